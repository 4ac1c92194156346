"""How much of what the target's own training gained does each row recover, and from which source on no more?

The recovered gap R of a row on a task is its difference to the target over the oracle's: 0 is the target, 1 the oracle
(the target's own trained model). Sources whose answer is known come first: a method that recovers nothing there says
nothing elsewhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pkt_stages.core.statistics import Recovery, recovered
from pkt_stages.profile import Profile
from pkt_stages.reporting import figures
from pkt_stages.reporting.figures import Drawing, Line
from pkt_stages.reporting.measure import NATS, POINTS, Measure
from pkt_stages.reporting.result import CEILINGS, CONTROLS, Result
from pkt_stages.reporting.table import MODELS, Row, aligned

MEASURES = (NATS, POINTS)
SURE = 2.0  # standard errors from which on a row is called better than nothing
MOST, FITTING = 12, 7  # lines that one panel holds, ceilings included; and, of a figure with several, without them


@dataclass(frozen=True)
class Climb:
    """A row's recovered gaps.

    Attributes:
        family: what makes it and its controls.
        by_task: by source and task, at the factor of the change that was chosen; None: no gap is shown there.
        unscaled: the same at factor 1, of rows whose factor was chosen.
        scales: by source the chosen factors by change.
    """

    slug: str
    group: str
    label: str
    family: str
    by_source: bool
    by_task: Mapping[str, Mapping[str, Recovery | None]]
    unscaled: Mapping[str, Mapping[str, Recovery | None]]
    scales: Mapping[str, Mapping[str, float]]

    def mean(self, source: str) -> Recovery | None:
        """The mean over the tasks that show a gap, with its error; tasks have no example in common."""
        found = [one for one in self.by_task.get(source, {}).values() if one is not None]
        if not found:
            return None
        return Recovery(fmean(r.share for r in found), sum(r.stderr**2 for r in found) ** 0.5 / len(found))


@dataclass(frozen=True)
class Ladder:
    """The recovered gaps of all rows, one measure.

    Attributes:
        sources: in order.
    """

    measure: Measure
    sources: list[str]
    tasks: list[str]
    climbs: list[Climb]

    def numbers(self) -> dict[str, Any]:
        """As JSON values: by row, source and task."""

        def told(found: Mapping[str, Mapping[str, Recovery | None]]) -> dict[str, Any]:
            return {
                source: {t: [r.share, r.stderr] if r is not None else None for t, r in by_task.items()}
                for source, by_task in found.items()
            }

        return {
            climb.slug: {"recovered": told(climb.by_task), "unscaled": told(climb.unscaled), "scales": climb.scales}
            for climb in self.climbs
        }

    def grid(self, task: str | None = None, *, unscaled: bool = False) -> list[list[str]]:
        """A table with a row per method and a column per source: of one task, or the mean over them, in percent."""
        rows = [["recovered, %", *self.sources]]
        for climb in self.climbs:
            cells = []
            for source in self.sources:
                where = climb.unscaled if unscaled else climb.by_task
                found = climb.mean(source) if task is None else where.get(source, {}).get(task)
                cells.append(percent(found) if found is not None else "-")
            if any(cell != "-" for cell in cells):
                rows.append([climb.label, *cells])
        return rows


def percent(found: Recovery) -> str:
    """`66 ±3`, in percent; whole numbers, but for errors below one."""
    digits = 0 if 100 * found.stderr >= 0.95 else 1
    return f"{round(100 * found.share, digits) + 0.0:.{digits}f} ±{100 * found.stderr:.{digits}f}"


def ladder(profile: Profile, results: Sequence[Result], oracle: Mapping[str, Any], measure: Measure) -> Ladder | None:
    """The recovered gaps of every row; None if nothing has this measure.

    Args:
        results: one per source.
        oracle: its evaluations by task.
    """
    target_metrics = results[0].metrics[profile.target]
    tasks = [
        task
        for task in profile.tasks
        if all(task in found and measure.measured(found[task]) for found in (oracle, target_metrics))
        and measure.comparable(oracle[task], target_metrics[task])
    ]
    if not tasks:
        return None
    climbs = []
    for head in _heads(results):
        by_source, unscaled, scales = {}, {}, {}
        for result in results:
            if head.slug not in result.metrics:
                continue
            whole, at_one, factors = {}, {}, {}
            for task in tasks:
                metrics = result.metrics[head.slug].get(task)
                if metrics is None or not measure.measured(metrics) or not measure.comparable(metrics, oracle[task]):
                    continue
                target, known = measure.results(target_metrics[task]), measure.results(oracle[task])
                whole[task] = recovered(measure.results(metrics), target, known)
                if "unscaled" in metrics:
                    factors = metrics["scales"]
                    if measure.measured(metrics["unscaled"]):
                        at_one[task] = recovered(measure.results(metrics["unscaled"]), target, known)
            by_source[result.source] = whole
            if factors:
                unscaled[result.source], scales[result.source] = at_one, factors
        method = next((m for m in profile.methods if m.name == head.slug), None)
        varies = method is not None and method.by_source
        family = method.code or method.group if method is not None else ""
        climbs.append(Climb(head.slug, head.group, head.label, family, varies, by_source, unscaled, scales))
    return Ladder(measure, [result.source for result in results], tasks, climbs)


def _heads(results: Sequence[Result]) -> list[Row]:
    """The methods' rows of all results, by section in the order of the first that has it."""
    found = {row.slug: row for result in results for row in result.points if row.group != MODELS}
    order = list(dict.fromkeys(row.group for row in found.values()))
    order.sort(key=lambda group: group == CONTROLS)
    return sorted(found.values(), key=lambda row: order.index(row.group))


