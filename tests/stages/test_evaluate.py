from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages import tasks
from pkt_stages.examples import write_jsonl
from pkt_stages.models.adapters import Adapter, save_adapter
from pkt_stages.models.changes import Change, DenseDelta, read_changes, write_changes
from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.load import identity, resolve

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    path = tmp_path / "test.jsonl"
    write_jsonl(path, [tasks.load("gsm8k").example(row, f"q{i}").to_row() for i, row in enumerate(rows)])
    return path


def arguments(folder: Path, test_set: Path, out: Path) -> tuple[object, ...]:
    return ("evaluate", "--model", folder, "--task", "gsm8k", "--test", test_set, "--out", out, "--max-new-tokens", 8)


def test_metrics_and_predictions(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    status, printed, err = pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, "--limit", 3)
    assert status == 0, err
    assert re.search(r"% accuracy, -\d+\.\d{4} \+- \d+\.\d{4} nats on 3 examples", printed)
    found = json.loads(out.read_text())
    assert (found["task"], found["n"], found["ids"]) == ("gsm8k", 3, ["q0", "q1", "q2"])
    assert found["settings"]["max_new_tokens"] == 8
    (run,) = found["runs"]
    likely = run["log_likelihoods"]
    assert len(likely) == len(run["correct"]) == 3
    assert found["nats"] == run["nats"] == pytest.approx(sum(likely) / 3)
    assert found["nats_stderr"] == run["nats_stderr"] == pytest.approx(statistics.stdev(likely) / 3**0.5)
    assert [run["label"] for run in found["runs"]] == ["base"]
    assert found["model"]["revision"].startswith("sha256:")
    assert str(tmp_path) not in out.read_text()
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == found["ids"]
    rounded = [round(nats, 4) for nats in likely]
    assert [json.loads(line)["log_likelihood"] for line in predictions.read_text().splitlines()] == rounded
    again = tmp_path / "again.json"
    pkt(*arguments(target_folder, test_set, again), "--limit", 3)
    assert again.read_bytes() == out.read_bytes()


def test_likelihoods_without_answers(pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path) -> None:
    """They are the same, and nothing is said of right and wrong."""
    whole, out, predictions = tmp_path / "whole.json", tmp_path / "m.json", tmp_path / "p.jsonl"
    assert pkt(*arguments(target_folder, test_set, whole))[0] == 0
    given = (*arguments(target_folder, test_set, out), "--nats-only", "--predictions", predictions)
    status, printed, err = pkt(*given)
    assert status == 0, err
    assert re.match(r"evaluate: gsm8k -\d+\.\d{4} \+- \d+\.\d{4} nats on 4 examples ->", printed)
    both, found = json.loads(whole.read_text()), json.loads(out.read_text())
    assert found.keys() == both.keys() - {"score", "stderr"}
    assert found["runs"][0].keys() == both["runs"][0].keys() - {"score", "stderr", "correct"}
    for key in ("nats", "nats_stderr"):
        assert found[key] == both[key]
    assert found["runs"][0]["log_likelihoods"] == both["runs"][0]["log_likelihoods"]
    assert found["settings"].keys() == {"backend", "dtype", "template"}
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert all(row.keys() == {"run", "id", "log_likelihood"} for row in rows)


@pytest.fixture
def meta(target_folder: Path) -> dict[str, Any]:
    """Of a row for the target."""
    target = identity(resolve(str(target_folder)))
    params = {"inject": {"dtype": "auto"}}
    return {"command": "inject", "method": "laten", "target": target, "source": None, "params": params}


def sparse(size: float) -> dict[str, SparseDelta]:
    return {"ffn_down": SparseDelta(torch.tensor([0]), torch.tensor([[1, 2]]), torch.full((1, 2, 64), size))}


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator))
    return Adapter({"model.layers.0.mlp.up_proj": factors}, 2.0)


def texts(path: Path) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        made.setdefault(row["run"], []).append(row["text"])
    return made


