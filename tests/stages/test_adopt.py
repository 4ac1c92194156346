from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pkt_stages.artifacts import write_json
from pkt_stages.stages.adopt import run

Run = Callable[..., tuple[int, str, str]]
METRICS = {
    "task": "gsm8k",
    "n": 5,
    "score": 40.0,
    "model": {"name": "target"},
    "settings": {"backend": "hf", "dtype": "float16", "max_new_tokens": 8, "template": "chat"},
}


def test_settings_must_agree() -> None:
    assert run(METRICS, "gsm8k", {"backend": "hf", "dtype": "float16", "max_new_tokens": 8}) is None
    assert run(METRICS, "gsm8k", {"dtype": "auto", "sandbox_floor": "rlimits"}) is None
    assert run(METRICS, "mmlu", {}) == "is of task 'gsm8k', not mmlu"
    told = "was made with max_new_tokens 8, this profile's `evaluate` says 16"
    assert run(METRICS, "gsm8k", {"max_new_tokens": 16}) == told
    assert run(METRICS, "gsm8k", {"limit": 4}) == "has 5 examples, this profile's `evaluate` says limit 4"


def test_the_command(pkt: Run, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("evaluate:\n  common: {backend: hf}\n  gsm8k: {max_new_tokens: 8}\n")
    write_json(tmp_path / "theirs.json", METRICS)
    given = ("--task", "gsm8k", "--metrics-in", tmp_path / "theirs.json", "--params", params)
    status, printed, err = pkt("adopt", *given, "--out", tmp_path / "ours.json")
    assert status == 0, err
    assert printed.startswith("adopt: gsm8k 40.0 % of target ->")
    assert json.loads((tmp_path / "ours.json").read_text()) == METRICS

    params.write_text("evaluate: {backend: vllm}\n")
    status, _, err = pkt("adopt", *given, "--out", tmp_path / "other.json")
    assert status == 2 and not (tmp_path / "other.json").exists()
    assert err == (
        f"pkt: error: {tmp_path / 'theirs.json'}: was made with backend hf, this profile's `evaluate` says vllm;"
        " use the same settings in both profiles\n"
    )
