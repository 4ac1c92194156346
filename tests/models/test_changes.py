"""What a method leaves, written and read through one door."""

# ruff: noqa: E501
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import CONFIG, WEIGHTS, Adapter
from pkt_stages.models.changes import LIST, Change, DenseDelta, changes_of, read_changes, write_changes
from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.load import identity, resolve

META = {
    "command": "inject",
    "method": "laten",
    "target": {"name": "owner/target", "revision": "sha256:1"},
    "source": None,
    "params": {"inject": {"dtype": "auto"}},
}
UP = "model.layers.0.mlp.up_proj"


def sparse(seed: int = 0) -> dict[str, SparseDelta]:
    rows = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
    return {
        "ffn_up": SparseDelta(torch.tensor([0, 2]), torch.tensor([[0, 1, 2], [5, 4, 3]]), rows),
        "attn_o": SparseDelta(torch.tensor([1, 2]), torch.tensor([[7], [0]]), rows[:, :1]),
    }


def low_rank(seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter({UP: (torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator))}, alpha=4.0)


def dense(seed: int = 0) -> DenseDelta:
    generator = torch.Generator().manual_seed(seed)
    return DenseDelta({f"{UP}.weight": torch.randn(6, 8, generator=generator), "b.weight": torch.ones(2, 2)})


def assert_equal(one: Change, two: Change) -> None:
    assert type(one) is type(two)
    if isinstance(one, Adapter) and isinstance(two, Adapter):
        assert one.alpha == two.alpha and one.factors.keys() == two.factors.keys()
        pairs = [(a, b) for name in one.factors for a, b in zip(one.factors[name], two.factors[name], strict=True)]
    elif isinstance(one, DenseDelta) and isinstance(two, DenseDelta):
        assert set(one.weights) == set(two.weights)
        pairs = [(one.weights[name], two.weights[name]) for name in one.weights]
    else:
        assert isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys()
        pairs = [(vars(one[s])[n], vars(two[s])[n]) for s in one for n in ("layers", "neurons", "rows")]
    assert pairs and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def row(tmp_path: Path) -> Path:
    """A row with a change of each kind."""
    changes = {"b": sparse(), "a": low_rank(), "step_01/x": dense()}
    write_changes(tmp_path / "row", changes, META, {"b": {"rounding_loss": 0.25}, "a": {"seed": 0}})
    return tmp_path / "row"


def test_a_row_survives_its_folder_in_order(row: Path) -> None:
    found = read_changes(row)
    assert found.meta == META and found.path == row
    assert [(s.label, s.kind, s.path) for s in found.items.values()] == [
        ("b", "sparse", row / "delta_0.safetensors"),
        ("a", "low_rank", row / "a"),
        ("step_01/x", "dense", row / "delta_2.safetensors"),
    ]
    assert list(found.items) == ["b", "a", "step_01/x"]
    assert found.made() == {**META, "facts": {"b": {"rounding_loss": 0.25}, "a": {"seed": 0}, "step_01/x": {}}}
    for label, change in (("b", sparse()), ("a", low_rank()), ("step_01/x", dense())):
        assert_equal(found.items[label].load(), change)
    assert json.loads((row / "a" / CONFIG).read_text())["base_model_name_or_path"] == "owner/target"


def test_equal_rows_are_equal_bytes_and_an_older_row_is_replaced_whole(row: Path) -> None:
    def content() -> dict[str, bytes]:
        return {p.relative_to(row).as_posix(): p.read_bytes() for p in sorted(row.rglob("*")) if p.is_file()}

    before = content()
    write_changes(row, {f"seed_{seed}": low_rank(seed) for seed in range(3)}, META)
    assert set(content()) == {LIST, *(f"seed_{s}/{name}" for s in range(3) for name in (CONFIG, WEIGHTS))}
    changes = {"b": sparse(), "a": low_rank(), "step_01/x": dense()}
    write_changes(row, changes, META, {"b": {"rounding_loss": 0.25}, "a": {"seed": 0}})
    assert content() == before


