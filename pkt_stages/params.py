"""Settings: frozen dataclasses whose defaults are the paper's, and a params file that says what differs.

A command's settings are its dataclass's defaults, changed by the params file's section of its name, then by the task's
part (`task.<task>.<command>`), then by the method's entry in `made_by`, then by options of the command line. Unknown
keys, wrong types and values out of bounds are errors.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import pickle
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pkt_stages.errors import UserError, meant, shown

Params = TypeVar("Params")

MAX_NODES = 1_000_000  # of a YAML text with its aliases written out; the largest params file here has some thousands
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


# A setting that a command takes from another one's, where its own do not say: rows are stored for the steps of `align`.
BORROWED = {"select": {"steps": "align"}}


def read_settings(
    path: Path, section: str, *, task: str | None = None, method: str | None = None, optional: bool = False
) -> dict[str, Any]:
    """What a params file says of a command's settings, for a task and a method if they are given.

    A method that several commands work on has a part for each in its entry, named like the command. What a command
    borrows (`BORROWED`) is the other one's for the task.

    Args:
        optional: whether the section may be missing.

    Raises:
        UserError: the file, the section, the task or the method is missing or malformed.
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
    for name, lender in BORROWED.get(section, {}).items():
        lent = read_settings(path, lender, task=task, optional=True)
        if name not in values and name in lent:
            values[name] = lent[name]
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
    if not path.exists():
        raise UserError(f"{path}: no such params file")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of params, found {shown(content)}")
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, whoever wrote it.

    Raises:
        UserError: no regular file, not readable, or aliases that stand for more than `MAX_NODES` values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, or none with a content (a pipe, a device)")
    try:
        return pickle.loads(_parsed(path.read_text(encoding="utf-8-sig")))
    except Exception as error:  # beside its own errors PyYAML raises whatever a wrong value leads to
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())[:300]})") from None


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> bytes:
    """A YAML text's value, pickled: a large params file is read dozens of times, each time as a value of its own."""
    return pickle.dumps(parse_yaml(text))


def parse_yaml(text: str, loader: Any = yaml.SafeLoader) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: its aliases stand for more than `MAX_NODES` values: what follows them, as merge keys do, would never
            end. yaml.YAMLError, and what else PyYAML raises: not readable.
    """
    parser = loader(text)
    try:
        node = parser.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_NODES:
            raise ValueError(f"its aliases stand for more than {MAX_NODES:,} values")
        return parser.construct_document(node)
    finally:
        parser.dispose()


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes this one stands for with every alias written out; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def mapping(content: Mapping[str, Any], path: Path, *keys: str) -> dict[str, Any]:
    """The mapping below these keys of a params file's content; UserError if it is missing or something else."""
    value: Any = content
    for place, key in enumerate(keys):
        where = ".".join(map(str, keys[: place + 1]))
        if key not in value:
            raise UserError(f"{path}: section {where!r} is missing")
        value = value[key]
        if not isinstance(value, dict):
            raise UserError(f"{path}: section {where!r}: expected a mapping, found {type(value).__name__}")
    return value


def build(cls: type[Params], values: Mapping[str, Any], where: str) -> Params:
    """An instance of the dataclass from these values; defaults fill what is absent.

    Raises:
        UserError: the first of their `mistakes`.
    """
    converted, found = _examined(cls, values)
    if found:
        raise UserError(f"{where}: {found[0][1]}")
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def mistakes(cls: type, values: Mapping[str, Any], *, whole: bool = True) -> list[tuple[str, str]]:
    """All that keeps `build` from making an instance of these values: the key and what is wrong with it.

    That is an unknown key, a missing one, a wrong type, a value out of its bounds, and, if there is nothing else, what
    the class itself refuses (its key is empty).

    Args:
        whole: the values are all that there will be; else none is missing, and the class is not asked.
    """
    converted, found = _examined(cls, values)
    if not whole:
        return [one for one in found if one[0] in values]
    if not found:
        try:
            cls(**converted)
        except (ValueError, UserError) as error:
            found.append(("", str(error)))
    return found


def _examined(cls: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values in the types of the dataclass's fields, and what is wrong with others."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    converted, found = {}, []
    for name in sorted(set(values) - set(fields), key=str):
        known = f"expected one of {', '.join(fields) or 'none'}"
        found.append((name, f"unknown key {shown(name)}{meant(name, fields)}; {known}"))
    for name, value in values.items():
        if name in fields:
            try:
                converted[name] = _convert(value, hints[name], name)
            except UserError as error:
                found.append((name, str(error)))
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            found.append((name, f"key {name!r} is missing"))
    for name, value in converted.items():
        for one in value if isinstance(value, tuple) else (value,):
            bounds = fields[name].metadata.get("bounds", {})
            if one is not None and not all(_BOUNDS[kind][0](one, bound) for kind, bound in bounds.items()):
                wanted = " and ".join(f"{_BOUNDS[kind][1]} {bound}" for kind, bound in bounds.items())
                found.append((name, f"{name} must be {wanted}, found {shown(one)}"))
                break
    return converted, found


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        if value not in args or isinstance(value, bool):
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, found {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {shown(value)}")
        return tuple(_convert(v, args[0], where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {shown(value)}")
        return {_convert(k, args[0], where): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {shown(value)}")
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML reads 3e-5 as text, for want of a dot.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise UserError(f"{where}: expected {hint.__name__}, found {shown(value)}")
    return value
