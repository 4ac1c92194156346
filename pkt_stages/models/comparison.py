"""What `pkt compare` finds out about two models, and what an adapter started from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.errors import UserError, shown
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, Changes, Stored
from pkt_stages.models.load import ModelRef, load_config
from pkt_stages.models.ranges import Parts, Ranges, of_change, of_models, ranges
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.similarity import similarities
from pkt_stages.models.sites import check_whole_matrices
from pkt_stages.models.submatrices import read_submatrices

MARK = "compare.json"  # says what was compared; the artifacts lie beside it


@dataclass(frozen=True)
class Comparison:
    """Of two models, or of a target before and after a change.

    Attributes:
        cka: by site, [first layer, second layer].
        ranges: of what the second has more than the first; None for models of different weights.
        similarity: of an adapter, `{site}.{moment}.{against}`; None for anything else.
        deltas: of what the two models have more than a base of theirs, as `alike`; None without a base.
    """

    cka: Mapping[str, Tensor]
    ranges: Ranges | None
    similarity: Mapping[str, Tensor] | None
    deltas: Mapping[str, Mapping[str, float | None]] | None

    def write(self, out: Path, meta: Mapping[str, Any]) -> None:
        """Write a folder with an artifact of each; it appears whole or not at all."""
        with artifacts.replaced_folder(out, MARK) as folder:
            maps = {f"cka.{site}": similarity for site, similarity in self.cka.items()}
            artifacts.save(folder / "cka.safetensors", artifacts.CKA, maps, meta)
            if self.ranges is not None:
                told = {**meta, **self.ranges.meta()}
                artifacts.save(folder / "ranges.safetensors", artifacts.DELTA_RANGES, self.ranges.tensors(), told)
            if self.similarity is not None:
                artifacts.save(folder / "similarity.safetensors", artifacts.SIMILARITY, self.similarity, meta)
            artifacts.write_json(folder / MARK, meta)

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        found = self.similarity
        return {
            "cka": {site: similarity.tolist() for site, similarity in self.cka.items()},
            "ranges": self.ranges.facts() if self.ranges is not None else None,
            "similarity": {name: values.tolist() for name, values in found.items()} if found is not None else None,
            "deltas": self.deltas,
        }

    def summary(self) -> str:
        means = ", ".join(f"{site} {float(similarity.mean()):.2f}" for site, similarity in self.cka.items())
        said = f"mean CKA of layer pairs {means}"
        if self.ranges is None:
            return f"{said}; no ranges, for their weights are not the same ones"
        whole = self.ranges.overall()
        said += f"; delta {whole['min']:+.4f} .. {whole['max']:+.4f}"
        if self.deltas is not None and (whole_cosine := self.deltas["all"]["cosine"]) is not None:
            length = self.deltas["all"]["relative_norm"]
            said += f"; from the base the second's is {length:.3f} times as long, cosine {whole_cosine:.3f}"
        for name, values in (self.similarity or {}).items():
            if name.startswith("ffn_up.trained."):
                said += f", cosine with {name.removeprefix('ffn_up.trained.')} {fmean(values[:, 0].tolist()):+.3f}"
        return said


@dataclass(frozen=True)
class Start:
    """What an adapter was trained from.

    Attributes:
        rank: in training.
        submatrices: the source's by module, if it started from them.
    """

    rank: int
    submatrices: Mapping[str, Tensor]


def start_of(row: Changes, stored: Stored, submatrices: Path | None, target: Mapping[str, Any]) -> Start | None:
    """What an adapter started from, if its row says so.

    Args:
        submatrices: a file of `pkt seek`, which init seeking needs and nothing else has use for.
        target: identity of the model that the row changes.

    Raises:
        UserError: see above, or a file of another target.
    """
    settings: Mapping[str, Any] = row.meta.get("params", {}) if stored.kind == "low_rank" else {}
    init = settings.get("init")
    if init is not None and not isinstance(settings.get("rank"), int):
        raise UserError(f"{row.path}: its params name init {shown(init)}, but no rank; make the row again")
    if submatrices is None:
        if init == "seeking":
            raise UserError(f"{row.path}: init seeking needs --submatrices (from `pkt seek`)")
        return Start(settings["rank"], {}) if init is not None else None
    if init != "seeking":
        raise UserError(f"{row.path}: has no use for --submatrices; only an adapter of init seeking has")
    found = artifacts.load(submatrices, artifacts.SUBMATRICES)
    return Start(settings["rank"], read_submatrices(found, target, str(target["name"])))


def ranges_of(refs: Sequence[ModelRef], change: Change | None) -> Ranges | None:
    """Of the change, or without one of what the second model has more than the first."""
    parts = of_change(change, load_config(refs[1])) if change is not None else of_models(*refs)
    return ranges(parts) if parts is not None else None


def changes_from(base: ModelRef, refs: Sequence[ModelRef]) -> list[Parts]:
    """What each model has more than the base that it went on from, not read yet.

    Raises:
        UserError: one is of another size, or has other weights.
    """
    found = []
    for ref in refs:
        parts = of_models(base, ref)
        if parts is None:
            raise UserError(f"{ref.location}: has other weights than --base {base.location}; give what it went on from")
        found.append(parts)
    return found


def alike(first: Parts, second: Parts) -> dict[str, dict[str, float | None]]:
    """How alike two changes of one model are, streamed from disk.

    Returns:
        by layer (`layer_0`), weight outside the layers, and `all`: `relative_norm`, the second's over the first's, and
        `cosine` of the two; None where one does not change anything.
    """
    sums: dict[str, Tensor] = {}
    for (name, a), (_, b) in zip(first, second, strict=True):
        a, b = a.double(), b.double()
        products = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
        layer = re.search(r"\blayers\.(\d+)\.", name)
        for part in (f"layer_{layer[1]}" if layer else name, "all"):
            sums[part] = sums.get(part, 0) + products
    told: dict[str, dict[str, float | None]] = {}
    for part, found in sums.items():
        product, own, other = found.tolist()
        changed = own > 0 and other > 0
        told[part] = {
            "relative_norm": (other / own) ** 0.5 if changed else None,
            "cosine": product / (own * other) ** 0.5 if changed else None,
        }
    return told


def similarity_of(ref: ModelRef, change: Change | None, start: Start | None) -> dict[str, Tensor] | None:
    """Of an adapter whose start is known, to the weights of the model that it changes."""
    if start is None:
        return None
    assert isinstance(change, Adapter)
    config, weight = load_config(ref), Checkpoint(ref).weight
    check_whole_matrices(config, "similarity")
    return similarities(weight, change, start.submatrices, rank=start.rank, num_layers=config.num_hidden_layers)
