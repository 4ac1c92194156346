from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pkt_stages import artifacts
from pkt_stages.models.inject import SparseDelta, delta_tensors, load_delta

Run = Callable[..., tuple[int, str, str]]


def write_deltas(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(2):
        rows = torch.randn(3, 4, 64, generator=generator) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
        part = SparseDelta(torch.arange(3), torch.arange(12).view(3, 4) + number, rows)
        meta = {"example": {"id": f"e{number}", "set": "transfer"}, "params": {"align": {"rate": 0.1}}}
        artifacts.save(folder / f"delta_{number}.safetensors", "delta", delta_tensors({"ffn_up": part}), meta)


def test_a_random_delta_of_equal_norm_at_the_same_neurons(pkt: Run, tmp_path: Path) -> None:
    write_deltas(tmp_path / "in")
    for out in ("a", "b"):
        status, printed, err = pkt("control", "--delta", tmp_path / "in", "--out", tmp_path / out)
        assert (status, err) == (0, "") and printed.startswith("control: 2 random deltas -> ")
    made = []
    for number in range(2):
        name = f"delta_{number}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        given, random = (load_delta(tmp_path / f / name)["ffn_up"] for f in ("in", "a"))
        assert torch.equal(given.layers, random.layers) and torch.equal(given.neurons, random.neurons)
        torch.testing.assert_close(random.rows.norm(dim=(1, 2)), given.rows.norm(dim=(1, 2)))
        cosine = torch.cosine_similarity(random.rows.flatten(1), given.rows.flatten(1))
        assert cosine.abs().max() < 0.3
        assert artifacts.load(tmp_path / "a" / name, "delta").meta["example"]["id"] == f"e{number}"
        made.append(random.rows)
    assert not torch.equal(made[0], made[1])


def test_older_deltas_do_not_stay(pkt: Run, tmp_path: Path) -> None:
    write_deltas(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "delta_7.safetensors").write_bytes(b"old")
    assert pkt("control", "--delta", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "delta_7.safetensors").exists()


def test_a_folder_without_deltas(pkt: Run, tmp_path: Path) -> None:
    status, _, err = pkt("control", "--delta", tmp_path, "--out", tmp_path / "out")
    assert status == 2
    assert err == f"pkt: error: {tmp_path}: a folder without delta_*.safetensors; make some with `pkt inject`\n"
