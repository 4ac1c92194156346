"""The factor of a change is the best on held-out examples, and is what `pkt evaluate` applies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import tasks
from pkt_stages.examples import write_jsonl
from pkt_stages.models.changes import DenseDelta, write_changes
from pkt_stages.models.load import identity, resolve
from pkt_stages.stages.scale import best
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]


def questions(path: Path, start: int, *, bare: bool = False) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(start, start + 4)]
    made = [tasks.load("gsm8k").example(row, f"q{i}").to_row() for i, row in enumerate(rows)]
    kept = ("dataset", "id", "messages") if bare else tuple(made[0])
    write_jsonl(path, [{key: row[key] for key in kept} for row in made])
    return path


@pytest.fixture
def row(target_folder: Path, tmp_path: Path) -> Path:
    """Halfway to another model in `towards`, and away from it in `away`."""
    other = make_model(tmp_path / "other", seed=9)
    before, after = (load_file(folder / "model.safetensors") for folder in (target_folder, other))
    difference = {n: after[n] - before[n] for n in before if "mlp.down_proj" in n}
    meta = {"command": "derive", "method": "m", "target": identity(resolve(str(target_folder)))}
    write_changes(
        tmp_path / "row",
        {"one": DenseDelta(difference), "two": DenseDelta({n: -w for n, w in difference.items()})},
        {**meta, "source": None, "params": {}},
    )
    return tmp_path / "row"


def scale(pkt: Run, target: Path, row: Path, folder: Path, *more: object) -> tuple[int, str, str]:
    return pkt("scale", "--model", target, "--delta", row, "--examples", folder, "--out", folder / "s.json", *more)


def test_the_best_by_the_mean_over_tasks_but_never_zero() -> None:
    assert best({0.0: {"a": 0.0}, 0.5: {"a": -3.0, "b": -1.0}, 1.0: {"a": -1.0, "b": -2.0}}) == 1.0
    assert best({0.0: {"a": 0.0}, 0.5: {"a": -1.0}, 1.0: {"a": -1.0}}) == 0.5


def test_likelihoods_are_those_of_the_changed_model(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    """The held-out value at a factor is what `pkt evaluate` finds for a model that was exported with it."""
    align = questions(tmp_path / "gsm8k/align.jsonl", 20)
    status, printed, err = scale(pkt, target_folder, row, tmp_path, "--scales", "0.25,1")
    assert status == 0, err
    assert "on 4 examples of 1 tasks" in printed
    told = json.loads((tmp_path / "s.json").read_text())
    assert told["examples"] == {"gsm8k": 4} and told["chosen"].keys() == {"one", "two"}
    for number, label in enumerate(("one", "two")):
        found = {factor: by_task["gsm8k"] for factor, by_task in told["chosen"][label]["nats"]}
        assert list(found) == [0.0, 0.25, 1.0]
        assert told["chosen"][label]["scale"] == max((0.25, 1.0), key=found.__getitem__)
        for factor, nats in found.items():
            model = target_folder
            if factor:
                model = tmp_path / f"{label}-{factor}"
                given = ("--run", number, "--scale", factor, "--out", model)
                assert pkt("export", "--model", target_folder, "--delta", row, *given)[0] == 0
            out = tmp_path / "m.json"
            assert (
                pkt("evaluate", "--model", model, "--task", "gsm8k", "--test", align, "--nats-only", "--out", out)[0]
                == 0
            )
            assert json.loads(out.read_text())["nats"] == pytest.approx(nats, abs=1e-5)


def test_evaluate_applies_the_factors(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    questions(tmp_path / "gsm8k/align.jsonl", 20)
    test = questions(tmp_path / "test.jsonl", 0)
    assert scale(pkt, target_folder, row, tmp_path, "--scales", "0.25,0.5")[0] == 0
    chosen = {k: v["scale"] for k, v in json.loads((tmp_path / "s.json").read_text())["chosen"].items()}

    def evaluated(model: Path, *more: object) -> dict[str, Any]:
        given = ("--model", model, "--task", "gsm8k", "--test", test, "--max-new-tokens", 6)
        status, _, err = pkt("evaluate", *given, *more, "--out", tmp_path / "m.json")
        assert status == 0, err
        return dict(json.loads((tmp_path / "m.json").read_text()))

    scaled = evaluated(target_folder, "--delta", row, "--scales", tmp_path / "s.json")
    whole = evaluated(target_folder, "--delta", row)
    assert scaled["scales"] == chosen and "scales" not in whole
    assert [run["log_likelihoods"] for run in scaled["unscaled"]["runs"]] == [
        run["log_likelihoods"] for run in whole["runs"]
    ]
    assert "correct" not in scaled["unscaled"]["runs"][0] and "correct" in scaled["runs"][0]
    alone = tmp_path / "alone"
    given = ("--run", "two", "--scale", chosen["two"], "--out", alone)
    assert pkt("export", "--model", target_folder, "--delta", row, *given)[0] == 0
    found = evaluated(alone)["runs"][0]
    assert found["correct"] == scaled["runs"][1]["correct"]
    assert torch.allclose(torch.tensor(found["log_likelihoods"]), torch.tensor(scaled["runs"][1]["log_likelihoods"]))


def test_examples_without_prefix_count_with_their_whole_answer(
    pkt: Run, target_folder: Path, row: Path, tmp_path: Path
) -> None:
    questions(tmp_path / "gsm8k/align.jsonl", 20, bare=True)
    assert scale(pkt, target_folder, row, tmp_path, "--scales", "1")[0] == 0
    whole = json.loads((tmp_path / "s.json").read_text())
    questions(tmp_path / "gsm8k/align.jsonl", 20)
    assert scale(pkt, target_folder, row, tmp_path, "--scales", "1")[0] == 0
    assert whole["chosen"]["one"]["nats"] != json.loads((tmp_path / "s.json").read_text())["chosen"]["one"]["nats"]


def test_tasks_can_be_named(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    for task in ("gsm8k", "other"):
        questions(tmp_path / task / "align.jsonl", 20)
    assert scale(pkt, target_folder, row, tmp_path, "--scales", "1", "--tasks", "gsm8k")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["examples"] == {"gsm8k": 4}
    status, _, err = scale(pkt, target_folder, row, tmp_path, "--tasks", "mmlu")
    assert (status, err) == (
        2,
        f"pkt: error: {tmp_path}: no mmlu/align.jsonl below it; make it with `pkt prepare`\n",
    )


def test_bad_input(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = scale(pkt, target_folder, row, tmp_path / "empty")
    assert status == 2 and "no <task>/align.jsonl below it" in err
    questions(tmp_path / "gsm8k/align.jsonl", 20)
    status, _, err = scale(pkt, target_folder, row, tmp_path, "--scales", "0,1")
    assert (status, err) == (2, "pkt: error: options of `scale`: scales must be above 0 and at most 100, found 0.0\n")
    # Factors of another change, and what are none.
    assert scale(pkt, target_folder, row, tmp_path, "--scales", "1")[0] == 0
    test = questions(tmp_path / "test.jsonl", 0)
    given = ("--model", target_folder, "--task", "gsm8k", "--test", test, "--out", tmp_path / "m.json")
    (tmp_path / "row/delta_0.safetensors").write_bytes((tmp_path / "row/delta_1.safetensors").read_bytes())
    status, _, err = pkt("evaluate", *given, "--delta", row, "--scales", tmp_path / "s.json")
    assert status == 2
    assert err.endswith(f"s.json: has no factor for {row}/delta_0.safetensors as it is; run `pkt scale` on it\n")
    (tmp_path / "s.json").write_text("[]")
    status, _, err = pkt("evaluate", *given, "--delta", row, "--scales", tmp_path / "s.json")
    assert status == 2 and "no readable factors" in err and "make them with `pkt scale`" in err
    assert not (tmp_path / "m.json").exists()
