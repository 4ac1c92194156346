"""Language-model losses per example, and the objective of an alignment step (METHODS section 4).

objective = mean over examples (mean over tokens of the language-model loss)
            + penalty_weight * sum over sites of mean(delta^2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# The delta rows of a micro-batch's injection -> the loss of each of its examples.
MicroBatchLoss = Callable[[Mapping[str, Tensor]], Float[Tensor, " example"]]


def token_mean_loss(
    logits: Float[Tensor, "example token vocab"], labels: Int[Tensor, "example token"]
) -> Float[Tensor, " example"]:
    """Each example's mean loss in nats over its supervised tokens.

    Args:
        logits: at each position, for the token after it.
        labels: the tokens themselves; -100 where no loss is taken. NaN for an example without a supervised token.
    """
    predicted, wanted = logits[:, :-1].float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(wanted.shape).sum(-1) / (wanted != -100).sum(-1)


def mean_square(deltas: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Sum over the sites of mean(delta^2); each site counts the same, whatever its number of rows."""
    return torch.stack([delta.square().mean() for delta in deltas.values()]).sum()


@dataclass(frozen=True)
class StepLosses:
    """One step's losses before the update.

    Attributes:
        per_example: language-model loss of each example, nats per token.
        mean_square: sum over the sites of mean(delta^2).
        objective: what was differentiated.
    """

    per_example: Float[Tensor, " example"]
    mean_square: float
    objective: float


def backward(
    network: nn.Module,
    rows: Mapping[str, Tensor],
    micro_batches: Iterable[MicroBatchLoss],
    *,
    penalty_weight: float,
    reduction: str,
) -> StepLosses:
    """Set the `.grad` of a mapping's parameters to the gradient of one step's objective.

    The mapping is evaluated once. Micro-batches add up the gradient of the delta rows; one backward pass takes it,
    and the penalty's, through the mapping. How examples are split into micro-batches changes rounding only.

    Args:
        network: maps rows by site to delta rows by site.
        rows: the extracted rows of the step's example by site, [layer_pair, k, d_source].
        micro_batches: each gives the losses of its examples under a delta.
        penalty_weight: lambda.
        reduction: `mean` divides by the number of examples; `sum` does not, and the penalty counts once per example,
            as in the authors' code.

    Raises:
        ValueError: an unknown reduction, or no example.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, found {reduction!r}")
    network.zero_grad(set_to_none=True)
    deltas: Mapping[str, Tensor] = network(rows)
    leaves = {site: delta.detach().requires_grad_() for site, delta in deltas.items()}
    losses = []
    for loss_of in micro_batches:
        losses.append(loss_of(leaves))
        losses[-1].sum().backward()
        losses[-1] = losses[-1].detach()
    if not losses:
        raise ValueError("a step needs at least one example")
    per_example = torch.cat(losses)
    scale = 1 / len(per_example) if reduction == "mean" else 1.0
    square = mean_square(deltas)
    penalty = square * (penalty_weight * scale * len(per_example))
    gradients = [leaf.grad * scale if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves.values()]
    torch.autograd.backward([*deltas.values(), penalty], [*gradients, None])
    objective = float(per_example.double().sum()) * scale + float(penalty.detach())
    return StepLosses(per_example, float(square.detach()), objective)


def value_range(delta: Tensor) -> dict[str, float]:
    """Minimum, maximum and root mean square of a delta's entries."""
    found = delta.detach().double()
    return {"min": float(found.min()), "max": float(found.max()), "rms": float(found.square().mean().sqrt())}
