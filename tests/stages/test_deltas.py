from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.models.adapters import Adapter, save_adapter
from pkt_stages.models.inject import SparseDelta, delta_tensors
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]


def deltas(pkt: Run, tmp_path: Path, *given: object) -> tuple[int, str, str]:
    return pkt("deltas", *given, "--out", tmp_path / "d.safetensors", "--metrics", tmp_path / "d.json")


def test_a_model_and_its_base(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=9)
    status, printed, err = deltas(pkt, tmp_path, "--model", other, "--base", target_folder)
    assert status == 0, err
    new, old = (load_file(folder / "model.safetensors") for folder in (other, target_folder))
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["weights"] == sorted(new)
    name = "model.layers.1.mlp.up_proj.weight"
    difference = (new[name] - old[name]).double()
    expected = {
        "num_entries": difference.numel(),
        "min": difference.min().item(),
        "max": difference.max().item(),
        "rms": difference.square().mean().sqrt().item(),
        "share_within": (difference.abs() <= 0.002).double().mean().item(),
        "share_beyond": (difference.abs() > 0.005).double().mean().item(),
    }
    assert found["by_weight"][name] == pytest.approx(expected)
    every = torch.cat([(new[n] - old[n]).flatten() for n in new]).double()
    assert found["overall"]["rms"] == pytest.approx(every.square().mean().sqrt().item())
    assert found["overall"]["share_within"] == pytest.approx((every.abs() <= 0.002).double().mean().item())
    assert (found["overall"]["min"], found["overall"]["max"]) == (every.min().item(), every.max().item())
    edges = torch.tensor(found["edges"], dtype=torch.float64)
    middle = len(edges) // 2
    assert sum(found["counts"]) == every.numel()
    assert found["counts"][middle] == int((every.abs() <= edges[middle]).sum())  # norms did not move
    assert printed.startswith(f"deltas: {len(new)} weights, {every.min().item():+.4f} .. ")
    # Weight by weight, the histograms of the artifact add up to the same.
    kept = artifacts.load(tmp_path / "d.safetensors", "delta_ranges")
    assert kept["counts"].sum(0).tolist() == found["counts"]
    assert str(tmp_path) not in (tmp_path / "d.json").read_text()


def test_runs_of_methods(pkt: Run, tmp_path: Path) -> None:
    rows = torch.tensor([[[0.0009, -0.5], [0.003, 0.01]]])
    delta = {"ffn_up": SparseDelta(torch.tensor([2]), torch.tensor([[4, 7]]), rows)}
    for number, factor in ((0, 1.0), (1, 2.0)):
        scaled = {site: SparseDelta(p.layers, p.neurons, p.rows * factor) for site, p in delta.items()}
        facts = {"example": {"id": f"x{number}"}}
        artifacts.save(tmp_path / "laten" / f"delta_{number}.safetensors", "delta", delta_tensors(scaled), facts)
    assert deltas(pkt, tmp_path, "--delta", tmp_path / "laten", "--run", 1)[0] == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["run"], found["weights"]) == ("x1", ["model.layers.2.mlp.up_proj.weight"])
    assert (found["overall"]["min"], found["overall"]["num_entries"]) == (-1.0, 4)
    assert (found["overall"]["share_within"], found["overall"]["share_beyond"]) == (0.25, 0.75)
    factors = {"model.layers.0.mlp.up_proj": (torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0], [-3.0]]))}
    save_adapter(tmp_path / "lora" / "seed_0", Adapter(factors, 1.0), "target")
    assert deltas(pkt, tmp_path, "--delta", tmp_path / "lora")[0] == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["overall"]["min"], found["overall"]["max"], found["overall"]["num_entries"]) == (-6.0, 2.0, 4)


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-base"
    for given, message in (
        (("--model", target_folder), "give either --model and --base, or --delta"),
        ((), "give either --model and --base, or --delta"),
        (
            ("--model", target_folder, "--base", target_folder, "--delta", tmp_path),
            "give either --model and --base, or",
        ),
        (("--model", target_folder, "--base", missing), f"{missing}: no such folder, and not a hub name of the form"),
        (
            ("--model", source_folder, "--base", target_folder),
            f"{source_folder} and {target_folder}: only {source_folder} has",
        ),
        (("--delta", tmp_path), f"{tmp_path}: a folder without delta_*.safetensors or PEFT adapters"),
    ):
        status, _, err = deltas(pkt, tmp_path, *given)
        assert status == 2
        assert err.startswith(f"pkt: error: {message}") and len(err.splitlines()) == 1
    assert not (tmp_path / "d.json").exists()
