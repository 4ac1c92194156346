"""A control: do a delta's directions matter, or only its size? (METHODS sections 6 and 11)

Each change of another row -> a Gaussian one of the same norm: of sparse rows per site and layer, at the same neurons;
of whole weights per weight. Not of adapters, whose products have no entries of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.inject import Delta, SparseDelta
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of the control."""

    seed: int = option(0, "Seed of the random numbers; every change of a row gets other ones.")
    repeats: int = option(1, "Random changes for each of the row's.", ge=1)


def derive(inputs: Inputs, params: Params) -> Derived:
    """For each of the row's changes one under the same label, or `<label>_<number>` if there are several.

    Raises:
        UserError: other inputs than --delta, or a change that is low-rank.
    """
    (row,) = inputs.only("delta")
    generator = torch.Generator().manual_seed(params.seed)
    made: dict[str, Change] = {}
    for label, stored in row.items.items():
        change = stored.load()
        if isinstance(change, Adapter):
            raise UserError(f"{row.path}: its change {label!r} is low-rank; expected a sparse or a dense one")
        for number in range(params.repeats):
            name = label if params.repeats == 1 else f"{label}_{number}"
            made[name] = (random_weights if isinstance(change, DenseDelta) else random_like)(change, generator)
    return Derived(made, row.meta.get("target"), row.meta.get("source"), meta={"of": dict(row.meta)})


def random_weights(delta: DenseDelta, generator: torch.Generator) -> DenseDelta:
    """Whole weights of the same shapes, each Gaussian with the norm that it has in `delta`."""
    made = {}
    for name, weight in delta.weights.items():
        random = torch.randn(weight.shape, generator=generator)
        made[name] = (random.double() * (weight.double().norm() / random.double().norm())).float()
    return DenseDelta(made)


def random_like(delta: Delta, generator: torch.Generator) -> Delta:
    """A delta of the same shape: Gaussian rows, scaled to the norm that each site and layer has in `delta`."""
    made = {}
    for site, part in delta.items():
        random = torch.randn(part.rows.shape, generator=generator)
        scale = part.rows.double().norm(dim=(1, 2), keepdim=True) / random.double().norm(dim=(1, 2), keepdim=True)
        made[site] = SparseDelta(part.layers, part.neurons, (scale * random).float())
    return made
