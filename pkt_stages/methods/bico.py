"""BiCo (2605.28444): as Theseus, with output maps from gradients in place of activations (METHODS 11.4).

What training adds to a weight is a sum of products of gradients at its output and activations at its input, so that its
output side is carried over by the orthogonal map that brings the source's gradients dL/dy nearest to the target's, its
input side by that of the activations. The loss is that of the align examples' answers, the same for both models, before
any training (`pkt gradients`): it needs labels, and no change of a weight. Exact where both activations and gradients
differ by isometries, so on a source that is the target with units and bases turned; neurons that add nothing have no
gradient, so that filler does not disturb the output side. Delicate: in the last layer only tokens that predict an
answer have a gradient, so that a map needs as many answer tokens as it is wide; and gradients are small against an
absolute floor of whitened eigenvalues, so the floor is relative here.

What differs from the published code: input maps come from the texts of `pkt correlate`, which serve all rows, instead
of the labelled examples (texts made of the examples give those); `fold: false` and `relative: false` give its
arithmetic.

Memory of one layer pair, 13B -> 7B: three maps [13824, 11008] in float64, 1.2 GB each, and their decompositions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from pkt_stages.core.transport import Polar
from pkt_stages.errors import UserError
from pkt_stages.methods.theseus import INPUT_OF, random_maps
from pkt_stages.models.correlation import INPUTS, Correlation, Pair, PairSums
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.folding import WRITES
from pkt_stages.models.gradients import NORMS, Gradients
from pkt_stages.models.sites import PROJECTIONS, Geometry
from pkt_stages.models.transport import (
    Maps,
    Models,
    PolarParams,
    Sides,
    at_input,
    carry,
    check_grams,
    check_texts,
    fitted,
    through,
)
from pkt_stages.params import option


@dataclass(frozen=True)
class Params(PolarParams):
    """Settings of the method."""

    inputs: Literal["activations", "gradients"] = option(
        "activations",
        "What input maps are made of; gradients: dL/dx, whose rank is at most the output's width.",
    )
    relative: bool = option(True, "Floor whitened eigenvalues relative to their mean; false: at 1e-6, as published.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights of every layer that has a partner.

    Raises:
        UserError: as `carry`; no --gradients, or of other models or layer pairs; too few texts or answers; whitening
            without the sums that it needs.
    """
    *_, folder = inputs.only("target", "source", "base", "correlation", "gradients", spare=["texts"])

    def fit(models: Models, found: Correlation) -> tuple[None, Callable[[Pair], Maps]]:
        gradients = Gradients(folder)
        gradients.check(found.meta["source"], found.meta["target"])
        if gradients.pairs != found.pairs:
            raise UserError(f"{folder}: of other pairs of layers than {found.path}; run `pkt gradients` on that one")
        if params.whitening:
            check_grams(gradients)
            if params.inputs == "activations":
                check_grams(found)
        return None, lambda pair: fitted_maps(models, found, gradients, pair, params)

    def draw(sizes: tuple[Geometry, Geometry], _residual: Tensor, generator: Generator) -> Maps:
        return random_maps(sizes, False, generator)

    return carry(inputs, params, vocabulary=False, fit=fit, draw=draw, fold=params.fold, spare=["texts", "gradients"])


def fitted_maps(models: Models, found: Correlation, gradients: Gradients, pair: Pair, params: Params) -> Maps:
    """The maps of one pair of layers.

    Raises:
        UserError: too few tokens for a map that they could determine.
    """
    grams, where = params.whitening > 0, f"of layers {pair[0]}-{pair[1]}"
    asked, sums = gradients.of(pair), found.of(pair)
    # Gains go apart only where they are not folded.
    places = (*PROJECTIONS, *(() if params.fold else NORMS))
    at_outputs = {name: gradient(models, asked, name, pair, grams=grams) for name in places}
    output = {name: fitted(sides, params, relative=params.relative) for name, sides in at_outputs.items()}
    for name, made in output.items():
        check_answers(gradients, made, f"the gradient at {name} {where}")
    into: dict[str, Polar] = {}
    if params.inputs == "gradients":
        for weight in PROJECTIONS:
            sides = through(models, at_outputs[weight], weight, pair)
            into[weight] = fitted(sides, params, relative=params.relative)
    else:
        by_input = {}
        for name in INPUTS:
            sides = at_input(models, sums, name, pair, grams=grams)
            by_input[name] = fitted(sides, params, relative=params.relative)
            check_texts(found, by_input[name], f"{name} {where}")
        into = {weight: by_input[INPUT_OF[weight]] for weight in PROJECTIONS}
    ranks = {f"{weight}.in": (p.rank, p.full_rank) for weight, p in into.items()}
    ranks |= {f"{name}.out": (p.rank, p.full_rank) for name, p in output.items()}
    gain = {weight: output[INPUT_OF[weight]].map for weight in ("attn_q", "ffn_gate") if not params.fold}
    return Maps({w: output[w].map for w in PROJECTIONS}, {w: p.map for w, p in into.items()}, ranks, gain)


def gradient(models: Models, asked: PairSums, name: str, pair: Pair, *, grams: bool) -> Sides:
    """What is known of the gradient at a place; for folded weights that write to the stream, of their folded output."""
    cross, (s, t), own = asked.cross(name), asked.sums(name), asked.grams(name) if grams else None
    if models.fold and name in WRITES:
        first, second = (m.written(name, n) for m, n in zip((models.base, models.target), pair, strict=True))
        first, second = first.expand_as(s), second.expand_as(t)
        cross, s, t = cross / torch.outer(first, second), s / first, t / second
        if own is not None:
            own = own[0] / torch.outer(first, first), own[1] / torch.outer(second, second)
    return Sides(cross, (s, t), own, asked.count)


def check_answers(gradients: Gradients, found: Polar, what: str) -> None:
    """Raise UserError if a map is short of full rank for want of answers."""
    count = int(gradients.meta["num_answer_tokens"])
    if found.rank < found.full_rank and count < 2 * found.full_rank:
        raise UserError(
            f"{gradients.path}: {count} answer tokens give the map of {what} rank {found.rank} of {found.full_rank};"
            " run `pkt gradients` on more examples"
        )
