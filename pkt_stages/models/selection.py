"""One variant of a selection with the source's rows, at a rate: whose neuron goes where (METHODS section 3).

Shared by `align` (train a mapping) and `inject` (use it). The rate may be anything up to the selection's max_rate:
neurons stand in score order, so a lower rate is a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from pkt_stages.models.load import is_same
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import SITES, SUBLAYER_OF_SITE, Geometry
from pkt_stages.progress import track

DEFAULT = "default"  # the variant of the settings themselves
INDICES, ROWS = "selection.safetensors", "rows.safetensors"
BASE_ROWS = "base_rows.safetensors"  # only where `select` was given the base model


@dataclass(frozen=True)
class Selection:
    """Who gives what to whom.

    Attributes:
        tensors: of the variant: `{sublayer}_layers` [example, layer_pair, 2], `{sublayer}_source_neurons` and
            `{sublayer}_target_neurons` [example, layer_pair, rank]; `{sublayer}_random_neurons` [source_layer, rank].
        rows: the `source_rows` artifact of the same selection; base_rows: that of the source's base model, if kept.
        meta: the selection's metadata: `examples`, `source`, `target`, `params`.
        counts: neurons per layer pair at this rate, by sublayer: k of `ffn` and `attn`.
    """

    tensors: Mapping[str, Tensor]
    rows: Artifact
    base_rows: Artifact | None
    meta: Mapping[str, Any]
    counts: Mapping[str, int]

    def examples(self, of: str) -> dict[str, int]:
        """Ids of the set `extract` or `transfer` in the selection's order, with their index in it."""
        return {e["id"]: i for i, e in enumerate(self.meta["examples"]) if e["set"] == of}

    @property
    def num_steps(self) -> int:
        """Extract examples whose rows are stored, the first ones, one for each step of an alignment."""
        return min(int(self.meta["params"]["steps"]), len(self.examples("extract")))

    def transferred(self, wanted: str | None) -> dict[str, int]:
        """Transfer examples by id, with their index; all, or the wanted one, by its id or its number from 0.

        Raises:
            UserError: there is none, or not the wanted one.
        """
        known = self.examples("transfer")
        if not known:
            raise UserError("the selection names no transfer example; attribute transfer.jsonl, too (--transfer)")
        if wanted is None:
            return known
        ids = list(known)
        number = int(wanted) if wanted not in known and wanted.isdecimal() else len(ids)
        id = wanted if wanted in known else ids[number] if number < len(ids) else None
        if id is None:
            names = ", ".join(f"{n}: {id}" for n, id in enumerate(ids))
            raise UserError(f"the selection has no transfer example {wanted!r}; found {names}")
        return {id: known[id]}

    def width(self, side: str) -> int:
        """d_model of the `source` or the `target`."""
        return int(self.meta[side]["geometry"]["d_model"])

    def source_layers(self, sublayer: str, example: int) -> list[int]:
        """The source layer of each layer pair."""
        found: list[int] = self.tensors[f"{sublayer}_layers"][example, :, 0].tolist()
        return found

    def source_neurons(self, sublayer: str, example: int) -> Tensor:
        """The source's neurons [layer_pair, k], in score order."""
        return self.tensors[f"{sublayer}_source_neurons"][example, :, : self.counts[sublayer]]

    def random_neurons(self, sublayer: str, layers: Sequence[int]) -> Tensor:
        """Neurons drawn at random in these source layers [layer_pair, k], equal for all examples (see `pkt select`).

        Raises:
            UserError: they were not stored.
        """
        drawn = self.tensors[f"{sublayer}_random_neurons"]
        if drawn.shape[1] < self.counts[sublayer]:
            raise UserError(
                f"{self.rows.path}: holds no random neurons' rows; set `select.random_neurons` to true and run"
                " `pkt select` again"
            )
        return drawn[list(layers), : self.counts[sublayer]]

    def rows_at(self, site: str, layers: Sequence[int], neurons: Tensor, *, change: bool = False) -> Tensor:
        """The source's rows at `neurons` [layer_pair, k] of these layers: float32 [layer_pair, k, d_source].

        Args:
            change: what training changed of them, trained minus base.

        Raises:
            UserError: files of different selections; the base model's rows are wanted and were not kept.
        """
        sublayer = SUBLAYER_OF_SITE[site]
        if change and self.base_rows is None:
            raise UserError(
                f"{self.rows.path}: what training changed needs the base model's rows beside it; run `pkt select` with"
                " --base (in a params file: the source in selected.with_base)"
            )
        found = []
        for layer, wanted in zip(layers, neurons, strict=True):
            union = self.rows[f"neurons.{sublayer}.{layer}"]
            at = torch.searchsorted(union, wanted.contiguous()).clamp_max(len(union) - 1)
            if not torch.equal(union[at], wanted):
                raise UserError(
                    f"{self.rows.path}: lacks rows of {site} in layer {layer} that the selection names;"
                    " make both again with `pkt select`"
                )
            rows = self.rows[f"{site}.{layer}"][at].float()
            if change and self.base_rows is not None:
                rows = rows - self.base_rows[f"{site}.{layer}"][at].float()
            found.append(rows)
        return torch.stack(found)

    def delta(self, example: int, mapped: Mapping[str, Tensor]) -> dict[str, SparseDelta]:
        """Rows in target coordinates, by site [layer_pair, k, d_target], at the target's neurons of an example."""
        delta = {}
        for site, rows in mapped.items():
            sublayer = SUBLAYER_OF_SITE[site]
            neurons = self.tensors[f"{sublayer}_target_neurons"][example, :, : self.counts[sublayer]]
            delta[site] = SparseDelta(self.tensors[f"{sublayer}_layers"][example, :, 1], neurons, rows)
        return delta


