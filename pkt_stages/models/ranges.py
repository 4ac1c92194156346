"""How large are deltas? Their ranges, of fine-tuning and of transfer (paper sections 3.2 and C.2; METHODS section 7).

Streamed weight by weight from disk: no model is loaded, let alone two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.artifacts import is_finite
from pkt_stages.core.similarity import bin_edges, histogram
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.load import ModelRef, load_config
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import family, geometry
from pkt_stages.progress import track

# The paper's marks: fine-tuning stays within the first, Seeking's extraction goes beyond the second.
WITHIN, BEYOND = 0.002, 0.005
SMALLEST, LARGEST, PER_DECADE = 1e-8, 10.0, 8
STATISTICS = ("num_entries", "min", "max", "rms", "share_within", "share_beyond")

Parts = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Ranges:
    """How the entries of a delta are distributed.

    Attributes:
        weights: names.
        edges: of the histograms' bins.
        statistics: [weight, statistic] float64, see `STATISTICS`.
        counts: [weight, bin] int64; the first and the last bin are open.
    """

    weights: list[str]
    edges: Tensor
    statistics: Tensor
    counts: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Of a `delta_ranges` artifact."""
        return {"edges": self.edges, "statistics": self.statistics, "counts": self.counts}

    def meta(self) -> dict[str, Any]:
        return {"within": WITHIN, "beyond": BEYOND, "statistics": list(STATISTICS), "weights": self.weights}

    def overall(self) -> dict[str, float]:
        """The statistics over all weights together."""
        count, low, high, rms, within, beyond = self.statistics.unbind(1)
        total = count.sum()
        mean_square, *shares = ((part * count).sum() / total for part in (rms.square(), within, beyond))
        found = [total, low.min(), high.max(), mean_square.sqrt(), *shares]
        return dict(zip(STATISTICS, torch.stack(found).tolist(), strict=True))

    def facts(self) -> dict[str, Any]:
        """As JSON values, the histogram over all weights together."""
        rows = zip(self.weights, self.statistics.tolist(), strict=True)
        by_weight = {name: dict(zip(STATISTICS, row, strict=True)) for name, row in rows}
        counts = self.counts.sum(0).tolist()
        edges = self.edges.tolist()
        return self.meta() | {"edges": edges, "counts": counts, "overall": self.overall(), "by_weight": by_weight}


def ranges(parts: Parts) -> Ranges:
    """Measure a delta's parts.

    Raises:
        UserError: NaN or infinity in one.
    """
    edges = bin_edges(SMALLEST, LARGEST, PER_DECADE)
    names, found = [], []
    for name, values in track(parts, "weights"):
        if not is_finite(values):
            raise UserError(f"{name}: the delta holds NaN or infinity")
        names.append(name)
        found.append((statistics(values), histogram(values, edges)))
    measured, counts = (torch.stack(column) for column in zip(*found, strict=True))
    return Ranges(names, edges, measured, counts)


def statistics(values: Tensor) -> Tensor:
    """`STATISTICS` of a tensor, float64."""
    exact = values.double()
    size = exact.abs()
    found: list[Any] = [
        exact.numel(),
        exact.min(),
        exact.max(),
        exact.square().mean().sqrt(),
        (size <= WITHIN).double().mean(),
        (size > BEYOND).double().mean(),
    ]
    return torch.tensor([float(x) for x in found], dtype=torch.float64)


def of_models(first: ModelRef, second: ModelRef) -> Parts | None:
    """What the second model has more than the first, weight by weight, float32.

    None if there is no such thing, because their sizes differ, or a weight of one is not in the other (architectures,
    biases and heads of their own differ also among models of one size), or one stores gains - 1 as Gemma does.
    """
    configs = [load_config(ref) for ref in (first, second)]
    if len({(geometry(config), family(config).gain_offset) for config in configs}) > 1:
        return None
    checkpoints = [Checkpoint(ref) for ref in (first, second)]
    names = checkpoints[0].names()
    if names != checkpoints[1].names():
        return None
    pairs = ((name, [checkpoint.weight(name).float() for checkpoint in checkpoints]) for name in names)
    return ((name, after - before) for name, (before, after) in pairs)


def of_change(change: Change, config: Any) -> Iterator[tuple[str, Tensor]]:
    """What a change adds to a model of this config, weight by weight; of a sparse delta its rows, the rest is zero."""
    if isinstance(change, Adapter):
        for module in change.factors:
            yield f"{module}.weight", change.delta(module)
    elif isinstance(change, DenseDelta):
        yield from change.weights.items()
    else:
        for site, part in change.items():
            for pair, layer in enumerate(part.layers.tolist()):
                yield family(config).weight(site, layer), part.rows[pair]
