"""The source's layers, made to fit the target by closed forms and added whole (paper section 3, B.1; METHODS 6).

Which source layers, how their rows get narrower, and which neurons: a grid of 18. The same neurons serve both sites of
a sublayer. Importance is the mean absolute weight over subkey and subvalue. PCA and whitening are fitted on all rows of
a site's matrix in a layer and applied to the rows as they are, so that the mean is kept. No example is used; the source
must be as large as the target in layers and neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pkt_stages.core.reduction import embedding_transform, importance, pca, whitening
from pkt_stages.errors import UserError
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity, load_config, vocabulary_difference
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import (
    SITES,
    SUBLAYER_OF_SITE,
    Geometry,
    as_rows,
    check_whole_matrices,
    geometry,
    module_name,
    weight_name,
)
from pkt_stages.params import option
from pkt_stages.progress import track


@dataclass(frozen=True)
class Params:
    """A cell of the grid."""

    layers: Literal["top", "bottom", "random"] = option(
        "top", "Source layers, as many as the target has: the last, the first, or random ones."
    )
    width: Literal["pca", "whitening", "embedding"] = option(
        "embedding", "How rows get narrower: pca, whitening, or the map of one embedding to the other."
    )
    neurons: Literal["random", "importance"] = option(
        "importance", "Which neurons, as many as the target has: random ones, or those of the largest weights."
    )
    seed: int = option(0, "Seed of what is random.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights at the four sites of every layer.

    Raises:
        UserError: other inputs than --target and --source, a source that is smaller than the target, or vocabularies
            that differ (width embedding).
    """
    target, source = inputs.only("target", "source")
    configs = [load_config(ref) for ref in (target, source)]
    for config in configs:
        check_whole_matrices(config, "the grid")
    small, large = map(geometry, configs)
    check(large, small, params)
    checkpoint = Checkpoint(source)
    generator = torch.Generator().manual_seed(params.seed)
    layers = source_layers(params.layers, large.num_layers, small.num_layers, generator)
    narrowing = narrowings(params.width, checkpoint, Checkpoint(target), small.d_model)
    weights = {}
    for place, layer in enumerate(track(layers, "source layers")):
        every = {
            site: checkpoint.neuron_rows(large, layer, site, torch.arange(large.num_neurons(site))).float()
            for site in SITES
        }
        for sublayer in ("ffn", "attn"):
            sites = [site for site in SITES if SUBLAYER_OF_SITE[site] == sublayer]
            have, count = large.num_neurons(sites[0]), small.num_neurons(sites[0])
            if params.neurons == "random":
                order = torch.randperm(have, generator=generator)
            else:
                weight = torch.stack([importance(every[site]) for site in sites]).sum(0)
                order = weight.sort(descending=True, stable=True).indices
            for site in sites:
                try:
                    matrix = narrowing(every[site])
                except ValueError as error:
                    raise UserError(f"{site} of source layer {layer}: {error}") from None
                reduced = (every[site][order[:count]].double() @ matrix).float()
                weights[weight_name(place, site)] = as_rows(reduced[own_neurons(small, site)], site).contiguous()
    return Derived({"delta": DenseDelta(weights)}, identity(target), identity(source), meta={"layers": layers})


def check(source: Geometry, target: Geometry, params: Params) -> None:
    """Raise UserError unless the source has as many layers and neurons as the target, and tokens that width needs."""
    if source.num_layers < target.num_layers:
        raise UserError(f"the source has {source.num_layers} layers, the target {target.num_layers}; swap the two")
    for sublayer, site in (("ffn", "ffn_up"), ("attn", "attn_v")):
        have, count = source.num_neurons(site), target.num_neurons(site)
        if count > have:
            raise UserError(f"the source has {have} {sublayer} neurons a layer, the target {count}; swap the two")
    if params.width == "embedding" and source.vocab_size != target.vocab_size:
        raise UserError(
            f"width embedding needs one vocabulary, found {source.vocab_size} and {target.vocab_size} tokens; use pca"
            " or whitening"
        )


def source_layers(rule: str, num_source: int, num_target: int, generator: torch.Generator) -> list[int]:
    """As many source layers as the target has, in depth order: the last, the first, or random ones."""
    if rule == "top":
        return list(range(num_source - num_target, num_source))
    if rule == "bottom":
        return list(range(num_target))
    drawn: list[int] = torch.randperm(num_source, generator=generator)[:num_target].sort().values.tolist()
    return drawn


def narrowings(width: str, source: Checkpoint, target: Checkpoint, d_target: int) -> Callable[[Tensor], Tensor]:
    """From all rows of a weight [neuron, d_source] to the matrix [d_source, d_target] that makes them narrower."""
    if width != "embedding":
        fit = {"pca": pca, "whitening": whitening}[width]
        return lambda rows: fit(rows, d_target)
    name = f"{module_name('embedding', 0)}.weight"
    tables = [checkpoint.weight(name) for checkpoint in (source, target)]
    if odd := vocabulary_difference(source.ref, target.ref):
        raise UserError(f"width embedding needs one vocabulary: {odd}; use pca or whitening")
    transform = embedding_transform(*tables)
    return lambda rows: transform


def own_neurons(sizes: Geometry, site: str) -> Tensor:
    """Neurons that stand for every weight row of a site once; under GQA the first of those that share a v row."""
    every = torch.arange(sizes.num_neurons(site))
    if site != "attn_v":
        return every
    return every.view(sizes.num_kv_heads, -1, sizes.d_head)[:, 0].flatten()