def test_a_row_that_fails_on_the_way_leaves_the_old_one(row: Path) -> None:
    before = sorted(row.parent.rglob("*"))
    for broken in (
        DenseDelta({"x": torch.tensor([[float("nan")]])}),
        Adapter({UP: (torch.ones(1, 8), torch.full((6, 1), torch.inf))}, 1.0),
    ):
        with pytest.raises(UserError, match="NaN or infinity"):
            write_changes(row, {"new": sparse(), "broken": broken}, META)
    assert sorted(row.parent.rglob("*")) == before
    assert list(read_changes(row).items) == ["b", "a", "step_01/x"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError) as refused:
        write_changes(tmp_path, {"a": sparse()}, META)
    assert str(refused.value) == (
        f"{tmp_path}: holds thesis.tex and no changes.json, so it is not ours to replace; give a new folder"
    )


@pytest.mark.parametrize("label", ["../../toy_1", "/etc/passwd", "..", "", "a/b", LIST, "x\n", "délta", ".hidden"])
def test_labels_are_no_paths(tmp_path: Path, label: str) -> None:
    out = tmp_path / "in" / "row"
    for change in (sparse(), low_rank(), dense()):
        write_changes(out, {"plain": sparse(), label: change}, META)
        found = read_changes(out)
        assert list(found.items) == ["plain", label]
        assert found.items[label].path.parent == out
        assert_equal(found.items[label].load(), change)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"] and list((tmp_path / "in").iterdir()) == [out]


def test_a_bare_change_is_called_like_its_file_or_folder(row: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(row / "a", tmp_path / "mine"))
    found = read_changes(adapter)
    base = {"target": META["target"]}  # which stays with the weights
    assert (found.meta, list(found.items), found.made()) == (base, ["mine"], {**base, "facts": {"mine": {}}})
    assert_equal(found.items["mine"].load(), low_rank())
    for number, kind, change in ((0, "sparse", sparse()), (2, "dense", dense())):
        file = Path(shutil.copy(row / f"delta_{number}.safetensors", tmp_path / f"its_{number}.safetensors"))
        found = read_changes(file)
        assert found.meta == META  # the file says it itself
        stored = found.items[f"its_{number}"]
        assert stored.kind == kind
        assert_equal(stored.load(), change)
    bare = tmp_path / "bare.safetensors"
    artifacts.save(bare, artifacts.DENSE_DELTA, {"w": torch.ones(2, 2)}, {})
    assert (read_changes(bare).meta, read_changes(bare).items["bare"].facts) == ({}, {})


