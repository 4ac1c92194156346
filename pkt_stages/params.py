"""Settings: frozen dataclasses whose defaults are the paper's, and a params file that says what differs.

A command's settings are its dataclass's defaults, changed by the params file's section of its name, then by the task's
part (`task.<task>.<command>`), then by the method's entry in `made_by`, then by options of the command line. Unknown
keys, wrong types and values out of bounds are errors.
"""

from __future__ import annotations

import dataclasses
import operator
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pkt_stages.errors import UserError

Params = TypeVar("Params")

_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A params field with the text that `--help` shows for it (with its unit).

    Args:
        bounds: any of `ge`, `gt`, `le` and `lt` (>=, >, <=, <), which `build` checks; of a list for every element.
    """
    assert set(bounds) <= set(_BOUNDS)
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


def read_settings(
    path: Path, section: str, *, task: str | None = None, method: str | None = None, optional: bool = False
) -> dict[str, Any]:
    """What a params file says of a command's settings, for a task and a method if they are given.

    A method that several commands work on has a part for each in its entry, named like the command.

    Args:
        optional: whether the section may be missing.

    Raises:
        UserError: the file, the task or the method is missing or malformed.
    """
    content = read_params(path)
    values = dict(mapping(content, path, section)) if section in content or not optional else {}
    if task is not None:
        tasks = mapping(content, path, "task")
        if task not in tasks:
            raise UserError(f"{path}: no task {task!r} in `task`; found {', '.join(tasks) or 'none'}")
        parts = mapping(content, path, "task", task)
        if section in parts:
            values |= mapping(content, path, "task", task, section)
    if method is not None:
        values |= entry(content, path, method, section)
    return values


def entry(content: Mapping[str, Any], path: Path, method: str, section: str) -> dict[str, Any]:
    """A method's settings, from its entry in `made_by`."""
    groups = {group: mapping(content, path, "made_by", group) for group in mapping(content, path, "made_by")}
    within = [group for group, methods in groups.items() if method in methods]
    if not within:
        known = ", ".join(name for methods in groups.values() for name in methods)
        raise UserError(f"{path}: unknown method {method!r}; `made_by` has {known or 'none'}")
    values = mapping(content, path, "made_by", within[0], method)
    if values and all(isinstance(part, dict) for part in values.values()):
        if section not in values:
            raise UserError(f"{path}: method {method} has no part for {section!r}; it has {', '.join(values)}")
        values = values[section]
    return dict(values)


def read_params(path: Path) -> dict[str, Any]:
    """The content of a params file.

    Raises:
        UserError: it is missing or no readable mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file") from None
    except Exception as error:  # beside its own errors PyYAML raises whatever a wrong value leads to
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of params, found {_shown(content)}")
    return content


def mapping(content: Mapping[str, Any], path: Path, *keys: str) -> dict[str, Any]:
    """The mapping below these keys of a params file's content; UserError if it is missing or something else."""
    value: Any = content
    for place, key in enumerate(keys):
        where = ".".join(keys[: place + 1])
        if key not in value:
            raise UserError(f"{path}: section {where!r} is missing")
        value = value[key]
        if not isinstance(value, dict):
            raise UserError(f"{path}: section {where!r}: expected a mapping, found {type(value).__name__}")
    return value


def build(cls: type[Params], values: Mapping[str, Any], where: str) -> Params:
    """An instance of the dataclass from these values; defaults fill what is absent.

    Raises:
        UserError: an unknown key, a missing one, a wrong type, a value out of its bounds, or one that the class itself
            refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(map(str, values)) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(fields) or 'none'}")
    converted = {name: _convert(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: key {name!r} is missing")
    for name, value in converted.items():
        for one in value if isinstance(value, tuple) else (value,):
            bounds = fields[name].metadata.get("bounds", {})
            if one is not None and not all(_BOUNDS[kind][0](one, bound) for kind, bound in bounds.items()):
                wanted = " and ".join(f"{_BOUNDS[kind][1]} {bound}" for kind, bound in bounds.items())
                raise UserError(f"{where}: {name} must be {wanted}, found {one}")
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _shown(value: Any) -> str:
    """A value for a message, cut short: a few aliases in YAML can stand for billions of entries."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        if value not in args or isinstance(value, bool):
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, found {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {_shown(value)}")
        return tuple(_convert(v, args[0], where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {_shown(value)}")
        return {_convert(k, args[0], where): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {_shown(value)}")
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML reads 3e-5 as text, for want of a dot.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{where}: expected {hint.__name__}, found {_shown(value)}")
    return value
