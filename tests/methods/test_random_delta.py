from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pkt_stages.errors import UserError
from pkt_stages.methods.random_delta import Params, derive
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, Changes, DenseDelta, SparseDelta, read_changes, write_changes
from pkt_stages.models.derivation import Inputs

TARGET = {"name": "target", "revision": "a"}
SOURCE = {"name": "source", "revision": "b"}


def row(folder: Path, changes: dict[str, Change]) -> Changes:
    facts = {"command": "inject", "method": "laten", "target": TARGET, "source": SOURCE, "params": {"rate": 0.1}}
    write_changes(folder, changes, facts)
    return read_changes(folder)


def deltas() -> dict[str, Change]:
    generator, made = torch.Generator().manual_seed(1), {}
    for number in range(2):
        rows = torch.randn(3, 4, 64, generator=generator) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
        made[f"e{number}"] = {"ffn_up": SparseDelta(torch.arange(3), torch.arange(12).view(3, 4) + number, rows)}
    return made


def test_a_delta_of_equal_norm_at_the_same_neurons(tmp_path: Path) -> None:
    given = deltas()
    inputs = Inputs(delta=row(tmp_path / "in", given))
    made, again, other = (derive(inputs, Params(seed)) for seed in (0, 0, 1))
    assert list(made.changes) == ["e0", "e1"]
    assert (made.target, made.source) == (TARGET, SOURCE)
    assert made.meta["of"]["method"] == "laten" and made.meta["of"]["params"] == {"rate": 0.1}
    for label, change in made.changes.items():
        part, random = given[label]["ffn_up"], change["ffn_up"]  # type: ignore[index]
        assert torch.equal(part.layers, random.layers) and torch.equal(part.neurons, random.neurons)
        torch.testing.assert_close(random.rows.norm(dim=(1, 2)), part.rows.norm(dim=(1, 2)))
        cosine = torch.cosine_similarity(random.rows.flatten(1), part.rows.flatten(1))
        assert cosine.abs().max() < 0.3
        assert torch.equal(random.rows, again.changes[label]["ffn_up"].rows)  # type: ignore[index]
        assert not torch.equal(random.rows, other.changes[label]["ffn_up"].rows)  # type: ignore[index]
    rows = [change["ffn_up"].rows for change in made.changes.values()]  # type: ignore[index]
    assert not torch.equal(*rows)


def test_whole_weights_of_equal_norm(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {f"model.layers.{i}.mlp.up_proj.weight": 10**i * torch.randn(6, 4, generator=generator) for i in range(2)}
    inputs = Inputs(delta=row(tmp_path / "in", {"delta": DenseDelta(weights)}))
    made, again, other = (derive(inputs, Params(seed)).changes["delta"] for seed in (0, 0, 1))
    assert isinstance(made, DenseDelta) and made.weights.keys() == weights.keys()
    for name, weight in weights.items():
        found = made.weights[name]
        assert (found.shape, found.dtype) == (weight.shape, torch.float32)
        torch.testing.assert_close(found.norm(), weight.norm())
        assert torch.cosine_similarity(found.flatten(), weight.flatten(), dim=0).abs() < 0.6
        assert torch.equal(found, again.weights[name])  # type: ignore[union-attr]
        assert not torch.equal(found, other.weights[name])  # type: ignore[union-attr]


def test_several_changes_for_each(tmp_path: Path) -> None:
    given = row(tmp_path / "in", deltas())
    made = derive(Inputs(delta=given), Params(repeats=2)).changes
    assert list(made) == ["e0_0", "e0_1", "e1_0", "e1_1"]
    rows = [change["ffn_up"].rows for change in made.values()]  # type: ignore[index]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


def test_bad_input(tmp_path: Path) -> None:
    adapter = Adapter({"model.layers.0.mlp.up_proj": (torch.ones(1, 4), torch.ones(6, 1))}, 1.0)
    given = row(tmp_path / "lora", {"seed_0": adapter})
    for inputs, message in (
        (Inputs(), "the method takes --delta, nothing else; found none"),
        (
            Inputs(submatrices=tmp_path, delta=given),
            "the method takes --delta, nothing else; found --submatrices and --delta",
        ),
        (
            Inputs(delta=given),
            f"{tmp_path / 'lora'}: its change 'seed_0' is low-rank; expected a sparse or a dense one",
        ),
    ):
        with pytest.raises(UserError) as error:
            derive(inputs, Params())
        assert str(error.value) == message
