"""Rows of the results table from metrics: scores, paired tests against the target, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError
from pkt_stages.reporting.measure import POINTS, Measure

if TYPE_CHECKING:
    from torch import Tensor

TESTS = {"mcnemar": "McNemar", "sign_flip": "sign flip"}
MODELS = "Models"  # the section above those of the methods
ALPHA = 0.05
POWER = 0.8
SEED = 0
NOTE = (
    "Difference to the target ± its standard error. ▲ higher, ▼ lower than the target, with p < .05 (McNemar's"
    " test for\none run of answers, else sign-flip test; after Holm's correction, the family being the rows of one"
    " table on one task).\nElse no difference is shown, and ≥x says from which true difference on one would have been,"
    " with 80 % power.\n"
)
OTHER_SANDBOX = (
    "[level]: its generated code ran in a sandbox of another level than the target's, so the two are not compared;\n"
    "evaluate both on one kind of host, or with one PKT_SANDBOX."
)


def compact(value: float, digits: int, sign: str = "") -> str:
    """For a narrow column: `rounded`; of several digits one less from 1 on, and below it no leading zero."""
    if digits > 1 and abs(value) >= 1:
        return f"{value:{sign}.{digits - 1}f}"
    text = rounded(value, digits, sign)
    return text if digits == 1 else text.replace("0.", ".", 1)


def rounded(value: float, digits: int, sign: str = "") -> str:
    """With so many digits and no minus before zero; of several, what would look like zero as `3e-5`: it has a sign."""
    if digits > 1 and value and not round(value, digits):
        size, exponent = f"{value:{sign}.0e}".split("e")
        return f"{size}e{int(exponent)}"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """A row's difference to the target in its measure's unit, see `core.statistics.Comparison`.

    `adjusted_p` is `p_value` after Holm's correction over the rows of one table on one task; `detectable` the smallest
    true difference that the test would have shown at the strictest of Holm's levels (`core.statistics.detectable`),
    None where so few examples show none.
    """

    difference: float
    stderr: float
    low: float
    high: float
    bootstrap_p: float
    test: str
    p_value: float
    adjusted_p: float
    detectable: float | None
    digits: int = 1

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

    @property
    def power_text(self) -> str:
        """What could have been seen, where no difference is shown; else nothing."""
        if self.mark:
            return ""
        return "none" if self.detectable is None else f"≥{compact(self.detectable, self.digits)}"

    def signed(self, value: float) -> str:
        return rounded(value, self.digits, "+")

    def text(self) -> str:
        """Short enough for four of them in a terminal's line: the p-value where there is a mark, else the power."""
        found = f"{compact(self.difference, self.digits, '+')} ±{compact(self.stderr, self.digits)}"
        return f"{found} {self.p_text}{self.mark}" if self.mark else f"{found} {self.power_text}"


def difference(row: Tensor, other: Tensor, measure: Measure) -> Difference:
    """Two rows' results compared, not yet as one of a family: `corrected` adjusts the p-value and tells the power."""
    from torch import Generator

    from pkt_stages.core.statistics import compare

    found = compare(row, other, Generator().manual_seed(SEED), unit=measure.unit)
    return Difference(**asdict(found), adjusted_p=found.p_value, detectable=None, digits=measure.digits)


def corrected(compared: Sequence[tuple[Difference, Tensor, Tensor]], measure: Measure) -> list[Difference]:
    """The differences of one family, each with the two rows' results, after Holm's correction."""
    import torch

    from pkt_stages.core.statistics import detectable, holm

    adjusted = holm(torch.tensor([found.p_value for found, _, _ in compared], dtype=torch.float64))
    made = []
    for (found, row, other), p in zip(compared, adjusted.tolist(), strict=True):
        seen = detectable(row, other, found.test, ALPHA / len(compared), POWER, measure.unit)
        made.append(replace(found, adjusted_p=p, detectable=seen if seen < float("inf") else None))
    return made


