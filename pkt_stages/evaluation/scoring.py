"""What tasks and the engine share to make a score of a model's answers. No model, no sandbox in here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

# A minus may be any dash right before a number and not behind one; commas join digits only to groups of three at the
# end, those before it of two or three.
NUMBER = (
    r"(?:(?<![\d.])[-\u2010-\u2013\u2212\ufe63\uff0d])?\$?"
    r"(?:(?:\d+(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


def reference_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A row's reference; it lies in the data set as JSON, because a column has one type only."""
    return dict(json.loads(doc["reference"]))


def best(choices: Sequence[str], log_probabilities: Sequence[float]) -> str:
    """The choice with the highest log-probability; the first one wins a tie."""
    return choices[max(range(len(choices)), key=lambda i: log_probabilities[i])]


def last_number(text: str) -> str:
    """The last number in a text, as it stands there; empty if there is none."""
    found = re.findall(NUMBER, text)
    return found[-1] if found else ""


def same_number(found: str, answer: str) -> bool:
    """Equal as decimals, without thousands commas, `$` and a trailing `.`; what is no number equals nothing.

    A minus may be typographic, or a dash.
    """
    values = []
    for text in (found, answer):
        text = re.sub(r"[\u2010-\u2013\u2212\ufe63\uff0d]", "-", text)
        try:
            values.append(Decimal(re.sub(r"[,$\s]", "", text).removesuffix(".")))
        except InvalidOperation:
            return False
    return all(value.is_finite() for value in values) and values[0] == values[1]


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one that passes (Chen et al. 2021, eq. 1)."""
    assert 0 <= passed <= n
    assert 1 <= k <= n
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)
