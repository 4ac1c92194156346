from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]


def test_pickled_weights_become_safetensors(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    pickled, out = tmp_path / "pickled", tmp_path / "out"
    shutil.copytree(target_folder, pickled)
    weights = load_file(pickled / "model.safetensors")
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    status, printed, err = pkt("convert", "--model", pickled, "--out", out)
    assert status == 0, err
    assert printed.startswith("convert: ") and "parameters as safetensors ->" in printed
    made = load_file(out / "model.safetensors")
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weight) for name, weight in weights.items())
    status, _, err = pkt("convert", "--model", pickled, "--out", out)
    assert (status, err) == (2, f"pkt: error: {out}: is there already; give a new folder\n")
