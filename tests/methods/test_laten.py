"""The rows that LaTen's mapping receives: the method's, and those of its controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.methods import laten
from pkt_stages.models.selection import Selection, open_selection
from pkt_stages.models.sites import SITES
from tests.conftest import make_model
from tests.stages.selection_files import write_selection

GIVEN = get_args(get_type_hints(laten.Params)["given"])


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> Selection:
    folder = write_selection(tmp_path_factory.mktemp("transfer"), source_folder, target_folder)
    return open_selection(folder, rate=0.2)


def rows_of(selection: Selection, given: str, example: int, seed: int = 0) -> dict[str, Tensor]:
    return laten.source_rows(selection, example, laten.Params(given=given), seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", GIVEN)
def test_every_kind_gives_as_many_rows(selection: Selection, given: str) -> None:
    rows = rows_of(selection, given, 1)
    shapes = {site: (3, selection.counts["ffn" if "ffn" in site else "attn"], 96) for site in SITES}
    assert {site: tuple(found.shape) for site, found in rows.items()} == shapes
    assert all(found.dtype == torch.float32 for found in rows.values())


@pytest.mark.parametrize("given", GIVEN)
def test_rows_depend_on_seed_and_example_alone(selection: Selection, given: str) -> None:
    first, again = (rows_of(selection, given, 1, seed=3) for _ in range(2))
    assert all(torch.equal(first[site], again[site]) for site in SITES)


@pytest.mark.parametrize("given", ["shuffled", "random"])
def test_another_seed_or_example_draws_anew(selection: Selection, given: str) -> None:
    def order(seed: int, example: int) -> list[float]:
        found = rows_of(selection, given, example, seed)["ffn_up"]
        return (found / rows_of(selection, "selected", example)["ffn_up"]).flatten().tolist()

    assert order(0, 1) != order(1, 1)
    same = replace(selection, tensors={n: t[:1].expand_as(t) for n, t in selection.tensors.items()})
    assert not torch.equal(rows_of(same, given, 0)["ffn_up"], rows_of(same, given, 1)["ffn_up"])


def test_shuffled_rows_are_the_selected_ones_with_subkey_and_subvalue_together(selection: Selection) -> None:
    selected, shuffled = rows_of(selection, "selected", 0), rows_of(selection, "shuffled", 0)
    for key, value in (("ffn_up", "ffn_down"), ("attn_v", "attn_o")):
        pairs = [torch.cat([rows[key], rows[value]], dim=-1).flatten(0, 1) for rows in (selected, shuffled)]
        assert not torch.equal(*pairs)
        assert sorted(pairs[0].tolist()) == sorted(pairs[1].tolist())


def test_random_neurons_are_rows_of_the_same_source_layers(selection: Selection, source_folder: Path) -> None:
    weights = load_file(source_folder / "model.safetensors")
    rows = rows_of(selection, "random_neurons", 2)
    for pair, layer in enumerate(selection.tensors["ffn_layers"][2, :, 0].tolist()):
        neurons = selection.tensors["ffn_random_neurons"][layer, : selection.counts["ffn"]]
        down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(rows["ffn_down"][pair], down[:, neurons].T)


def test_random_neurons_that_were_not_stored(selection: Selection) -> None:
    none = {name: t[:, :0] if "random" in name else t for name, t in selection.tensors.items()}
    with pytest.raises(UserError) as error:
        rows_of(replace(selection, tensors=none), "random_neurons", 2)
    assert str(error.value) == (
        f"{selection.rows.path}: holds no random neurons' rows; set `select.random_neurons` to true and run"
        " `pkt select` again"
    )


def test_random_rows_have_the_selected_rows_size(selection: Selection) -> None:
    selected, random = rows_of(selection, "selected", 0), rows_of(selection, "random", 0)
    for site in SITES:
        expected = selected[site].square().mean((1, 2)).sqrt()
        torch.testing.assert_close(random[site].square().mean((1, 2)).sqrt(), expected, rtol=0.1, atol=0)


def test_the_mapping_is_seeded_and_has_the_width_that_is_asked_for() -> None:
    def made(seed: int, **settings: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return laten.mapping(laten.Params(**settings), d_source=6, d_target=4, generator=generator).state_dict()  # type: ignore[arg-type]

    shapes = {name: tuple(weight.shape) for name, weight in made(0).items()}
    assert shapes == {f"{site}.{place}.weight": size for site in SITES for place, size in ((0, (6, 6)), (2, (4, 6)))}
    assert made(0, d_hidden=3)["ffn_up.0.weight"].shape == (3, 6)
    assert all(
        torch.equal(made(0)[name], made(0)[name]) and not torch.equal(made(0)[name], made(1)[name]) for name in shapes
    )
    assert torch.allclose(made(0, init_std=1.0)["attn_o.2.weight"] * 1e-5, made(0)["attn_o.2.weight"])


def test_what_training_changed_takes_the_place_of_the_rows(
    tmp_path: Path, source_folder: Path, target_folder: Path
) -> None:
    """Trained minus base at the same neurons, of the selected ones and of each control; sizes are the change's own."""
    base = make_model(tmp_path / "base", seed=3, hidden_size=96, intermediate_size=128, num_hidden_layers=4)
    selection = open_selection(
        write_selection(tmp_path / "selection", source_folder, target_folder, base=base), rate=0.2
    )
    plain = open_selection(write_selection(tmp_path / "plain", base, target_folder), rate=0.2)
    for given in GIVEN:
        params = laten.Params(given=given, moved="change")
        found = laten.source_rows(selection, 1, params, seed=0)
        after, before = (rows_of(rows, given, 1) for rows in (selection, plain))
        for site in SITES:
            change = after[site] - before[site]
            if given == "random":
                selected = laten.source_rows(selection, 1, laten.Params(moved="change"), seed=0)[site]
                sizes = [rows.square().mean((1, 2)).sqrt() for rows in (found[site], selected)]
                torch.testing.assert_close(sizes[0], sizes[1], rtol=0.1, atol=0)
            else:
                assert torch.equal(found[site], change), given
    with pytest.raises(UserError) as caught:
        laten.source_rows(plain, 1, laten.Params(moved="change"), seed=0)
    assert str(caught.value) == (
        f"{tmp_path}/plain/rows.safetensors: what training changed needs the base model's rows beside it; run `pkt"
        " select` with --base (in a params file: the source in selected.with_base)"
    )
