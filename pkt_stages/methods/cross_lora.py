"""Cross-LoRA (2508.05232): a change carried over by the singular vectors of the weights alone (METHODS 11.7).

dW_t = U_t (U_s^T dW_s V_s) V_t^T with the leading singular vectors U, V of the source's weight W_s and of the target's
W_t. No text and no label is used; of the correlation it takes the pairs of layers alone (`layer_pairs: proportional`
needs no texts either). Singular vectors have no sign of their own, and their signs change everything: here the sum of
cubes of every right one is positive, which no permutation of units and no zero padding changes, and a rotation does.
Exact, up to `rank`, where the target is the source with its units in other places. `maps: random` is the control: two
random isometries for each weight.

Cost at 13B -> 7B: 560 decompositions of matrices up to [13824, 5120], minutes each on a CPU. Memory of one, 566 MB in
float64, four times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor

from pkt_stages.core.transport import Polar, singular_map
from pkt_stages.models.correlation import Correlation, Pair
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.sites import PROJECTIONS, Geometry
from pkt_stages.models.transport import MapParams, Maps, Models, carry
from pkt_stages.params import option


@dataclass(frozen=True)
class Params(MapParams):
    """Settings of the method."""

    rank: int | None = option(None, "Leading singular vectors; None: as many as both weights have.", ge=1)


def derive(inputs: Inputs, params: Params) -> Derived:
    """Whole weights of every layer that has a partner.

    Raises:
        UserError: as `carry`.
    """

    def fit(models: Models, _found: Correlation) -> tuple[None, Callable[[Pair], Maps]]:
        return None, lambda pair: fitted_maps(models, pair, params)

    def draw(sizes: tuple[Geometry, Geometry], _residual: Tensor, generator: Generator) -> Maps:
        from pkt_stages.methods.theseus import random_maps

        return random_maps(sizes, False, generator)

    return carry(inputs, params, vocabulary=False, fit=fit, draw=draw)


def fitted_maps(models: Models, pair: Pair, params: Params) -> Maps:
    """The maps of one pair of layers, from its weights."""
    output: dict[str, Polar] = {}
    into: dict[str, Polar] = {}
    for weight in PROJECTIONS:
        weights = models.base.weight(weight, pair[0]), models.target.weight(weight, pair[1])
        output[weight], into[weight] = singular_map(*weights, params.rank, params.tolerance)
    ranks = {f"{weight}.out": (p.rank, p.full_rank) for weight, p in output.items()}
    return Maps({w: p.map for w, p in output.items()}, {w: p.map for w, p in into.items()}, ranks)
