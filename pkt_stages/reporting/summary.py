"""What the page begins with: what this report is about, and what it says in a few sentences."""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkt_stages.profile import Method, Profile
from pkt_stages.reporting.measure import NATS, POINTS, Measure
from pkt_stages.reporting.result import CEILINGS, CONTROLS, Result
from pkt_stages.reporting.table import corrected, difference, rounded


@dataclass(frozen=True)
class Found:
    """A row of a method that has a source, against the target and against its controls, by task.

    Attributes:
        higher: tasks on which it is shown above the target; `beyond`: of these those on which it is shown above each of
            its controls as well.
        gained: the least and the largest difference to the target on those, as text; empty if there are none.
        below: tasks on which a control is shown above it.
        num_tasks: that were measured.
        controlled: whether it has a control.
    """

    source: str
    label: str
    higher: list[str]
    beyond: list[str]
    gained: str
    below: list[str]
    num_tasks: int
    controlled: bool


def kind(method: Method) -> str:
    """What a method and its controls have in common: what makes them, or what they are made of."""
    group = method.group.removesuffix("_control")
    return "align" if group == "control" else group


def primary(results: Sequence[Result]) -> Measure | None:
    """Scores if every task that was evaluated has them, else likelihoods; None if nothing was measured."""
    points, nats = (
        {task for result in results for row in rows(result) for task in row.cells}
        for rows in (lambda result: result.points, lambda result: result.nats)
    )
    if not points | nats:
        return None
    return POINTS if points >= nats else NATS


def compared(profile: Profile, result: Result, measure: Measure) -> list[Found]:
    """Every row of a method with a source. Tests against controls are corrected (Holm) over all rows and tasks."""
    rows = {row.slug: row for row in (result.points if measure is POINTS else result.nats) if row.cells}
    methods = [method for method in profile.of_source(result.source) if method.name in rows]
    ours = [method for method in methods if method.by_source and method.section not in (CEILINGS, CONTROLS)]
    tests = []
    for method in ours:
        for control in (m for m in methods if m.section == CONTROLS and kind(m) == kind(method)):
            for task in (task for task in rows[method.name].cells if task in rows[control.name].cells):
                one, other = (measure.results(result.metrics[m.name][task]) for m in (method, control))
                tests.append(((method.name, task), difference(one, other, measure), one, other))
    against: dict[tuple[str, str], set[str]] = {}
    for (key, *_), found in zip(tests, corrected([test[1:] for test in tests], measure), strict=True):
        against.setdefault(key, set()).add(found.mark)
    made = []
    for row in (rows[method.name] for method in ours):
        marks = {task: against.get((row.slug, task), set()) for task in row.cells}
        higher = [task for task in row.cells if (versus := row.versus(task)) and versus.mark == "▲"]
        beyond = [task for task in higher if marks[task] == {"▲"}]
        gains = sorted(versus.difference for task in beyond if (versus := row.versus(task)))
        made.append(
            Found(
                source=result.source,
                label=row.label,
                higher=higher,
                beyond=beyond,
                gained=_span(gains, measure, "+"),
                below=[task for task in row.cells if "▼" in marks[task]],
                num_tasks=len(row.cells),
                controlled=any(marks.values()),
            )
        )
    return made


def sentences(profile: Profile, results: Sequence[Result], tasks: Mapping[str, str]) -> list[str]:
    """What was shown to transfer, what was no better than its control or the target, and what could not be seen."""
    measure = primary(results)
    if measure is None:
        return ["Nothing has been evaluated yet."]
    found = [one for result in results for one in compared(profile, result, measure)]
    unit = "score" if measure is POINTS else "log-likelihood"
    if not found:
        return ["No row of this report has a source, so it says nothing of a transfer."]
    held = [f for f in found if f.controlled]
    shown = _listed(held, lambda f: f.beyond, sized=measure.name)
    made = [
        f"Shown to transfer, by {unit} (above the target and above each of its controls): {shown}."
        if shown
        else f"Nothing was shown to transfer by {unit}: no row with a source is above both the target and its controls."
        if held
        else "No row with a source has a control here, so nothing of it can be called a transfer."
    ]
    if failed := _listed(held, lambda f: not f.beyond, counted=False):
        text = f"On no task above both the target and its controls: {failed}."
        if worse := _listed([f for f in held if not f.beyond], lambda f: f.below):
            text += f" A control is even shown above {worse}."
        made.append(text)
    alone = [f for f in found if not f.controlled]
    if higher := _listed(alone, lambda f: f.higher):
        made.append(f"Above the target, but without a control of what the source adds: {higher}.")
    if nothing := _listed(alone, lambda f: not f.higher, counted=False):
        made.append(f"Not shown above the target, and without a control: {nothing}.")
    made.append(_unseen(results, measure, tasks))
    return made


def markdown(said: Sequence[str]) -> str:
    """The sentences as a list, in lines of a terminal's width."""
    lines = [textwrap.fill(f"- {text}", 118, subsequent_indent="  ") for text in said]
    return "### In short\n\n" + "\n".join(lines) + "\n"


