"""What came out, and why? Metrics of every listed model and method -> tables, scores, figures, one page.

Loads no model. What to show stands in the params file; a row that is listed but has no metrics is an error, and so are
metrics that are not listed (docs/decisions/004), unless a partial look at what there is is asked for. Every row is
compared with the target on the same examples; what no test supports is not called higher or lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import tasks
from pkt_stages.artifacts import check_replaceable, replaced_folder, write_json, written_whole
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch
from pkt_stages.profile import Profile, read_profile

if TYPE_CHECKING:
    from pkt_stages.reporting.figures import Drawing
    from pkt_stages.reporting.reading import Folder

CAPTIONS = "captions.md"  # beside the figures, by which their folder is known


@dataclass(frozen=True)
class Report:
    """What is written: the numbers (JSON values), the tables (Markdown), the page (HTML), its figures in order; and, to
    take away, the scores (JSON values), all rows (CSV) and the table (LaTeX)."""

    summary: str
    numbers: dict[str, Any]
    table: str
    page: str
    drawings: list[Drawing]
    scores: dict[str, Any]
    rows: str
    latex: str


def run(profile: Profile, evaluated: Folder, analysed: Folder, code: str = "") -> Report:
    """Everything about a profile, from its metrics.

    Args:
        code: a fingerprint of the code that the page shows.

    Raises:
        UserError: metrics that are missing, or that are not listed; neither in a partial look.
    """
    from pkt_stages.reporting import analysis, diagnostics, paper, scores, summary, table
    from pkt_stages.reporting.ladder import MEASURES, drawings, ladder, sentences
    from pkt_stages.reporting.ladder import markdown as climbed
    from pkt_stages.reporting.measure import NATS
    from pkt_stages.reporting.page import page
    from pkt_stages.reporting.reading import check_nothing_else
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
        (model, found)
        for task in profile.analysed["task"]
        for model in profile.attributed
        if (found := analysed.read("neurons", model, task, keys=("params", "attribution", "examples"))) is not None
    ]
    before = diagnostics.measured(analysed, profile)
    prepared = analysed.by_task(profile.prepared, "data", keys=("counts", "pools"))
    if not evaluated.partial:
        check_nothing_else((evaluated, analysed), profile.path)
    num_missing = len(evaluated.missing | analysed.missing)
    banner = (
        f"Partial: {num_missing} of the {len(evaluated.listed | analysed.listed)} metrics that the params list are not"
        " there yet (a dash each). Holm's correction is over the rows that are there: p-values will rise with the rest."
        if num_missing
        else ""
    )

    ladders = []
    if profile.oracle is not None:
        known = models[profile.oracle]
        ladders = [made for m in MEASURES if (made := ladder(profile, results, known, m)) is not None]
    alike = diagnostics.diagnostics(before, next((one for one in ladders if one.measure is NATS), None))
    climbs = drawings(ladders)
    told = sentences(ladders[0]) if ladders else []
    drawn = [result.drawings(titles) for result in results]
    sections = ([alike.section()] if alike is not None else []) + analysis.sections(compared, neurons)
    figures = climbs + [d for by_kind in drawn for group in by_kind.values() for d in group]
    figures += [d for section in sections for d in section.drawings]
    identities = {name: next(iter(by_task.values()))["model"] for name, by_task in models.items() if by_task}
    said = summary.sentences(profile, results, titles)
    return Report(
        summary=f"{sum(len(r.points) for r in results)} rows on {len(titles)} tasks, {len(figures)} figures",
        numbers={f"{r.source}-{r.target}": r.numbers() for r in results}
        | ({"recovered": {made.measure.name: made.numbers() for made in ladders}} if ladders else {})
        | ({"diagnostics": alike.numbers()} if alike is not None else {}),
        table="\n".join(
            ([f"**{banner}**\n"] if banner else [])
            + [summary.markdown(said)]
            + ([climbed(ladders, told)] if ladders else [])
            + ([alike.markdown()] if alike is not None else [])
            + [f"### {r.source} to {r.target}\n\n{table.markdown(r.points, r.nats, titles)}" for r in results]
        ),
        page=page(
            profile=profile.name,
            oracle=profile.oracle,
            target=profile.target,
            banner=banner,
            said=said,
            facts=summary.facts(profile, results, identities, titles, prepared, code),
            figure={drawing.name: number for number, drawing in enumerate(figures, start=1)},
            ladders=ladders,
            climbs=climbs,
            told=told,
            results=list(zip(results, drawn, strict=True)),
            tasks=titles,
            sections=sections,
            paper_tables=paper.tables({(r.source, r.target): r.named for r in results}),
            models=identities,
            in_force=in_force(used(profile, results, titles, compared, neurons)),
            params=profile.path.read_text(encoding="utf-8-sig"),
        ),
        drawings=figures,
        scores=scores.flat(profile, results),
        rows=scores.tidy(results, profile.tasks),
        latex=scores.latex(results, titles),
    )


def report(
    params: Annotated[Path, typer.Option(help="Params file with the lists of models, tasks and methods.")],
    results: Annotated[
        Path,
        typer.Option(
            help="Folder of metrics: evaluate/<model>/<task>.json, evaluate/<method>/[<source>/]<task>.json,"
            " evaluate/steps/..., and analysis/align, analysis/correlate, analysis/compare, analysis/neurons."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures (PNG, SVG, PDF) and captions.md.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Where to write the tables (Markdown); else they are printed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the numbers (JSON).")] = None,
    scores: Annotated[Path | None, typer.Option(help="Where to write a score per row and task (JSON).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Where to write every row, task and run (CSV).")] = None,
    tex: Annotated[Path | None, typer.Option(help="Where to write the table for a paper (LaTeX, booktabs).")] = None,
    code: Annotated[Path | None, typer.Option(help="File of `pkt code` whose MD5 the page shows.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Show what there is; rows without metrics have gaps.")
    ] = False,
) -> None:
    """Draw the results tables, the figures and the page from the metrics. What no path is given for is not written."""
    import hashlib

    from pkt_stages.reporting.reading import Folder

    watch = Stopwatch()
    if figures is not None:
        check_replaceable(figures, CAPTIONS)
    if code is not None and not code.is_file():
        raise UserError(f"{code}: no such file; `dvc repro code` writes it")
    fingerprint = hashlib.md5(code.read_bytes(), usedforsecurity=False).hexdigest() if code is not None else ""
    evaluated, analysed = (Folder(results / name, partial=partial) for name in ("evaluate", "analysis"))
    made = run(read_profile(params), evaluated, analysed, fingerprint)
    for path, value in ((out, made.numbers), (scores, made.scores)):
        if path is not None:
            write_json(path, value)
    for path, text in ((table, made.table), (html, made.page), (csv, made.rows), (tex, made.latex)):
        if path is not None:
            with written_whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if figures is not None:
        with replaced_folder(figures, CAPTIONS) as folder:
            write_figures(made.drawings, folder)
    if table is None:
        typer.echo(made.table)
    watch.summary("report", made.summary, html or table or results)


def write_figures(drawings: Sequence[Drawing], folder: Path) -> None:
    """Every figure as PNG, SVG and PDF, and the captions with the page's numbers."""
    for drawing in drawings:
        for kind, data in (("png", drawing.image.png), ("svg", drawing.image.svg), ("pdf", drawing.image.pdf)):
            (folder / f"{drawing.name}.{kind}").write_bytes(data)
    captions = [f"**Figure {n}** (`{d.name}`). {d.caption}\n" for n, d in enumerate(drawings, start=1)]
    (folder / CAPTIONS).write_text("\n".join(captions), encoding="utf-8")
