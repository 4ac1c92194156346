"""Language-model losses of encoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pkt_stages.core.losses import token_mean_loss
from pkt_stages.encoding import Encoded
from pkt_stages.models.batches import padded


def home(model: Any) -> torch.device:
    """The device that takes the token ids; of a sharded model the first."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def micro_batches(examples: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    """The examples in order, at most `size` at a time."""
    return [list(examples[start : start + size]) for start in range(0, len(examples), size)]


def example_losses(model: Any, examples: Sequence[Encoded]) -> Tensor:
    """Each example's mean loss over its supervised tokens, nats: [example] float32 on the model's first device.

    Examples are padded on the right, where a causal model's useful positions cannot see it.
    """
    ids = padded([e.ids for e in examples], 0).to(home(model))
    mask = padded([[1] * len(e.ids) for e in examples], 0).to(home(model))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = padded([e.labels for e in examples], -100).to(logits.device)
    return token_mean_loss(logits, labels).to(home(model))
