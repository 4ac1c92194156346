"""Which examples every step of the alignment uses, and its learning rate (METHODS sections 4 and 9)."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR


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


def scheduler(schedule: str, optimizer: torch.optim.Optimizer, *, lr: float, total_steps: int) -> LRScheduler:
    """What sets an optimizer's learning rate, and beta1, before each step.

    Args:
        schedule: `constant`; or `onecycle`, as in the authors' code: `lr` is the peak and beta1 is cycled. With fewer
            than ten steps the peak lies before the first one, so that there is no warm-up.
        total_steps: of `onecycle`: the number of extract examples, of which only the first steps may be taken.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "constant":
        return LambdaLR(optimizer, lambda _: 1.0)
    if schedule != "onecycle":
        raise ValueError(f"schedule must be constant or onecycle, found {schedule!r}")
    # A hair less than the authors' 0.1, at which a cycle of ten steps divides by zero; it then starts at its peak.
    return OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps, pct_start=0.1 - 1e-12, final_div_factor=1.0)
