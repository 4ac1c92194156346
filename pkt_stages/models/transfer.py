"""From a selection and the source's rows to a delta at the target's neurons, for one example at a rate.

Shared by `align` (train the mapping) and `inject` (use it). The rate may be anything up to the selection's max_rate:
neurons stand in score order, so a lower rate is a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.artifacts import Artifact
from pkt_stages.core.selection import num_selected
from pkt_stages.errors import UserError
from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.sites import MODULE_OF_SITE, SITES


@dataclass(frozen=True)
class Transfer:
    """Who gives what to whom.

    Attributes:
        selection: tensors of a `selection` artifact.
        rows: the `source_rows` artifact of the same selection.
        meta: the selection's metadata: `examples`, `source`, `target`, `params`.
        counts: neurons per layer pair at this rate, by module: k of `ffn` and `attn`.
    """

    selection: Mapping[str, Tensor]
    rows: Artifact
    meta: Mapping[str, Any]
    counts: Mapping[str, int]

    def examples(self, of: str) -> dict[str, int]:
        """Ids of the set `extract` or `transfer` in the selection's order, with their index in it."""
        return {e["id"]: i for i, e in enumerate(self.meta["examples"]) if e["set"] == of}

    def width(self, side: str) -> int:
        """d_model of the `source` or the `target`."""
        return int(self.meta[side]["geometry"]["d_model"])

    def source_rows(self, example: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows that an example extracts, by site: float32 [layer_pair, k, d_source], in score order."""
        return {site: self._rows_at(site, example).to(device) for site in SITES}

    def _rows_at(self, site: str, example: int) -> Tensor:
        module = MODULE_OF_SITE[site]
        layers = self.selection[f"{module}_layers"][example, :, 0].tolist()
        neurons = self.selection[f"{module}_source_neurons"][example, :, : self.counts[module]]
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


def open_transfer(selection: Path, rows: Path, *, rate: float) -> Transfer:
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
    return Transfer(chosen.tensors(), extracted, chosen.meta, counts)


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
