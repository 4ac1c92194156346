"""A control: do a delta's directions matter, or only its size? (METHODS section 6)

Each change of another row -> a Gaussian one of the same norm, per site and layer, at the same neurons. Of a row of
LaTen's kind only: adapters and whole weights have no neurons of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pkt_stages.errors import UserError
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.inject import Delta, SparseDelta
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of the control."""

    seed: int = option(0, "Seed of the random rows; every change of a row gets other ones.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """As many changes as the row has, under the same labels.

    Raises:
        UserError: other inputs than --delta, or a change that is not sparse.
    """
    (row,) = inputs.only("delta")
    generator = torch.Generator().manual_seed(params.seed)
    made = {}
    for label, stored in row.items.items():
        if stored.kind != "sparse":
            raise UserError(f"{row.path}: its change {label!r} is {stored.kind}; expected a sparse one, as of LaTen")
        made[label] = random_like(stored.load(), generator)
    return Derived(made, row.meta.get("target"), row.meta.get("source"), meta={"of": dict(row.meta)})


def random_like(delta: Delta, generator: torch.Generator) -> Delta:
    """A delta of the same shape: Gaussian rows, scaled to the norm that each site and layer has in `delta`."""
    made = {}
    for site, part in delta.items():
        random = torch.randn(part.rows.shape, generator=generator)
        scale = part.rows.double().norm(dim=(1, 2), keepdim=True) / random.double().norm(dim=(1, 2), keepdim=True)
        made[site] = SparseDelta(part.layers, part.neurons, (scale * random).float())
    return made
