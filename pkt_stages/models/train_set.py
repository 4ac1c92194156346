"""What a training sees: encoded examples, how much they are, and their batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pkt_stages.encoding import Encoded, Labels, encode
from pkt_stages.examples import read_examples
from pkt_stages.models.batches import padded, padding_mask
from pkt_stages.models.recipe import TrainingParams


def read_train(tokenizer: Any, path: Path, params: TrainingParams, labels: Labels = "answer") -> list[Encoded]:
    """The first `num_examples` of a file, encoded; all of them by default.

    Raises:
        UserError: malformed or too long examples, or fewer than asked for.
    """
    found = read_examples(path, params.num_examples)
    how: dict[str, Any] = {"template": params.template, "max_length": params.max_length, "labels": labels}
    return [encode(tokenizer, e, **how) for e in found]


def rows(examples: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """The examples as a Trainer's data set."""
    return [{"ids": e.ids, "labels": e.labels} for e in examples]


def collate(examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Some of `rows` as a batch, padded on the right."""
    ids = [example["ids"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padding_mask(ids),
        "labels": padded([example["labels"] for example in examples], -100),
    }


def counts(examples: Sequence[Encoded], params: TrainingParams) -> dict[str, int]:
    """How much a run trains on: examples, optimizer steps, supervised tokens over all epochs."""
    supervised = sum(label != -100 for e in examples for label in e.labels[1:])
    return {
        "num_examples": len(examples),
        "num_steps": params.epochs * math.ceil(len(examples) / params.batch_size),
        "num_supervised_tokens": params.epochs * supervised,
    }
