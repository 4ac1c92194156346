from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pkt_stages.examples import from_benchmark, write_rows

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
    assert len(found["runs"]) == 1
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == found["ids"]
    again = tmp_path / "again.json"
    pkt(*arguments(target_folder, test_set, again), "--limit", 3)
    assert again.read_bytes() == out.read_bytes()


def test_several_deltas_are_several_runs(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    from pkt_stages import artifacts
    from pkt_stages.models.inject import SparseDelta, delta_tensors

    paths = []
    for size in (0.5, 5.0):
        rows = torch.full((1, 2, 64), size)
        delta = {"ffn_down": SparseDelta(torch.tensor([0]), torch.tensor([[1, 2]]), rows)}
        paths.append(tmp_path / f"delta_{size}.safetensors")
        artifacts.save(paths[-1], "delta", delta_tensors(delta), {})
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    status, _, err = pkt(
        *arguments(target_folder, test_set, out), "--predictions", predictions, "--delta", paths[0], "--delta", paths[1]
    )
    assert status == 0, err
    assert len(json.loads(out.read_text())["runs"]) == 2
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [row["delta"] for row in rows] == ["delta_0.5"] * 4 + ["delta_5.0"] * 4
    assert [row["text"] for row in rows[:4]] != [row["text"] for row in rows[4:]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--limit", 0), "pkt: error: limit: expected at least 1, found 0\n"),
        (("--top-p", 0.5), "pkt: error: top_p 0.5 has no effect with temperature 0; set a temperature\n"),
        (("--adapter", "nowhere"), "pkt: error: nowhere: no adapter_config.json; expected a PEFT adapter folder\n"),
    ],
)
def test_bad_input(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "m.json"
    assert pkt(*arguments(target_folder, test_set, out), *extra)[0::2] == (2, message)
    assert not out.exists()