@dataclass(frozen=True)
class Cell:
    """One row's result on one task, in its measure's unit.

    `mean` and `stderr` are of the mean over test examples, each example's value being its mean over the runs; `runs`
    are the means of the runs (seeds, or LaTen's unseen examples) and `spread` their standard deviation, None for one
    run. `run_stderrs` are the standard errors of each run. `bounds` is Wilson's 95 % interval of a score where all
    or no answers are right in every run, None else: there the standard error is 0 and says nothing. `versus` is the
    difference to the target, None for the target itself and for a row whose generated code ran in another sandbox: of
    the level `sandbox`, which is None for all others.
    """

    mean: float
    stderr: float
    n: int
    runs: dict[str, float]
    spread: float | None
    versus: Difference | None
    digits: int = 1
    run_stderrs: dict[str, float] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None
    sandbox: str | None = None

    @property
    def mean_text(self) -> str:
        return f"{round(self.mean, self.digits) + 0.0:.{self.digits}f}"

    @property
    def stderr_text(self) -> str:
        return rounded(self.stderr, self.digits)

    @property
    def bounds_text(self) -> str:
        """Where all or none are right, what the true score may be, `≤1.5` or `≥98.5`; else nothing."""
        if self.bounds is None:
            return ""
        return f"≤{self.bounds[1]:.1f}" if self.mean < 50 else f"≥{self.bounds[0]:.1f}"

    def text(self) -> str:
        spread = f" ({compact(self.spread, self.digits)})" if self.spread is not None else ""
        other = f" [{self.sandbox}]" if self.sandbox is not None else ""
        error = self.bounds_text or f"±{compact(self.stderr, self.digits)}"
        return f"{compact(self.mean, self.digits)} {error}{spread}{other}"


@dataclass(frozen=True)
class Head:
    """A model or a method: its name in the params, the section of the table it stands in, and what it is called."""

    slug: str
    group: str
    label: str


@dataclass(frozen=True)
class Row(Head):
    """With its cells by task; a task whose evaluation has no such measure has none."""

    cells: dict[str, Cell]

    @property
    def num_runs(self) -> str:
        """How many runs, as `3`, or `1-3` where tasks differ."""
        counts = [len(cell.runs) for cell in self.cells.values()]
        if not counts:
            return ""
        return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"

    def versus(self, task: str) -> Difference | None:
        """The difference to the target on a task, if there is one."""
        return self.cells[task].versus if task in self.cells else None


def summarise(row: str, metrics: dict[str, Any], target: dict[str, Any] | None, measure: Measure) -> Cell:
    """One cell from an evaluation's metrics, and the target's (None for the target itself, or if it has none yet).

    Raises:
        UserError: naming the row, if its examples or its settings are not the target's.
    """
    from pkt_stages.core.statistics import mean_and_deviation, standard_error, wilson

    found = measure.results(metrics)
    labels = [run["label"] for run in metrics["runs"]]
    means = measure.unit * found.mean(1)
    alike = target is None or measure.comparable(metrics, target)
    bounds = None
    if measure is POINTS and float(found[0, 0]) in (0.0, 1.0) and bool((found == found[0, 0]).all()):
        low, high = wilson(int(found[0].sum()), found.shape[1])
        bounds = measure.unit * low, measure.unit * high
    mean, spread = mean_and_deviation(means)
    if target is not None:
        _check_comparable(row, metrics, target, measure)
    return Cell(
        mean=mean,
        stderr=measure.unit * standard_error(found.mean(0)),
        n=found.shape[1],
        runs=dict(zip(labels, means.tolist(), strict=True)),
        spread=spread,
        versus=difference(found, measure.results(target), measure) if target is not None and alike else None,
        digits=measure.digits,
        run_stderrs={name: measure.unit * standard_error(run) for name, run in zip(labels, found, strict=True)},
        bounds=bounds,
        sandbox=None if alike else metrics["settings"].get("sandbox"),
    )


