from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from pkt_stages import methods
from pkt_stages.errors import UserError
from pkt_stages.methods import Method
from pkt_stages.options import MethodName, Task, option, with_method


@dataclass(frozen=True)
class Shared:
    lr: float = option(0.5, "A rate.", gt=0)
    seeds: tuple[int, ...] = option((0,), "Seeds.")


@dataclass(frozen=True)
class Own:
    width: int | None = option(None, "A width.", ge=1)
    kind: str = option("plain", "A kind.")


@dataclass(frozen=True)
class Clash:
    lr: float = option(0.5, "Another rate.")


Run = Callable[..., tuple[Shared, Method]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command whose method's code is called `mine`; `other` is for another one, `clash` has one of its settings."""
    files = {
        "mine": SimpleNamespace(Params=Own, mapping=None),
        "other": SimpleNamespace(Params=Own),
        "clash": SimpleNamespace(Params=Clash, mapping=None),
    }
    monkeypatch.setattr(methods, "names", lambda: sorted(files))
    for name, module in files.items():
        monkeypatch.setitem(sys.modules, f"{methods.__name__}.{name}", module)
    seen: list[tuple[Shared, Method]] = []

    @with_method("tune", Shared, functions=("mapping",), code="mine")
    def tune(params: Shared, by: Method, task: Task = None, method: MethodName = None) -> None:
        seen.append((params, by))

    def go(*arguments: object) -> tuple[Shared, Method]:
        app = typer.Typer()
        app.command()(tune)
        app(list(map(str, arguments)), standalone_mode=False)
        return seen[-1]

    return go


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(
        "tune: {lr: 1}\ntask: {mmlu: {tune: {seeds: [1, 2]}}}\n"
        "made_by: {align: {one: {lr: 2, width: 7}, two: {code: other}, three: {widht: 7}, four: {width: 0}}}\n"
    )
    return path


def test_settings_come_from_defaults_file_task_method_and_options(run: Run, file: Path) -> None:
    assert run() == (Shared(), Method("mine", run()[1].code, Own()))
    params, by = run("--params", file, "--task", "mmlu", "--method", "one")
    assert params == Shared(lr=2.0, seeds=(1, 2))
    assert (by.name, by.settings) == ("mine", Own(width=7))
    params, by = run("--params", file, "--method", "one", "--lr", "3", "--seeds", "4,5", "--set", "kind=odd")
    assert params == Shared(lr=3.0, seeds=(4, 5))
    assert by.facts() == {"code": "mine", "width": 7, "kind": "odd"}
    assert run("--set", "width=null")[1].settings == Own()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "two"],
            "code 'other': pkt_stages/methods/other.py has no `mapping`; it is for another command, or not whole",
        ),
        (
            ["--code", "clash"],
            "pkt_stages/methods/clash.py: 'lr' is a setting of the command, too; rename it",
        ),
        (
            ["--method", "three"],
            "{file}: tune: unknown key 'widht' (did you mean 'width'?); expected one of width, kind, lr, seeds",
        ),
        (["--method", "four"], "{file}: tune (mine): width must be at least 1, found 0"),
        (["--code", "yours"], "code 'yours': no such file in pkt_stages/methods; found clash, mine, other"),
        (["--set", "width"], "--set width: expected NAME=VALUE"),
        (["--set", "width=[1"], "--set width=[1: its value is no YAML"),
        (["--set", "width=wide"], "{file}: tune (mine): width: expected int, found 'wide'"),
        (["--lr", "0"], "{file}: tune: lr must be above 0, found 0.0"),
    ],
)
def test_bad_settings(run: Run, file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run("--params", file, *arguments)
    assert str(caught.value) == message.format(file=file)


def test_a_command_without_a_file_of_its_own_asks_for_one() -> None:
    @dataclass(frozen=True)
    class Nothing:
        pass

    @with_method("make", Nothing, functions=("derive",))
    def make(params: Any, by: Method) -> None:
        raise AssertionError

    app = typer.Typer()
    app.command()(make)
    with pytest.raises(UserError, match="options of `make`: no code; name a file of pkt_stages/methods: "):
        app([], standalone_mode=False)