def test_a_dense_delta_is_read_weight_by_weight(row: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = read_changes(row).items["step_01/x"].load()
    assert isinstance(change, DenseDelta)
    asked: list[str] = []
    original = artifacts.Artifact.__getitem__

    def noted(self: artifacts.Artifact, name: str) -> Any:
        asked.append(name)
        return original(self, name)

    monkeypatch.setattr(artifacts.Artifact, "__getitem__", noted)
    assert list(change.weights) == ["b.weight", f"{UP}.weight"]
    assert asked == []
    assert torch.equal(change.weights["b.weight"], torch.ones(2, 2))
    assert asked == ["b.weight"]


def test_the_content_hash_covers_all_that_decides(row: Path) -> None:
    hashes = {label: stored.content_hash for label, stored in read_changes(row).items.items()}
    assert len(set(hashes.values())) == 3
    assert hashes["b"] == artifacts.content_hash(row / "delta_0.safetensors")
    config = row / "a" / CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 8.0'))
    assert read_changes(row).items["a"].content_hash != hashes["a"]


def test_one_of_a_row(row: Path) -> None:
    found = read_changes(row)
    assert [found.one(wanted).label for wanted in ("a", "0", "2", "step_01/x")] == ["a", "b", "step_01/x", "step_01/x"]
    for wanted, message in (
        (None, f"{row}: holds 3 runs; choose one with --run: b, a, step_01/x"),
        ("3", f"{row}: has no run '3'; found b, a, step_01/x"),
        ("c", f"{row}: has no run 'c'; found b, a, step_01/x"),
    ):
        with pytest.raises(UserError) as refused:
            found.one(wanted)
        assert str(refused.value) == message
    assert read_changes(row / "a").one(None).label == "a"


def test_a_row_of_another_target(row: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_changes(row)
    found.check_target({"name": "a-copy", "revision": "sha256:1"})
    read_changes(row / "a").check_target({"name": "a-copy", "revision": "sha256:1"})
    other = {"name": "other", "revision": "sha256:2"}
    for path in (row, row / "a", Path(shutil.copytree(row / "a", row.parent / "moved")), row / "delta_0.safetensors"):
        with pytest.raises(UserError) as refused:
            changes_of(path, other)
        said = f"{path}: made for the target owner/target at sha256:1, found other at sha256:2"
        assert str(refused.value) == f"{said}; give its own target, or insist with --any-base"
        capsys.readouterr()
        assert changes_of(path, other, any_base=True).path == path
        assert capsys.readouterr().err == f"pkt: warning: {said} (--any-base)\n"


COMMITS = "a" * 40, "b" * 40
HERE = {"name": "target-chat", "revision": "sha256:1"}
HUB = {"name": "owner/target-chat", "revision": COMMITS[0]}


@pytest.mark.parametrize(
    ("base", "revision", "found", "fits"),
    [
        ("owner/target-chat", None, HUB, True),
        ("owner/target-chat", "main", HUB, True),
        ("owner/target-chat", COMMITS[0], HUB, True),
        ("owner/target-chat", COMMITS[1], HUB, False),
        ("other/target-chat", None, HUB, False),
        ("/models/of/target-chat/", None, HUB, True),
        ("/models/of/Target-Chat", None, HERE, True),
        ("owner/target-chat", None, HERE, True),
        ("owner/target-base", None, HERE, False),
        ("owner/target-chat", COMMITS[0], HERE, False),  # weights that cannot be compared
        ("target-base", None, HERE, False),
    ],
)
def test_a_stranger_s_adapter_has_a_name_at_best(
    row: Path, tmp_path: Path, base: str, revision: str | None, found: dict[str, str], fits: bool
) -> None:
    folder = stranger(row, tmp_path, base, revision)
    if fits:
        changes_of(folder, found)
        return
    with pytest.raises(UserError) as refused:
        changes_of(folder, found)
    pinned = revision or "an unknown revision"
    assert str(refused.value).startswith(f"{folder}: made for the target {base} at {pinned}, found {found['name']} at")


def stranger(row: Path, tmp_path: Path, base: str | None, revision: str | None = None) -> Path:
    """An adapter as PEFT writes it."""
    folder = Path(shutil.copytree(row / "a", tmp_path / "theirs"))
    config = json.loads((folder / CONFIG).read_text())
    config |= {"base_model_name_or_path": base, "revision": revision}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_a_base_that_lies_here_is_known_by_its_content(row: Path, target_folder: Path, tmp_path: Path) -> None:
    """Whatever either is called."""
    folder = stranger(row, tmp_path, str(target_folder))
    renamed = identity(resolve(str(shutil.copytree(target_folder, tmp_path / "renamed"))))
    changes_of(folder, renamed)
    with pytest.raises(UserError, match=r"made for the target target at sha256:.*, found target at sha256:1; give"):
        changes_of(folder, {"name": "target", "revision": "sha256:1"})


def test_an_adapter_that_says_nothing_is_taken_with_a_word(
    row: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stranger(row, tmp_path, None)
    changes_of(folder, HERE)
    assert capsys.readouterr().err == f"pkt: warning: {folder}: says nothing of the model that it was made for\n"


def edited(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Rewrites a row's list."""

    def edit(row: Path) -> None:
        content = json.loads((row / LIST).read_text())
        (row / LIST).write_text(json.dumps(change(content) or content))

    return edit


def entry(**values: Any) -> Callable[[Path], None]:
    """Rewrites the first entry of a row's list."""
    return edited(lambda content: content["changes"][0].update(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: (row / LIST).write_text('{"a": '), "{list}: not readable as JSON (Expecting value: line 1 column 7 (char 6)); make the row again"),
        (lambda row: (row / LIST).write_text('{"a": ' * 20000), "{list}: not readable as JSON ("),
        (lambda row: (row / LIST).write_bytes(b"\xff"), "{list}: not readable as JSON ("),
        (edited(lambda _: [1]), "{list}: no list of changes (it is a list); make the row again"),
        (edited(lambda content: content.pop("command") and None), "{list}: no list of changes (it lacks 'command'); make the row again"),
        (edited(lambda content: content.pop("changes") and None), "{list}: no list of changes (it lacks 'changes'); make the row again"),
        (edited(lambda content: content.update(params=None)), "{list}: `params`: found None; make the row again"),
        (edited(lambda content: content.update(target="x")), "{list}: `target`: found 'x'; make the row again"),
        (edited(lambda content: content.update(method=[1])), "{list}: `method`: found [1]; make the row again"),
        (edited(lambda content: content.update(changes=[])), "{list}: `changes`: expected a list with at least one change; make the row again"),
        (edited(lambda content: content.update(changes={"a": 1})), "{list}: `changes`: expected a list with at least one change; make the row again"),
        (edited(lambda content: content.update(changes=[3])), "{list}: change 0: expected texts `label`, `kind` and `file`; make the row again"),
        (entry(label=3), "{list}: change 0: expected texts `label`, `kind` and `file`; make the row again"),
        (entry(label="a"), "{list}: two changes are called 'a'; make the row again"),
        (entry(kind="quantised"), "{list}: change 'b': unknown kind 'quantised'; expected one of sparse, low_rank, dense"),
        (entry(kind=["sparse"]), "{list}: change 'b': unknown kind ['sparse']; expected one of sparse, low_rank, dense"),
        (entry(file="../../x"), "{list}: change 'b': names '../../x'; expected a file or folder beside it"),
        (entry(file="/etc/passwd"), "{list}: change 'b': names '/etc/passwd'; expected a file or folder beside it"),
        (entry(file=".."), "{list}: change 'b': names '..'; expected a file or folder beside it"),
        (entry(file="."), "{list}: change 'b': names '.'; expected a file or folder beside it"),
        (entry(file=""), "{list}: change 'b': names ''; expected a file or folder beside it"),
        (entry(file="a"), "{row}/a: not there, or no sparse change, but {list} names it; fetch or make the row again"),
        (lambda row: (row / "delta_0.safetensors").unlink(), "{row}/delta_0.safetensors: not there, or no sparse change, but {list} names it; fetch or make the row again"),
        (lambda row: (row / "a" / CONFIG).unlink(), "{row}/a: not there, or no low_rank change, but {list} names it; fetch or make the row again"),
        (lambda row: (row / LIST).unlink(), "{row}: a folder without changes.json and no PEFT adapter; expected what a method of the table made"),
        (shutil.rmtree, "{row}: no such file or folder; expected a row's folder, a PEFT adapter or a delta"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_one_line(row: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(row)
    with pytest.raises(UserError) as refused:
        read_changes(row)
    assert str(refused.value).startswith(message.format(row=row, list=row / LIST))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_delta(row: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    artifacts.save(other, artifacts.CKA, {"cka.ffn_up": torch.zeros(1, 1, dtype=torch.float64)}, {})
    with pytest.raises(UserError) as refused:
        read_changes(other)
    assert str(refused.value) == f"{other}: expected an artifact of a kind among delta, dense_delta; found kind 'cka'"
    for text in (b"", b"no safetensors at all"):
        other.write_bytes(text)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            read_changes(other)


def test_a_file_of_another_kind_than_the_list_says(row: Path) -> None:
    shutil.copy(row / "delta_2.safetensors", row / "delta_0.safetensors")
    with pytest.raises(UserError) as refused:
        read_changes(row).items["b"].load()
    assert str(refused.value) == (
        f"{row}/delta_0.safetensors: expected a delta artifact (made by `pkt inject`), found dense_delta"
    )
