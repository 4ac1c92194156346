"""What came out, and why? Metrics of every listed model and method -> tables and figures, Markdown, JSON, one page.

Loads no model. What to show stands in the params file (source, target, task, and the lists of methods); a row that is
listed but has no metrics is an error, and so are metrics that are not listed (docs/decisions/004). Every row is
compared with the target on the same examples; what no test supports is not called higher or lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from pkt_stages.artifacts import write_json, written_whole
from pkt_stages.options import Stopwatch

if TYPE_CHECKING:
    from pkt_stages.reporting.analysis import Drawing
    from pkt_stages.reporting.paper import Claim
    from pkt_stages.reporting.reading import Folder
    from pkt_stages.reporting.table import Row

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Result:
    """All that one pair of models has to show.

    Attributes:
        metrics: of the evaluations by row and task.
        alignments: metrics by method and task; those of controls are left out.
        steps: evaluations after every step of an alignment, by method and task.
    """

    source: str
    target: str
    rows: list[Row]
    metrics: dict[str, dict[str, dict[str, Any]]]
    alignments: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, Any]]
    claims: list[Claim]
    controls: list[Claim]

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
            "claims": [claim.numbers() for claim in self.claims],
            "controls": [claim.numbers() for claim in self.controls],
        }

    @property
    def named(self) -> dict[str, dict[str, Any]]:
        """Cells by row and task, the two models' rows as `source` and `target`."""
        names = {self.source: "source", self.target: "target"}
        return {names.get(row.slug, row.slug): row.cells for row in self.rows}


def run(evaluated: Folder, aligned: Folder, settings: Mapping[str, Any], source: str, target: str) -> Result:
    """Everything about one pair of models, from its metrics."""
    from pkt_stages.reporting.paper import claims
    from pkt_stages.reporting.table import group_of, table

    tasks, pair = settings["task"], f"{source}-{target}"
    found = {model: evaluated.by_task(tasks, model) for model in (source, target)}
    for methods, where in (
        ("pair_methods", pair),
        ("grid_methods", pair),
        ("target_methods", target),
        ("adopted_target_methods", target),
    ):
        found |= {method: evaluated.by_task(tasks, method, where) for method in settings[methods]}
    trained = (*settings["aligned_methods"], *settings["reselected_methods"])
    curves = {method: aligned.by_task(tasks, method, pair) for method in trained}
    named = {{source: "source", target: "target"}.get(row, row): by_task for row, by_task in found.items()}
    return Result(
        source=source,
        target=target,
        rows=table(found, source, target),
        metrics=found,
        alignments={method: by_task for method, by_task in curves.items() if group_of(method) != "Controls"},
        steps={method: evaluated.by_task(tasks, "steps", method, pair) for method in settings["curve_methods"]},
        claims=claims(named, tasks, section="claims"),
        controls=claims(named, tasks, section="controls"),
    )


def drawings_of(result: Result, titles: Mapping[str, str]) -> dict[str, list[Drawing]]:
    """The figures of one pair: `forest`, `losses` and `steps`."""
    from pkt_stages.reporting import figures
    from pkt_stages.reporting.analysis import Drawing
    from pkt_stages.reporting.table import MODELS, title_of

    pair = f"{result.source}-{result.target}"
    made: dict[str, list[Drawing]] = {"forest": [], "losses": [], "steps": []}
    kinds = {MODELS: "model", "Controls": "control"}
    for task, title in titles.items():
        intervals = [
            figures.Interval(
                label=row.label,
                group=row.group,
                kind=kinds.get(row.group, "method"),
                value=versus.difference,
                low=versus.low,
                high=versus.high,
                marked=bool(versus.mark),
            )
            for row in result.rows
            if (versus := row.cells[task].versus) is not None
        ]
        alt = f"{title}: difference to the target with its 95 % interval, one line per row; numbers in the table above"
        made["forest"].append(Drawing(f"{pair}_differences_{task}", figures.forest(title, intervals), alt))
    for method, by_task in result.alignments.items():
        for task, found in by_task.items():
            values = [found["validation_loss_without_delta"], *(step["validation_loss"] for step in found["steps"])]
            title = f"{title_of(method)}, {titles[task]}"
            png = figures.losses(title, values, found["chosen_step"])
            made["losses"].append(Drawing(f"{pair}_loss_{method}_{task}", png, f"{title}: held-out loss by step"))
    for method, by_task in result.steps.items():
        for task, found in by_task.items():
            steps: dict[str, list[float]] = {}
            for one in found["runs"]:
                steps.setdefault(one["label"].split("/")[0], []).append(one["score"])
            title = f"{title_of(method)}, {titles[task]}"
            chosen = result.alignments[method][task]["chosen_step"]
            target = result.named["target"][task].score
            png = figures.score_by_step(title, list(steps.values()), chosen, target)
            made["steps"].append(Drawing(f"{pair}_steps_{method}_{task}", png, f"{title}: test score by step"))
    return made


