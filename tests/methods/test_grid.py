from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core.reduction import embedding_transform
from pkt_stages.errors import UserError
from pkt_stages.methods.grid import Params, derive
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity, resolve
from pkt_stages.models.sites import as_rows, weight_name
from tests.conftest import make_model


def made(source: Path, target: Path, **params: object) -> Derived:
    inputs = Inputs(source=resolve(str(source)), target=resolve(str(target)))
    return derive(inputs, Params(**params))  # type: ignore[arg-type]


def rows_of(derived: Derived, site: str, layer: int) -> Tensor:
    delta = derived.changes["delta"]
    assert isinstance(delta, DenseDelta)
    return as_rows(delta.weights[weight_name(layer, site)], site)


@pytest.mark.parametrize(
    ("layers", "width", "neurons"),
    product(("top", "bottom", "random"), ("pca", "whitening", "embedding"), ("random", "importance")),
)
def test_every_cell(source_folder: Path, target_folder: Path, layers: str, width: str, neurons: str) -> None:
    one, other = (
        made(source_folder, target_folder, layers=layers, width=width, neurons=neurons, seed=3) for _ in range(2)
    )
    target = load_file(target_folder / "model.safetensors")
    weights = one.changes["delta"].weights  # type: ignore[union-attr]
    assert len(weights) == 3 * 4
    for name, weight in weights.items():
        assert weight.shape == target[name].shape and weight.dtype == torch.float32
        assert torch.equal(weight, other.changes["delta"].weights[name])  # type: ignore[union-attr]
    assert one.source == identity(resolve(str(source_folder)))
    assert one.target == identity(resolve(str(target_folder)))
    chosen = one.meta["layers"]
    assert {"top": [1, 2, 3], "bottom": [0, 1, 2]}.get(layers, chosen) == chosen == sorted(set(chosen))


def test_a_cell_by_hand(source_folder: Path, target_folder: Path) -> None:
    """Top layers, embedding transform, importance: the largest FFN neurons, made narrower by least squares."""
    found = made(source_folder, target_folder, layers="top", width="embedding", neurons="importance")
    source, target = (load_file(folder / "model.safetensors") for folder in (source_folder, target_folder))
    matrix = embedding_transform(source["model.embed_tokens.weight"], target["model.embed_tokens.weight"])
    for place, layer in enumerate((1, 2, 3)):
        up, down = (source[f"model.layers.{layer}.mlp.{x}_proj.weight"].double() for x in ("up", "down"))
        weight = up.abs().mean(1) + down.T.abs().mean(1)
        best = sorted(range(128), key=lambda n: (-weight[n].item(), n))[:96]
        for site, rows in (("ffn_up", up), ("ffn_down", down.T)):
            torch.testing.assert_close(rows_of(found, site, place).double(), rows[best] @ matrix, rtol=0, atol=1e-6)


def test_attention_and_pca_by_hand(source_folder: Path, target_folder: Path) -> None:
    """Under grouped-query attention on both sides; rows are projected as they are, so their mean stays."""
    found = made(source_folder, target_folder, layers="bottom", width="pca", neurons="importance")
    source = load_file(source_folder / "model.safetensors")
    # 4 heads of width 24 over 2 key/value heads in the source; 4 of width 16 over 2 in the target.
    v_row = [j // 24 // 2 * 24 + j % 24 for j in range(96)]
    for layer in range(3):
        v, o = (source[f"model.layers.{layer}.self_attn.{x}_proj.weight"].double() for x in "vo")
        v, o = v[v_row], o.T
        weight = v.abs().mean(1) + o.abs().mean(1)
        best = torch.tensor(sorted(range(96), key=lambda n: (-weight[n].item(), n))[:64])
        first_of_its_v_row = [j for j in range(64) if j // 16 % 2 == 0]
        for site, rows, taken in (("attn_v", v, best[first_of_its_v_row]), ("attn_o", o, best)):
            covariance = torch.cov(rows.T)
            directions = torch.linalg.eigh(covariance).eigenvectors[:, -64:]
            reduced, expected = rows_of(found, site, layer).double(), rows[taken] @ directions
            # The signs of directions are arbitrary, inner products of rows are not.
            torch.testing.assert_close(reduced @ reduced.T, expected @ expected.T, rtol=0, atol=1e-4)


def test_bad_input(source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", seed=9, num_hidden_layers=2)
    thin = make_model(tmp_path / "thin", seed=9, intermediate_size=64)
    words = make_model(tmp_path / "words", seed=9, num_hidden_layers=4, vocab_size=300)
    for source, params, message in (
        (small, {}, "the source has 2 layers, the target 3; swap the two"),
        (thin, {}, "the source has 64 ffn neurons a layer, the target 96; swap the two"),
        (words, {}, "width embedding needs one vocabulary, found 300 and 264 tokens; use pca or whitening"),
    ):
        with pytest.raises(UserError) as error:
            made(source, target_folder, **params)
        assert str(error.value) == message
    with pytest.raises(UserError) as error:
        derive(Inputs(target=resolve(str(target_folder))), Params())
    assert str(error.value) == "the method takes --target and --source, nothing else; found --target"
