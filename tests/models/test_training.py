from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models import training
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.lora import Lora, site_modules
from pkt_stages.models.recipe import Recipe

RECIPE = Recipe(
    epochs=3,
    batch_size=2,
    lr=1e-2,
    lr_schedule="linear",
    warmup_ratio=0.25,
    weight_decay=0.0,
    max_grad_norm=1.0,
)
EXAMPLES = [Encoded([0, 7 + i, 9, 1], [-100, -100, 9, 1]) for i in range(7)]


def train(folder: Path, target: Path, recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Train one seed; its record in scratch, which holds every step."""

    def start(seed: int) -> training.Start:
        sizes = Lora(site_modules(3), rank=2, alpha=2.0, dropout=0.0)
        return training.started(load_model(resolve(str(target))), sizes, init="random", blocks={}, examples=EXAMPLES)

    def trainer(started: training.Start, arguments: dict[str, Any]) -> Any:
        from transformers import Trainer, TrainingArguments

        data: Any = [{"ids": e.ids, "labels": e.labels} for e in EXAMPLES]
        return Trainer(
            started.model, TrainingArguments(**arguments), data_collator=training.collate, train_dataset=data
        )

    training.train_seeds(
        [5],
        folder_of=lambda seed: folder,
        start=start,
        trainer=trainer,
        recipe=recipe,
        micro_batch_size=4,
        device=device,
        base_model="target",
        log=lambda record: None,
    )
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def rate(schedule: str, step: int) -> float:
    """The share of lr in a step (from 0) of 12 steps, 3 of them warm-up."""
    if step < 3:
        return step / 3
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
    return (12 - step) / 9 if schedule == "linear" else 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_follows_the_schedule(schedule: Any, target_folder: Path, tmp_path: Path) -> None:
    steps = train(tmp_path / "run", target_folder, replace(RECIPE, lr_schedule=schedule))["steps"]
    assert [step["lr"] for step in steps] == pytest.approx([1e-2 * rate(schedule, i) for i in range(12)])
    # 7 examples: the last step of an epoch has one.
    assert [math.ceil(step["epoch"] - 1e-6) for step in steps] == [1] * 4 + [2] * 4 + [3] * 4
    assert training.token_counts(EXAMPLES, RECIPE) == {
        "num_examples": 7,
        "num_steps": 12,
        "num_supervised_tokens": 42,
    }


def test_several_gpus_are_refused(target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", target_folder, RECIPE, device="cuda")
    assert str(caught.value) == (
        "2 GPUs are visible, one process trains on one; set CUDA_VISIBLE_DEVICES, or start one process per GPU with"
        " torchrun"
    )


@pytest.mark.parametrize(
    ("batch_size", "most", "processes", "micro"),
    [(64, 4, 1, 4), (64, 100, 1, 64), (6, 4, 1, 3), (7, 4, 1, 1), (64, 4, 2, 4), (64, 100, 2, 32), (6, 4, 2, 3)],
)
def test_micro_batches_divide_the_batch(batch_size: int, most: int, processes: int, micro: int, tmp_path: Path) -> None:
    found = training._arguments(replace(RECIPE, batch_size=batch_size), tmp_path, 0, most, "cpu", processes)
    assert found["per_device_train_batch_size"] == micro
    assert found["gradient_accumulation_steps"] * micro * processes == batch_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, found -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must not be negative, found nan"),
    ],
)
def test_recipes_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        replace(RECIPE, **change).check()
