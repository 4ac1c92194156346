"""What a params file says of a profile as a whole: its models, its tasks, and its rows in the table's order.

`GROUPS` says for each key of `made_by`, which is a stage of dvc.yaml, how its rows come about; a test holds it to the
graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt_stages.errors import UserError, meant, shown
from pkt_stages.params import mapping, read_params


@dataclass(frozen=True)
class Group:
    """Methods that one stage of dvc.yaml makes.

    Attributes:
        command: that makes a row; settings of its method's entry are settings of this command.
        section: of the table.
        sources: the list of the params with the sources that a row is made for; empty: from the target alone.
        by_task: whether a row is made for each task.
        union: the mapping of the params that unites it with others for one stage of evaluation, if there is one.
        runs_code: whether an entry's `code` names a file of pkt_stages/methods.
        before: a command that runs before it and takes settings of the method's entry, too.
    """

    command: str
    section: str
    sources: str = "source"
    by_task: bool = True
    union: str = ""
    runs_code: bool = False
    before: str = ""

    @property
    def by_source(self) -> bool:
        return bool(self.sources)


GROUPS: dict[str, Group] = {
    "oracle": Group("derive", "Ceilings", sources="", by_task=False, runs_code=True),
    "transport": Group(
        "derive", "Transport", sources="transport_source", by_task=False, union="transported", runs_code=True
    ),
    "labelled": Group(
        "derive", "Transport", sources="transport_source", by_task=False, union="transported", runs_code=True
    ),
    "align": Group("align", "PrePKT", union="aligned", runs_code=True),
    "unaligned": Group("derive", "PrePKT", sources="seek_source", union="sought", runs_code=True),
    "grid": Group("derive", "PrePKT", by_task=False, runs_code=True),
    "finetune": Group("finetune", "PostPKT", sources=""),
    "finetune_seeking": Group("finetune", "PostPKT", sources="seek_source", union="sought"),
    "finetune_answers": Group("finetune", "Distillation", sources="teacher", union="taught", before="generate"),
    "finetune_states": Group("finetune", "Distillation", sources="teacher", union="taught"),
    "distill": Group("distill", "Distillation", sources="teacher", union="taught"),
    "imported": Group("import", "Imported", sources="", by_task=False),
    "control": Group("derive", "Controls", union="aligned", runs_code=True),
    "transport_control": Group(
        "derive", "Controls", sources="transport_source", by_task=False, union="transported", runs_code=True
    ),
    "filter": Group(
        "derive", "Transport", sources="transport_source", by_task=False, union="transported", runs_code=True
    ),
    "filter_control": Group(
        "derive", "Controls", sources="transport_source", by_task=False, union="transported", runs_code=True
    ),
}
SOURCE_LISTS = tuple(dict.fromkeys(group.sources for group in GROUPS.values() if group.sources))
UNIONS = tuple(dict.fromkeys(group.union for group in GROUPS.values() if group.union))
# What a group's stage works on, another group's row.
WORKS_ON = {
    "control": ("align", "laten"),
    "transport_control": ("transport", "matched"),
    "filter": ("transport", "theseus"),
    "filter_control": ("transport_control", "control_random_transport"),
}
SELECTED = ("trained", "with_base")  # keys of `selected`, by what `select` keeps of a source
CONTROL = "control_"  # a method whose name begins so is a control, whatever makes it
# Settings that concern some tasks alone: in a section they would have the stages of all others run again.
OF_CODE = ("sandbox_floor", "sandbox_seconds", "sandbox_memory_mb")
DEFAULT_CODE = {"align": "laten"}  # the file of an entry without `code`, by command
# Tasks of the project itself, in the folder where `pkt` runs: a folder with a file each; `code` depends on it.
TASKS, TASK_FILE = Path("tasks"), "task.yaml"
# Names are parts of paths, of commands and of tables; that of a method or a task of a key as well, which DVC cuts at
# dots and in which it takes a number for a place.
NAME = re.compile(r"\w[\w.-]*"), "letters, digits and any of _ - . (a letter, a digit or _ first)"
KEY = re.compile(r"[^\W\d][\w-]*"), "letters, digits and any of _ - (a letter or _ first; DVC cuts keys at dots)"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: its key in `made_by`.
        group: the stage that makes it, a key of `GROUPS`.
        entry: its settings.
    """

    name: str
    group: str
    entry: Mapping[str, Any]

    @property
    def section(self) -> str:
        return "Controls" if self.name.startswith(CONTROL) else GROUPS[self.group].section

    @property
    def code(self) -> str | None:
        """The file of pkt_stages/methods that makes it, if one does."""
        group = GROUPS[self.group]
        return str(self.entry.get("code") or DEFAULT_CODE.get(group.command, "")) if group.runs_code else None

    @property
    def by_source(self) -> bool:
        return GROUPS[self.group].by_source

    def folder(self, source: str) -> tuple[str, ...]:
        """Where its metrics lie, below a folder of metrics and above the task."""
        return (self.name, source) if self.by_source else (self.name,)


