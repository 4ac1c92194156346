"""What came out, and why? Metrics of every listed model and method -> tables and figures, Markdown, JSON, one page.

Loads no model. What to show stands in the params file; a row that is listed but has no metrics is an error, and so are
metrics that are not listed (docs/decisions/004). Every row is compared with the target on the same examples; what no
test supports is not called higher or lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import tasks
from pkt_stages.artifacts import write_json, written_whole
from pkt_stages.options import Stopwatch
from pkt_stages.profile import Profile, read_profile

if TYPE_CHECKING:
    from pkt_stages.reporting.figures import Drawing
    from pkt_stages.reporting.reading import Folder


@dataclass(frozen=True)
class Report:
    """What is written: the numbers (JSON values), the tables (Markdown), the page (HTML) and its figures."""

    summary: str
    numbers: dict[str, Any]
    table: str
    page: str
    drawings: list[Drawing]


def run(profile: Profile, evaluated: Folder, analysed: Folder) -> Report:
    """Everything about a profile, from its metrics.

    Raises:
        UserError: metrics that are missing, or that are not listed.
    """
    from pkt_stages.reporting import analysis, paper, table
    from pkt_stages.reporting.ladder import MEASURES, drawing, ladder, sentences
    from pkt_stages.reporting.ladder import markdown as climbed
    from pkt_stages.reporting.page import page
    from pkt_stages.reporting.result import EVALUATION, result
    from pkt_stages.reporting.settings import in_force, used

    titles = {task: tasks.load(task).title for task in profile.tasks}
    adopted = {name: evaluated.by_task(profile.tasks, name, keys=EVALUATION) for name in profile.adopted}
    taken = [name for name, found in adopted.items() if any(metrics["made"] for metrics in found.values())]
    names = paper.titles([*taken, *(method.name for method in profile.methods)])
    results = [result(evaluated, analysed, profile, source, names, taken) for source in profile.sources["source"]]
    models = {name: evaluated.by_task(profile.tasks, name, keys=EVALUATION) for name in profile.models}
    models |= {name: found for name, found in adopted.items() if name not in taken}
    compared = analysis.compared(analysed, profile, names, titles)
    neurons = [
        (model, analysed.read("neurons", model, task, keys=("params", "attribution", "examples")))
        for task in profile.analysed["task"]
        for model in profile.attributed
    ]
    for folder in (evaluated, analysed):
        folder.check_nothing_else(profile.path)

    ladders = []
    if profile.oracle is not None:
        known = models[profile.oracle]
        ladders = [made for m in MEASURES if (made := ladder(profile, results, known, m)) is not None]
    climbs = [drawing(ladders)] if ladders else []
    told = sentences(ladders[0]) if ladders else []
    drawn = [result.drawings(titles) for result in results]
    sections = analysis.sections(compared, neurons)
    drawings = climbs + [d for by_kind in drawn for group in by_kind.values() for d in group]
    drawings += [d for section in sections for d in section.drawings]
    return Report(
        summary=f"{sum(len(r.points) for r in results)} rows on {len(titles)} tasks, {len(drawings)} figures",
        numbers={f"{r.source}-{r.target}": r.numbers() for r in results}
        | ({"recovered": {made.measure.name: made.numbers() for made in ladders}} if ladders else {}),
        table="\n".join(
            ([climbed(ladders, told)] if ladders else [])
            + [f"### {r.source} to {r.target}\n\n{table.markdown(r.points, r.nats, titles)}" for r in results]
        ),
        page=page(
            profile=profile.name,
            oracle=profile.oracle,
            target=profile.target,
            ladders=ladders,
            climbs=climbs,
            told=told,
            results=list(zip(results, drawn, strict=True)),
            tasks=titles,
            sections=sections,
            paper_tables=paper.tables({(r.source, r.target): r.named for r in results}),
            models={name: next(iter(by_task.values()))["model"] for name, by_task in models.items()},
            in_force=in_force(used(profile, results, titles, compared, neurons)),
            params=profile.path.read_text(encoding="utf-8-sig"),
        ),
        drawings=drawings,
    )


def report(
    params: Annotated[Path, typer.Option(help="Params file with the lists of models, tasks and methods.")],
    results: Annotated[
        Path,
        typer.Option(
            help="Folder of metrics: evaluate/<model>/<task>.json, evaluate/<method>/[<source>/]<task>.json,"
            " evaluate/steps/..., and analysis/align, analysis/compare, analysis/neurons."
        ),
    ],
    html: Annotated[Path, typer.Option(help="Where to write the page.")],
    figures: Annotated[Path, typer.Option(help="Folder for the figures as PNG files.")],
    table: Annotated[Path, typer.Option(help="Where to write the tables (Markdown).")],
    out: Annotated[Path, typer.Option(help="Where to write the numbers (JSON).")],
) -> None:
    """Draw the results tables, the figures and the page from the metrics."""
    from pkt_stages.reporting.reading import Folder

    watch = Stopwatch()
    made = run(read_profile(params), Folder(results / "evaluate"), Folder(results / "analysis"))
    write_json(out, made.numbers)
    for path, text in ((table, made.table), (html, made.page)):
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for drawing in made.drawings:
        with written_whole(figures / f"{drawing.name}.png") as temporary:
            temporary.write_bytes(drawing.png)
    watch.summary("report", made.summary, html)
