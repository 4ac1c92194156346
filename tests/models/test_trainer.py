"""A single training; what commands make of several is in test_training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from pkt_stages.encoding import Encoded
from pkt_stages.models import trainer
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.lora import Lora, Start, site_modules, started
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.models.train_set import collate, rows
from pkt_stages.parallel import Group

PARAMS = TrainingParams(epochs=3, batch_size=2, lr=1e-2, warmup_ratio=0.25)
EXAMPLES = [Encoded([0, 7 + i, 9, 1], [-100, -100, 9, 1]) for i in range(7)]


def train(folder: Path, target: Path, params: TrainingParams) -> trainer.Trained:
    def start() -> Start:
        sizes = Lora(site_modules(LlamaConfig(num_hidden_layers=3)), rank=2, alpha=2.0, dropout=0.0)
        return started(load_model(resolve(str(target))), sizes, "random", {}, EXAMPLES)

    def make_trainer(model: Any, arguments: dict[str, Any]) -> Any:
        from transformers import Trainer, TrainingArguments

        data: Any = rows(EXAMPLES)
        return Trainer(model, TrainingArguments(**arguments), data_collator=collate, train_dataset=data)

    return trainer.train(
        5,
        folder,
        start=start,
        make_trainer=make_trainer,
        arguments=trainer.training_arguments(params, folder / "trainer", 5, 4, "cpu", 1),
        base_model="target",
        log=lambda record: None,
        group=Group(),
    )


def rate(schedule: str, step: int) -> float:
    """The share of lr in a step (from 0) of 12 steps, 3 of them warm-up."""
    if step < 3:
        return step / 3
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
    return (12 - step) / 9 if schedule == "linear" else 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_follows_the_schedule(schedule: Any, target_folder: Path, tmp_path: Path) -> None:
    found = train(tmp_path / "run", target_folder, replace(PARAMS, lr_schedule=schedule))
    steps = found.record["steps"]
    assert [step["lr"] for step in steps] == pytest.approx([1e-2 * rate(schedule, i) for i in range(12)])
    # 7 examples: the last step of an epoch has one.
    assert [math.ceil(step["epoch"] - 1e-6) for step in steps] == [1] * 4 + [2] * 4 + [3] * 4
    kept = trainer.finished(tmp_path / "run")
    assert kept is not None and kept.record == found.record
    assert kept.adapter.factors.keys() == found.adapter.factors.keys()


@pytest.mark.parametrize(
    ("batch_size", "most", "processes", "micro"),
    [(64, 4, 1, 4), (64, 100, 1, 64), (6, 4, 1, 3), (7, 4, 1, 1), (64, 4, 2, 4), (64, 100, 2, 32), (6, 4, 2, 3)],
)
def test_micro_batches_divide_the_batch(batch_size: int, most: int, processes: int, micro: int, tmp_path: Path) -> None:
    found = trainer.training_arguments(replace(PARAMS, batch_size=batch_size), tmp_path, 0, most, "cpu", processes)
    assert found["per_device_train_batch_size"] == micro
    assert found["gradient_accumulation_steps"] * micro * processes == batch_size