@dataclass(frozen=True)
class Profile:
    """A params file's lists.

    Attributes:
        content: the whole file.
        sources: by the list that names them (`SOURCE_LISTS`); `source` has all.
        oracle: what training made of the target, a model; None if there is none to compare with.
        models: that are evaluated; `attributed`: whose neurons are.
        reexpressed: models that are written in another shape, by name: `of`, `like` and `how`.
        tasks: in order; `prepared`: those whose examples the profile makes.
        methods: the table's rows but for the models, in order; controls last.
        pairs: models to compare, by the pair's name: `first` and `second`.
        analysed: `task`, `source`, `methods`, `seeking` and `target_methods`.
    """

    path: Path
    content: Mapping[str, Any]
    name: str
    sources: Mapping[str, list[str]]
    target: str
    oracle: str | None
    models: list[str]
    attributed: list[str]
    reexpressed: Mapping[str, Mapping[str, Any]]
    tasks: list[str]
    prepared: list[str]
    methods: list[Method]
    every_step: list[str]
    adopted: list[str]
    pairs: Mapping[str, Mapping[str, str]]
    analysed: Mapping[str, list[str]]

    def method(self, name: str) -> Method:
        """A row by its name.

        Raises:
            UserError: there is none.
        """
        for method in self.methods:
            if method.name == name:
                return method
        known = ", ".join(method.name for method in self.methods)
        near = meant(name, [method.name for method in self.methods])
        raise UserError(f"{self.path}: unknown method {name!r}{near}; `made_by` has {known or 'none'}")

    def of_source(self, source: str) -> list[Method]:
        """The rows that this source has, those without a source among them."""
        lists = {name for name, sources in self.sources.items() if source in sources}
        return [m for m in self.methods if not m.by_source or GROUPS[m.group].sources in lists]

    def in_group(self, group: str) -> list[Method]:
        return [method for method in self.methods if method.group == group]


def read_profile(path: Path) -> Profile:
    """Read a params file's lists.

    Raises:
        UserError: it is missing or malformed, or the first of what `examine` finds.
    """
    profile, problems = examine(path)
    if problems:
        raise UserError(problems[0])
    return profile