def report(
    params: Annotated[Path, typer.Option(help="Params file with the lists of models, tasks and methods.")],
    evaluations: Annotated[
        Path,
        typer.Option(
            help="Folder of metrics: <model>/<task>.json, <method>/<source>-<target>/<task>.json,"
            " <target method>/<target>/<task>.json, steps/<method>/<source>-<target>/<task>.json."
        ),
    ],
    alignments: Annotated[
        Path, typer.Option(help="Folder of alignment metrics: <method>/<source>-<target>/<task>.json.")
    ],
    html: Annotated[Path, typer.Option(help="Where to write the page.")],
    table: Annotated[Path, typer.Option(help="Where to write the tables (Markdown).")],
    out: Annotated[Path, typer.Option(help="Where to write the numbers (JSON).")],
    analysis: Annotated[
        Path | None, typer.Option(help="Folder of the metrics of cka, similarity, deltas and neurons.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG files.")] = None,
) -> None:
    """Draw the results tables, the figures and the page from the metrics."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from pkt_stages.reporting import paper
    from pkt_stages.reporting.analysis import sections
    from pkt_stages.reporting.reading import Folder, read_settings
    from pkt_stages.reporting.table import TASKS, markdown, signed, title_of

    watch = Stopwatch()
    settings = read_settings(params)
    tasks: list[str] = settings["task"]
    titles = {task: TASKS.get(task, task) for task in tasks}
    evaluated, aligned = Folder(evaluations), Folder(alignments)
    folders = [evaluated, aligned]
    results = [
        run(evaluated, aligned, settings, source, target)
        for source in settings["source"]
        for target in settings["target"]
    ]
    models = {model: evaluated.by_task(tasks, model) for model in (*settings["models"], *settings["adopted_models"])}
    parts = []
    if analysis is not None:
        folders.append(Folder(analysis))
        parts = sections(folders[-1], settings)
    for folder in folders:
        folder.check_nothing_else(params)

    drawn = [drawings_of(result, titles) for result in results]
    every = [d for by_kind in drawn for group in by_kind.values() for d in group]
    every += [d for part in parts for d in part.drawings]
    write_json(out, {f"{r.source}-{r.target}": r.numbers() for r in results})
    text = "\n".join(f"### {r.source} to {r.target}, in percent\n\n{markdown(r.rows, tasks)}" for r in results)
    with written_whole(table) as temporary:
        temporary.write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("pkt_stages.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    page = template.render(
        profile=settings["profile"],
        results=list(zip(results, drawn, strict=True)),
        tasks=titles,
        title_of=title_of,
        signed=signed,
        sections=parts,
        paper_tables=paper.tables({(r.source, r.target): r.named for r in results}),
        models={name: next(iter(by_task.values()))["model"] for name, by_task in models.items()},
        evaluated={task: found["settings"] for task, found in results[0].metrics[results[0].target].items()},
        params=yaml.safe_dump(settings, sort_keys=False),
    )
    with written_whole(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if figures is not None:
        for drawing in every:
            with written_whole(figures / f"{drawing.name}.png") as temporary:
                temporary.write_bytes(drawing.png)
    what = f"{sum(len(r.rows) for r in results)} rows on {len(tasks)} tasks, {len(every)} figures"
    watch.summary("report", what, html)