def open_selection(folder: Path, *, rate: float, variant: str = DEFAULT) -> Selection:
    """Open what `pkt select` wrote and check that it belongs together and reaches the rate.

    Raises:
        UserError: bad files, files of different selections, an unknown variant, a rate above max_rate, or one that
            selects no neuron.
    """
    chosen = artifacts.load(folder / INDICES, artifacts.SELECTION)
    found = [artifacts.load(folder / ROWS, artifacts.SOURCE_ROWS)]
    if (folder / BASE_ROWS).is_file():
        found.append(artifacts.load(folder / BASE_ROWS, artifacts.SOURCE_ROWS))
    for extracted in found:
        for key in ("source", "target", "examples", "params"):
            if chosen.meta.get(key) != extracted.meta.get(key):
                raise UserError(
                    f"{extracted.path}: not of the same run of `pkt select` as {chosen.path} ({key} differs)"
                )
    named_examples = [(e["set"], e["id"]) for e in chosen.meta["examples"]]
    if len(set(named_examples)) < len(named_examples):
        raise UserError(f"{chosen.path}: two of its examples have one id; give each its own and attribute them again")
    variants = {name.partition(".")[0] for name in chosen.shapes if "." in name}
    if variant not in variants:
        raise UserError(
            f"{folder}: has no selection {variant!r}; found {', '.join(sorted(variants))}; add it to `select.variants`"
        )
    max_rate = chosen.meta["params"]["max_rate"]
    if rate > max_rate:
        raise UserError(f"rate {rate} is above the selection's max_rate {max_rate}; run `pkt select` with a higher one")
    counts = check_rate(rate, Geometry(**chosen.meta["target"]["geometry"]))
    # Those of the variant, and the random neurons, which are of none.
    named = {n.removeprefix(f"{variant}."): n for n in chosen.shapes if "." not in n or n.startswith(f"{variant}.")}
    tensors = {name: chosen[whole] for name, whole in named.items()}
    return Selection(tensors, found[0], found[1] if len(found) > 1 else None, chosen.meta, counts)


def stored_files(folder: Path) -> list[Path]:
    """What `pkt select` wrote there."""
    return [path for name in (INDICES, ROWS, BASE_ROWS) if (path := folder / name).is_file()]


def check_rate(rate: float, target: Geometry) -> dict[str, int]:
    """How many neurons a rate selects of a layer of the target, by sublayer; UserError if of one it selects none."""
    counts = {"ffn": num_selected(rate, target.d_ff), "attn": num_selected(rate, target.d_model)}
    for sublayer, count in counts.items():
        if count < 1:
            raise UserError(f"rate {rate} selects no {sublayer} neuron of the target; raise it")
    return counts


def check_target(selection: Selection, found: Mapping[str, Any], location: str) -> None:
    """Raise UserError unless the model `found` (see `load.identity`) is the target that the selection was made for."""
    if is_same(found, selection.meta["target"]["model"]):
        return
    expected = selection.meta["target"]["model"]
    if is_same(found, selection.meta["source"]["model"]):
        raise UserError(f"{location}: this is the selection's source; its target is {expected['name']}")
    raise UserError(
        f"{location}: not the target that the selection was made for (expected {expected['name']} at"
        f" {expected['revision']}, found {found['name']} at {found['revision']})"
    )


def random_neurons(sizes: Geometry, counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """So many random neurons of every source layer, [source_layer, rank] by sublayer."""
    found = {}
    for sublayer, size in (("ffn", sizes.d_ff), ("attn", sizes.num_attn_neurons)):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(size, generator=generator)[: counts[sublayer]] for _ in range(sizes.num_layers)]
        found[f"{sublayer}_random_neurons"] = torch.stack(drawn)
    return found


def extract_rows(
    checkpoint: Checkpoint, sizes: Geometry, selection: Mapping[str, Tensor], examples: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of a `source_rows` artifact: each layer's rows once, at its random neurons and those of the examples.

    Args:
        examples: indices of those whose rows are wanted.
    """
    kept = list(examples)
    tensors = {}
    for layer in track(range(sizes.num_layers), "reading rows"):
        for sublayer in ("ffn", "attn"):
            wanted = []
            for variant in sorted({name.partition(".")[0] for name in selection if "." in name}):
                here = selection[f"{variant}.{sublayer}_layers"][kept][..., 0] == layer
                wanted.append(selection[f"{variant}.{sublayer}_source_neurons"][kept][here].flatten())
            if not any(map(len, wanted)):
                continue
            neurons = torch.cat([*wanted, selection[f"{sublayer}_random_neurons"][layer]]).unique()
            tensors[f"neurons.{sublayer}.{layer}"] = neurons
            for site in SITES:
                if SUBLAYER_OF_SITE[site] == sublayer:
                    tensors[f"{site}.{layer}"] = checkpoint.neuron_rows(sizes, layer, site, neurons)
    return tensors