def sentences(ladder: Ladder) -> list[tuple[str, str]]:
    """Per source what was recovered, in words: by method the range over tasks, of the measure's mean."""
    told = []
    for source in ladder.sources:
        parts: dict[bool, list[str]] = {False: [], True: []}
        for climb in ladder.climbs:
            found = [r for r in climb.by_task.get(source, {}).values() if r is not None]
            if not climb.by_source or climb.group == CEILINGS or not found:
                continue
            low, high = (round(100 * pick(r.share for r in found)) for pick in (min, max))
            span = f"{low} %" if low == high else f"{low} to {high} %"
            sure = sum(r.share > SURE * r.stderr for r in found)
            parts[climb.group == CONTROLS].append(f"{climb.label} {span} (above 0 on {sure} of {len(found)} tasks)")
        text = "; ".join(parts[False]) or "no method"
        text += f". Controls: {'; '.join(parts[True])}." if parts[True] else "."
        told.append((source, text))
    return told


def drawings(ladders: Sequence[Ladder]) -> list[Drawing]:
    """Sources along x, the mean recovered gap along y: a panel per measure; or, where that were too many lines, a
    figure per measure, with panels of families of methods, each beside its controls and the ceilings.
    """
    if not ladders:
        return []
    caption = (
        "Recovered gap by source, mean over tasks with two standard errors: the share of the gain of the target's own"
        " training that each row has. Dashed without markers: the ceilings, that training with all weights, and of"
        " the layers' projections alone; open orange: controls; an arrow marks a value below the axis."
    )
    name, sources = "recovered_gap_by_source", ladders[0].sources
    lines = {one.measure.name: _lines(one) for one in ladders}
    if all(len(of) <= MOST for of in lines.values()):
        panels = {f"in {measure}": [line for _, line in pairs] for measure, pairs in lines.items()}
        return [Drawing(name, figures.ladder(sources, panels), caption, wide=True)]
    return [
        Drawing(
            f"{name}_{measure}",
            figures.ladder(sources, _panels(of, measure), many=True),
            f"In {measure}. {caption}",
            wide=True,
        )
        for measure, of in lines.items()
    ]


def _lines(ladder: Ladder) -> list[tuple[str, Line]]:
    """The lines of the figure, each with its family."""
    lines = []
    for climb in ladder.climbs:
        means = [climb.mean(source) for source in ladder.sources]
        points = [(i, r.share, r.stderr) for i, r in enumerate(means) if r is not None]
        if not points or (not climb.by_source and climb.group != CEILINGS):
            continue
        kind = {CEILINGS: "ceiling", CONTROLS: "control"}.get(climb.group, "method")
        lines.append((climb.family, Line(climb.label, kind, points)))
    return lines


def _panels(lines: Sequence[tuple[str, Line]], measure: str) -> dict[str, list[Line]]:
    """Families in their order, as many in a panel as fit; the ceilings are in each."""
    ceilings = [line for _, line in lines if line.kind == "ceiling"]
    families: dict[str, list[Line]] = {}
    for family, line in lines:
        if line.kind != "ceiling":
            families.setdefault(family, []).append(line)
    panels: list[list[Line]] = [[]]
    for members in families.values():
        if panels[-1] and len(panels[-1]) + len(members) > FITTING:
            panels.append([])
        panels[-1] += members
    return {f"in {measure}, {i} of {len(panels)}": ceilings + panel for i, panel in enumerate(panels, start=1)}


def markdown(ladders: Sequence[Ladder], told: Sequence[tuple[str, str]]) -> str:
    """In words by source (`sentences`), and the mean over tasks by source, a table per measure."""
    parts = [f"Recovered gap, {one.measure.name}, mean over tasks\n\n{aligned(one.grid())}" for one in ladders]
    words = [textwrap.fill(f"- {source}, in nats: {text}", 118, subsequent_indent="  ") for source, text in told]
    return (
        "### What was recovered\n\n"
        + "\n".join(words)
        + "\n\n"
        + "\n".join(parts)
        + "\nIn percent of the gap between the target and its own trained model, ± standard error. 100 is all of it;"
        " below 0 the\nrow harms. Factors of a transported change are chosen on held-out align examples.\n"
    )
