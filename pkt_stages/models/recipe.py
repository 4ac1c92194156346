"""The settings that every training of an adapter has in common, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples per optimizer step.
        lr: AdamW's learning rate after the warm-up.
        lr_schedule: its course after the warm-up; linear and cosine end at 0.
        warmup_ratio: share of the steps in which the rate rises linearly from 0.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are scaled to it; 0 leaves them.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, found {self.lr}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be at least 0 and below 1, found {self.warmup_ratio}")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")


def check_adapter_settings(params: Any) -> None:
    """Raise ValueError for values that make no sense; `params` is a stage's: rank, alpha, dropout, seeds and sizes."""
    for name in ("rank", "max_length"):
        if getattr(params, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(params, name)}")
    if params.num_examples is not None and params.num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, found {params.num_examples}")
    if not params.alpha > 0:
        raise ValueError(f"alpha must be above 0, found {params.alpha}")
    if not 0 <= params.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {params.dropout}")
    if not params.seeds or len(set(params.seeds)) < len(params.seeds) or min(params.seeds) < 0:
        raise ValueError(f"seeds must be different numbers from 0, found {list(params.seeds)}")
