"""Rows of the results table from metrics: scores, paired tests against the target, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TESTS = {"mcnemar": "McNemar", "sign_flip": "sign flip"}
MODELS = "Models"  # the section above those of the methods
ALPHA = 0.05
SEED = 0


def signed(points: float) -> str:
    """Points with their sign and one decimal, without a minus before zero."""
    return f"{round(points, 1) + 0.0:+.1f}"


@dataclass(frozen=True)
class Difference:
    """A row's difference to the target in points, see `core.statistics.Comparison`.

    `adjusted_p` is `p_value` after Holm's correction over the rows of one table on one task.
    """

    difference: float
    stderr: float
    low: float
    high: float
    bootstrap_p: float
    test: str
    p_value: float
    adjusted_p: float

    @property
    def mark(self) -> str:
        """▲ (higher) or ▼ (lower) where the adjusted p-value is below 0.05, else nothing."""
        if self.adjusted_p >= ALPHA:
            return ""
        return "▲" if self.difference > 0 else "▼"

    @property
    def p_text(self) -> str:
        return "<.001" if self.adjusted_p < 0.001 else f"{self.adjusted_p:.3f}".removeprefix("0")

    @property
    def test_text(self) -> str:
        return TESTS[self.test]

    def text(self) -> str:
        return f"{signed(self.difference)} ±{self.stderr:.1f} {self.p_text}{self.mark}"


@dataclass(frozen=True)
class Cell:
    """One row's result on one task, in percent.

    `score` and `stderr` are of the mean over test examples, each example's value being its mean over the runs; `runs`
    are the scores of the runs (seeds, or LaTen's unseen examples) and `spread` their standard deviation, None for one
    run. `versus` is the difference to the target, None for the target itself.
    """

    score: float
    stderr: float
    n: int
    runs: dict[str, float]
    spread: float | None
    versus: Difference | None

    def text(self) -> str:
        spread = f" ({self.spread:.1f})" if self.spread is not None else ""
        return f"{self.score:.1f} ±{self.stderr:.1f}{spread}"


@dataclass(frozen=True)
class Head:
    """A model or a method: its name in the params, the section of the table it stands in, and what it is called."""

    slug: str
    group: str
    label: str


@dataclass(frozen=True)
class Row(Head):
    """With its cells by task."""

    cells: dict[str, Cell]

    @property
    def num_runs(self) -> str:
        """How many runs, as `3`, or `1-3` where tasks differ."""
        counts = [len(cell.runs) for cell in self.cells.values()]
        return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def summarise(row: str, metrics: dict[str, Any], target: dict[str, Any] | None) -> Cell:
    """One cell from an evaluation's metrics, and the target's (None for the target itself).

    Raises:
        UserError: naming the row, if its examples or its settings are not the target's.
    """
    import torch
    from torch import Generator

    from pkt_stages.core.statistics import compare, mean_and_deviation, standard_error

    correct = results(metrics)
    score, spread = mean_and_deviation(torch.tensor([run["score"] for run in metrics["runs"]], dtype=torch.float64))
    versus = None
    if target is not None:
        _check_comparable(row, metrics, target)
        found = compare(correct, results(target), Generator().manual_seed(SEED))
        versus = Difference(**asdict(found), adjusted_p=found.p_value)
    return Cell(
        score=score,
        stderr=100 * standard_error(correct.mean(0)),
        n=correct.shape[1],
        runs={run["label"]: run["score"] for run in metrics["runs"]},
        spread=spread,
        versus=versus,
    )


def results(metrics: dict[str, Any]) -> Tensor:
    """Right or wrong, `[run, example]` float64."""
    import torch

    return torch.tensor([run["correct"] for run in metrics["runs"]], dtype=torch.float64)


def _check_comparable(row: str, metrics: dict[str, Any], target: dict[str, Any]) -> None:
    where = f"row {row}, task {metrics['task']}"
    if metrics["ids"] != target["ids"]:
        raise UserError(f"{where}: evaluated on other examples than the target; evaluate again")
    for name in sorted(metrics["settings"].keys() | target["settings"].keys()):
        here, there = metrics["settings"].get(name), target["settings"].get(name)
        # Which sandbox ran the code depends on the host's kernel and is no part of the protocol.
        if here != there and name != "sandbox":
            raise UserError(
                f"{where}: evaluated with {name} {here}, the target with {there}; evaluate both with equal settings"
            )


def table(heads: Sequence[Head], metrics: Mapping[str, Mapping[str, dict[str, Any]]], target: str) -> list[Row]:
    """The table's rows, in the order of `heads`, from `metrics[slug][task]`; `target` is a slug."""
    import torch

    from pkt_stages.core.statistics import holm

    rows = []
    for head in heads:
        cells = {
            task: summarise(head.slug, found, None if head.slug == target else metrics[target][task])
            for task, found in metrics[head.slug].items()
        }
        rows.append(Row(head.slug, head.group, head.label, cells))
    for task in metrics[target]:
        compared = [(row, versus) for row in rows if (versus := row.cells[task].versus) is not None]
        adjusted = holm(torch.tensor([versus.p_value for _, versus in compared], dtype=torch.float64))
        for (row, versus), p_value in zip(compared, adjusted.tolist(), strict=True):
            row.cells[task] = replace(row.cells[task], versus=replace(versus, adjusted_p=p_value))
    return rows


def markdown(rows: list[Row], tasks: Mapping[str, str]) -> str:
    """Scores, then differences to the target, as two Markdown tables that a terminal shows aligned; in percent.

    Args:
        tasks: their titles by name.
    """
    scores = [["score", "runs", *(f"{title} (n {rows[0].cells[task].n})" for task, title in tasks.items())]]
    differences = [["difference to the target", *tasks.values()]]
    for group, members in groupby(rows, lambda row: row.group):
        for table in (scores, differences):
            if group != MODELS:
                table.append([f"**{group}**", *[""] * (len(table[0]) - 1)])
        for row in members:
            cells = [row.cells[task] for task in tasks]
            scores.append([row.label, row.num_runs, *(cell.text() for cell in cells)])
            if all(cell.versus for cell in cells):
                differences.append([row.label, *(cell.versus.text() for cell in cells if cell.versus)])
    return (
        f"{aligned(scores)}\nScore ± standard error over test examples (standard deviation over runs).\n\n"
        f"{aligned(differences)}\nDifference ± its standard error, and p (McNemar's test for one run, sign-flip test"
        " for several; after Holm's\ncorrection over the rows). ▲ higher, ▼ lower than the target at p < .05; without"
        " a mark no difference is shown.\n"
    )


def aligned(table: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