def examine(path: Path) -> tuple[Profile, list[str]]:
    """A params file's lists as far as they can be read, and all that is wrong with them, one line each.

    That is: a list that is missing or malformed, a method in two groups, a group that is no stage of the graph, lists
    that belong together and differ.

    Raises:
        UserError: the file is missing or no mapping.
    """
    lists = _Lists(read_params(path), path)
    methods = sorted(_methods(lists), key=lambda method: method.section == "Controls")
    analysed = lists.part("analysed")
    pairs = {name: lists.part("pairs", name) for name in lists.part("pairs")}
    for name, pair in pairs.items():
        lists.check_name(name, "pairs")
        if set(pair) != {"first", "second"} or not all(isinstance(model, str) for model in pair.values()):
            lists.note(f"pairs.{name}: expected the keys first and second with a model each, found {shown(pair)}")
    profile = Profile(
        path=path,
        content=lists.content,
        name=lists.name("profile"),
        sources={name: lists.names(name, least=int(name == "source")) for name in SOURCE_LISTS},
        target=lists.name("target"),
        oracle=lists.name("oracle") if lists.content.get("oracle") is not None else None,
        models=lists.names("models"),
        attributed=lists.names("attributed"),
        reexpressed={name: lists.part("reexpressed", name) for name in lists.part("reexpressed")},
        tasks=[task for task in lists.part("task") if isinstance(task, str)],
        prepared=[task for task in lists.given("prepared_task") if isinstance(task, str)],
        methods=methods,
        every_step=lists.names("every_step"),
        adopted=lists.names("adopted"),
        pairs=pairs,
        analysed={key: lists.names(key, of=analysed, within="analysed.") for key in _ANALYSED},
    )
    if not profile.tasks:
        lists.note("task: expected at least one task, found none")
    for where, names, groups in (
        ("every_step", profile.every_step, ("align",)),
        (
            "analysed.methods",
            profile.analysed["methods"],
            [g for g in GROUPS if GROUPS[g].by_source and GROUPS[g].by_task],
        ),
        ("analysed.seeking", profile.analysed["seeking"], ("finetune_seeking",)),
        ("analysed.target_methods", profile.analysed["target_methods"], ("finetune",)),
    ):
        for name in names:
            try:
                if (made_by := profile.method(name).group) not in groups:
                    lists.note(f"{where}: {name} is made by {made_by}, not {', '.join(groups)}")
            except UserError as error:
                lists.problems.append(str(error))
    for task in profile.analysed["task"]:
        if task not in profile.tasks:
            known = f"is not in `task` ({', '.join(profile.tasks)})"
            lists.note(f"analysed.task: {task!r} {known}{meant(task, profile.tasks)}")
    for task in lists.part("task"):
        lists.check_name(task, "task", KEY)
    for name in profile.reexpressed:
        lists.check_name(name, "reexpressed")
    _check_lists(profile, lists)
    return profile, list(dict.fromkeys(lists.problems))


class _Lists:
    """A params file's content with what was wrong with it: what cannot be read is noted, and empty."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        self.content, self.path = content, path
        self.problems: list[str] = []

    def note(self, problem: str) -> None:
        self.problems.append(str(UserError(f"{self.path}: {problem}")))

    def part(self, *keys: str) -> dict[str, Any]:
        """The mapping below these keys."""
        try:
            return mapping(self.content, self.path, *keys)
        except UserError as error:
            self.problems.append(str(error))
            return {}

    def given(self, key: str) -> list[Any] | dict[Any, Any]:
        """A list or the keys of a mapping, as a stage's `matrix` takes either; nothing if the key is not there."""
        value = self.content.get(key) or {}
        if not isinstance(value, (list, dict)):
            self.note(f"{key}: expected a mapping or a list, found {shown(value)}")
            return []
        return value

    def name(self, key: str) -> str:
        value = self.content.get(key)
        if not isinstance(value, str):
            self.note(f"{key}: expected a name, found {shown(value)}")
            return ""
        self.check_name(value, key)
        return value

    def names(self, key: str, *, of: Mapping[str, Any] | None = None, least: int = 0, within: str = "") -> list[str]:
        value = (self.content if of is None else of).get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(value) < least:
            some = " with at least one name" if least else " of names"
            self.note(f"{within}{key}: expected a list{some}, found {shown(value)}")
            return []
        for name in value:
            self.check_name(name, f"{within}{key}")
        return value

    def check_name(self, name: Any, where: str, rule: tuple[re.Pattern[str], str] = NAME) -> None:
        """Note a name that paths, commands and tables cannot hold."""
        allowed, said = rule
        if not isinstance(name, str) or not allowed.fullmatch(name):
            self.note(f"{where}: {name!r} is no name here; use {said}")


