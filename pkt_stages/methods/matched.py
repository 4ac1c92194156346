"""Matched transport (ours): what training added to the source, carried over unit by unit (METHODS 11.2).

An orthogonal map takes the residual stream over, FFN neurons and heads are matched one to one, and only inside a
matched pair of heads may v and o be turned; q and k may not, since RoPE ties their entries together. Where the source
is the target written in another shape, filler included, the change is recovered exactly, because the right maps are of
this kind and the texts determine them. `maps: random` is the control: random isometries and pairings.

Memory of one layer pair, 13B -> 7B: the neurons' correlations [13824, 11008] in float64, 1.2 GB, and some copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pkt_stages.core.transport import Polar, assignment, correlation, head_likeness, matched_heads, polar
from pkt_stages.models.correlation import FINAL, Correlation, Pair
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.sites import Geometry
from pkt_stages.models.transport import MapParams, Maps, Models, Units, at_input, carry, check_texts
from pkt_stages.params import option


@dataclass(frozen=True)
class Params(MapParams):
    """Settings of the method."""

    vocabulary: bool = option(True, "Carry over what training added to embedding and head, too.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights of every layer that has a partner, and of embedding and head.

    Raises:
        UserError: as `carry`, or too few texts.
    """

    def fit(models: Models, found: Correlation) -> tuple[Polar, Callable[[Pair], Maps]]:
        whole = polar(at_input(models, found.of(None), FINAL, (0, 0)).cross, params.tolerance)
        check_texts(found, whole, "the residual stream")
        sizes = (models.base.sizes, models.target.sizes)
        return whole, lambda pair: fitted_maps(found, pair, sizes, whole.map, params.tolerance)

    return carry(inputs, params, vocabulary=params.vocabulary, fit=fit, draw=random_maps)


def fitted_maps(
    found: Correlation, pair: Pair, sizes: tuple[Geometry, Geometry], residual: Tensor, tolerance: float
) -> Maps:
    """The maps of one pair of layers, from what both compute on the texts."""
    sums = found.of(pair)
    neurons = correlation(sums.cross("neurons"), sums.sums("neurons"), sums.squares("neurons"), sums.count)
    likeness = head_likeness(sums.cross("heads"), sums.sums("heads"), sums.heads(), sums.count)
    partners = matched_heads(likeness, sizes[0].num_kv_heads, sizes[1].num_kv_heads)
    turns = turns_of(sums.cross("heads"), partners, sizes, tolerance)
    return unit_maps(residual, Units(assignment(neurons)), partners, turns, sizes)


def random_maps(sizes: tuple[Geometry, Geometry], residual: Tensor, generator: Generator) -> Maps:
    """Random ones of the same kind."""
    likeness = torch.rand(sizes[0].num_heads, sizes[1].num_heads, generator=generator, dtype=torch.float64)
    partners = matched_heads(likeness, sizes[0].num_kv_heads, sizes[1].num_kv_heads)
    cross = torch.randn(sizes[0].num_attn_neurons, sizes[1].num_attn_neurons, generator=generator, dtype=torch.float64)
    neurons = torch.full((sizes[1].d_ff,), -1)
    count = min(sizes[0].d_ff, sizes[1].d_ff)
    places = torch.randperm(sizes[1].d_ff, generator=generator)[:count]
    neurons[places] = torch.randperm(sizes[0].d_ff, generator=generator)[:count]
    return unit_maps(residual, Units(neurons), partners, turns_of(cross, partners, sizes, 0.0), sizes)


def turns_of(cross: Tensor, partners: Tensor, sizes: tuple[Geometry, Geometry], tolerance: float) -> Tensor:
    """[target key/value head, d_head of the source, d_head of the target]: how v turns inside each matched group."""
    blocks = cross.unflatten(1, (sizes[1].num_heads, -1)).unflatten(0, (sizes[0].num_heads, -1))
    size = sizes[1].num_heads // sizes[1].num_kv_heads
    found = torch.zeros(sizes[1].num_kv_heads, sizes[0].d_head, sizes[1].d_head, dtype=torch.float64)
    for place in range(sizes[1].num_kv_heads):
        heads = [(int(partners[h]), h) for h in range(place * size, (place + 1) * size) if partners[h] >= 0]
        if heads:
            found[place] = polar(sum(blocks[s, :, t] for s, t in heads), tolerance).map
    return found


def unit_maps(
    residual: Tensor, neurons: Units, partners: Tensor, turns: Tensor, sizes: tuple[Geometry, Geometry]
) -> Maps:
    """The maps of one pair of layers from those of the residual stream, of neurons, of heads and inside heads."""
    source, target = sizes
    groups = (source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads)
    heads = torch.zeros(source.num_heads, source.d_head, target.num_heads, target.d_head, dtype=torch.float64)
    values = torch.zeros(source.num_kv_heads, source.d_head, target.num_kv_heads, target.d_head, dtype=torch.float64)
    shared = torch.full((target.num_kv_heads,), -1)  # by target key/value head the source's
    for t, s in enumerate(partners.tolist()):
        if s >= 0:
            place = t // groups[1]
            shared[place] = s // groups[0]
            heads[s, :, t] = turns[place]
            values[s // groups[0], :, place] = turns[place]
    return Maps(
        output={
            "attn_q": Units(_entries(partners, source.d_head, target.d_head)),
            "attn_k": Units(_entries(shared, source.d_head, target.d_head)),
            "attn_v": values.flatten(2).flatten(0, 1),
            "attn_o": residual,
            "ffn_gate": neurons,
            "ffn_up": neurons,
            "ffn_down": residual,
        },
        input={
            "attn_q": residual,
            "attn_k": residual,
            "attn_v": residual,
            "attn_o": heads.flatten(2).flatten(0, 1),
            "ffn_gate": residual,
            "ffn_up": residual,
            "ffn_down": neurons,
        },
    )


def _entries(partners: Tensor, d_source: int, d_target: int) -> Tensor:
    """By entry of the target's heads the entry of the source's at the same place in the head, -1 for none."""
    inside = torch.arange(d_target)
    found = partners[:, None] * d_source + inside
    return torch.where((partners[:, None] >= 0) & (inside < d_source), found, -1).flatten()
