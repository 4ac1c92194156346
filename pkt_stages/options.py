"""Command-line options made from a stage's params dataclass, so that help, defaults and params file cannot disagree."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from pkt_stages import methods
from pkt_stages.errors import UserError, meant
from pkt_stages.params import build, option, read_settings

__all__ = ["option"]  # stages take it from here

DType = Literal["auto", "float32", "float16", "bfloat16"]
# Machine facts: no params, because no result depends on them.
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded over GPUs).", envvar="PKT_DEVICE")]
Scratch = Annotated[Path, typer.Option(help="Folder for what a killed run goes on from.", envvar="PKT_SCRATCH")]
MicroBatch = Annotated[int, typer.Option(min=1, help="Examples at a time; changes memory.", envvar="PKT_MICRO_BATCH")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time.", envvar="PKT_EVALUATE_BATCH_SIZE")]
SCRATCH = Path(".scratch")
# What commands name.
Source = Annotated[str, typer.Option(help="The source: model folder, or hub name `owner/name@revision`.")]
Target = Annotated[str, typer.Option(help="The target: model folder, or hub name `owner/name@revision`.")]
Model = Annotated[str, typer.Option(help="Model folder, or hub name `owner/name@revision`.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Insist on changes that were made for other weights; warns of them.")
]
PAIRS_AT_ONCE = 8
PairsAtOnce = Annotated[
    int, typer.Option(min=1, help="Pairs of layers whose sums are held at a time.", envvar="PKT_PAIRS_AT_ONCE")
]
Task = Annotated[str | None, typer.Option(help="Task whose part of the params file to use.")]
MethodName = Annotated[
    str | None, typer.Option("--method", help="Method whose entry in `made_by` of the params to use.")
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a command with settings says of them, as its attribute `settings`; `pkt check` goes by it.

    Attributes:
        section: of the params file.
        cls: the dataclass.
        functions: that the file of pkt_stages/methods must have which brings settings of its own; none: there is none.
    """

    section: str
    cls: type
    functions: tuple[str, ...]


def with_params(section: str, cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `--params FILE` and one per field of `cls`; it receives `params`, built from them.

    Values come as `params.read_settings` says, for the command's `task` and `method` where it has such options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(values: dict[str, Any], where: str, given: dict[str, Any]) -> None:
            command(**given, params=build(cls, values, where))

        return _with_options(command, section, cls, [], run, ())

    return decorate


def with_method(
    section: str, cls: type, *, functions: Sequence[str], code: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `with_params`, for a command that calls a file of pkt_stages/methods: it receives it as `by`, too.

    The file is that of `--code`, of the method's entry, or `code`. Settings of its own come from the same places and
    from `--set NAME=VALUE`.

    Args:
        functions: that the file must have.
        code: the file to take where none is named; empty: that is an error.
    """
    extra = [
        _parameter("code", str, help=f"File of pkt_stages/methods (default: {code or 'none'})."),
        _parameter("set_", list[str], "--set", help="NAME=VALUE of its `Params`; repeatable. A wrong NAME lists them."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(values: dict[str, Any], where: str, given: dict[str, Any]) -> None:
            named = given.pop("code") or values.get("code") or code
            values = {**values, **_assignments(given.pop("set_") or [])}
            values.pop("code", None)
            if not isinstance(named, str) or not named:
                known = ", ".join(methods.names())
                raise UserError(f"{where}: no code; name a file of pkt_stages/methods: {known}")
            by, shared = _method(named, functions, cls, values, where)
            command(**given, params=build(cls, shared, where), by=by)

        return _with_options(command, section, cls, extra, run, tuple(functions))

    return decorate


def _with_options(
    command: Callable[..., None],
    section: str,
    cls: type,
    extra: Sequence[inspect.Parameter],
    run: Callable[[dict[str, Any], str, dict[str, Any]], None],
    functions: tuple[str, ...],
) -> Callable[..., None]:
    """The command as typer sees it, with its `Settings`.

    Args:
        run: receives the settings as values, where they are from, and what else was given.
    """
    signature = inspect.signature(command, eval_str=True)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in signature.parameters.items()
        if name not in ("params", "by")
    ]
    made = [_parameter("params_file", Path, "--params", help=f"Params file whose section `{section}` to use."), *extra]
    for name, f in fields.items():
        if not _is_mapping(hints[name]):
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            text = f"{f.metadata['help']} (default: {shown})"
            made.append(_parameter(name, _option_type(hints[name]), help=text, rich_help_panel="Settings"))

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        file, task, method = given.pop("params_file"), given.get("task"), given.get("method")
        values = read_settings(file, section, task=task, method=method) if file is not None else {}
        for name in fields:
            value = given.pop(name, None)
            if value is not None:
                values[name] = _elements(value, hints[name]) if _is_list(hints[name]) else value
        run(values, f"{file}: {section}" if file is not None else f"options of `{section}`", given)

    wrapper.__signature__ = signature.replace(parameters=own + made)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in own + made}
    wrapper.settings = Settings(section, cls, functions)  # type: ignore[attr-defined]
    return wrapper


def _parameter(name: str, hint: Any, *flags: str, **how: Any) -> inspect.Parameter:
    annotation = Annotated[hint | None, typer.Option(*flags, **how)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _method(
    name: str, functions: Sequence[str], cls: type, values: Mapping[str, Any], where: str
) -> tuple[methods.Method, dict[str, Any]]:
    """The method with those of the values that are settings of its own, and the others."""
    code = methods.load(name, functions)
    shared, own = ([f.name for f in dataclasses.fields(c)] for c in (cls, code.Params))
    if both := [key for key in own if key in shared]:
        raise UserError(f"pkt_stages/methods/{name}.py: {both[0]!r} is a setting of the command, too; rename it")
    if unknown := [key for key in values if key not in shared and key not in own]:
        known = f"expected one of {', '.join([*own, *shared])}"
        raise UserError(f"{where}: unknown key {unknown[0]!r}{meant(unknown[0], [*own, *shared])}; {known}")
    settings = build(code.Params, {key: value for key, value in values.items() if key in own}, f"{where} ({name})")
    return methods.Method(name, code, settings), {key: value for key, value in values.items() if key not in own}


def _assignments(texts: list[str]) -> dict[str, Any]:
    """`NAME=VALUE`, the value as YAML reads it."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set {text}: expected NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text}: its value is no YAML") from None
    return found


def _is_mapping(hint: Any) -> bool:
    """Whether a field is a mapping, which stands in a params file alone."""
    return dict in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint)))


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _elements(text: str, hint: Any) -> list[Any]:
    """Comma-separated text as a list; whole numbers where the list holds such."""
    integers = typing.get_args(hint)[0] is int
    return [int(part) if integers and part.strip().isdecimal() else part for part in text.split(",")]


def _option_type(hint: Any) -> Any:
    """The type that typer parses; lists arrive as comma-separated text."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if _is_list(hint) or typing.get_origin(hint) is typing.Literal:
        return str
    return hint


class Stopwatch:
    """Measures a stage for its one summary line."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def summary(self, stage: str, what: str, out: Path) -> None:
        """Print `stage: what -> where (seconds)`."""
        typer.echo(f"{stage}: {what} -> {out} ({time.perf_counter() - self._start:.1f} s)")
