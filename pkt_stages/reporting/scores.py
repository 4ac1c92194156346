"""The rows to take away: one flat mapping for DVC, one tidy CSV file, one LaTeX table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pkt_stages.profile import Profile
from pkt_stages.reporting.measure import NATS, POINTS, Measure
from pkt_stages.reporting.result import Result
from pkt_stages.reporting.table import MODELS, Cell, Row

# Of the CSV file, per measure; docs/evaluation.md describes them.
MEASURED = (
    "",
    "_stderr",
    "_difference",
    "_difference_stderr",
    "_low",
    "_high",
    "_p",
    "_p_holm",
    "_test",
    "_detectable",
)
COLUMNS = [
    *("source", "target", "section", "method", "label", "task", "run", "n"),
    *(measure.name + part for measure in (POINTS, NATS) for part in MEASURED),
]


def flat(profile: Profile, results: Sequence[Result]) -> dict[str, Any]:
    """Scores in percent by row, its source if it has one, and task, as the evaluations' folders are named.

    A task that was evaluated by likelihood alone is `<task>_nats`, in nats.
    """
    found: dict[str, Any] = {}
    by_source = {method.name for method in profile.methods if method.by_source}
    for result in results:
        for row, nats in zip(result.points, result.nats, strict=True):
            its = found.setdefault(row.slug, {})
            if row.slug in by_source:
                its = its.setdefault(result.source, {})
            its |= {task: round(cell.mean, 2) for task, cell in row.cells.items()}
            its |= {f"{task}_nats": round(c.mean, 4) for task, c in nats.cells.items() if task not in row.cells}
    return found


def tidy(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """A line per pair, row, task and run (`COLUMNS`); run `mean`, the mean over the runs, carries the comparison."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for result in results:
        for points, nats in zip(result.points, result.nats, strict=True):
            row = {"source": result.source, "target": result.target, "section": points.group}
            row |= {"method": points.slug, "label": points.label}
            for task in tasks:
                cells = {m: r.cells[task] for m, r in ((POINTS, points), (NATS, nats)) if task in r.cells}
                writer.writerows({**row, "task": task, **line} for line in _lines(cells))
    return stream.getvalue()


def _lines(cells: Mapping[Measure, Cell]) -> Iterator[dict[str, Any]]:
    if not cells:
        return
    some = next(iter(cells.values()))
    line: dict[str, Any] = {"run": "mean", "n": some.n}
    for measure, cell in cells.items():
        values: list[Any] = [cell.mean, cell.stderr]
        if (v := cell.versus) is not None:
            values += [v.difference, v.stderr, v.low, v.high, v.p_value, v.adjusted_p, v.test, v.detectable]
        line |= {measure.name + part: _number(value) for part, value in zip(MEASURED, values, strict=False)}
    yield line
    for run in some.runs:
        line = {"run": run, "n": some.n}
        for measure, cell in cells.items():
            line |= {measure.name: _number(cell.runs[run]), f"{measure.name}_stderr": _number(cell.run_stderrs[run])}
        yield line


def _number(value: float | str | None) -> float | str:
    """Six significant digits are far beyond any error and the same on every machine."""
    return "" if value is None else value if isinstance(value, str) else float(f"{value:.6g}") + 0.0


def latex(results: Sequence[Result], tasks: Mapping[str, str]) -> str:
    """A `booktabs` table per pair: scores in percent, or nats where there are none, with marks against the target."""
    made = ["% \\usepackage{booktabs}; a file for \\input, one table per pair of models, each with its legend below\n"]
    for result in results:
        measure, rows = (POINTS, result.points) if any(r.cells for r in result.points) else (NATS, result.nats)
        made.append(_tabular(result, measure, rows, tasks))
    return "\n".join(made)


def _tabular(result: Result, measure: Measure, rows: Sequence[Row], tasks: Mapping[str, str]) -> str:
    unit = "Percent" if measure is POINTS else "Nats per token"
    legend = (
        f"{unit} $\\pm$ standard error over examples; $^{{+}}$, $^{{-}}$: higher, lower than the target ($p < .05$"
        " after Holm's correction over the rows of a task); in brackets: Wilson's 95\\,\\% bound."
    )
    lines = [
        f"% {result.source} to {result.target}",
        "{\\footnotesize\\setlength{\\tabcolsep}{3pt}\\noindent",
        f"\\begin{{tabular}}{{l{'r' * len(tasks)}}}",
        "\\toprule",
        " & ".join(["", *map(_escaped, tasks.values())]) + " \\\\",
        "\\midrule",
    ]
    for group, members in groupby(rows, lambda row: row.group):
        if group != MODELS:
            lines += ["\\midrule", f"\\multicolumn{{{len(tasks) + 1}}}{{l}}{{\\emph{{{_escaped(group)}}}}} \\\\"]
        lines += [
            " & ".join([_escaped(row.label), *(_cell(row.cells.get(t)) for t in tasks)]) + " \\\\" for row in members
        ]
    lines += ["\\bottomrule", "\\end{tabular}", "\\par\\smallskip\\noindent", f"{legend}\\par}}\\medskip\n"]
    return "\n".join(lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mark = {"▲": "^{+}", "▼": "^{-}"}.get(cell.versus.mark if cell.versus else "", "")
    if cell.bounds_text:
        bound = cell.bounds_text.replace("≤", "\\leq ").replace("≥", "\\geq ")
        return f"${cell.mean_text}{mark}$ [${bound}$]"
    return f"${cell.mean_text}{mark} \\pm {cell.stderr_text}$"


_SPECIAL = {**{c: f"\\{c}" for c in "&%$#_{}"}, "\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
_SPECIAL |= {"^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
