from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.evaluation.settings import EvaluateParams
from pkt_stages.params import build, read_settings
from pkt_stages.stages.adopt import run

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
METRICS: dict[str, Any] = {
    "task": "gsm8k",
    "n": 5,
    "score": 40.0,
    "nats": -0.5,
    "model": {"name": "target"},
    "settings": {"backend": "hf", "dtype": "float16", "max_new_tokens": 8, "template": "chat"},
}


PARAMS = EvaluateParams(dtype="float16", max_new_tokens=8)


@pytest.mark.parametrize(
    ("settings", "changes", "problem"),
    [
        ({}, {}, None),
        ({}, {"dtype": "auto"}, None),
        ({}, {"max_new_tokens": 16}, "was made with max_new_tokens 8, this profile's `evaluate` says 16"),
        ({"top_p": 0.9}, {}, "was made with top_p 0.9, this profile's `evaluate` says 1.0"),
        ({"top_k": 9}, {}, "was made with top_k 9, which is no setting of `evaluate` here"),
        ({}, {"limit": 4}, "has 5 examples, this profile's `evaluate` says limit 4"),
        ({"sandbox": "sandlock"}, {"sandbox_floor": "rlimits"}, None),
        (
            {"sandbox": "rlimits"},
            {"sandbox_floor": "sandlock"},
            "was made in a sandbox of level rlimits, this profile's `evaluate` says sandbox_floor sandlock",
        ),
    ],
)
def test_settings_must_agree(settings: dict[str, Any], changes: dict[str, Any], problem: str | None) -> None:
    metrics = METRICS | {"settings": METRICS["settings"] | settings}
    assert run(metrics, "gsm8k", replace(PARAMS, **changes)) == problem


def test_a_score_is_missed_unless_likelihoods_suffice() -> None:
    metrics = {name: value for name, value in METRICS.items() if name != "score"}
    said = "has no score, this profile's `evaluate` does not say nats_only"
    assert run(metrics, "gsm8k", PARAMS) == said
    assert run(metrics, "gsm8k", replace(PARAMS, nats_only=True)) is None


def test_another_task() -> None:
    assert run(METRICS, "mmlu", PARAMS) == "is of task 'gsm8k', not mmlu"


@pytest.mark.parametrize("task", ["mmlu", "gsm8k", "humaneval", "mbpp"])
def test_the_default_profile_would_adopt_its_own(task: str) -> None:
    params = build(EvaluateParams, read_settings(ROOT / "params.yaml", "evaluate", task=task), "params.yaml")
    metrics = json.loads((ROOT / f"results/tiny/evaluate/source-chat/{task}.json").read_text())
    assert run(metrics, task, params) is None


@pytest.mark.parametrize("content", ["[1]", "{}", '{"task": "gsm8k"}', '{"task": "gsm8k", "settings": 3}'])
def test_what_is_no_metrics(pkt: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "theirs.json").write_text(content)
    params = tmp_path / "params.yaml"
    params.write_text("evaluate: {backend: hf}\ntask: {gsm8k: {}}\n")
    given = ("--task", "gsm8k", "--metrics-in", tmp_path / "theirs.json", "--params", params)
    status, _, err = pkt("adopt", *given, "--out", tmp_path / "ours.json")
    assert (status, err) == (
        2,
        f"pkt: error: {tmp_path / 'theirs.json'}: expected metrics that `pkt evaluate` wrote\n",
    )


def test_the_command(pkt: Run, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("evaluate: {dtype: auto}\ntask: {gsm8k: {evaluate: {max_new_tokens: 8}}}\n")
    write_json(tmp_path / "theirs.json", METRICS)
    given = ("--task", "gsm8k", "--metrics-in", tmp_path / "theirs.json", "--params", params)
    status, printed, err = pkt("adopt", *given, "--out", tmp_path / "ours.json")
    assert status == 0, err
    assert printed.startswith("adopt: gsm8k -0.5000 nats of target ->")
    assert json.loads((tmp_path / "ours.json").read_text()) == METRICS

    params.write_text("evaluate: {backend: vllm, max_new_tokens: 8}\ntask: {gsm8k: {}}\n")
    status, _, err = pkt("adopt", *given, "--out", tmp_path / "other.json")
    assert status == 2 and not (tmp_path / "other.json").exists()
    assert err == (
        f"pkt: error: {tmp_path / 'theirs.json'}: was made with backend hf, this profile's `evaluate` says vllm;"
        " use the same settings in both profiles\n"
    )
