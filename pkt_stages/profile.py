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

from pkt_stages.errors import UserError
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
    """

    command: str
    section: str
    sources: str = "source"
    by_task: bool = True
    union: str = ""
    runs_code: bool = False

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
    "finetune_answers": Group("finetune", "Distillation", sources="teacher", union="taught"),
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
        tasks: in order.
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
        raise UserError(f"{self.path}: unknown method {name!r}; `made_by` has {known or 'none'}")

    def of_source(self, source: str) -> list[Method]:
        """The rows that this source has, those without a source among them."""
        lists = {name for name, sources in self.sources.items() if source in sources}
        return [m for m in self.methods if not m.by_source or GROUPS[m.group].sources in lists]

    def in_group(self, group: str) -> list[Method]:
        return [method for method in self.methods if method.group == group]


def read_profile(path: Path) -> Profile:
    """Read a params file's lists.

    Raises:
        UserError: it is missing or malformed, a method is in two groups, a group is no stage of the graph, or lists
            that belong together differ.
    """
    content = read_params(path)
    methods = sorted(_methods(content, path), key=lambda method: method.section == "Controls")
    analysed = mapping(content, path, "analysed")
    pairs = {name: mapping(content, path, "pairs", name) for name in mapping(content, path, "pairs")}
    for name, pair in pairs.items():
        _check_name(name, path, "pairs")
        if set(pair) != {"first", "second"} or not all(isinstance(model, str) for model in pair.values()):
            raise UserError(
                f"{path}: pairs.{name}: expected the keys first and second with a model each, found {pair!r}"
            )
    profile = Profile(
        path=path,
        content=content,
        name=_name(content, path, "profile"),
        sources={name: _names(content, path, name, least=int(name == "source")) for name in SOURCE_LISTS},
        target=_name(content, path, "target"),
        oracle=_name(content, path, "oracle") if content.get("oracle") is not None else None,
        models=_names(content, path, "models"),
        attributed=_names(content, path, "attributed"),
        reexpressed={
            name: mapping(content, path, "reexpressed", name) for name in mapping(content, path, "reexpressed")
        },
        tasks=list(mapping(content, path, "task")),
        methods=methods,
        every_step=_names(content, path, "every_step"),
        adopted=_names(content, path, "adopted"),
        pairs=pairs,
        analysed={key: _names(analysed, path, key, within="analysed.") for key in _ANALYSED},
    )
    if not profile.tasks:
        raise UserError(f"{path}: task: expected at least one task, found none")
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
            if profile.method(name).group not in groups:
                raise UserError(
                    f"{path}: {where}: {name} is made by {profile.method(name).group}, not {', '.join(groups)}"
                )
    if strange := [task for task in profile.analysed["task"] if task not in profile.tasks]:
        raise UserError(f"{path}: analysed.task: {strange[0]!r} is not in `task` ({', '.join(profile.tasks)})")
    for task in profile.tasks:
        _check_name(task, path, "task", KEY)
    for name in profile.reexpressed:
        _check_name(name, path, "reexpressed")
    _check_lists(profile)
    return profile


def _check_lists(profile: Profile) -> None:
    """That lists which repeat others, because DVC cannot derive them, do so: what one lacks would silently not be made.

    Raises:
        UserError: one does not.
    """
    content, path = profile.content, profile.path

    def same(where: str, found: Iterable[str], expected: Iterable[str], why: str) -> None:
        wanted, have = list(expected), list(found)
        if lacking := [name for name in wanted if name not in have]:
            raise UserError(f"{path}: {where}: {lacking[0]!r} is missing; {why}")
        if strange := [name for name in have if name not in wanted]:
            raise UserError(f"{path}: {where}: {strange[0]!r} does not belong there; {why}")

    same("made_by", mapping(content, path, "made_by"), GROUPS, "a group without methods is an empty mapping: {}")
    parts = list(mapping(content, path, "no_change"))
    why = f"a task has the parts of `no_change`: {', '.join(parts)}"
    for task in profile.tasks:
        same(f"task.{task}", mapping(content, path, "task", task), parts, why)
    why = "it unites groups of `made_by`, see the end of `made_by` in params.yaml"
    for union in UNIONS:
        expected = [method.name for method in profile.methods if GROUPS[method.group].union == union]
        same(union, mapping(content, path, union), expected, why)
    same("methods", mapping(content, path, "methods"), [method.name for method in profile.methods], why)
    for name in SOURCE_LISTS:
        if strange := [source for source in profile.sources[name] if source not in profile.sources["source"]]:
            raise UserError(f"{path}: {name}: {strange[0]!r} is not in `source`")
    if strange := [source for source in profile.analysed["source"] if source not in profile.sources["source"]]:
        raise UserError(f"{path}: analysed.source: {strange[0]!r} is not in `source`")
    for source in profile.sources["source"]:
        for where, models in (("models", profile.models), ("attributed", profile.attributed)):
            if chat_model(source) not in models and (where == "models" or profile.in_group("align")):
                why = "a source is evaluated" if where == "models" else "LaTen selects its neurons"
                raise UserError(f"{path}: {where}: {chat_model(source)!r} is missing; {why}, too")
    if missing := [name for name in (profile.target,) if name not in (*profile.models, *profile.adopted)]:
        raise UserError(f"{path}: models: {missing[0]!r} is missing; rows are compared with the target")
    if profile.oracle is not None and profile.oracle not in (*profile.models, *profile.adopted):
        raise UserError(f"{path}: models: {profile.oracle!r} is missing; the recovered gap is that to the oracle")
    if profile.oracle is None and (rows := profile.in_group("oracle")):
        raise UserError(f"{path}: oracle: {rows[0].name} is made of the oracle; name a model")
    for method in profile.methods:
        its = GROUPS[method.group]
        if its.by_source and its.sources != "source" and not profile.sources[its.sources]:
            raise UserError(f"{path}: {its.sources}: expected at least one source; {method.name} is made from it")
    for group, (controlled, row) in WORKS_ON.items():
        rows = profile.in_group(group)
        if rows and row not in [method.name for method in profile.in_group(controlled)]:
            raise UserError(f"{path}: made_by.{controlled}: {row!r} is missing; {rows[0].name} is made of its delta")
    for name, entry in profile.reexpressed.items():
        if set(entry) != {"of", "like", "how"} or not isinstance(entry["how"], dict) or not entry["how"]:
            raise UserError(
                f"{path}: reexpressed.{name}: expected `of` and `like` (models) and `how` (options of `pkt reexpress`,"
                f" at least `seed`), found {', '.join(map(str, entry)) or 'nothing'}"
            )
    selected = [_names(mapping(content, path, "selected"), path, how, within="selected.") for how in SELECTED]
    why = f"each of `source` stands in one of selected.{' and selected.'.join(SELECTED)}"
    same("selected", sorted(name for names in selected for name in names), sorted(profile.sources["source"]), why)
    if twice := set(selected[0]) & set(selected[1]):
        raise UserError(f"{path}: selected: {min(twice)!r} stands twice; {why}")
    wanted = profile.sources["transport_source"] if profile.in_group("labelled") else []
    why = "it repeats transport_source where there are rows in made_by.labelled, and is empty else"
    same("labelled_source", _names(content, path, "labelled_source"), wanted, why)


def chat_model(source: str) -> str:
    """The trained one of a source's two models."""
    return f"{source}-chat"


