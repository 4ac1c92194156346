from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.core.delta import low_rank_factors
from pkt_stages.models.adapters import Adapter, load_adapter, save_adapter
from pkt_stages.models.load import identity, load_model, resolve
from pkt_stages.models.lora import Lora, adapter_of, pissa, seeking, site_modules
from pkt_stages.models.sites import SITES, as_rows, geometry, projection_name, weight_name

Run = Callable[..., tuple[int, str, str]]
RANK, ALPHA = 4, 8.0


def slow_cosine(a: Tensor, b: Tensor) -> float:
    rows = [float(x.double() @ y.double() / (x.double().norm() * y.double().norm())) for x, y in zip(a, b, strict=True)]
    return sum(rows) / len(rows)


@pytest.fixture
def made(target_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """What `pkt finetune` and `pkt seek` leave behind, for an update that a step of training moved a little."""
    ref = resolve(str(target_folder))
    model = load_model(ref)
    sizes = geometry(model.config)
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"layers": torch.arange(3), "layer_sensitivity": torch.ones(4, dtype=torch.float64)}
    blocks = {}
    for site in SITES:
        tensors[f"{site}.corner"] = torch.zeros(3, 2, dtype=torch.int64)
        for layer in range(3):
            block = torch.randn(sizes.weight_shape(site), generator=draw)
            tensors[f"{site}.block.{layer}"] = blocks[projection_name(layer, site)] = block
    target = {"model": identity(ref), "geometry": {}}
    artifacts.save(tmp_path / "blocks.safetensors", "submatrices", tensors, {"target": target})
    lora = Lora(site_modules(3), RANK, ALPHA, 0.0)
    for init, attach in (("pissa", pissa), ("seeking", seeking)):
        start = adapter_of(attach(load_model(ref), lora, blocks), ALPHA)
        moved = {m: (a, b + 0.05 * torch.randn(b.shape, generator=draw)) for m, (a, b) in start.factors.items()}
        save_adapter(tmp_path / init / "seed_0", Adapter(moved, ALPHA).minus(start), "target")
        facts = {"method": init, "target": identity(ref), "params": {"init": init, "rank": RANK, "alpha": ALPHA}}
        artifacts.write_json(tmp_path / f"{init}.json", facts)
    return {"folder": tmp_path, "target": target_folder}


def similarity(pkt: Run, made: dict[str, Path], init: str, *more: object) -> tuple[int, str, str]:
    folder = made["folder"]
    given = ("--target", made["target"], "--adapter", folder / init, "--training", folder / f"{init}.json")
    return pkt("similarity", *given, "--out", folder / "s.safetensors", "--metrics", folder / "s.json", *more)


def test_pissa_is_orthogonal_to_the_base_that_it_trains_on(pkt: Run, made: dict[str, Path]) -> None:
    status, printed, err = similarity(pkt, made, "pissa")
    assert status == 0, err
    assert printed.startswith("similarity: ffn_up ")
    found = artifacts.load(made["folder"] / "s.safetensors", "similarity")
    assert {name.split(".", 1)[1] for name in found.shapes} == {
        f"{moment}.{against}" for moment in ("initial", "trained") for against in ("weight", "reduced_base")
    }
    model = load_model(resolve(str(made["target"])))
    for site in SITES:
        assert found[f"{site}.initial.reduced_base"][:, 1].abs().max() < 1e-6
        assert found[f"{site}.initial.weight"].min() > 0.2
        for layer in range(3):
            weight = model.get_parameter(weight_name(layer, site))
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            leading = u[:, :RANK] * s[:RANK] @ vh[:RANK]
            expected = slow_cosine(as_rows(leading, site), as_rows(weight, site))
            assert float(found[f"{site}.initial.weight"][layer, 0]) == pytest.approx(expected, abs=1e-5)


def test_seeking_against_weight_base_and_submatrix(pkt: Run, made: dict[str, Path]) -> None:
    folder = made["folder"]
    given = ("--submatrices", folder / "blocks.safetensors")
    assert similarity(pkt, made, "seeking", *given)[0] == 0
    found = json.loads((folder / "s.json").read_text())["similarity"]
    blocks = artifacts.load(folder / "blocks.safetensors", "submatrices")
    trained = load_adapter(folder / "seeking" / "seed_0")
    model = load_model(resolve(str(made["target"])))
    for site in SITES:
        for layer in range(3):
            block = blocks[f"{site}.block.{layer}"]
            a, b = low_rank_factors(block, RANK)
            start = ALPHA / RANK * (b @ a)
            weight = model.get_parameter(weight_name(layer, site))
            after = start + trained.delta(projection_name(layer, site))
            for moment, update in (("initial", start), ("trained", after)):
                others = {"weight": weight, "reduced_base": weight - start, "submatrix": block}
                for name, other in others.items():
                    rows, flat = found[f"{site}.{moment}.{name}"][layer]
                    assert rows == pytest.approx(slow_cosine(as_rows(update, site), as_rows(other, site)), abs=1e-5)
                    assert flat == pytest.approx(
                        float(torch.cosine_similarity(update.flatten(), other.flatten(), 0)), abs=1e-5
                    )
            # The base has what the update holds, with the opposite sign.
            assert found[f"{site}.initial.reduced_base"][layer][1] < -0.5


def test_bad_input(pkt: Run, made: dict[str, Path], source_folder: Path) -> None:
    folder = made["folder"]
    pissa_json, seeking_json = folder / "pissa.json", folder / "seeking.json"
    for init, more, message in (
        ("seeking", (), f"{seeking_json}: init seeking needs --submatrices (from `pkt seek`)"),
        (
            "pissa",
            ("--submatrices", folder / "blocks.safetensors"),
            f"{pissa_json}: init pissa has no use for --submatrices",
        ),
        ("pissa", ("--run", 2), f"{folder / 'pissa'}: has 1 runs, no number 2 (from 0)"),
        (
            "pissa",
            ("--training", folder / "no"),
            f"{folder / 'no'}: no such file; expected the metrics of `pkt finetune`",
        ),
        ("pissa", ("--adapter", folder), f"{folder}: a folder without delta_*.safetensors or PEFT adapters"),
    ):
        status, _, err = similarity(pkt, made, init, *more)
        assert (status, err) == (2, f"pkt: error: {message}\n")
    status, _, err = similarity(pkt, {**made, "target": source_folder}, "pissa")
    assert status == 2
    assert err.startswith(f"pkt: error: {pissa_json}: of the target target at sha256:")
    assert not (folder / "s.safetensors").exists()