def _listed(
    found: Sequence[Found], shown: Callable[[Found], Any], *, counted: bool = True, sized: str | None = None
) -> str:
    """`matched transport (from s, 4 of 4 tasks; t, 1 of 4 tasks)`: of those that `shown` is true of, by method.

    Args:
        shown: if `counted`, a list of tasks, of which the number is told.
        sized: the unit of how much was gained, which is told too.
    """
    parts: dict[str, list[str]] = {}
    for one in filter(shown, found):
        told = f", {len(shown(one))} of {one.num_tasks} tasks" if counted else ""
        told += f" by {one.gained} {sized}" if sized else ""
        parts.setdefault(one.label, []).append(f"{one.source}{told}")
    total = Counter(one.label for one in found)
    return "; ".join(
        f"{label} (from {'each source' if not counted and 2 < len(p) == total[label] else '; '.join(p)})"
        for label, p in parts.items()
    )


def _span(values: Sequence[float], measure: Measure, sign: str = "") -> str:
    """`0.5 to 9.8`: the first and the last of sorted values, or one if they look alike."""
    ends = dict.fromkeys(rounded(value, measure.digits, sign) for value in (*values[:1], *values[-1:]))
    return " to ".join(ends)


def _unseen(results: Sequence[Result], measure: Measure, tasks: Mapping[str, str]) -> str:
    """By task the range of differences that tests of methods against the target would have missed."""
    parts, blind = [], 0
    for task, title in tasks.items():
        versus = [
            v
            for result in results
            for row in (result.points if measure is POINTS else result.nats)
            if row.group not in (CEILINGS, CONTROLS) and (v := row.versus(task)) is not None and not v.mark
        ]
        seen = sorted(v.detectable for v in versus if v.detectable is not None)
        blind += len(versus) - len(seen)
        if seen:
            parts.append(f"{title} {_span(seen, measure)}")
    if not parts and not blind:
        return "Every row differs from the target, so that power is no question here."
    text = (
        f"Not to be seen with these test sets (80 % power, by row): true differences to the target below"
        f" {', '.join(parts)} {measure.name}."
        if parts
        else ""
    )
    return f"{text} {blind} comparisons could have shown no difference of any size.".strip() if blind else text


def facts(
    profile: Profile,
    results: Sequence[Result],
    models: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, str],
    data: Mapping[str, Mapping[str, Any]],
    code: str,
) -> list[tuple[str, list[str]]]:
    """What the report is about, as names and lines, as far as the metrics record it.

    Args:
        models: by name what was evaluated: `name` and `revision`.
        data: by task what `pkt prepare` says of its examples, if this profile made them.
        code: the code's fingerprint, or nothing.
    """
    shapes: dict[str, Mapping[str, Any]] = {}
    for result in results:
        for by_task in result.alignments.values():
            for metrics in by_task.values():
                for side in ("source", "target"):
                    if "geometry" in (one := metrics.get(side, {})):
                        shapes[one["model"]["name"]] = one["geometry"]
    told = []
    for name, model in models.items():
        roles = [f"trained model of source {r.source}" for r in results if f"{r.source}-chat" == name]
        roles += ["target"] * (name == profile.target) + ["oracle: the target's own training"] * (
            name == profile.oracle
        )
        size = ""
        if shape := shapes.get(model["name"]):
            size = f"; {shape['num_layers']} layers, d_model {shape['d_model']}, d_ff {shape['d_ff']}"
            size += f", {shape['vocab_size']} tokens"
        alias = "" if model["name"] == name else f" ({model['name']})"
        parts = [name, alias, *(f", {role}" for role in roles), size, f"; revision {_short(model['revision'])}"]
        told.append("".join(parts))
    examples: list[str] = []
    machines: dict[str, None] = {}
    for task, title in tasks.items():
        evaluations = [r.metrics[row][task] for r in results for row in r.metrics if task in r.metrics[row]]
        machines |= dict.fromkeys(_machine(found.get("machine")) for found in evaluations)
        if evaluations:
            ids = hashlib.sha256("\n".join(evaluations[0]["ids"]).encode()).hexdigest()[:12]
            told_of = f"; {_origin(data[task])}" if task in data else ""
            examples.append(f"{title}: {len(evaluations[0]['ids'])} test examples, ids {ids}{told_of}")
    where = f"once dvc.lock is committed, git log -S {code} -- '*dvc.lock' finds commit and date"
    code_of = [f"fingerprint {code}; {where}"] if code else []
    found = {"Models": told, "Data": examples, "Computed by": list(machines), "Code": code_of}
    return [(name, lines) for name, lines in found.items() if lines]


def _origin(prepared: Mapping[str, Any]) -> str:
    """How many examples each set has, and which file or revision they are from."""
    counts = ", ".join(f"{n} {name}" for name, n in prepared["counts"].items() if name != "test")
    pools = "; ".join(
        f"{name} from {pool['repo']} at {_short(pool['revision'])}"
        if "repo" in pool
        else f"{pool['file']} sha256:{pool['sha256'][:12]}"
        for name, pool in prepared["pools"].items()
    )
    return f"{counts}; {pools}"


def _machine(found: Mapping[str, str] | None) -> str:
    return "not recorded" if found is None else ", ".join(f"{name} {value}" for name, value in found.items())


def _short(revision: str | None) -> str:
    """As much of it as tells it from others; the whole stands at the end of the page."""
    return "unpinned" if revision is None else revision[:19] if revision.startswith("sha256:") else revision[:12]
