"""The two measures of every row: the share of right answers, and how likely the reference answers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """What a table shows of an evaluation.

    Attributes:
        name: points or nats.
        key: of a run's values per example in the metrics.
        unit: what these are multiplied by.
        digits: that are shown.
        settings: of the evaluation that the values depend on; empty: on all.
    """

    name: str
    key: str
    unit: float
    digits: int
    settings: frozenset[str] = frozenset()

    def measured(self, metrics: dict[str, Any]) -> bool:
        """Whether an evaluation has values of this kind: scores need answers, which `nats_only` does without."""
        return all(self.key in run for run in metrics["runs"])

    def comparable(self, *metrics: dict[str, Any]) -> bool:
        """Whether the values may be compared: those of generated code only if it ran in sandboxes of one level."""
        return bool(self.settings) or len({found["settings"].get("sandbox") for found in metrics}) == 1

    def results(self, metrics: dict[str, Any]) -> Tensor:
        """Values `[run, example]` float64."""
        import torch

        return torch.tensor([run[self.key] for run in metrics["runs"]], dtype=torch.float64)


POINTS = Measure("points", "correct", 100.0, 1)
NATS = Measure("nats", "log_likelihoods", 1.0, 3, frozenset({"backend", "dtype", "template"}))
