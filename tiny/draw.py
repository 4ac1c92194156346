"""What every family of generated examples shares: a graded row and a weighted draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")

# A piece of a text and whether it is to be learned (full loss weight) or leads to what is (PROMPT_WEIGHT).
Part = tuple[str, bool]


@dataclass(frozen=True)
class GradedRow:
    """A row in a benchmark's own schema and its difficulty level, 1 (easiest) to 4; the level is not shipped."""

    row: dict[str, Any]
    level: int


def zipf_weights(count: int, exponent: float, shift: float = 3.0) -> list[float]:
    """Weights 1 / (rank + shift) ** exponent of ranks 0 .. count - 1; exponent 0 gives equal weights."""
    return [(rank + shift) ** -exponent for rank in range(count)]


def draw(rng: Random, items: Sequence[T], weights: Sequence[float]) -> T:
    """One item, with probability proportional to its weight."""
    return rng.choices(items, weights)[0]
