from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pickled(target_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(target_folder, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_become_safetensors(pkt: Run, target_folder: Path, pickled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = tmp_path / ".out.new/of_a_killed_run.safetensors"
    left.parent.mkdir()
    left.touch()
    status, printed, err = pkt("convert", "--model", pickled, "--out", out)
    assert status == 0, err
    assert printed.startswith("convert: ") and "parameters as safetensors ->" in printed
    assert sorted(tmp_path.iterdir()) == [out, pickled] and not (out / left.name).exists()
    made, weights = (load_file(folder / "model.safetensors") for folder in (out, target_folder))
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weight) for name, weight in weights.items())
    status, _, err = pkt("convert", "--model", pickled, "--out", out)
    assert (status, err) == (2, f"pkt: error: {out}: is there already; give a new folder\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, "not the weights that its config.json describes; it lacks model.norm.weight"),
        (
            "model.layers.3.mlp.up_proj.weight",
            1.0,
            "not the weights that its config.json describes; it has model.layers.3.mlp.up_proj.weight too many",
        ),
        (
            "model.norm.weight",
            float("nan"),
            "weight model.norm.weight holds NaN or infinity; the checkpoint is broken",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    pkt: Run, pickled: Path, tmp_path: Path, name: str, value: float | None, message: str
) -> None:
    """What it lacks would become random numbers, in a folder that looks whole."""
    weights = torch.load(pickled / "pytorch_model.bin")
    if value is None:
        del weights[name]
    else:
        weights[name] = torch.full((64,), value)
    torch.save(weights, pickled / "pytorch_model.bin")
    assert pkt("convert", "--model", pickled, "--out", tmp_path / "out") == (
        2,
        "",
        f"pkt: error: {pickled}: {message}\n",
    )
    assert list(tmp_path.iterdir()) == [pickled]
