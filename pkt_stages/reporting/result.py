"""What one source's transfer to the target has to show: its rows with their tests, its alignments, its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from pkt_stages.profile import GROUPS, Method, Profile, chat_model
from pkt_stages.reporting import figures
from pkt_stages.reporting.figures import Drawing
from pkt_stages.reporting.measure import NATS, POINTS, Measure
from pkt_stages.reporting.paper import Claim, claims, descriptions
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.table import MODELS, Head, Row, table

EVALUATION = ("task", "model", "ids", "runs", "settings", "made", "nats")
ALIGNMENT = ("params", "selection", "chosen_step", "steps", "validation_loss_without_delta")
CONTROLS, CEILINGS = GROUPS["control"].section, GROUPS["oracle"].section


@dataclass(frozen=True)
class Result:
    """All that one pair of models has to show.

    Attributes:
        points, nats: the rows, measured either way.
        metrics: of the evaluations by row and task.
        descriptions: what each row is, one line, by name.
        alignments: metrics by method and task.
        steps: evaluations after every step of an alignment, by method and task.
    """

    source: str
    target: str
    points: list[Row]
    nats: list[Row]
    metrics: dict[str, dict[str, dict[str, Any]]]
    descriptions: Mapping[str, str]
    alignments: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, Any]]
    claims: list[Claim]
    controls: list[Claim]

    @property
    def tables(self) -> list[tuple[Measure, list[tuple[str, list[Row]]]]]:
        """By measure the rows by section; a measure that no row has is left out."""
        return [
            (measure, [(group, list(members)) for group, members in groupby(rows, lambda row: row.group)])
            for measure, rows in ((POINTS, self.points), (NATS, self.nats))
            if any(row.cells for row in rows)
        ]

    @property
    def named(self) -> dict[str, Row]:
        """Rows by name, the two models' as `source` and `target`."""
        names = {chat_model(self.source): "source", self.target: "target"}
        return {names.get(row.slug, row.slug): row for row in self.points}

    @property
    def shown(self) -> dict[str, dict[str, Any]]:
        """The alignments by method and task; those of controls are left out."""
        return {name: found for name, found in self.alignments.items() if self.named[name].group != CONTROLS}

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON values, by row and task."""
        return {
            "rows": {row.slug: asdict(row) for row in self.points},
            "nats": {row.slug: asdict(row) for row in self.nats},
            "order": [row.slug for row in self.points],
            "alignments": {
                method: {
                    task: {
                        "chosen_step": found["chosen_step"],
                        "validation_loss_without_delta": found["validation_loss_without_delta"],
                        "validation_loss": [step["validation_loss"] for step in found["steps"]],
                    }
                    for task, found in by_task.items()
                }
                for method, by_task in self.shown.items()
            },
            "claims": [claim.numbers() for claim in self.claims],
            "controls": [claim.numbers() for claim in self.controls],
        }

    def drawings(self, tasks: Mapping[str, str]) -> dict[str, list[Drawing]]:
        """The figures: `forest`, `losses` and `steps`; `tasks` are their titles by name."""
        pair = f"{self.source}-{self.target}"
        made: dict[str, list[Drawing]] = {"forest": [], "losses": [], "steps": []}
        kinds = {MODELS: "model", CONTROLS: "control"}
        for task, title in tasks.items():
            # Where nothing was generated, what there is.
            shown = [
                (m, r) for m, r in ((POINTS, self.points), (NATS, self.nats)) if any(row.versus(task) for row in r)
            ]
            if not shown:
                continue
            measure, rows = shown[0]
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
                for row in rows
                if (versus := row.versus(task)) is not None
            ]
            caption = (
                f"{title}, {self.source} to {self.target}: difference to the target in {measure.name}, with its 95 %"
                " interval. Filled: p < .05 after Holm's correction; square: the source; circle: a method; diamond: a"
                " control. Right: what lies close to zero."
            )
            image = figures.forest(title, intervals, measure.name)
            made["forest"].append(Drawing(f"{pair}_differences_{task}", image, caption))
        for method, by_task in self.shown.items():
            for task, found in by_task.items():
                values = [found["validation_loss_without_delta"], *(step["validation_loss"] for step in found["steps"])]
                title = f"{self.named[method].label}, {tasks[task]}"
                image = figures.losses(title, values, found["chosen_step"])
                caption = (
                    f"{title}, from {self.source}: answer loss on held-out align examples after each alignment step"
                    " (circles), of the untouched target (dotted), and the step that was chosen on it (square)."
                )
                made["losses"].append(Drawing(f"{pair}_loss_{method}_{task}", image, caption))
        for method, by_task in self.steps.items():
            for task, found in by_task.items():
                if task not in self.alignments[method] or task not in self.named["target"].cells:
                    continue  # of a partial look
                steps: dict[str, list[float]] = {}
                for one in found["runs"]:
                    steps.setdefault(one["label"].split("/")[0], []).append(one["score"])
                title = f"{self.named[method].label}, {tasks[task]}"
                chosen = self.alignments[method][task]["chosen_step"]
                target = self.named["target"].cells[task].mean
                image = figures.score_by_step(title, list(steps.values()), chosen, target)
                caption = (
                    f"{title}, from {self.source}: test score with the delta of every alignment step, one line per"
                    " unseen example; dotted: the target; grey: the chosen step."
                )
                made["steps"].append(Drawing(f"{pair}_steps_{method}_{task}", image, caption))
        return made


def result(
    evaluated: Folder, analysed: Folder, profile: Profile, source: str, titles: Mapping[str, str], adopted: list[str]
) -> Result:
    """Everything about one source and the target, from their metrics.

    Args:
        titles: of the methods, by name.
        adopted: rows taken over that are methods.
    """
    tasks, target = profile.tasks, profile.target
    own, model = profile.of_source(source), chat_model(source)
    methods = in_sections([Method(name, "finetune", {}) for name in adopted], own)
    heads = [Head(model, MODELS, f"source: {model}"), Head(target, MODELS, f"target: {target}")]
    heads += [Head(method.name, method.section, titles[method.name]) for method in methods]
    folders = {model: (model,), target: (target,)} | {method.name: method.folder(source) for method in methods}
    found = {name: evaluated.by_task(tasks, *folder, keys=EVALUATION) for name, folder in folders.items()}
    named = {{model: "source", target: "target"}.get(row, row): by_task for row, by_task in found.items()}
    return Result(
        source=source,
        target=target,
        points=table(heads, found, target, POINTS),
        nats=table(heads, found, target, NATS),
        metrics=found,
        descriptions=descriptions(methods),
        alignments={
            method.name: analysed.by_task(tasks, "align", *method.folder(source), keys=ALIGNMENT)
            for method in own
            if method.group == "align"
        },
        steps={
            name: evaluated.by_task(tasks, "steps", *profile.method(name).folder(source), keys=EVALUATION)
            for name in profile.every_step
        },
        claims=claims(named, tasks, section="claims"),
        controls=claims(named, tasks, section="controls"),
    )


def in_sections(adopted: list[Method], methods: list[Method]) -> list[Method]:
    """The table's rows by section, each section where its first method is; rows taken over lead theirs."""
    order = list(dict.fromkeys(method.section for method in methods))

    def place(method: Method) -> tuple[bool, int]:
        section = method.section
        return section == CONTROLS, order.index(section) if section in order else len(order)

    return sorted([*adopted, *methods], key=place)
