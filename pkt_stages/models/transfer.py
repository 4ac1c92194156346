"""From a selection and the source's rows to a delta at the target's neurons, for one example at a rate.

Shared by `align` (train the mapping) and `inject` (use it). The rate may be anything up to the selection's max_rate:
neurons stand in score order, so a lower rate is a slice.

Which rows are handed to the mapping is one of `GIVEN`: those that attribution selected, or the rows of a control. The
controls have the same number of rows, the same training and the same choice of the step; if one does as well as the
selected rows, the source's knowledge was not what helped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.artifacts import Artifact
from pkt_stages.core.selection import num_selected
from pkt_stages.errors import UserError
from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.sites import MODULE_OF_SITE, SITES

Given = Literal["selected", "shuffled", "random_neurons", "random"]


@dataclass(frozen=True)
class Transfer:
    """Who gives what to whom.

    Attributes:
        selection: tensors of a `selection` artifact.
        rows: the `source_rows` artifact of the same selection.
        meta: the selection's metadata: `examples`, `source`, `target`, `params`.
        counts: neurons per layer pair at this rate, by module: k of `ffn` and `attn`.
        given: which rows the mapping receives, a key of `GIVEN`.
        seed: of the rows of a control.
    """

    selection: Mapping[str, Tensor]
    rows: Artifact
    meta: Mapping[str, Any]
    counts: Mapping[str, int]
    given: Given = "selected"
    seed: int = 0

    def examples(self, of: str) -> dict[str, int]:
        """Ids of the set `extract` or `transfer` in the selection's order, with their index in it."""
        return {e["id"]: i for i, e in enumerate(self.meta["examples"]) if e["set"] == of}

    def width(self, side: str) -> int:
        """d_model of the `source` or the `target`."""
        return int(self.meta[side]["geometry"]["d_model"])

    def source_rows(self, example: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows that an example gives to the mapping, by site: float32 [layer_pair, k, d_source], in score order."""
        return {site: rows.to(device) for site, rows in GIVEN[self.given](self, example).items()}

    def layers(self, module: str, example: int) -> list[int]:
        """The source layer of each layer pair."""
        found: list[int] = self.selection[f"{module}_layers"][example, :, 0].tolist()
        return found

    def generator(self, example: int) -> torch.Generator:
        """Random numbers of a control, other ones for every example."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + example)

    def rows_at(self, site: str, layers: Sequence[int], neurons: Tensor) -> Tensor:
        """The source's rows at `neurons` [layer_pair, k] of these layers: float32 [layer_pair, k, d_source]."""
        module = MODULE_OF_SITE[site]
        found = []
        for layer, wanted in zip(layers, neurons, strict=True):
            union = self.rows[f"neurons.{module}.{layer}"]
            at = torch.searchsorted(union, wanted.contiguous()).clamp_max(len(union) - 1)
            if not torch.equal(union[at], wanted):
                raise UserError(
                    f"{self.rows.path}: lacks rows of {site} in layer {layer} that the selection names;"
                    " make both again with `pkt select`"
                )
            found.append(self.rows[f"{site}.{layer}"][at].float())
        return torch.stack(found)

    def delta(self, example: int, mapped: Mapping[str, Tensor]) -> dict[str, SparseDelta]:
        """Rows in target coordinates, by site [layer_pair, k, d_target], at the target's neurons of an example."""
        delta = {}
        for site, rows in mapped.items():
            module = MODULE_OF_SITE[site]
            neurons = self.selection[f"{module}_target_neurons"][example, :, : self.counts[module]]
            delta[site] = SparseDelta(self.selection[f"{module}_layers"][example, :, 1], neurons, rows)
        return delta


def selected_rows(transfer: Transfer, example: int) -> dict[str, Tensor]:
    """The rows of the neurons that attribution ranks first (the method itself)."""
    return {
        site: transfer.rows_at(
            site,
            transfer.layers(MODULE_OF_SITE[site], example),
            transfer.selection[f"{MODULE_OF_SITE[site]}_source_neurons"][
                example, :, : transfer.counts[MODULE_OF_SITE[site]]
            ],
        )
        for site in SITES
    }


def shuffled_rows(transfer: Transfer, example: int) -> dict[str, Tensor]:
    """The selected rows in another order, across ranks and layers: each target neuron gets some other neuron's.

    A neuron's subkey and subvalue stay together.
    """
    generator = transfer.generator(example)
    rows, order = {}, {}
    for site, found in selected_rows(transfer, example).items():
        module = MODULE_OF_SITE[site]
        if module not in order:
            order[module] = torch.randperm(found.shape[0] * found.shape[1], generator=generator)
        rows[site] = found.flatten(0, 1)[order[module]].view_as(found)
    return rows


def random_neurons_rows(transfer: Transfer, example: int) -> dict[str, Tensor]:
    """The rows of neurons drawn at random in the same source layers, equal for all examples (see `pkt select`)."""
    rows = {}
    for site in SITES:
        module = MODULE_OF_SITE[site]
        layers = transfer.layers(module, example)
        neurons = transfer.selection[f"{module}_random_neurons"][layers, : transfer.counts[module]]
        rows[site] = transfer.rows_at(site, layers, neurons)
    return rows


def random_rows(transfer: Transfer, example: int) -> dict[str, Tensor]:
    """Gaussian rows with the mean square of the selected ones, per site and layer pair."""
    generator = transfer.generator(example)
    rows = {}
    for site, found in selected_rows(transfer, example).items():
        scale = found.square().mean((1, 2), keepdim=True).sqrt()
        rows[site] = scale * torch.randn(found.shape, generator=generator)
    return rows


GIVEN: Mapping[Given, Callable[[Transfer, int], dict[str, Tensor]]] = {
    "selected": selected_rows,
    "shuffled": shuffled_rows,
    "random_neurons": random_neurons_rows,
    "random": random_rows,
}


def open_transfer(selection: Path, rows: Path, *, rate: float, given: Given = "selected", seed: int = 0) -> Transfer:
    """Open a selection with its rows and check that they belong together and reach the rate.

    Raises:
        UserError: bad files, files of different selections, a rate above max_rate, or one that selects no neuron.
    """
    chosen, extracted = artifacts.load(selection, "selection"), artifacts.load(rows, "source_rows")
    for key in ("source", "target", "examples", "params"):
        if chosen.meta.get(key) != extracted.meta.get(key):
            raise UserError(f"{rows}: not of the same run of `pkt select` as {selection} ({key} differs)")
    max_rate = chosen.meta["params"]["max_rate"]
    if rate > max_rate:
        raise UserError(f"rate {rate} is above the selection's max_rate {max_rate}; run `pkt select` with a higher one")
    sizes = chosen.meta["target"]["geometry"]
    counts = {"ffn": num_selected(rate, sizes["d_ff"]), "attn": num_selected(rate, sizes["d_model"])}
    for module, count in counts.items():
        if count < 1:
            raise UserError(f"rate {rate} selects no {module} neuron of the target; raise it")
    return Transfer(chosen.tensors(), extracted, chosen.meta, counts, given, seed)


def check_target(transfer: Transfer, found: Mapping[str, Any], location: str) -> None:
    """Raise UserError unless the model `found` (see `load.identity`) is the target that the selection was made for."""
    if found == transfer.meta["target"]["model"]:
        return
    expected = transfer.meta["target"]["model"]
    if found == transfer.meta["source"]["model"]:
        raise UserError(f"{location}: this is the selection's source; its target is {expected['name']}")
    raise UserError(
        f"{location}: not the target that the selection was made for (expected {expected['name']} at"
        f" {expected['revision']}, found {found['name']} at {found['revision']})"
    )
