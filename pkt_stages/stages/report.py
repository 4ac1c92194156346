"""What came out? Metrics of every listed model and method -> tables and figures, as Markdown, JSON and one page.

Loads no model. What to show stands in the params file (source, target, task, and the lists of methods); a row that is
listed but has no metrics is an error, and so are metrics that are not listed (docs/decisions/004). Every row is
compared with the target on the same examples; what no test supports is not called higher or lower.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from pkt_stages.artifacts import write_json, written_whole
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = "report.html.j2"
TASKS = {"mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP"}
TESTS = {"mcnemar": "McNemar", "sign_flip": "sign flip"}
# Slug of a method -> its title, in the table's order. A slug that is not here is shown as it is.
TITLES = {
    "laten": "LaTen",
    "unaligned_seeking": "Seeking, unaligned",
    "unaligned_seeking_full": "Seeking, unaligned, whole blocks",
    "postpkt_random": "LoRA, random init",
    "postpkt_pissa": "LoRA, PiSSA init",
    "postpkt_seeking": "LoRA, Seeking init",
    "seqkd": "SeqKD",
    "kd": "supervised KD",
    "gkd": "GKD",
    "control_random_delta": "random delta of LaTen's norm",
    "control_shuffled_rows": "LaTen on shuffled rows",
    "control_random_neurons": "LaTen on random neurons' rows",
    "control_random_rows": "LaTen on random rows",
}
FEW = "_few"
MODELS = "Models"
# Group of rows -> its methods, as a pattern; in the table's order.
GROUPS = {
    "PrePKT": r"laten.*|unaligned_.*",
    "PostPKT": r"postpkt_.*",
    "Distillation": r"(seq|g)?kd(_.*)?",
    "Controls": r"control_.*",
    "Other": r".*",
}
ALPHA = 0.05
CLOSE = 5
SEED = 0
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


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
class Row:
    """A model or a method: its group, what it is called, and its cells by task."""

    slug: str
    group: str
    label: str
    cells: dict[str, Cell]

    @property
    def num_runs(self) -> str:
        """How many runs, as `3`, or `1-3` where tasks differ."""
        counts = [len(cell.runs) for cell in self.cells.values()]
        return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def title_of(method: str) -> str:
    """How a method is called in the tables; an unknown one keeps its slug."""
    whole = method.removesuffix(FEW)
    if whole in TITLES:
        return TITLES[whole] + (", align set" if whole != method else "")
    if grid := re.fullmatch(r"unaligned_([^_]+)_([^_]+)_([^_]+)", method):
        layers, width, neurons = grid.groups()
        return f"grid {layers}/{'PCA' if width == 'pca' else width}/{neurons}"
    return method


def group_of(method: str) -> str:
    """The group of rows that a method belongs to."""
    return next(name for name, pattern in GROUPS.items() if re.fullmatch(pattern, method))


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods by group; inside a group those trained on the align set last, then as in `TITLES`, then as given."""
    groups, known = list(GROUPS), list(TITLES)

    def place(method: str) -> tuple[int, bool, int]:
        whole = method.removesuffix(FEW)
        return (
            groups.index(group_of(method)),
            whole != method,
            known.index(whole) if whole in known else len(known),
        )

    return sorted(methods, key=place)


def summarise(row: str, metrics: dict[str, Any], target: dict[str, Any] | None) -> Cell:
    """One cell from an evaluation's metrics, and the target's (None for the target itself).

    Raises:
        UserError: naming the row, if its examples or its settings are not the target's.
    """
    import torch
    from torch import Generator

    from pkt_stages.core.statistics import compare, mean_and_deviation, standard_error

    correct = _correct(metrics)
    score, spread = mean_and_deviation(torch.tensor([run["score"] for run in metrics["runs"]], dtype=torch.float64))
    versus = None
    if target is not None:
        _check_comparable(row, metrics, target)
        found = compare(correct, _correct(target), Generator().manual_seed(SEED))
        versus = Difference(**asdict(found), adjusted_p=found.p_value)
    return Cell(
        score=score,
        stderr=100 * standard_error(correct.mean(0)),
        n=correct.shape[1],
        runs={run["label"]: run["score"] for run in metrics["runs"]},
        spread=spread,
        versus=versus,
    )


def _correct(metrics: dict[str, Any]) -> Tensor:
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


def run(metrics: dict[str, dict[str, dict[str, Any]]], source: str, target: str) -> list[Row]:
    """The table: `metrics[row][task]`, rows being the source, the target and methods, as rows in the table's order."""
    import torch

    from pkt_stages.core.statistics import holm

    labels = {source: f"source: {source}", target: f"target: {target}"}
    methods = in_order(name for name in metrics if name not in labels)
    rows = []
    for name in [*labels, *methods]:
        cells = {
            task: summarise(name, found, None if name == target else metrics[target][task])
            for task, found in metrics[name].items()
        }
        group = MODELS if name in labels else group_of(name)
        rows.append(Row(name, group, labels.get(name) or title_of(name), cells))
    for task in metrics[target]:
        compared = [(row, versus) for row in rows if (versus := row.cells[task].versus) is not None]
        adjusted = holm(torch.tensor([versus.p_value for _, versus in compared], dtype=torch.float64))
        for (row, versus), p_value in zip(compared, adjusted.tolist(), strict=True):
            row.cells[task] = replace(row.cells[task], versus=replace(versus, adjusted_p=p_value))
    return rows


