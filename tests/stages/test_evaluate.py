from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pkt_stages.examples import from_benchmark, write_rows
from pkt_stages.models.adapters import Adapter, save_adapter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    path = tmp_path / "test.jsonl"
    write_rows(path, [from_benchmark("gsm8k", row, f"q{i}").to_row() for i, row in enumerate(rows)])
    return path


def arguments(folder: Path, test_set: Path, out: Path) -> tuple[object, ...]:
    return ("evaluate", "--model", folder, "--task", "gsm8k", "--test", test_set, "--out", out, "--max-new-tokens", 8)


def test_metrics_and_predictions(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    status, printed, err = pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, "--limit", 3)
    assert status == 0, err
    assert "% accuracy on 3 examples" in printed
    found = json.loads(out.read_text())
    assert (found["task"], found["n"], found["ids"]) == ("gsm8k", 3, ["q0", "q1", "q2"])
    assert found["settings"]["max_new_tokens"] == 8
    assert [run["label"] for run in found["runs"]] == ["base"]
    assert found["model"]["revision"].startswith("sha256:")
    assert str(tmp_path) not in out.read_text()
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == found["ids"]
    again = tmp_path / "again.json"
    pkt(*arguments(target_folder, test_set, again), "--limit", 3)
    assert again.read_bytes() == out.read_bytes()


def write_delta(path: Path, size: float, example: str | None = None) -> Path:
    from pkt_stages import artifacts
    from pkt_stages.models.inject import SparseDelta, delta_tensors

    rows = torch.full((1, 2, 64), size)
    delta = {"ffn_down": SparseDelta(torch.tensor([0]), torch.tensor([[1, 2]]), rows)}
    artifacts.save(path, "delta", delta_tensors(delta), {"example": {"id": example}} if example else {})
    return path


def texts(path: Path) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        made.setdefault(row["run"], []).append(row["text"])
    return made


def test_several_deltas_are_several_runs(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deltas"
    for number, size in ((10, 5.0), (2, 0.5)):
        write_delta(folder / f"delta_{number}.safetensors", size, f"x{number}")
    alone = write_delta(tmp_path / "alone.safetensors", 5.0)
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    status, _, err = pkt(
        *arguments(target_folder, test_set, out), "--predictions", predictions, "--delta", folder, "--delta", alone
    )
    assert status == 0, err
    assert [run["label"] for run in json.loads(out.read_text())["runs"]] == ["x2", "x10", "alone"]
    found = texts(predictions)
    assert list(found) == ["x2", "x10", "alone"]
    assert found["x2"] != found["x10"]
    # Equal deltas give equal answers, whatever was merged before.
    assert found["x10"] == found["alone"]
    pkt(*arguments(target_folder, test_set, out), "--predictions", predictions)
    assert texts(predictions)["base"] != found["x10"]


def test_deltas_of_every_step_carry_it_in_their_labels(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path
) -> None:
    for step in (10, 9):
        for number in (1, 0):
            write_delta(tmp_path / "all" / f"step_{step:02d}" / f"delta_{number}.safetensors", 0.1 * step, f"x{number}")
    out = tmp_path / "m.json"
    status, _, err = pkt(*arguments(target_folder, test_set, out), "--delta", tmp_path / "all")
    assert status == 0, err
    labels = [run["label"] for run in json.loads(out.read_text())["runs"]]
    assert labels == ["step_09/x0", "step_09/x1", "step_10/x0", "step_10/x1"]


def test_adapters_of_a_folder_are_runs_by_their_names(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path
) -> None:
    for seed in (10, 2):
        generator = torch.Generator().manual_seed(seed)
        factors = (torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator))
        adapter = Adapter({"model.layers.0.mlp.up_proj": factors}, 2.0)
        save_adapter(tmp_path / "adapters" / f"seed_{seed}", adapter, "target")
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    delta = ("--delta", tmp_path / "adapters")
    status, _, err = pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, *delta)
    assert status == 0, err
    both = texts(predictions)
    assert list(both) == ["seed_2", "seed_10"] and both["seed_2"] != both["seed_10"]
    pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, *delta[:1], delta[1] / "seed_10")
    assert texts(predictions) == {"seed_10": both["seed_10"]}


def test_two_deltas_with_one_label(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    one, two = (write_delta(tmp_path / name / "d.safetensors", 1.0, "same") for name in "ab")
    out = tmp_path / "m.json"
    status, _, err = pkt(*arguments(target_folder, test_set, out), "--delta", one, "--delta", two)
    assert (status, err) == (2, f"pkt: error: {two}: called 'same' as {one}; evaluate them one by one\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--limit", 0), "options of `evaluate`: limit must be at least 1, found 0"),
        (("--top-p", 0.5), "options of `evaluate`: top_p 0.5 has no effect with temperature 0; set a temperature"),
        (
            ("--task", "mbpp"),
            "example q0: `reference` lacks 'code_prefix', which task mbpp needs; make the test set with `pkt prepare`",
        ),
        (("--delta", Path("profiles")), "profiles: a folder without delta_*.safetensors or PEFT adapters"),
    ],
)
def test_bad_input(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "m.json"
    assert pkt(*arguments(target_folder, test_set, out), *extra)[0::2] == (2, f"pkt: error: {message}\n")
    assert not out.exists()
