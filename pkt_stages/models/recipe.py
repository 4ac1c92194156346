"""Settings of trainings: what those of an adapter have in common, and how a mapping is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pkt_stages.encoding import EncodingParams
from pkt_stages.options import DType
from pkt_stages.params import option

Init = Literal["random", "pissa", "seeking"]  # what LoRA starts from
Block = Literal["sensitive", "random", "uniform", "subclone"]  # which part of the source's weights Seeking takes


@dataclass(frozen=True)
class TrainingParams(EncodingParams):
    """How to train, on what, and how often."""

    rank: int = option(16, "Rank r of the adapter that is trained.", ge=1)
    alpha: float = option(16.0, "The update is alpha / rank times B A.", gt=0)
    dropout: float = option(0.05, "Dropout of the adapter's input, 0 .. 1.", ge=0, lt=1)
    epochs: int = option(5, "Passes over the examples.", ge=1)
    batch_size: int = option(64, "Examples per optimizer step.", ge=1)
    lr: float = option(3e-4, "Learning rate of AdamW after the warm-up.", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "linear", "Course of the rate after the warm-up: constant, linear or cosine; the last two end at 0."
    )
    warmup_ratio: float = option(0.03, "Share of the steps in which the rate rises from 0.", ge=0, lt=1)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", ge=0)
    max_grad_norm: float = option(1.0, "Longer gradients are scaled to this norm; 0: never.", ge=0)
    train_set: Literal["train", "align"] = option(
        "train", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )
    num_examples: int | None = option(None, "Only the first so many examples; None: all.", ge=1)
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "One training each: of the initial weights, data order, dropout and drawn answers.", ge=0
    )
    dtype: DType = option("float32", "The models' dtype in training; auto: the checkpoint's.")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, found {list(self.seeds)}")


ALIGNMENT = ("mapping", "source_rows", "place")  # functions of an alignment's file, see methods/laten.py


@dataclass(frozen=True)
class AlignmentParams:
    """How a mapping from source rows to target rows is trained (METHODS section 4)."""

    steps: int = option(4, "Optimizer steps, each with the rows of one extract example.", ge=1)
    batch_size: int = option(16, "Examples per step: the extract example and align examples.", ge=1)
    lr: float = option(3e-5, "Learning rate of AdamW (peak of onecycle).", gt=0)
    schedule: Literal["constant", "onecycle"] = option(
        "constant", "Learning rate over steps: constant, or onecycle over the extract examples (authors' code)."
    )
    penalty: float = option(1000.0, "Weight lambda of the sum over sites of mean(delta^2).", ge=0)
    loss_reduction: Literal["mean", "sum"] = option("mean", "Over a step's examples; sum is the authors' code.")
    validation_size: int = option(16, "Align examples held out to choose the step.", ge=1)
    weight_decay: float = option(0.05, "Weight decay of AdamW.", ge=0)
    beta1: float = option(0.9, "AdamW's beta1 (onecycle cycles its own).", ge=0, lt=1)
    beta2: float = option(0.95, "AdamW's beta2.", ge=0, lt=1)
    seed: int = option(0, "Seed of the initial weights, of the drawn examples and of a control's rows.")
