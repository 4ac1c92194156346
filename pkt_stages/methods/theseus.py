"""Theseus (2602.12952): what training added to the source, carried over projection by projection (METHODS 11.3).

Each projection gets the two orthogonal maps that bring the source's activations at its input and output nearest to the
target's. Exact where those activations differ by an isometry. Delicate: the outputs of gate and up span no more than
d_model < d_ff directions, so that their own map is arbitrary in the others; `shared_ffn` takes one map for the whole
FFN from its neurons' coefficients instead. Where a map is short of full rank the rest of it is zero and the rank is
noted down. `maps: random` is the control.

Memory of one layer pair, 13B -> 7B: a map of the FFN [13824, 11008] in float64, 1.2 GB, its decomposition three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from pkt_stages.core.transport import (
    Polar,
    head_likeness,
    head_map,
    matched_heads,
    random_isometry,
)
from pkt_stages.models.correlation import FINAL, INPUTS, Correlation, Pair
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.sites import PROJECTIONS, Geometry
from pkt_stages.models.transport import (
    Maps,
    Models,
    PolarParams,
    at_input,
    at_output,
    carry,
    check_grams,
    check_texts,
    fitted,
)
from pkt_stages.params import option

INPUT_OF = {
    "attn_q": "attn_in",
    "attn_k": "attn_in",
    "attn_v": "attn_in",
    "attn_o": "heads",
    "ffn_gate": "ffn_in",
    "ffn_up": "ffn_in",
    "ffn_down": "neurons",
}


@dataclass(frozen=True)
class Params(PolarParams):
    """Settings of the method."""

    vocabulary: bool = option(False, "Carry over what training added to embedding and head, too.")
    heads: bool = option(False, "One map per matched pair of heads, where heads are inputs or outputs.")
    shared_ffn: bool = option(True, "One map for the whole FFN, from its neurons' coefficients.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights of every layer that has a partner, and of embedding and head if wanted.

    Raises:
        UserError: as `carry`; too few texts; whitening without the correlation's grams.
    """

    def fit(models: Models, found: Correlation) -> tuple[Polar | None, Callable[[Pair], Maps]]:
        if params.whitening:
            check_grams(found)
        whole = None
        if params.vocabulary:
            sides = at_input(models, found.of(None), FINAL, (0, 0), grams=params.whitening > 0)
            whole = fitted(sides, params)
        return whole, lambda pair: fitted_maps(models, found, pair, params)

    def draw(sizes: tuple[Geometry, Geometry], _residual: Tensor, generator: Generator) -> Maps:
        return random_maps(sizes, params.shared_ffn, generator)

    return carry(inputs, params, vocabulary=params.vocabulary, fit=fit, draw=draw, fold=params.fold)


def fitted_maps(models: Models, found: Correlation, pair: Pair, params: Params) -> Maps:
    """The maps of one pair of layers, from what both compute on the texts.

    Raises:
        UserError: too few tokens for a map that they could determine.
    """
    sums = found.of(pair)
    inputs = {name: at_input(models, sums, name, pair, grams=params.whitening > 0) for name in INPUTS}
    partners: list[list[int]] | None = None
    if params.heads:
        sizes = models.base.sizes, models.target.sizes
        likeness = head_likeness(sums.cross("heads"), sums.sums("heads"), sums.heads(), sums.count)
        chosen = matched_heads(likeness, sizes[0].num_kv_heads, sizes[1].num_kv_heads)
        partners = [[int(head)] if head >= 0 else [] for head in chosen]
    by_input = {name: fitted(sides, params) for name, sides in inputs.items()}
    if partners is not None:
        by_input["heads"] = head_map(inputs["heads"].cross, partners, models.base.sizes.num_heads, params.tolerance)
    for name, made in by_input.items():
        check_texts(found, made, f"{name} of layers {pair[0]}-{pair[1]}")
    by_output = {}
    for weight in PROJECTIONS:
        if weight in ("ffn_gate", "ffn_up") and params.shared_ffn:
            by_output[weight] = by_input["neurons"]
            continue
        sides = at_output(models, inputs[INPUT_OF[weight]], weight, pair)
        if partners is not None and weight in ("attn_q", "attn_k", "attn_v"):
            by_output[weight] = _by_heads(sides.cross, partners, weight, models, params.tolerance)
        else:
            by_output[weight] = fitted(sides, params)
    ranks = {f"{name}.in": (p.rank, p.full_rank) for name, p in by_input.items()}
    ranks |= {f"{weight}.out": (p.rank, p.full_rank) for weight, p in by_output.items()}
    into = {weight: by_input[INPUT_OF[weight]].map for weight in PROJECTIONS}
    return Maps({weight: p.map for weight, p in by_output.items()}, into, ranks)


def _by_heads(cross: Tensor, partners: list[list[int]], weight: str, models: Models, tolerance: float) -> Polar:
    """The map of the outputs of q, or of k or v, whose heads are those of the matched groups."""
    source, target = models.base.sizes, models.target.sizes
    if weight == "attn_q":
        return head_map(cross, partners, source.num_heads, tolerance)
    groups = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    shared: list[list[int]] = []
    for first in range(0, target.num_heads, groups[1]):
        found = {head // groups[0] for heads in partners[first : first + groups[1]] for head in heads}
        shared.append(sorted(found))
    return head_map(cross, shared, source.num_kv_heads, tolerance)


def random_maps(sizes: tuple[Geometry, Geometry], shared_ffn: bool, generator: Generator) -> Maps:
    """Random isometries of the same sizes, shared where the fitted ones are."""

    def drawn(weight: str, side: int) -> Tensor:
        source, target = (size.weight_shape(weight)[side] for size in sizes)
        return random_isometry(source, target, generator)

    inputs = {name: drawn(weight, 1) for name, weight in INPUTS.items()}
    output = {
        weight: inputs["neurons"] if weight in ("ffn_gate", "ffn_up") and shared_ffn else drawn(weight, 0)
        for weight in PROJECTIONS
    }
    return Maps(output, {weight: inputs[INPUT_OF[weight]] for weight in PROJECTIONS})
