"""Which examples, learning rate and beta1 every step of the alignment uses (METHODS sections 4 and 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# The authors' OneCycleLR: its arguments where they differ from torch's defaults, and those defaults.
WARM_UP, DIVISOR, BETA1_LOW, BETA1_HIGH = 0.1, 25.0, 0.85, 0.95


@dataclass(frozen=True)
class Rates:
    lr: float
    beta1: float


def rates(schedule: str, step: int, *, lr: float, beta1: float, total_steps: int) -> Rates:
    """What step `step` (from 0) uses.

    Args:
        schedule: `constant`, or `onecycle`, torch's OneCycleLR with pct_start 0.1, final_div_factor 1 and cycled
            beta1, as in the authors' code: lr is the peak, and `beta1` is not used.
        total_steps: of `onecycle`: the number of extract examples, of which only the first steps may be taken.

    Raises:
        ValueError: an unknown schedule, or a step outside the cycle.
    """
    if schedule == "constant":
        return Rates(lr, beta1)
    if schedule != "onecycle":
        raise ValueError(f"schedule must be constant or onecycle, found {schedule!r}")
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a cycle of {total_steps} steps")
    # With fewer than ten steps the peak lies before the first step, which is why these never warm up.
    peak = WARM_UP * total_steps - 1
    valley = 0 if step < peak else total_steps - 1
    height = (1 + math.cos(math.pi * (step - peak) / (valley - peak))) / 2  # 1 at the peak, 0 at both ends
    return Rates(
        lr=lr / DIVISOR + (lr - lr / DIVISOR) * height,
        beta1=BETA1_HIGH - (BETA1_HIGH - BETA1_LOW) * height,
    )


def draw_examples(
    num_examples: int, *, num_held_out: int, per_step: int, steps: int, seed: int
) -> tuple[list[int], list[list[int]]]:
    """Indices of the held-out examples, and of each step's examples among the others.

    Drawn without repetition within a step; fewer steps are the beginning of more.

    Raises:
        ValueError: fewer than `num_held_out + per_step` examples.
    """
    if num_examples < num_held_out + per_step:
        raise ValueError(f"{num_examples} examples are fewer than {num_held_out} + {per_step}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_examples, generator=generator)
    pool = order[num_held_out:]
    drawn = [pool[torch.randperm(len(pool), generator=generator)[:per_step]].tolist() for _ in range(steps)]
    return order[:num_held_out].tolist(), drawn
