"""Matched transport (ours): what training added to the source, carried over unit by unit (METHODS 11.2).

An orthogonal map takes the residual stream over, FFN neurons and heads are matched one to one, and only inside a
matched pair of heads may v and o be turned; q and k may not, since RoPE ties their entries together. Where the source
is the target written in another shape, filler included, the change is recovered exactly, because the right maps are of
this kind and the texts determine them. `maps: random` is the control: random isometries and pairings.

Memory of one layer pair, 13B -> 7B: the neurons' correlations [13824, 11008] in float64, 1.2 GB, and some copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from pkt_stages.core.transport import (
    TOLERANCE,
    assignment,
    correlation,
    head_likeness,
    matched_heads,
    polar,
    random_isometry,
)
from pkt_stages.models.changes import Change
from pkt_stages.models.correlation import FINAL, Correlation, Pair
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.sites import Geometry
from pkt_stages.models.transport import (
    Maps,
    Units,
    at_input,
    check_texts,
    check_vocabulary,
    identities,
    opened,
    transported,
)
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of the method."""

    vocabulary: bool = option(True, "Carry over what training added to embedding and head, too.")
    maps: Literal["fitted", "random"] = option("fitted", "Maps from the texts, or a control's random ones.")
    seeds: tuple[int, ...] = option((0,), "Of random maps: one change for each.")
    tolerance: float = option(TOLERANCE, "Singular values up to this share of the largest are rounding.", ge=0, lt=1)


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights of every layer that has a partner, and of embedding and head.

    Raises:
        UserError: other inputs than --target, --source, --base and --correlation; models that are not those of the
            correlation or differ in shape; too few texts; a vocabulary that cannot be carried over.
    """
    target, source, base, folder = inputs.only("target", "source", "base", "correlation")
    models, found = opened(target, source, base), Correlation(folder)
    of_target, of_source, of_base = identities(models)
    found.check(of_base, of_target)
    if params.vocabulary:
        check_vocabulary(models)
    sizes = (models.base.sizes, models.target.sizes)
    changes: dict[str, Change] = {}
    ranks: dict[str, list[int]] = {}
    if params.maps == "random":
        for seed in params.seeds:
            generator = torch.Generator().manual_seed(seed)
            residual = random_isometry(sizes[0].d_model, sizes[1].d_model, generator)
            drawn = {pair: random_maps(sizes, residual, generator) for pair in found.pairs}
            label = "delta" if len(params.seeds) == 1 else f"seed_{seed}"
            changes[label], _ = transported(
                models, found.pairs, drawn.__getitem__, residual if params.vocabulary else None
            )
    else:
        whole = polar(at_input(models, found.of(None), FINAL, (0, 0)).cross, params.tolerance)
        check_texts(found, whole, "the residual stream")
        changes["delta"], ranks = transported(
            models,
            found.pairs,
            lambda pair: fitted_maps(found, pair, sizes, whole.map, params.tolerance),
            whole.map if params.vocabulary else None,
        )
        ranks["residual"] = [whole.rank, whole.full_rank]
    meta = {"base": of_base, "pairs": [list(pair) for pair in found.pairs], "ranks": ranks}
    return Derived(changes, of_target, of_source, meta=meta)


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
