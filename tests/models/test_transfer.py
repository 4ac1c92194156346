"""The rows that the mapping receives: the method's, and those of its controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.models.sites import SITES
from pkt_stages.models.transfer import GIVEN, Transfer, open_transfer
from tests.stages.transfer_files import write_transfer


@pytest.fixture(scope="module")
def transfer(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> Transfer:
    paths = write_transfer(tmp_path_factory.mktemp("transfer"), source_folder, target_folder)
    return open_transfer(paths["selection"], paths["rows"], rate=0.2)


@pytest.mark.parametrize("given", GIVEN)
def test_every_kind_gives_as_many_rows(transfer: Transfer, given: str) -> None:
    rows = replace(transfer, given=given).source_rows(1)
    shapes = {site: (3, transfer.counts["ffn" if "ffn" in site else "attn"], 96) for site in SITES}
    assert {site: tuple(found.shape) for site, found in rows.items()} == shapes
    assert all(found.dtype == torch.float32 for found in rows.values())


@pytest.mark.parametrize("given", GIVEN)
def test_rows_depend_on_seed_and_example_alone(transfer: Transfer, given: str) -> None:
    first, again = (replace(transfer, given=given, seed=3).source_rows(1) for _ in range(2))
    assert all(torch.equal(first[site], again[site]) for site in SITES)


@pytest.mark.parametrize("given", ["shuffled", "random"])
def test_another_seed_or_example_draws_anew(transfer: Transfer, given: str) -> None:
    def order(seed: int, example: int) -> list[float]:
        control = replace(transfer, given=given, seed=seed)
        return (control.source_rows(example)["ffn_up"] / transfer.source_rows(example)["ffn_up"]).flatten().tolist()

    assert order(0, 1) != order(1, 1)
    same = replace(transfer, selection={n: t[:1].expand_as(t) for n, t in transfer.selection.items()}, given=given)
    assert not torch.equal(same.source_rows(0)["ffn_up"], same.source_rows(1)["ffn_up"])


def test_shuffled_rows_are_the_selected_ones_with_subkey_and_subvalue_together(transfer: Transfer) -> None:
    selected, shuffled = transfer.source_rows(0), replace(transfer, given="shuffled").source_rows(0)
    for key, value in (("ffn_up", "ffn_down"), ("attn_v", "attn_o")):
        pairs = [torch.cat([rows[key], rows[value]], dim=-1).flatten(0, 1) for rows in (selected, shuffled)]
        assert not torch.equal(*pairs)
        assert sorted(pairs[0].tolist()) == sorted(pairs[1].tolist())


def test_random_neurons_are_rows_of_the_same_source_layers(transfer: Transfer, source_folder: Path) -> None:
    weights = load_file(source_folder / "model.safetensors")
    rows = replace(transfer, given="random_neurons").source_rows(2)
    for pair, layer in enumerate(transfer.selection["ffn_layers"][2, :, 0].tolist()):
        neurons = transfer.selection["ffn_random_neurons"][layer, : transfer.counts["ffn"]]
        down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(rows["ffn_down"][pair], down[:, neurons].T)


def test_random_rows_have_the_selected_rows_size(transfer: Transfer) -> None:
    selected, random = transfer.source_rows(0), replace(transfer, given="random").source_rows(0)
    for site in SITES:
        expected = selected[site].square().mean((1, 2)).sqrt()
        torch.testing.assert_close(random[site].square().mean((1, 2)).sqrt(), expected, rtol=0.1, atol=0)
