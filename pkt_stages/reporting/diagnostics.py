"""What is known of two models before anything is carried over, and does it foretell what will be recovered?

The numbers are `pkt correlate`'s, one set per source. Beside them stands the recovered gap of every row that has a
source, in nats and in the mean over tasks, and the rank correlation of the two over the sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.core.statistics import RankCorrelation, Recovery, rank_correlation
from pkt_stages.profile import Profile
from pkt_stages.reporting import figures
from pkt_stages.reporting.analysis import Grid, Section
from pkt_stages.reporting.figures import Drawing
from pkt_stages.reporting.ladder import Ladder, percent
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.result import CONTROLS
from pkt_stages.reporting.table import aligned

TITLES = {
    "size_ratio": "parameters, source / target",
    "cka": "CKA of paired layers",
    "procrustes": "Procrustes residual",
    "neurons": "neurons' best correlation",
}
DIGITS = 3
LEAST = 5  # sources from which on a rank correlation is given
TITLE = "Before any transfer: how alike are source and target?"


@dataclass(frozen=True)
class Row:
    """A method's recovered gaps by source, and their rank correlation by diagnostic."""

    label: str
    is_control: bool
    recovered: Mapping[str, Recovery]
    ranks: Mapping[str, RankCorrelation | None]


@dataclass(frozen=True)
class Diagnostics:
    """Of every source that something is transported from.

    Attributes:
        by_source: by source and name (`TITLES`).
        rows: by method.
    """

    by_source: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, Row]

    def numbers(self) -> dict[str, Any]:
        """As JSON values."""
        ranks = {
            slug: {name: asdict(found) if found is not None else None for name, found in row.ranks.items()}
            for slug, row in self.rows.items()
        }
        return {"by_source": self.by_source, "rank_correlations": ranks}

    def grid(self) -> list[list[str]]:
        """A row per source: diagnostics, then recovered gaps in percent."""
        rows = [["source", *TITLES.values(), *(f"{row.label}, %" for row in self.rows.values())]]
        for source, found in self.by_source.items():
            gaps = [percent(row.recovered[source]) if source in row.recovered else "-" for row in self.rows.values()]
            rows.append([source, *(f"{found[name]:.{DIGITS}f}" for name in TITLES), *gaps])
        return rows

    def ranks(self) -> list[list[str]]:
        """A row per method: the rank correlations with their intervals; only a head where sources are too few."""
        rows = [["rank correlation of recovered gap and", *TITLES.values()]]
        for row in self.rows.values():
            if row.ranks:
                rows.append([row.label, *(_shown(row.ranks[name]) for name in TITLES)])
        return rows

    @property
    def caption(self) -> str:
        return (
            f"Spearman's, over {len(self.by_source)} sources, with the 95 % bootstrap interval over sources and the"
            " p-value of a permutation test. Sources of one kind count as many times as they are listed, and so few"
            " show little more than whether a diagnostic tells the kinds apart."
        )

    def section(self) -> Section:
        """For the page."""
        text = (
            "From the base models and raw texts alone (pkt correlate). CKA: of what paired layers add to the residual"
            " stream, 1 for equal up to rotation and scale. Procrustes residual: what the best rotation and scale leave"
            " of the distance between the states in front of the head, as a share, 0 for equal and 1 for unrelated."
            " Neurons' best correlation: of a target's neuron with any of the paired layer, mean over neurons."
        )
        heads, *rows = self.grid()
        grids = [Grid(heads, rows, "Recovered gap in nats, % ± standard error, mean over tasks")]
        heads, *rows = self.ranks()
        drawings = []
        if rows:
            grids.append(Grid(heads, rows, self.caption))
            panels = {
                title: {
                    row.label: (
                        row.is_control,
                        [(self.by_source[s][name], r.share, r.stderr) for s, r in row.recovered.items()],
                    )
                    for row in self.rows.values()
                }
                for name, title in TITLES.items()
            }
            caption = (
                "Recovered gap in nats against each diagnostic, a marker per source, mean over tasks with two standard"
                " errors; open orange: controls."
            )
            drawings.append(Drawing("recovered_gap_by_diagnostic", figures.against(panels), caption, wide=True))
        return Section(TITLE, text, drawings, grids)

    def markdown(self) -> str:
        """For the tables."""
        parts = [f"### {TITLE}", aligned(self.grid())]
        if len(ranks := self.ranks()) > 1:
            parts += [aligned(ranks), self.caption + "\n"]
        return "\n\n".join(parts)


def measured(analysed: Folder, profile: Profile) -> dict[str, Mapping[str, float]]:
    """`pkt correlate`'s numbers by source; of a partial look those that are there.

    Raises:
        UserError: metrics are missing.
    """
    sources = profile.sources["transport_source"]
    read = {source: analysed.read("correlate", source, keys=("diagnostics",)) for source in sources}
    return {source: metrics["diagnostics"] for source, metrics in read.items() if metrics is not None}


def diagnostics(found: Mapping[str, Mapping[str, float]], ladder: Ladder | None) -> Diagnostics | None:
    """Beside what was recovered; None if nothing is transported.

    Args:
        found: as `measured`.
        ladder: the recovered gaps, in nats.
    """
    if not found:
        return None
    rows = {}
    for climb in ladder.climbs if ladder is not None else ():
        means = {source: climb.mean(source) for source in found} if climb.by_source else {}
        recovered = {source: mean for source, mean in means.items() if mean is not None}
        if not recovered:
            continue
        ranks = {
            name: rank_correlation(
                _shown_values([found[source][name] for source in recovered]),
                _shown_values([mean.share for mean in recovered.values()]),
                torch.Generator().manual_seed(0),
            )
            for name in TITLES
            if len(recovered) >= LEAST
        }
        rows[climb.slug] = Row(climb.label, climb.group == CONTROLS, recovered, ranks)
    return Diagnostics(found, rows)


def _shown_values(values: Sequence[float]) -> Tensor:
    """As they are shown: what differs by less, as equal models do by rounding, is tied."""
    return torch.tensor([round(value, DIGITS) for value in values], dtype=torch.float64)


def _shown(found: RankCorrelation | None) -> str:
    if found is None:
        return "-"
    return f"{found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}] p {found.p_value:.3f}"
