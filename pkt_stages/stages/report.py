"""What came out? Metrics of every listed model and method -> one table, as Markdown, JSON and a self-contained page.

Loads no model. What to show stands in the params file (source, target, transfer_method, task); a row that is listed
but has no metrics is an error, and metrics that are not listed are named in a warning and left out.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pkt_stages.artifacts import write_json, written_whole
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch

TITLES = {"mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP", "laten": "LaTen"}
TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Cell:
    """One row's result on one task, in percent.

    `score` and `stderr` (of a mean over test examples) are means over runs; `spread` is the standard deviation over
    runs (LaTen: over unseen examples), None for one run. `gain` is the difference to the target, and `gain_stderr` its
    standard error from per-example differences, so that what both get right or wrong cancels.
    """

    score: float
    stderr: float
    n: int
    num_runs: int
    spread: float | None
    gain: float | None
    gain_stderr: float | None

    def text(self) -> str:
        spread = f", sd {self.spread:.1f} over {self.num_runs}" if self.spread is not None else ""
        return f"{self.score:.1f} ± {self.stderr:.1f} (n {self.n}{spread})"

    def gain_text(self) -> str:
        return "" if self.gain is None else f"{self.gain:+.2f} ± {self.gain_stderr:.2f}"


@dataclass(frozen=True)
class Row:
    label: str
    cells: dict[str, Cell]


def summarise(metrics: dict[str, Any], baseline: dict[str, Any] | None) -> Cell:
    """One cell from an evaluation's metrics, and the target's metrics on the same examples."""
    runs = metrics["runs"]
    per_example = [statistics.fmean(values) for values in zip(*(run["correct"] for run in runs), strict=True)]
    gain = gain_stderr = None
    if baseline is not None:
        if metrics["ids"] != baseline["ids"]:
            raise UserError(f"task {metrics['task']}: evaluated on other examples than the target; evaluate again")
        differences = [a - b for a, b in zip(per_example, baseline["runs"][0]["correct"], strict=True)]
        gain = 100 * statistics.fmean(differences)
        gain_stderr = 100 * _stderr(differences)
    return Cell(
        score=statistics.fmean(run["score"] for run in runs),
        stderr=100 * _stderr(per_example),
        n=len(per_example),
        num_runs=len(runs),
        spread=statistics.stdev([run["score"] for run in runs]) if len(runs) > 1 else None,
        gain=gain,
        gain_stderr=gain_stderr,
    )


def _stderr(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def run(metrics: dict[str, dict[str, dict[str, Any]]], target: str, labels: dict[str, str]) -> list[Row]:
    """The table: `metrics[row][task]` as rows in the order of `labels` (row -> how it is called)."""
    rows = []
    for name, label in labels.items():
        cells = {}
        for task, found in metrics[name].items():
            plain = name in labels and name == target
            cells[task] = summarise(found, None if plain else metrics[target][task])
        rows.append(Row(label, cells))
    return rows


def markdown(rows: list[Row], tasks: list[str]) -> str:
    """The table in Markdown; scores in percent."""
    lines = [
        "| | " + " | ".join(TITLES.get(t, t) for t in tasks) + " |",
        "|---|" + "---|" * len(tasks),
        *("| " + " | ".join([row.label, *(row.cells[t].text() for t in tasks)]) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def loss_figure(alignments: dict[str, dict[str, Any]]) -> str:
    """Validation loss against alignment step, one line per task, as base64 PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(alignments), figsize=(3.2 * len(alignments), 2.8), squeeze=False)
    for axis, (name, found) in zip(axes[0], alignments.items(), strict=True):
        losses = [found["validation_loss_without_delta"], *(step["validation_loss"] for step in found["steps"])]
        axis.plot(range(len(losses)), losses, "o-", color="#0072B2")
        chosen = found["chosen_step"]
        axis.plot([chosen], [losses[chosen]], "s", markersize=10, fillstyle="none", color="#D55E00")
        axis.axhline(losses[0], linestyle=":", color="#555555", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("alignment step")
        axis.set_ylabel("held-out answer loss (nats)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(stream.getvalue()).decode()


def report(
    params: Annotated[Path, typer.Option(help="Params file with source, target, transfer_method and task.")],
    evaluations: Annotated[
        Path, typer.Option(help="Folder of metrics: <model>/<task>.json, <method>/<pair>/<task>.json.")
    ],
    alignments: Annotated[Path, typer.Option(help="Folder of alignment metrics: <pair>/<task>.json.")],
    html: Annotated[Path, typer.Option(help="Where to write the page.")],
    table: Annotated[Path, typer.Option(help="Where to write the table (Markdown).")],
    out: Annotated[Path, typer.Option(help="Where to write the numbers (JSON).")],
) -> None:
    """Draw the results table and the page from the metrics."""
    from dataclasses import asdict
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    watch = Stopwatch()
    settings = _settings(params)
    tasks = settings["task"]
    pairs = [(s, t) for s in settings["source"] for t in settings["target"]]
    tables = []
    listed: set[Path] = set()

    def metrics_of(folder: Path) -> dict[str, dict[str, Any]]:
        paths = {task: folder / f"{task}.json" for task in tasks}
        listed.update(paths.values())
        return {task: _read(path) for task, path in paths.items()}

    for source, target in pairs:
        found = {source: metrics_of(evaluations / source), target: metrics_of(evaluations / target)}
        labels = {source: f"source: {source}", target: f"target: {target}"}
        for method in settings["transfer_method"]:
            found[method] = metrics_of(evaluations / method / f"{source}-{target}")
            labels[method] = f"target + {TITLES.get(method, method)}"
        tables.append((source, target, run(found, target, labels)))
    extra = sorted(set(evaluations.rglob("*.json")) - listed)
    if extra:
        names = ", ".join(str(path.relative_to(evaluations)) for path in extra)
        typer.echo(f"warning: {names}: not listed in {params}, left out; delete them if they are stale", err=True)

    curves = {
        f"{source} to {target}": {
            TITLES.get(task, task): _read(alignments / f"{source}-{target}" / f"{task}.json") for task in tasks
        }
        for source, target in pairs
    }
    write_json(
        out,
        [
            {"source": s, "target": t, "rows": [asdict(row) for row in rows], "alignment": curves[f"{s} to {t}"]}
            for s, t, rows in tables
        ],
    )
    text = "\n".join(f"### {s} to {t}: score in percent\n\n{markdown(rows, tasks)}" for s, t, rows in tables)
    with written_whole(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("pkt_stages.stages").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    page = template.render(
        profile=settings["profile"],
        tables=tables,
        tasks=tasks,
        titles=TITLES,
        figures={name: loss_figure(found) for name, found in curves.items()},
        alignments=curves,
        params=yaml.safe_dump(settings, sort_keys=False),
        evaluated=_read(evaluations / pairs[0][1] / f"{tasks[0]}.json")["settings"],
    )
    with written_whole(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    watch.summary("report", f"{sum(len(rows) for *_, rows in tables)} rows on {len(tasks)} tasks", html)


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    for name in ("source", "target", "task", "transfer_method"):
        values = content.get(name) if isinstance(content, dict) else None
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: {name}: expected a list with at least one name, found {values!r}")
    return dict(content)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such metrics; the params list this row, run `dvc repro`") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable metrics ({' '.join(str(error).split())})") from None
