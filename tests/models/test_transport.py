"""Task vectors carried over: against Theseus' own code, and exact recovery where the right maps exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pkt_stages.artifacts import write_json
from pkt_stages.core.transport import proportional_pairs
from pkt_stages.methods.theseus import Params, fitted, fitted_maps
from pkt_stages.models.batches import Batch
from pkt_stages.models.correlation import FINAL, LIST, Correlation, correlate, write_pair
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.transport import at_input, opened, transported

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = GOLDEN / "reference_models"


@pytest.fixture(scope="module")
def theseus() -> dict[str, Tensor]:
    return load_file(GOLDEN / "transport/I_theseus_e2e.safetensors")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The reference source with the layers paired alone, as the code runs it, before and after the fixture's update."""
    parent = tmp_path_factory.mktemp("sources")
    config = json.loads((MODELS / "source/config.json").read_text()) | {"num_hidden_layers": 4}
    whole = load_file(MODELS / "source/model.safetensors")
    weights = {name: weight.double() for name, weight in whole.items() if ".layers." not in name}
    for source, target in proportional_pairs(6, 4):
        at = f"model.layers.{source}."
        weights |= {
            f"model.layers.{target}.{name.removeprefix(at)}": weight.double()
            for name, weight in whole.items()
            if name.startswith(at)
        }
    steps = 0.01 * (torch.arange(96) % 7 - 3).double()
    tuned = {
        name: weight + (0.05 * torch.roll(weight, 1, 0) if weight.ndim == 2 else steps)
        for name, weight in weights.items()
    }
    for name, content in (("base", weights), ("tuned", tuned)):
        (parent / name).mkdir()
        (parent / name / "config.json").write_text(json.dumps(config))
        save_file(content, parent / name / "model.safetensors")
    return parent / "base", parent / "tuned"


@pytest.fixture(scope="module")
def sums(
    theseus: dict[str, Tensor], sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Correlation:
    """What both models compute on the fixture's tokens, in float64, through the files of `pkt correlate`."""
    folder = tmp_path_factory.mktemp("correlation")
    models = [load_model(resolve(str(at)), dtype="float32").double() for at in (sources[0], MODELS / "target")]
    ids: list[list[int]] = theseus["llama.ids"].tolist()
    pairs = [(layer, layer) for layer in range(4)]
    for pair, found in correlate(models, [[Batch(some)] * 2 for some in (ids[:4], ids[4:])], pairs, grams=True).items():
        write_pair(folder, pair, found, "float64", {})
    meta = {"pairs": pairs, "num_tokens": theseus["llama.ids"].numel(), "params": {"grams": True}}
    write_json(folder / LIST, meta)
    return Correlation(folder)


@pytest.mark.parametrize(("key", "settings"), [("p00.raw", {}), ("p25.cent", {"whitening": 0.25, "centred": True})])
def test_theseus_end_to_end(
    theseus: dict[str, Tensor], sources: tuple[Path, Path], sums: Correlation, key: str, settings: dict[str, Any]
) -> None:
    """As published: gains apart, one map for every projection; of gate and up only what data determine is compared."""
    refs = [resolve(str(folder)) for folder in (MODELS / "target", sources[1], sources[0])]
    models = opened(*refs, fold=False)
    params = Params(fold=False, shared_ffn=False, **settings)
    residual = fitted(at_input(models, sums.of(None), FINAL, (0, 0), grams=params.whitening > 0), params).map
    change, ranks = transported(models, sums.pairs, lambda pair: fitted_maps(models, sums, pair, params), residual)
    compared = 0
    for name, expected in theseus.items():
        if name.startswith(f"llama.{key}."):
            weight = name.removeprefix(f"llama.{key}.").removesuffix(".det")
            found = change.weights[weight]
            assert float((found - expected).norm() / expected.norm()) < 1e-5, weight
            compared += 1
    assert compared == 2 * 9 + 1
    assert ranks["layer_0.ffn_up.out"] == [64, 160] and ranks["layer_0.attn_in.in"] == [64, 64]