def _check_lists(profile: Profile, lists: _Lists) -> None:
    """Note lists which repeat others, because DVC cannot derive them, and do not: what one lacks would silently not be
    made; and rows, models and settings that others need.
    """

    def same(where: str, found: Iterable[str], expected: Iterable[str], why: str) -> None:
        wanted, have = list(expected), list(found)
        for name in wanted:
            if name not in have:
                lists.note(f"{where}: {name!r} is missing; {why}")
        for name in have:
            if name not in wanted:
                lists.note(f"{where}: {name!r} does not belong there{meant(name, wanted)}; {why}")

    section = lists.content.get("evaluate")
    for key in OF_CODE:
        if isinstance(section, dict) and key in section:
            where = "`task.<task>.evaluate` of the tasks of generated code, whose evaluations alone it changes"
            lists.note(f"evaluate.{key}: does not belong there; expected in {where}")
    same("made_by", lists.part("made_by"), GROUPS, "a group without methods is an empty mapping: {}")
    parts = list(lists.part("no_change"))
    why = f"a task has the parts of `no_change`: {', '.join(parts)}"
    for task in profile.tasks:
        same(f"task.{task}", lists.part("task", task), parts, why)
    why = "it unites groups of `made_by`, see the end of `made_by` in params.yaml"
    for union in UNIONS:
        expected = [method.name for method in profile.methods if GROUPS[method.group].union == union]
        same(union, lists.part(union), expected, why)
    same("methods", lists.part("methods"), [method.name for method in profile.methods], why)
    every = profile.sources["source"]
    for name in SOURCE_LISTS:
        for source in profile.sources[name]:
            if source not in every:
                lists.note(f"{name}: {source!r} is not in `source`{meant(source, every)}")
    for source in profile.analysed["source"]:
        if source not in every:
            lists.note(f"analysed.source: {source!r} is not in `source`{meant(source, every)}")
    for source in every:
        for where, models in (("models", profile.models), ("attributed", profile.attributed)):
            if chat_model(source) not in models and (where == "models" or profile.in_group("align")):
                why = "a source is evaluated" if where == "models" else "LaTen selects its neurons"
                lists.note(f"{where}: {chat_model(source)!r} is missing; {why}, too")
    if profile.target and profile.target not in (*profile.models, *profile.adopted):
        lists.note(f"models: {profile.target!r} is missing; rows are compared with the target")
    if profile.oracle and profile.oracle not in (*profile.models, *profile.adopted):
        lists.note(f"models: {profile.oracle!r} is missing; the recovered gap is that to the oracle")
    if profile.oracle is None and (rows := profile.in_group("oracle")):
        lists.note(f"oracle: {rows[0].name} is made of the oracle; name a model")
    for method in profile.methods:
        its = GROUPS[method.group]
        if its.by_source and its.sources != "source" and not profile.sources[its.sources]:
            lists.note(f"{its.sources}: expected at least one source; {method.name} is made from it")
    for group, (controlled, row) in WORKS_ON.items():
        rows = profile.in_group(group)
        if rows and row not in [method.name for method in profile.in_group(controlled)]:
            lists.note(f"made_by.{controlled}: {row!r} is missing; {rows[0].name} is made of its delta")
    for name, entry in profile.reexpressed.items():
        if set(entry) != {"of", "like", "how"} or not isinstance(entry["how"], dict) or not entry["how"]:
            lists.note(
                f"reexpressed.{name}: expected `of` and `like` (models) and `how` (options of `pkt reexpress`,"
                f" at least `seed`), found {', '.join(map(str, entry)) or 'nothing'}"
            )
    ways = lists.part("selected")
    selected = [lists.names(how, of=ways, within="selected.") for how in SELECTED]
    why = f"each of `source` stands in one of selected.{' and selected.'.join(SELECTED)}"
    have = sorted(name for names in selected for name in names)
    aligned = bool(profile.in_group("align"))  # else nothing needs a selection, and what it takes may be spared
    same("selected", have, [name for name in sorted(profile.sources["source"]) if aligned or name in have], why)
    if twice := set(selected[0]) & set(selected[1]):
        lists.note(f"selected: {min(twice)!r} stands twice; {why}")
    wanted = profile.sources["transport_source"] if profile.in_group("labelled") else []
    why = "it repeats transport_source where there are rows in made_by.labelled, and is empty else"
    same("labelled_source", lists.names("labelled_source"), wanted, why)


def chat_model(source: str) -> str:
    """The trained one of a source's two models."""
    return f"{source}-chat"


_ANALYSED = ("task", "source", "methods", "seeking", "target_methods")


def _methods(lists: _Lists) -> Iterator[Method]:
    seen: dict[str, str] = {}
    for group in lists.part("made_by"):
        if group not in GROUPS:
            expected = f"expected any of {', '.join(GROUPS)}"
            lists.note(f"made_by.{group}: no such group{meant(group, GROUPS)}; {expected}")
            continue
        for name in lists.part("made_by", group):
            lists.check_name(name, f"made_by.{group}", KEY)
            if not isinstance(name, str):
                continue
            if name in seen:
                lists.note(f"made_by.{group}: {name} is in made_by.{seen[name]}, too; list it once")
                continue
            seen[name] = group
            yield Method(name, group, lists.part("made_by", group, name))
