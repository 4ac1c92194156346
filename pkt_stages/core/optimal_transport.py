"""Soft correspondences between the units and layers of two models by optimal transport (Transport & Merge, 2602.05495).

Activations are means over a text's tokens, rows texts. A unit of one model and one of another are as far apart as their
activations are uncorrelated; Sinkhorn's plan Q [n_t, n_s] says how much of which source unit goes to which of the
target, and the plan's cost how far apart two layers are; from those costs a second plan P [L_t, L_s] between layers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def unit_costs(target: Float[Tensor, "text n_t"], source: Float[Tensor, "text n_s"]) -> Float64[Tensor, "n_t n_s"]:
    """1 - Pearson's correlation over texts; 1 where a unit does not vary."""
    scaled = []
    for values in (target.double(), source.double()):
        middle = values - values.mean(0)
        norm = middle.norm(dim=0)
        # What is left of a constant is rounding.
        varies = norm > 1e-9 * values.norm(dim=0)
        scaled.append(torch.where(varies, middle / torch.where(varies, norm, 1.0), 0.0))
    return 1 - (scaled[0].mT @ scaled[1]).clamp(-1, 1)


def sinkhorn(
    costs: Float[Tensor, "*batch n m"], penalty: float, *, rounds: int, tolerance: float
) -> Float64[Tensor, "*batch n m"]:
    """The entropic plan of mass 1 between uniform weights: rows sum to 1 / n, columns to 1 / m.

    Args:
        penalty: of the plan's negative entropy.
        rounds: at most so many; it stops once no row's potential moved by more than `tolerance`.
    """
    scaled = -costs.double() / penalty
    n, m = scaled.shape[-2:]
    rows = scaled.new_zeros(scaled.shape[:-1])
    columns = scaled.new_zeros((*scaled.shape[:-2], m))
    for _ in range(rounds):
        before = rows
        rows = -math.log(n) - torch.logsumexp(scaled + columns[..., None, :], dim=-1)
        columns = -math.log(m) - torch.logsumexp(scaled + rows[..., :, None], dim=-2)
        if float((rows - before).abs().max()) <= tolerance:
            break
    plan = (scaled + rows[..., :, None] + columns[..., None, :]).exp()
    return plan / plan.sum((-2, -1), keepdim=True)


def layer_plan(
    costs: Float[Tensor, "l_t l_s"], penalty: float, *, rounds: int, tolerance: float
) -> Float64[Tensor, "l_t l_s"]:
    """The plan between layers; its costs count from the smallest, in units of their lower median."""
    shifted = costs.double() - costs.double().min()
    scale = shifted.flatten().median()  # torch's is the lower one
    plan = sinkhorn(shifted / scale.clamp_min(1e-12), penalty, rounds=rounds, tolerance=tolerance)
    for _ in range(3):
        plan = plan / plan.sum(1, keepdim=True) / len(plan)
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


def layer_weights(output: Float[Tensor, "l_t l_s"], input: Float[Tensor, "l_t l_s"]) -> Float64[Tensor, "l_t l_s"]:
    """How much of which source layer a target layer gets, rows of sum 1: from the plans of outputs and of inputs."""
    both = (output.double() * input.double()).sqrt()
    return both / both.sum(1, keepdim=True)
