"""Is a profile ready to run? All that is wrong with its settings, its lists, its models and its data, before any runs.

Every rule stands where it is applied: in the dataclasses of the commands, `profile.examine`, the readers of models and
examples, and the functions of the stages that refuse what does not fit. Nothing is written, no weights are loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from pkt_stages import methods, stages
from pkt_stages.errors import UserError, meant, shown
from pkt_stages.options import Settings
from pkt_stages.params import build, mistakes, read_params
from pkt_stages.profile import GROUPS, UNIONS, Method, Profile, examine

GRAPH, PARAMS = "dvc.yaml", "params.yaml"
NO_CHANGE = "no_change"
FOLDERS = ("here", "there", "told", "heard", "models_dir", "data_dir")
# Keys of a params file that `profile.examine` reads, beside those that the graph names.
LISTS = ("profile", "root", "params_file", "made_by", "methods", "oracle", NO_CHANGE, *UNIONS)


def commands() -> dict[str, Settings]:
    """What the commands of stages/ say of their settings, by command; of those that have some."""
    found = {}
    for module in pkgutil.iter_modules(stages.__path__):
        command = getattr(importlib.import_module(f"{stages.__name__}.{module.name}"), module.name)
        if hasattr(command, "settings"):
            found[module.name.rstrip("_")] = command.settings  # `import` is a word of Python's
    return found


def changed_by_tasks(graph: str) -> set[str]:
    """Commands whose settings a task may change, by the text of a dvc.yaml."""
    return set(re.findall(r"task\.\$\{item\.task\}\.(\w+)", graph))


class Checked:
    """A profile's settings as far as they hold, and all that is wrong with the profile.

    Attributes:
        profile: its lists.
        root: the project's folder.
        problems: lines that say where, what is expected and found, and what to do.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: the params file is missing or no mapping.
        """
        self.path = path
        self.profile: Profile
        self.profile, problems = examine(path)
        self.problems = set(problems)
        self.content = self.profile.content
        root = self.content.get("root")
        self.root = Path(os.path.relpath(path.parent / root)) if isinstance(root, str) else path.parent
        self._commands = commands()
        graph = path.parent / GRAPH
        self._graph = graph.read_text(encoding="utf-8") if graph.is_file() else ""
        self._by_task = changed_by_tasks(self._graph)
        self._values: dict[tuple[str, str | None, str | None], Any] = {}
        self._code: dict[str, tuple[ModuleType, Any]] = {}

    def note(self, where: str, problem: object) -> None:
        self.problems.add(str(UserError(f"{self.path}: {where}: {problem}")))

    def settings(self, command: str, *, task: str | None = None, method: str | None = None) -> Any:
        """The settings in force, an instance of the command's dataclass; None if they are wrong."""
        task = task if command in self._by_task else None
        return self._values.get((command, task, method))

    def code(self, method: Method) -> tuple[ModuleType, Any] | None:
        """The file of pkt_stages/methods that makes a row, with its own settings; None if these are wrong."""
        return self._code.get(method.name)

    def check_places(self) -> None:
        """The file's own place, and the folders that it names."""
        graph = self.path.parent / GRAPH
        for key in ("root", "params_file", *FOLDERS):
            if not isinstance(self.content.get(key), str):
                self.note(key, f"expected a path, found {shown(self.content.get(key))}")
        file = self.content.get("params_file")
        if isinstance(file, str) and not _same(self.root / file, self.path):
            its = Path(os.path.relpath(self.path, self.root)).as_posix()
            self.note("params_file", f"expected {its}, this file as seen from `root`, found {file}")
        if not graph.is_file():
            self.note(GRAPH, f"expected the graph beside the params; cp {self.root / GRAPH} {graph}")
        elif (whole := self.root / GRAPH).is_file() and whole.read_bytes() != graph.read_bytes():
            self.note(GRAPH, f"expected a copy of {whole}, found another graph; cp {whole} {graph}")
        for mine in ("here", "told"):
            value = self.content.get(mine)
            if isinstance(value, str) and self.profile.name and Path(value).name != self.profile.name:
                self.note(
                    mine, f"expected a folder that is called like the profile, {self.profile.name}, found {value}"
                )

    def check_keys(self) -> set[str]:
        """Keys of the params file; returns the commands of the graph that take settings from it."""
        text = self._graph
        used = set(re.findall(r"pkt (\w+) --params", text)) & set(self._commands)
        sections = {self._commands[name].section for name in used if dataclasses.fields(self._commands[name].cls)}
        known = {*LISTS, *sections, *re.findall(r"\$\{(\w+)", text)} - {"item", "key"}
        for key in self.content:
            if key not in known:
                self.note(str(key), f"no list and no section of a command{meant(key, known)}; take it out")
        for section in sorted(sections - set(self.content)):
            self.note(section, f"section is missing; `{section}: {{}}` takes the defaults")
        return used

    def check_settings(self, used: set[str]) -> None:
        """Sections, the tasks' parts and the methods' entries, each with the dataclass of its command."""
        by_task = self._by_task & used
        parts = self.content.get(NO_CHANGE)
        for part in parts if isinstance(parts, dict) else ():
            if part not in by_task:
                self.note(f"{NO_CHANGE}.{part}", f"no command has settings that a task changes{meant(part, by_task)}")
        for part in sorted(by_task - set(parts if isinstance(parts, dict) else by_task)):
            self.note(NO_CHANGE, f"{part!r} is missing; the graph has stages that a task's part of it changes")
        for command, its in self._commands.items():
            if command not in used or command != its.section:
                continue
            makes = [m for m in self.profile.methods if command in (GROUPS[m.group].command, GROUPS[m.group].before)]
            made = any(command in (group.command, group.before) for group in GROUPS.values())
            own = self._clean(command, self.content.get(command, {}), its.cls)
            for task in self.profile.tasks if command in by_task else [None]:
                told = self._part(task, command, its)
                for method in makes if made else [None]:
                    self._settle(command, its, own | told, task, method)

    def _part(self, task: str | None, command: str, its: Settings) -> dict[str, Any]:
        part = self._below("task", task, command) if task is not None else {}
        return self._clean(f"task.{task}.{command}", part, its.cls)

    def _below(self, *keys: Any) -> Any:
        """What stands there; nothing if that is missing or none of a mapping's, which `examine` has found."""
        value: Any = self.content
        for key in keys:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        return value

    def _settle(
        self, command: str, its: Settings, values: Mapping[str, Any], task: str | None, method: Method | None
    ) -> None:
        """The settings in force for a task and a method."""
        where = f"task.{task}.{command}" if task is not None else command
        if method is not None:
            where = f"made_by.{method.group}.{method.name}"
            entry = self._entry(where, method, command)
            if its.functions:
                entry.pop("code", None)
                if (module := self._module(where, method, its.functions)) is None:
                    return
                clean = self._clean(where, entry, module.Params, its.cls)
                own = [field.name for field in dataclasses.fields(module.Params)]
                code = self._built(where, module.Params, {key: clean.pop(key) for key in own if key in clean})
                if code is not None:
                    self._code[method.name] = module, code
            else:
                clean = self._clean(where, entry, its.cls)
            values = {**values, **clean}
        found = self._built(where, its.cls, values)
        if found is not None:
            self._values[command, task, method.name if method is not None else None] = found

    def _entry(self, where: str, method: Method, command: str) -> dict[str, Any]:
        """What a method's entry says to a command: all, or the part of its name."""
        values = dict(method.entry)
        if not values or not all(isinstance(part, dict) for part in values.values()):
            return values
        group = GROUPS[method.group]
        known = [name for name in (group.before, group.command) if name]
        for name in values:
            if name not in known:
                self.note(where, f"a part for {name!r}{meant(name, known)}; expected parts for {' and '.join(known)}")
        if command not in values:
            self.note(where, f"has no part for {command!r}; it has {', '.join(map(str, values))}")
        return dict(values.get(command, {}))

    def _module(self, where: str, method: Method, functions: Sequence[str]) -> ModuleType | None:
        if not isinstance(method.entry.get("code", ""), str) or not method.code:
            self.note(where, f"names no `code`, a file of pkt_stages/methods; found {', '.join(methods.names())}")
            return None
        try:
            return methods.load(method.code, functions)
        except UserError as error:
            self.note(where, error)
            return None

    def _clean(self, where: str, values: Any, *classes: type) -> dict[str, Any]:
        """Those of the values that hold, for fields of these dataclasses; the others are noted."""
        if not isinstance(values, dict):
            self.note(where, f"expected a mapping, found {shown(values)}")
            return {}
        known = [field.name for cls in classes for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                expected = f"expected one of {', '.join(known) or 'none'}"
                self.note(where, f"unknown key {shown(key)}{meant(key, known)}; {expected}")
        good = {key: value for key, value in values.items() if key in known}
        for cls in classes:
            names = {field.name for field in dataclasses.fields(cls)}
            for key, problem in mistakes(cls, {k: v for k, v in good.items() if k in names}, whole=False):
                self.note(where, problem)
                good.pop(key, None)
        return good

    def _built(self, where: str, cls: type, values: Mapping[str, Any]) -> Any:
        found = mistakes(cls, values)
        for _, problem in found:
            self.note(where, problem)
        return None if found else build(cls, values, where)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def problems(path: Path, *, allow_missing: bool = False) -> list[str]:
    """All that is wrong with a profile, one line each, sorted.

    Args:
        path: of its params file.
        allow_missing: models need not be here.
    """
    from pkt_stages.tools.inputs import check_inputs

    try:
        checked = Checked(path)
    except UserError as error:
        return [str(error)]
    checked.check_places()
    checked.check_settings(checked.check_keys())
    check_inputs(checked, allow_missing=allow_missing)
    return sorted(checked.problems)


def check_profiles(targets: Sequence[str], *, allow_missing: bool = False) -> None:
    """Print all that is wrong with the profiles of DVC's targets, and end with exit status 1 if there is something.

    Raises:
        UserError: a params file is not readable.
    """
    files = sorted({Path(target.partition(":")[0]).parent / PARAMS for target in targets})
    # What has no rows is no profile, but somebody's own stages.
    profiles = [path for path in files if path.exists() and "made_by" in read_params(path)]
    _tell([line for path in profiles for line in problems(path, allow_missing=allow_missing)])


def _tell(found: Sequence[str]) -> None:
    for line in found:
        typer.echo(f"pkt: error: {line}", err=True)
    if found:
        raise typer.Exit(1)


def params_file(target: str) -> Path:
    """The params file of a profile that is named by it, by its folder or by its dvc.yaml.

    Raises:
        UserError: there is none.
    """
    named = Path(target.partition(":")[0])
    folder = named if named.is_dir() else named.parent
    if not named.exists() or not (folder / PARAMS).is_file():
        raise UserError(f"{target}: no profile ({PARAMS} beside a {GRAPH}); {whereabouts()}")
    return folder / PARAMS


def project() -> Path | None:
    """The project's folder around the current one, as seen from here; None if there is none."""
    here = Path.cwd()
    around = (folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir() and (folder / GRAPH).is_file())
    return next((Path(os.path.relpath(folder)) for folder in around), None)


def without_git() -> str:
    """What to do where the project is in no git repository, which DVC needs; nothing if it is in one."""
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)
    if root is None or any((folder / ".git").exists() for folder in (root, *root.parents)):
        return ""
    config = root / ".dvc" / "config"
    if config.is_file() and re.search(r"^\s*no_scm\s*=\s*true", config.read_text(encoding="utf-8"), re.M | re.I):
        return ""
    return "a downloaded ZIP is none: `git init` makes one, or `dvc config core.no_scm true` does without"


def whereabouts() -> str:
    """Where a command that needs a profile can be run, seen from here."""
    root = project()
    if root is None:
        return "run this in the project's folder"
    return "name a profile's folder" if root == Path() else f"run this in the project's folder, {root}"


def check(
    profiles: Annotated[
        list[str] | None, typer.Argument(help="Profiles: dvc.yaml, folder or params file.", show_default=GRAPH)
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Models that are not here are no problem, as a team's may be.")
    ] = False,
) -> None:
    """List all that is wrong with a profile, before anything runs; exit status 1 if something is. Writes nothing."""
    paths = list(dict.fromkeys(map(params_file, profiles or [GRAPH])))
    _tell([line for path in paths for line in problems(path, allow_missing=allow_missing)])
    for path in paths:
        its, _ = examine(path)
        counts = f"{len(its.methods)} methods, {len(its.tasks)} tasks, {len(its.sources['source'])} sources"
        typer.echo(f"check: {path}: nothing wrong ({counts})")