_ANALYSED = ("task", "source", "methods", "seeking", "target_methods")


def _methods(content: Mapping[str, Any], path: Path) -> Iterator[Method]:
    seen: dict[str, str] = {}
    for group in mapping(content, path, "made_by"):
        if group not in GROUPS:
            raise UserError(f"{path}: made_by.{group}: no such group; expected any of {', '.join(GROUPS)}")
        for name in mapping(content, path, "made_by", group):
            _check_name(name, path, f"made_by.{group}", KEY)
            if name in seen:
                raise UserError(f"{path}: made_by.{group}: {name} is in made_by.{seen[name]}, too; list it once")
            seen[name] = group
            yield Method(name, group, mapping(content, path, "made_by", group, name))


def _name(content: Mapping[str, Any], path: Path, key: str) -> str:
    if not isinstance(content.get(key), str):
        raise UserError(f"{path}: {key}: expected a name, found {content.get(key)!r}")
    return _check_name(content[key], path, key)


def _names(content: Mapping[str, Any], path: Path, key: str, *, least: int = 0, within: str = "") -> list[str]:
    value = content.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(value) < least:
        some = " with at least one name" if least else " of names"
        raise UserError(f"{path}: {within}{key}: expected a list{some}, found {value!r}")
    return [_check_name(name, path, f"{within}{key}") for name in value]


def _check_name(name: Any, path: Path, where: str, rule: tuple[re.Pattern[str], str] = NAME) -> str:
    """The name, if it is one that paths, commands and tables can hold; else UserError."""
    allowed, said = rule
    if not isinstance(name, str) or not allowed.fullmatch(name):
        raise UserError(f"{path}: {where}: {name!r} is no name here; use {said}")
    return name
