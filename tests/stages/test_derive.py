from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import methods
from pkt_stages.models.changes import DenseDelta, SparseDelta, read_changes, write_changes
from pkt_stages.models.load import identity, resolve

Run = Callable[..., tuple[int, str, str]]
GRID = (
    "derive: {}\nmade_by: {grid: {unaligned_pca: {code: grid, width: pca, seed: 4}},"
    " control: {random: {code: random_delta}}}\n"
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_method_of_the_params_file(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(GRID)
    given = ("--params", params, "--method", "unaligned_pca", "--source", source_folder, "--target", target_folder)
    for out in ("a", "b"):
        status, printed, err = pkt("derive", *given, "--set", "layers=bottom", "--out", tmp_path / out)
        assert (status, err) == (0, "")
    settings = "layers bottom, width pca, neurons importance, seed 4"
    assert printed.startswith(f"derive: grid ({settings}), 1 change -> {tmp_path / 'b'} (")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    found = read_changes(tmp_path / "a")
    assert {label: stored.kind for label, stored in found.items.items()} == {"delta": "dense"}
    assert found.meta == {
        "command": "derive",
        "method": "unaligned_pca",
        "source": identity(resolve(str(source_folder))),
        "target": identity(resolve(str(target_folder))),
        "params": {
            "code": "grid",
            "layers": "bottom",
            "width": "pca",
            "neurons": "importance",
            "seed": 4,
            "stored": "float32",
        },
        "layers": [0, 1, 2],
    }


def test_a_row_of_another_row(pkt: Run, tmp_path: Path) -> None:
    delta = {"ffn_up": SparseDelta(torch.arange(2), torch.tensor([[0, 1], [2, 3]]), torch.randn(2, 2, 8))}
    target = {"name": "t", "revision": "r"}
    facts = {"command": "inject", "method": "laten", "target": target, "source": None, "params": {}}
    write_changes(tmp_path / "laten", {"x/1": delta, "x/2": delta}, facts)
    # An earlier row is replaced, whatever it held.
    write_changes(tmp_path / "out", {f"old_{i}": delta for i in range(3)}, facts)
    params = tmp_path / "params.yaml"
    params.write_text(GRID)
    given = ("--params", params, "--method", "random", "--delta", tmp_path / "laten", "--out", tmp_path / "out")
    status, printed, err = pkt("derive", *given)
    assert (status, err) == (0, "") and printed.startswith("derive: random_delta (seed 0, repeats 1), 2 changes -> ")
    assert sorted(files(tmp_path / "out")) == ["changes.json", "delta_0.safetensors", "delta_1.safetensors"]
    found = read_changes(tmp_path / "out")
    assert list(found.items) == ["x/1", "x/2"] and found.meta["target"] == target
    assert found.meta["params"] == {"code": "random_delta", "seed": 0, "repeats": 1, "stored": "float32"}
    assert found.meta["of"]["method"] == "laten"


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    params, mine = tmp_path / "params.yaml", tmp_path / "mine"
    params.write_text(GRID)
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    models = ("--source", source_folder, "--target", target_folder)
    for given, message in (
        (models, f"options of `derive`: no code; name a file of pkt_stages/methods: {', '.join(methods.names())}"),
        (
            ("--code", "laten", *models),
            "code 'laten': pkt_stages/methods/laten.py has no `derive`; it is for another command, or not whole",
        ),
        (
            ("--params", params, "--method", "other", *models),
            f"{params}: unknown method 'other'; `made_by` has unaligned_pca, random",
        ),
        (
            ("--code", "seeking", "--set", "rank=0", *models),
            "options of `derive` (seeking): rank must be at least 1, found 0",
        ),
        (
            ("--code", "grid", "--set", "rank=4", *models),
            "options of `derive`: unknown key 'rank'; expected one of layers, width, neurons, seed, stored",
        ),
        (
            ("--code", "seeking", *models),
            "the method takes --target and --submatrices, nothing else; found --target and --source",
        ),
        (
            ("--code", "random_delta", "--delta", tmp_path),
            f"{tmp_path}: a folder without changes.json and no PEFT adapter; expected what a method of the table made",
        ),
    ):
        status, _, err = pkt("derive", *given, "--out", tmp_path / "out")
        assert (status, err) == (2, f"pkt: error: {message}\n")
    assert not (tmp_path / "out").exists()
    status, _, err = pkt("derive", "--code", "grid", *models, "--out", mine)
    message = f"{mine}: holds notes.txt and no changes.json, so it is not ours to replace; give a new folder"
    assert (status, err) == (2, f"pkt: error: {message}\n")
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_whole_weights_in_16_bits(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    """The rounded values themselves, and the share of the norm that rounding lost; other rows can be made of it."""
    models = ("--source", source_folder, "--target", target_folder)
    exact = load_derived(pkt, tmp_path / "float32", *models)
    for dtype in ("bfloat16", "float16"):
        found = load_derived(pkt, tmp_path / dtype, *models, "--stored", dtype)
        lost = total = 0.0
        for name, weight in exact.items():
            assert torch.equal(found[name], weight.to(getattr(torch, dtype)))
            lost += float((found[name].double() - weight.double()).square().sum())
            total += float(weight.double().square().sum())
        row = read_changes(tmp_path / dtype)
        assert row.meta["params"]["stored"] == dtype
        assert row.items["delta"].facts == {"rounding_loss": pytest.approx((lost / total) ** 0.5)}
        assert 0 < (lost / total) ** 0.5 < 0.01
    # A random one of equal norms is made from it, and float32 notes nothing down.
    again = load_derived(pkt, tmp_path / "random", "--delta", tmp_path / "bfloat16", code="random_delta")
    for name, weight in again.items():
        assert weight.dtype == torch.float32 and weight.norm() == pytest.approx(float(exact[name].norm()), rel=1e-3)
    assert read_changes(tmp_path / "float32").items["delta"].facts == {}


def load_derived(pkt: Run, out: Path, *given: object, code: str = "grid") -> dict[str, torch.Tensor]:
    status, _, err = pkt("derive", "--code", code, *given, "--out", out)
    assert (status, err) == (0, "")
    return load_file(out / "delta_0.safetensors")


@pytest.mark.parametrize(("size", "said"), [(1e-6, "warning: delta: stored as float16, which loses 1."), (1e-9, "")])
def test_what_16_bits_cannot_hold(pkt: Run, tmp_path: Path, size: float, said: str) -> None:
    """float16 ends at 6e-8: smaller entries are warned of, or refused where most of the change would be lost."""
    weights = {"model.layers.0.mlp.up_proj.weight": size * torch.randn(32, 32, generator=torch.Generator())}
    facts = {"command": "derive", "method": None, "target": None, "source": None, "params": {}}
    write_changes(tmp_path / "row", {"delta": DenseDelta(weights)}, facts)
    given = ("derive", "--code", "random_delta", "--delta", tmp_path / "row", "--stored", "float16")
    status, _, err = pkt(*given, "--out", tmp_path / "out")
    if said:
        assert status == 0 and err.startswith(said) and err.endswith(" of the change's norm\n")
    else:
        message = "stored float16: rounding would lose 100% of the norm of the change 'delta' (limit 50%); use float32"
        assert (status, err) == (2, f"pkt: error: {message}\n") and not (tmp_path / "out").exists()


def test_sparse_rows_are_float32(pkt: Run, tmp_path: Path) -> None:
    delta = {"ffn_up": SparseDelta(torch.arange(1), torch.tensor([[0, 1]]), torch.randn(1, 2, 8))}
    facts = {"command": "inject", "method": "laten", "target": None, "source": None, "params": {}}
    write_changes(tmp_path / "row", {"x": delta}, facts)
    given = ("--delta", tmp_path / "row", "--stored", "bfloat16", "--out", tmp_path / "out")
    status, _, err = pkt("derive", "--code", "random_delta", *given)
    message = "stored bfloat16: the change 'x' is not of whole weights; leave it float32"
    assert (status, err) == (2, f"pkt: error: {message}\n")
