"""What the task files name: from a model's text to a score (METHODS section 10). No model, no sandbox in here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from pkt_stages.evaluation.sandbox.pool import Job, Verdict

LETTERS = ("A", "B", "C", "D")


def reference_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A row's reference; it lies in the data set as JSON, because a column has one type only."""
    return dict(json.loads(doc["reference"]))


def mmlu(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """1 if the letter with the highest log-probability is the answer; the first one wins a tie."""
    return {"accuracy": float(best_letter([score for score, _ in results]) == reference_of(doc)["answer"])}


def best_letter(scores: Sequence[float]) -> str:
    return LETTERS[max(range(len(LETTERS)), key=lambda i: scores[i])]


def gsm8k(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of samples whose last number equals the answer."""
    answer = reference_of(doc)["answer"]
    return {"accuracy": sum(same_number(found, answer) for found in results[0]) / len(results[0])}


def same_number(found: str, answer: str) -> bool:
    """Equal as decimals, without thousands commas, `$` and a trailing `.`; what is no number equals nothing."""
    values = []
    for text in (found, answer):
        try:
            values.append(Decimal(re.sub(r"[,$\s]", "", text).removesuffix(".")))
        except InvalidOperation:
            return False
    return all(value.is_finite() for value in values) and values[0] == values[1]


def code(doc: Mapping[str, Any], results: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """pass@1 from the verdicts on all samples."""
    passed = sum(verdict.outcome == "passed" for verdict in results[0])
    return {"pass@1": pass_at_k(len(results[0]), passed, 1)}


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one that passes (Chen et al. 2021, eq. 1)."""
    assert 0 <= passed <= n
    assert 1 <= k <= n
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def humaneval_job(doc: Mapping[str, Any], text: str) -> Job:
    """The prompt's code with the generated body; `check` is called with the function."""
    reference = reference_of(doc)
    prefix = reference["code_prefix"]
    return Job(prefix + text, prefix, reference["entry_point"], "", reference["test"], "check")


def mbpp_job(doc: Mapping[str, Any], text: str) -> Job:
    """The signature with the generated rest; the assertions call it by name."""
    reference = reference_of(doc)
    prefix = reference["code_prefix"]
    entries = re.findall(r"^def\s+(\w+)", prefix, re.MULTILINE)
    tests = "\n".join(reference["test_list"])
    return Job(prefix + text, prefix, entries[-1] if entries else "", reference["setup"], tests, "")


JOBS = {"humaneval": humaneval_job, "mbpp": mbpp_job}
REFERENCE_KEYS = {
    "mmlu": {"answer"},
    "gsm8k": {"answer"},
    "humaneval": {"code_prefix", "test", "entry_point"},
    "mbpp": {"code_prefix", "setup", "test_list"},
}