def markdown(rows: list[Row], tasks: list[str]) -> str:
    """Scores, then differences to the target, as two Markdown tables that a terminal shows aligned; in percent."""
    sizes = {task: rows[0].cells[task].n for task in tasks}
    scores = [["score", "runs", *(f"{TASKS.get(t, t)} (n {sizes[t]})" for t in tasks)]]
    differences = [["difference to the target", *(TASKS.get(t, t) for t in tasks)]]
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
        f"{_aligned(scores)}\nScore ± standard error over test examples (standard deviation over runs).\n\n"
        f"{_aligned(differences)}\nDifference ± its standard error, and p (McNemar's test for one run, sign-flip test"
        " for several; after Holm's\ncorrection over the rows). ▲ higher, ▼ lower than the target at p < .05; without"
        " a mark no difference is shown.\n"
    )


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def forest_figure(rows: list[Row], task: str) -> str:
    """Difference to the target with its 95 % interval, one line per row, as base64 PNG; on the right close to zero.

    Filled markers are differences that the test supports; shapes tell source, methods and controls apart, so that the
    figure reads the same in black and white.
    """
    compared = [(row, versus) for row in rows if (versus := row.cells[task].versus) is not None]
    groups = [row.group for row, _ in compared]
    # Half a line of space between groups.
    heights = [-i - 0.5 * len(set(groups[: i + 1])) for i in range(len(groups))]
    with _png((6.4, 0.9 + 0.26 * (heights[0] - heights[-1] + 1)), 2) as (axes, image):
        for axis in axes:
            axis.axvline(0, color=GREY, linewidth=1)
            axis.grid(axis="x", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.set_ylim(heights[-1] - 0.7, heights[0] + 0.7)
            for height, (row, versus) in zip(heights, compared, strict=True):
                shape, colour = {MODELS: ("s", "black"), "Controls": ("D", ORANGE)}.get(row.group, ("o", BLUE))
                fill = colour if versus.mark else "white"
                axis.plot([versus.low, versus.high], [height, height], color=colour, linewidth=1.5)
                axis.plot(versus.difference, height, shape, color=colour, markerfacecolor=fill, markersize=5.5)
        whole, close = axes
        whole.set_yticks(heights, [row.label for row, _ in compared])
        close.set_yticks([])
        close.set_xlim(-CLOSE, CLOSE)
        close.set_xticks([-CLOSE, 0, CLOSE])
        whole.set_title(TASKS.get(task, task), fontsize=11)
        close.set_title(f"within {CLOSE} points", fontsize=9)
        whole.set_xlabel("points above the target")
    return image.text


def loss_figure(task: str, alignment: dict[str, Any]) -> str:
    """Validation loss against alignment step, as base64 PNG."""
    losses = [alignment["validation_loss_without_delta"], *(step["validation_loss"] for step in alignment["steps"])]
    chosen = alignment["chosen_step"]
    with _png((5.0, 3.2), 1) as ((axis,), image):
        axis.plot(range(len(losses)), losses, "o-", color=BLUE)
        axis.plot([chosen], [losses[chosen]], "s", markersize=10, fillstyle="none", color=ORANGE)
        axis.axhline(losses[0], linestyle=":", color=GREY, linewidth=1)
        axis.set_title(TASKS.get(task, task), fontsize=11)
        axis.set_xlabel("alignment step")
        axis.set_ylabel("held-out answer loss (nats)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
    return image.text


@dataclass
class _Image:
    text: str = ""


@contextmanager
def _png(size: tuple[float, float], count: int) -> Iterator[tuple[list[Any], _Image]]:
    """`count` axes side by side in `size` inches to draw on; afterwards the image holds them as base64 PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, image = Figure(figsize=size, dpi=180), _Image()
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.tick_params(labelsize=9)
    yield axes, image
    figure.tight_layout(w_pad=2)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    image.text = base64.b64encode(stream.getvalue()).decode()


def report(
    params: Annotated[
        Path,
        typer.Option(
            help="Params file with the lists source, target, task, pair_methods, grid_methods, target_methods and"
            " aligned_methods."
        ),
    ],
    evaluations: Annotated[
        Path,
        typer.Option(
            help="Folder of metrics: <model>/<task>.json, <method>/<source>-<target>/<task>.json,"
            " <target method>/<target>/<task>.json."
        ),
    ],
    alignments: Annotated[
        Path, typer.Option(help="Folder of alignment metrics: <method>/<source>-<target>/<task>.json.")
    ],
    html: Annotated[Path, typer.Option(help="Where to write the page.")],
    table: Annotated[Path, typer.Option(help="Where to write the tables (Markdown).")],
    out: Annotated[Path, typer.Option(help="Where to write the numbers (JSON).")],
) -> None:
    """Draw the results tables and the page from the metrics."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    watch = Stopwatch()
    settings = _settings(params)
    tasks: list[str] = settings["task"]
    pairs = [(s, t) for s in settings["source"] for t in settings["target"]]
    evaluated = _Folder(evaluations, tasks)
    aligned = _Folder(alignments, tasks)
    results = []
    for source, target in pairs:
        pair = f"{source}-{target}"
        found = {model: evaluated.read(model) for model in (source, target)}
        found |= {m: evaluated.read(m, pair) for m in (*settings["pair_methods"], *settings["grid_methods"])}
        found |= {m: evaluated.read(m, target) for m in settings["target_methods"]}
        curves = {m: aligned.read(m, pair) for m in settings["aligned_methods"]}
        drawn = {m: by_task for m, by_task in curves.items() if group_of(m) != "Controls"}
        results.append(_Result(source, target, run(found, source, target), drawn))
    for model in settings["models"]:
        evaluated.read(model)
    for folder in (evaluated, aligned):
        folder.check_nothing_else(params)

    write_json(out, {f"{r.source}-{r.target}": r.numbers() for r in results})
    text = "\n".join(f"### {r.source} to {r.target}, in percent\n\n{markdown(r.rows, tasks)}" for r in results)
    with written_whole(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("pkt_stages.stages").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    page = template.render(
        profile=settings["profile"],
        results=results,
        tasks={task: TASKS.get(task, task) for task in tasks},
        title_of=title_of,
        signed=signed,
        forest_figure=forest_figure,
        loss_figure=loss_figure,
        evaluated={task: found["settings"] for task, found in evaluated.read(pairs[0][1]).items()},
        params=yaml.safe_dump(settings, sort_keys=False),
    )
    with written_whole(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    watch.summary("report", f"{sum(len(r.rows) for r in results)} rows on {len(tasks)} tasks", html)


@dataclass(frozen=True)
class _Result:
    """All that one pair of models has to show; `alignments[method][task]` are the drawn alignments' metrics."""

    source: str
    target: str
    rows: list[Row]
    alignments: dict[str, dict[str, Any]]

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        return [(group, list(members)) for group, members in groupby(self.rows, lambda row: row.group)]

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON values, by row and task."""
        return {
            "rows": {row.slug: asdict(row) for row in self.rows},
            "order": [row.slug for row in self.rows],
            "alignments": {
                method: {
                    task: {
                        "chosen_step": found["chosen_step"],
                        "validation_loss_without_delta": found["validation_loss_without_delta"],
                        "validation_loss": [step["validation_loss"] for step in found["steps"]],
                    }
                    for task, found in by_task.items()
                }
                for method, by_task in self.alignments.items()
            },
        }


class _Folder:
    """A folder of metrics, one file per task in each subfolder, that knows which of its files were asked for."""

    def __init__(self, path: Path, tasks: Collection[str]) -> None:
        self.path, self.tasks = path, tasks
        self.listed: set[Path] = set()

    def read(self, *below: str) -> dict[str, dict[str, Any]]:
        """Metrics by task."""
        paths = {task: self.path.joinpath(*below, f"{task}.json") for task in self.tasks}
        self.listed.update(paths.values())
        return {task: _read(path) for task, path in paths.items()}

    def check_nothing_else(self, params: Path) -> None:
        """Raise UserError if there are files that were not asked for, with the command that deletes them."""
        needed = {parent for path in self.listed for parent in (path, *path.parents)}
        extra = set()
        for path in self.path.rglob("*.json"):
            if path not in needed:
                # The whole folder where none of it is listed.
                extra.add(next(p for p in (*reversed(path.parents), path) if p not in needed))
        if extra:
            names = shlex.join(str(path) for path in sorted(extra))
            raise UserError(
                f"{self.path}: holds metrics that {params} does not list; list their rows (again) or delete them:"
                f" rm -r {names}"
            )


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of params, found {content!r}")
    for name in ("source", "target", "task"):
        if not _is_names(content.get(name)) or not content[name]:
            raise UserError(f"{path}: {name}: expected a list with at least one name, found {content.get(name)!r}")
    seen: dict[str, str] = {}
    methods = ("pair_methods", "grid_methods", "target_methods")
    # A list that is left out is empty: the metrics of its rows would be an error.
    for name in (*methods, "aligned_methods", "models"):
        content.setdefault(name, [])
        if not _is_names(content[name]):
            raise UserError(f"{path}: {name}: expected a list of names, found {content[name]!r}")
        for method in content[name] if name in methods else ():
            if method in seen:
                raise UserError(f"{path}: {name}: {method} is in {seen[method]}, too; list it once")
            seen[method] = name
    return content


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such metrics; the params list this row, run `dvc repro`") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable metrics ({' '.join(str(error).split())})") from None
