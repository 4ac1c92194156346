"""Reads a section of params.yaml into the frozen dataclass that its stage defines.

A section is `{common: {...}, <task>: {...}}` when a stage's settings differ by task, else a flat mapping. Unknown keys
and wrong types are errors; every value may be overridden on the command line (`stages.options`).
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pkt_stages.errors import UserError

Params = TypeVar("Params")


def read_section(path: Path, section: str, task: str | None = None) -> dict[str, Any]:
    """The mapping at `section` of a params file; with `common` inside, `common` updated by the task's own part.

    Raises:
        UserError: the file or section is missing or malformed.
    """
    values = _mapping(path, section)
    if "common" not in values:
        return values
    for part, inner in values.items():
        if not isinstance(inner, dict):
            raise UserError(f"{path}: {section}.{part}: expected a mapping, found {type(inner).__name__}")
    if task is not None and task not in values:
        raise UserError(f"{path}: section {section!r} has no part for task {task!r}; add `{section}.{task}: {{}}`")
    return {**values["common"], **(values[task] if task is not None else {})}


def read_method(path: Path, method: str, section: str) -> dict[str, Any]:
    """The settings of one method, `methods.<method>` of a params file.

    A method that several commands work on has a part for each, named like the command's section.

    Raises:
        UserError: the file has no such method, or it is malformed.
    """
    methods = _mapping(path, "methods")
    if method not in methods:
        raise UserError(f"{path}: unknown method {method!r}; `methods` has {', '.join(methods) or 'none'}")
    if not isinstance(methods[method], dict):
        raise UserError(f"{path}: methods.{method}: expected a mapping, found {type(methods[method]).__name__}")
    values = methods[method]
    if values and all(isinstance(part, dict) for part in values.values()):
        if section not in values:
            raise UserError(f"{path}: methods.{method} has no part for {section!r}; it has {', '.join(values)}")
        values = values[section]
    return dict(values)


def _mapping(path: Path, section: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file") from None
    except Exception as error:  # beside its own errors PyYAML raises whatever a wrong value leads to
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or section not in content:
        raise UserError(f"{path}: section {section!r} is missing")
    values = content[section]
    if not isinstance(values, dict):
        raise UserError(f"{path}: section {section!r}: expected a mapping, found {type(values).__name__}")
    return values


def build(cls: type[Params], values: Mapping[str, Any], where: str) -> Params:
    """An instance of the dataclass from these values; defaults fill what is absent.

    Raises:
        UserError: an unknown key, a missing one, a wrong type, or a value that the class itself refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(map(str, values)) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(fields)}")
    converted = {name: _convert(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: key {name!r} is missing")
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
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML reads 3e-5 as text, for want of a dot.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{where}: expected {hint.__name__}, found {_shown(value)}")
    return value
