from __future__ import annotations

import math
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.params import build


def test_the_defaults_are_the_papers() -> None:
    found = TrainingParams()
    assert (found.rank, found.alpha, found.dropout) == (16, 16.0, 0.05)
    assert (found.epochs, found.batch_size, found.lr, found.lr_schedule) == (5, 64, 3e-4, "linear")
    assert (found.warmup_ratio, found.weight_decay, found.max_grad_norm) == (0.03, 0.0, 1.0)
    assert (found.max_length, found.seeds, found.dtype) == (2048, (0, 1, 2), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"alpha": 0.0}, "alpha must be above 0, found 0.0"),
        ({"max_length": 0}, "max_length must be at least 1, found 0"),
        ({"num_examples": 0}, "num_examples must be at least 1, found 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1, found 1.0"),
        ({"lr": 0.0}, "lr must be above 0, found 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, found -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be at least 0, found nan"),
        ({"seeds": [0, -1]}, "seeds must be at least 0, found -1"),
        ({"seeds": []}, "seeds must be different numbers, at least one, found []"),
        ({"seeds": [1, 1]}, "seeds must be different numbers, at least one, found [1, 1]"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(TrainingParams, change, "here")
    assert str(caught.value) == f"here: {message}"
