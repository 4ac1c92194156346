"""Which source layers and neurons go to which target layers and neurons (paper 4.2; METHODS section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pair_layers(
    source: Float[Tensor, "example source_layer"], target: Float[Tensor, "example target_layer"]
) -> Int[Tensor, "example layer_pair 2"]:
    """Pair source with target layers, per example, in depth order.

    The source's best-scored layers, as many as the target has, are put back in depth order and paired one to one with
    the target's layers. A source with fewer layers than the target is paired with that many of the target's best.

    Args:
        source, target: layer scores in nats; ties go to the lower layer.
    """
    count = min(source.shape[1], target.shape[1])
    return torch.stack([_best_in_order(source, count), _best_in_order(target, count)], dim=-1)


def _best_in_order(scores: Float[Tensor, "example layer"], count: int) -> Int[Tensor, "example count"]:
    return ranked(scores)[:, :count].sort(dim=-1).values


def ranked(scores: Float[Tensor, "*batch item"]) -> Int[Tensor, "*batch item"]:
    """Indices by score, highest first; ties go to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def top_neurons(
    scores: Float[Tensor, "example layer neuron"], layers: Int[Tensor, "example layer_pair"], count: int
) -> Int[Tensor, "example layer_pair count"]:
    """The `count` highest-scored neurons of each chosen layer, in score order; ties go to the lower index.

    Raises:
        ValueError: if a layer has fewer neurons than `count`.
    """
    if count > scores.shape[-1]:
        raise ValueError(f"{count} neurons wanted, a layer has {scores.shape[-1]}")
    chosen = scores.gather(1, layers[..., None].expand(-1, -1, scores.shape[-1]))
    return ranked(chosen)[..., :count]


def num_selected(rate: float, num_neurons: int) -> int:
    """floor(rate * num_neurons), exact for rates with a short decimal form such as 0.29 of 100."""
    return int(rate * num_neurons + 1e-9)
