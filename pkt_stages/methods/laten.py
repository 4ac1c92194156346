"""LaTen: a small hypernetwork maps the source's selected rows to rows of the target (paper 4.3; METHODS section 4).

The three functions are what `pkt align` and `pkt inject` ask of an alignment; another one is another file, which may
take from here what it does not change:

- `mapping`: the module that is trained; its `forward` takes rows by site and gives rows of the target by site.
- `source_rows`: what it receives for an example.
- `place`: where in the target what it gives is added.

The controls differ in the rows alone: the same number of rows, the same training and choice of the step. If one does as
well as the selected rows, the source's knowledge was not what helped.

The paper moves rows of the trained source; `moved: change` gives the mapping what training changed of them, trained
minus base, the task vector that transports move (METHODS 11; ours). Such rows are smaller, and so is then what the
mapping makes of them at first, as it has no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pkt_stages.core.hypernetwork import Hypernetwork, draw_weights
from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.selection import Selection
from pkt_stages.models.sites import SITES, SUBLAYER_OF_SITE
from pkt_stages.params import option


@dataclass(frozen=True)
class Params:
    """Settings of LaTen's own."""

    given: Literal["selected", "shuffled", "random_neurons", "random"] = option(
        "selected", "Rows that the mapping receives: selected, or a control's: shuffled, random_neurons, random."
    )
    moved: Literal["trained", "change"] = option(
        "trained", "Rows of the trained source (paper), or what training changed of them (needs select's --base)."
    )
    init_std: float = option(1e-5, "Standard deviation of the mapping's initial weights.", gt=0)
    d_hidden: int | None = option(None, "Width of the mapping's hidden layer; None: the source's d_model.", ge=1)


def mapping(params: Params, *, d_source: int, d_target: int, generator: torch.Generator) -> nn.Module:
    """One two-layer network per site, shared by all layers."""
    network = Hypernetwork(SITES, d_source=d_source, d_hidden=params.d_hidden or d_source, d_target=d_target)
    draw_weights(network, std=params.init_std, generator=generator)
    return network


def source_rows(selection: Selection, example: int, params: Params, *, seed: int) -> dict[str, Tensor]:
    """The rows that an example gives to the mapping, by site: float32 [layer_pair, k, d_source]."""
    if params.given == "random_neurons":
        return _random_neurons(selection, example, params.moved == "change")
    rows = _selected(selection, example, params.moved == "change")
    if params.given == "selected":
        return rows
    generator = torch.Generator().manual_seed(seed * 1_000_003 + example)  # other numbers for every example
    return {"shuffled": _shuffled, "random": _random}[params.given](rows, generator)


def place(selection: Selection, example: int, rows: Mapping[str, Tensor]) -> dict[str, SparseDelta]:
    """The r-th row of a layer pair at the r-th of the target's selected neurons."""
    return selection.delta(example, rows)


def _selected(selection: Selection, example: int, change: bool) -> dict[str, Tensor]:
    """The rows of the neurons that attribution ranks first, in score order."""
    rows = {}
    for site in SITES:
        sublayer = SUBLAYER_OF_SITE[site]
        layers, neurons = selection.source_layers(sublayer, example), selection.source_neurons(sublayer, example)
        rows[site] = selection.rows_at(site, layers, neurons, change=change)
    return rows


def _shuffled(rows: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The rows in another order, across ranks and layers: each target neuron gets some other neuron's.

    A neuron's subkey and subvalue stay together.
    """
    found, order = {}, {}
    for site, part in rows.items():
        sublayer = SUBLAYER_OF_SITE[site]
        if sublayer not in order:
            order[sublayer] = torch.randperm(part.shape[0] * part.shape[1], generator=generator)
        found[site] = part.flatten(0, 1)[order[sublayer]].view_as(part)
    return found


def _random(rows: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Gaussian rows with the mean square of the selected ones, per site and layer pair."""
    found = {}
    for site, part in rows.items():
        scale = part.square().mean((1, 2), keepdim=True).sqrt()
        found[site] = scale * torch.randn(part.shape, generator=generator)
    return found


def _random_neurons(selection: Selection, example: int, change: bool) -> dict[str, Tensor]:
    """The rows of neurons drawn at random in the selected source layers."""
    rows = {}
    for site in SITES:
        sublayer = SUBLAYER_OF_SITE[site]
        layers = selection.source_layers(sublayer, example)
        rows[site] = selection.rows_at(site, layers, selection.random_neurons(sublayer, layers), change=change)
    return rows