def test_the_changes_of_a_row_are_runs(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, meta: dict[str, Any]
) -> None:
    row, alone = tmp_path / "row", tmp_path / "alone"
    whole = torch.zeros(64, 96)
    whole[:, [1, 2]] = 5.0
    same = DenseDelta({"model.layers.0.mlp.down_proj.weight": whole})
    changes: dict[str, Change] = {"x10": sparse(5.0), "x2": sparse(0.5), "same": same, "seed_0": adapter(0)}
    write_changes(row, changes, meta, {"x2": {"rounding_loss": 0.25}})
    out, predictions = tmp_path / "m.json", tmp_path / "p.jsonl"
    status, printed, err = pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, "--delta", row)
    assert status == 0, err
    assert "on 4 examples, 4 runs ->" in printed
    metrics = json.loads(out.read_text())
    assert [run["label"] for run in metrics["runs"]] == list(changes)
    facts = {"x10": {}, "x2": {"rounding_loss": 0.25}, "same": {}, "seed_0": {}}
    assert metrics["made"] == {**meta, "facts": facts}
    assert str(tmp_path) not in out.read_text()
    found = texts(predictions)
    assert list(found) == list(changes)
    assert found["x2"] != found["x10"] != found["seed_0"]
    # Equal deltas give equal answers, whatever was merged before and however they are stored.
    assert found["x10"] == found["same"]
    write_changes(alone, {"alone": sparse(5.0)}, meta)
    pkt(*arguments(target_folder, test_set, out), "--predictions", predictions, "--delta", alone)
    assert texts(predictions) == {"alone": found["x10"]}
    pkt(*arguments(target_folder, test_set, out), "--predictions", predictions)
    assert texts(predictions)["base"] != found["x10"]
    assert json.loads(out.read_text())["made"] is None


def test_several_rows_and_bare_changes(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, meta: dict[str, Any]
) -> None:
    row = tmp_path / "row"
    write_changes(row, {"step_09/x": sparse(0.5), "step_10/x": sparse(5.0)}, meta)
    save_adapter(tmp_path / "mine", adapter(1), "target")
    out = tmp_path / "m.json"
    given = ("--delta", row, "--delta", tmp_path / "mine", "--delta", row / "delta_0.safetensors")
    status, _, err = pkt(*arguments(target_folder, test_set, out), *given)
    assert status == 0, err
    metrics = json.loads(out.read_text())
    assert [run["label"] for run in metrics["runs"]] == ["step_09/x", "step_10/x", "mine", "delta_0"]
    facts = [{"step_09/x": {}, "step_10/x": {}}, {"mine": {}}, {"delta_0": {}}]
    named = {"target": {"name": "target", "revision": None}}
    assert metrics["made"] == [{**meta, "facts": facts[0]}, {**named, "facts": facts[1]}, {**meta, "facts": facts[2]}]
    hashes = [stored.content_hash for path in given[1::2] for stored in read_changes(Path(path)).items.values()]
    assert [run["change"] for run in metrics["runs"]] == hashes


def test_two_changes_with_one_label(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, meta: dict[str, Any]
) -> None:
    for name in "ab":
        write_changes(tmp_path / name, {"same": sparse(1.0)}, meta)
    one, two = (tmp_path / name / "delta_0.safetensors" for name in "ab")
    out = tmp_path / "m.json"
    given = ("--delta", tmp_path / "a", "--delta", tmp_path / "b")
    status, _, err = pkt(*arguments(target_folder, test_set, out), *given)
    assert (status, err) == (2, f"pkt: error: {two}: called 'same' as {one}; evaluate them one by one\n")


def test_a_row_of_another_target(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, meta: dict[str, Any]
) -> None:
    row, other = tmp_path / "row", {"name": "other", "revision": "sha256:1"}
    write_changes(row, {"same": sparse(1.0)}, meta | {"target": other})
    status, _, err = pkt(*arguments(target_folder, test_set, tmp_path / "m.json"), "--delta", row)
    assert status == 2
    assert err.startswith(
        f"pkt: error: {row}: made for the target other at sha256:1, found {meta['target']['name']} at"
    )
    assert not (tmp_path / "m.json").exists()
    status, _, err = pkt(*arguments(target_folder, test_set, tmp_path / "m.json"), "--delta", row, "--any-base")
    assert status == 0, err
    assert f"pkt: warning: {row}: made for the target other at sha256:1, found" in err
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["made"]["target"], metrics["model"]) == (other, meta["target"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--limit", 0), "options of `evaluate`: limit must be at least 1, found 0"),
        (("--top-p", 0.5), "options of `evaluate`: top_p 0.5 has no effect with temperature 0; set a temperature"),
        (
            ("--task", "mbpp"),
            "example q0: `reference` lacks 'code_prefix', which task mbpp needs; make the test set with `pkt prepare`",
        ),
        (
            ("--delta", Path(__file__).parent),
            f"{Path(__file__).parent}: a folder without changes.json and no PEFT adapter; expected what a method of the"
            " table made",
        ),
    ],
)
def test_bad_input(
    pkt: Run, target_folder: Path, test_set: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "m.json"
    assert pkt(*arguments(target_folder, test_set, out), *extra)[0::2] == (2, f"pkt: error: {message}\n")
    assert not out.exists()
