"""What was in force: the settings that the metrics themselves record, by command, and where rows differ in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkt_stages.profile import Profile
from pkt_stages.reporting.analysis import Compared, Neurons
from pkt_stages.reporting.result import Result

# A command, the row and the task that it worked on (no task where none is), and its settings.
Used = tuple[str, str, str, Mapping[str, Any]]
_ABSENT = object()


@dataclass(frozen=True)
class InForce:
    """The settings of a command: what is in force unless a task, a row or both have something else, as pairs."""

    command: str
    usual: str
    differing: list[tuple[str, str]]


def used(
    profile: Profile,
    results: Sequence[Result],
    titles: Mapping[str, str],
    compared: Sequence[Compared],
    neurons: Sequence[Neurons],
) -> Iterator[Used]:
    """What the metrics record; an alignment's settings are among those of `pkt inject`, and those of
    `attribute` are known where its neurons are shown. `titles` are the tasks'."""
    by_source = {method.name for method in profile.methods if method.by_source}
    for result in results:
        more = f", from {result.source}" if len(results) > 1 else ""
        labels = {row.slug: row.label + (more if row.slug in by_source else "") for row in result.points}
        for slug, by_task in result.alignments.items():
            for task, metrics in by_task.items():
                yield "select", labels[slug], titles[task], metrics["selection"]
        for slug, by_task in result.metrics.items():
            for task, metrics in by_task.items():
                yield "evaluate", labels[slug], titles[task], metrics["settings"]
                if (made := metrics["made"]) and "params" in made:
                    yield made["command"], labels[slug], titles[task], made["params"]
    for one in compared:
        yield "compare", one.both, "", one.metrics["params"]
    for model, found in neurons:
        yield "attribute", model, "", found["attribution"]
        yield "neurons", model, "", found["params"]


def in_force(used: Iterable[Used]) -> list[InForce]:
    """By command in the order given: what most rows have, by task where it depends on that, and then by exception."""
    commands: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for command, row, task, params in used:
        commands.setdefault(command, {})[row, task] = dict(_flat(params))
    return [_of_command(command, places) for command, places in commands.items()]


def _of_command(command: str, places: Mapping[tuple[str, str], Mapping[str, Any]]) -> InForce:
    rows, tasks = (list(dict.fromkeys(place[side] for place in places)) for side in (0, 1))
    usual: dict[str, Any] = {}
    differing: dict[str, dict[str, Any]] = {where: {} for where in (*tasks, *rows, *map(_both, places))}
    for name in dict.fromkeys(name for settings in places.values() for name in settings):
        values = {place: settings.get(name, _ABSENT) for place, settings in places.items()}
        expected = {task: _expected([v for place, v in values.items() if place[1] == task]) for task in tasks}
        if _equal([*expected.values()]):
            usual[name] = expected[tasks[0]]
        else:
            for task, value in expected.items():
                differing[task][name] = value
        for row in rows:
            own = {place[1]: value for place, value in values.items() if place[0] == row}
            if all(value == expected[task] for task, value in own.items()):
                continue
            if _equal([*own.values()]):
                differing[row][name] = next(iter(own.values()))
            else:
                for task, value in own.items():
                    if value != expected[task]:
                        differing[_both((row, task))][name] = value
    told = {where: _text(found) for where, found in differing.items()}
    return InForce(command, _text(usual), [(where, text) for where, text in told.items() if text])


def _both(place: tuple[str, str]) -> str:
    return ", ".join(filter(None, place))


def _expected(values: list[Any]) -> Any:
    """The most frequent value, of several the first; none where some rows have no such setting."""
    if _ABSENT in values:
        return _ABSENT
    shown = [repr(value) for value in values]
    return values[shown.index(max(dict.fromkeys(shown), key=shown.count))]


def _flat(params: Mapping[str, Any], within: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def _equal(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not _ABSENT)
