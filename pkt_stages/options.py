"""Command-line options made from a stage's params dataclass, so that help, defaults and params.yaml cannot disagree."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages.params import build, read_method, read_section


def option(default: Any, help: str) -> Any:
    """A params field with the text that `--help` shows for it (with its unit)."""
    return dataclasses.field(default=default, metadata={"help": help})


def with_params(section: str, cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `--params FILE` and one per field of `cls`; it receives `params`, built from them.

    Values come from the defaults, then the file's section (and the part of `--task`, where there is one), then the
    section of `--method` in `methods`, where the command has that option, then options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        hints = typing.get_type_hints(cls)
        own = [p for name, p in signature.parameters.items() if name != "params"]
        assert "params" in signature.parameters
        fields = {f.name: f for f in dataclasses.fields(cls)}
        extra = [
            inspect.Parameter(
                "params_file",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    Path | None, typer.Option("--params", help=f"Params file whose section `{section}` to use.")
                ],
            )
        ]
        for name, f in fields.items():
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            described = typer.Option(help=f"{f.metadata['help']} (default: {shown})", rich_help_panel="Settings")
            extra.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[_option_type(hints[name]) | None, described],
                )
            )

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            file = given.pop("params_file")
            values = read_section(file, section, given.get("task")) if file is not None else {}
            if file is not None and given.get("method") is not None:
                values = {**values, **read_method(file, given["method"], section)}
            for name in fields:
                value = given.pop(name)
                if value is not None:
                    values = {**values, name: _elements(value, hints[name]) if _is_list(hints[name]) else value}
            where = f"{file}: {section}" if file is not None else f"options of `{section}`"
            command(**given, params=build(cls, values, where))

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = signature.replace(parameters=keyword_only + extra)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in keyword_only + extra}
        return wrapper

    return decorate


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