def _check_comparable(row: str, metrics: dict[str, Any], target: dict[str, Any], measure: Measure) -> None:
    where = f"row {row}, task {metrics['task']}"
    if metrics["ids"] != target["ids"]:
        raise UserError(f"{where}: evaluated on other examples than the target; evaluate again")
    for name in sorted(metrics["settings"].keys() | target["settings"].keys()):
        if measure.settings and name not in measure.settings:
            continue
        here, there = metrics["settings"].get(name), target["settings"].get(name)
        # Which sandbox ran the code depends on the host's kernel: such rows are shown, but not compared.
        if here != there and name != "sandbox":
            raise UserError(
                f"{where}: evaluated with {name} {here}, the target with {there}; evaluate both with equal settings"
            )


def table(
    heads: Sequence[Head], metrics: Mapping[str, Mapping[str, dict[str, Any]]], target: str, measure: Measure
) -> list[Row]:
    """The table's rows, in the order of `heads`, from `metrics[slug][task]`; `target` is a slug.

    Where the target has no metrics of a task yet, nothing is compared with it.
    """
    rows = []
    for head in heads:
        cells = {
            task: summarise(head.slug, found, None if head.slug == target else metrics[target].get(task), measure)
            for task, found in metrics[head.slug].items()
            if measure.measured(found) and measure.measured(metrics[target].get(task, found))
        }
        rows.append(Row(head.slug, head.group, head.label, cells))
    for task in metrics[target]:
        compared = [(row, versus) for row in rows if (versus := row.versus(task)) is not None]
        values = [
            (versus, measure.results(metrics[row.slug][task]), measure.results(metrics[target][task]))
            for row, versus in compared
        ]
        for (row, _), versus in zip(compared, corrected(values, measure), strict=True):
            row.cells[task] = replace(row.cells[task], versus=versus)
    return rows


def markdown(points: list[Row], nats: list[Row], tasks: Mapping[str, str]) -> str:
    """Scores and log-likelihoods, each with differences to the target, as Markdown tables aligned for a terminal.

    Args:
        points, nats: the same rows, measured either way.
        tasks: their titles by name.
    """
    parts = []
    for rows, what, unit, note in (
        (
            points,
            "score",
            "in percent",
            "Score ± standard error over test examples (standard deviation over runs); where all or none are right,"
            "\nWilson's 95 % bound instead.",
        ),
        (
            nats,
            "log-likelihood",
            "in nats",
            "Mean log-likelihood of the reference answers, nats per token (mmlu: of the right letter); higher is"
            " better.",
        ),
    ):
        if not any(row.cells for row in rows):
            continue
        # How many runs and how far apart they are stands in the table of scores, if there is one.
        alone = rows is points or not any(row.cells for row in points)
        values = [[what, *(["runs"] * alone), *(_titled(rows, task, title) for task, title in tasks.items())]]
        differences = [[f"difference, {unit}", *tasks.values()]]
        for group, members in groupby(rows, lambda row: row.group):
            for made in (values, differences):
                if group != MODELS:
                    made.append([f"**{group}**", *[""] * (len(made[0]) - 1)])
            for row in members:
                cells = [_text(row.cells.get(task), spread=alone) for task in tasks]
                values.append([row.label, *([row.num_runs] * alone), *cells])
                versus = [row.versus(task) for task in tasks]
                if any(versus):
                    differences.append([row.label, *(found.text() if found else "-" for found in versus)])
        if any(cell.sandbox for row in rows for cell in row.cells.values()):
            note += f"\n{OTHER_SANDBOX}"
        parts.append(f"{aligned(values)}\n{note}\n\n{aligned(differences)}")
    return "\n".join([*parts, NOTE])


def _titled(rows: Sequence[Row], task: str, title: str) -> str:
    counts = [row.cells[task].n for row in rows if task in row.cells]
    return f"{title} (n {counts[0]})" if counts else title


def _text(cell: Cell | None, *, spread: bool) -> str:
    return "-" if cell is None else (cell if spread else replace(cell, spread=None)).text()


def aligned(table: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
