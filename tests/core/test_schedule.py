from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pkt_stages.core.schedule import draw_examples, scheduler


def rates(schedule: str, steps: int, *, lr: float, beta1: float, total_steps: int) -> list[tuple[float, float]]:
    """Learning rate and beta1 that an optimizer has at each of its first steps."""
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr, betas=(beta1, 0.95))
    plan = scheduler(schedule, adam, lr=lr, total_steps=total_steps)
    found = []
    for _ in range(steps):
        found.append((adam.param_groups[0]["lr"], adam.param_groups[0]["betas"][0]))
        adam.step()
        plan.step()
    return found


def test_onecycle_agrees_with_the_published_code(golden: Path) -> None:
    recorded = json.loads((golden / "laten" / "D_onecycle_schedule.json").read_text())
    assert set(recorded) == {"1", "2", "3", "4", "8", "16", "20", "32"}
    for total, steps in recorded.items():
        found = rates("onecycle", len(steps), lr=3e-5, beta1=0.9, total_steps=int(total))
        for (lr, beta1), expected in zip(found, steps, strict=True):
            assert lr == pytest.approx(expected["lr"], rel=1e-9)
            assert beta1 == pytest.approx(expected["beta1"], rel=1e-9)


def test_a_cycle_of_ten_starts_at_its_peak() -> None:
    assert rates("onecycle", 1, lr=3e-5, beta1=0.9, total_steps=10) == [(pytest.approx(3e-5), pytest.approx(0.85))]


def test_constant_rates() -> None:
    assert set(rates("constant", 9, lr=0.1, beta1=0.7, total_steps=3)) == {(0.1, 0.7)}


def test_held_out_examples_are_never_drawn() -> None:
    held_out, steps = draw_examples(12, num_held_out=4, per_step=5, steps=50, seed=1)
    assert len(set(held_out)) == 4
    assert all(len(set(step)) == 5 for step in steps)
    assert {i for step in steps for i in step} == set(range(12)) - set(held_out)
    assert draw_examples(12, num_held_out=4, per_step=5, steps=2, seed=1) == (held_out, steps[:2])
    assert draw_examples(12, num_held_out=4, per_step=5, steps=50, seed=2) != (held_out, steps)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="schedule must be constant or onecycle, found 'linear'"):
        rates("linear", 1, lr=1.0, beta1=0.9, total_steps=1)
    with pytest.raises(ValueError, match="7 examples are fewer than 4 \\+ 4"):
        draw_examples(7, num_held_out=4, per_step=4, steps=1, seed=0)
