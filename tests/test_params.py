from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pkt_stages.errors import UserError
from pkt_stages.params import build, option, read_params, read_settings


@dataclass(frozen=True)
class Example:
    rate: float = option(0.1, "A share.", gt=0, le=1)
    steps: int = option(4, "A number.", ge=1)
    rule: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    limit: int | None = option(None, "A limit.", ge=1)
    flag: bool = False
    seeds: tuple[int, ...] = option((0,), "Seeds.", ge=0)
    parts: dict[str, dict[str, int]] | None = None

    def __post_init__(self) -> None:
        if self.limit == self.steps:
            raise ValueError(f"limit and steps are both {self.limit}")


def test_values_and_defaults() -> None:
    made = build(Example, {"rate": 1, "names": ["x"], "limit": 3, "parts": {"one": {"a": 1}}}, "here")
    assert made == Example(rate=1.0, names=("x",), limit=3, parts={"one": {"a": 1}})
    assert isinstance(made.rate, float)
    assert build(Example, {"rate": "3e-5", "limit": None}, "here").rate == 3e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"stpes": 3},
            "here: unknown key 'stpes' (did you mean 'steps'?); expected one of rate, steps, rule, names, limit, flag, seeds, parts",  # noqa: E501
        ),
        ({"steps": "3"}, "here: steps: expected int, found '3'"),
        ({"steps": True}, "here: steps: expected int, found True"),
        ({"steps": 2.5}, "here: steps: expected int, found 2.5"),
        ({"flag": 1}, "here: flag: expected bool, found 1"),
        ({"rate": "much"}, "here: rate: expected float, found 'much'"),
        ({"rate": None}, "here: rate: expected float, found None"),
        ({"rule": "c"}, "here: rule: expected one of a, b, found 'c'"),
        ({"names": "x"}, "here: names: expected a list, found 'x'"),
        ({"names": [1]}, "here: names: expected str, found 1"),
        ({"parts": [1]}, "here: parts: expected a mapping, found [1]"),
        ({"parts": {"one": {"a": "b"}}}, "here: parts.one.a: expected int, found 'b'"),
        ({"steps": 0}, "here: steps must be at least 1, found 0"),
        ({"rate": 1.5}, "here: rate must be above 0 and at most 1, found 1.5"),
        ({"rate": float("nan")}, "here: rate must be above 0 and at most 1, found nan"),
        ({"limit": 0}, "here: limit must be at least 1, found 0"),
        ({"seeds": [3, -1]}, "here: seeds must be at least 0, found -1"),
        ({"limit": 4}, "here: limit and steps are both 4"),
    ],
)
def test_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Example, values, "here")
    assert str(caught.value) == message


PARAMS = """
tune: {lr: 1, epochs: 2}
bare: {}
generate: {}
task:
  mmlu: {tune: {lr: 2}, bare: {}}
  gsm8k: {}
made_by:
  first: {one: {epochs: 9}, none: {}}
  second: {two: {generate: {seed: 1}, tune: {lr: 3}}, bad: 3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


def test_task_and_method_change_the_section(file: Path) -> None:
    assert read_settings(file, "tune") == {"lr": 1, "epochs": 2}
    assert read_settings(file, "tune", task="mmlu") == {"lr": 2, "epochs": 2}
    assert read_settings(file, "tune", task="gsm8k") == {"lr": 1, "epochs": 2}
    assert read_settings(file, "tune", task="mmlu", method="one") == {"lr": 2, "epochs": 9}
    assert read_settings(file, "tune", method="two") == {"lr": 3, "epochs": 2}
    assert read_settings(file, "generate", method="two") == {"seed": 1}
    assert read_settings(file, "tune", method="none") == {"lr": 1, "epochs": 2}


def test_settings_are_copies(file: Path) -> None:
    read_settings(file, "tune")["lr"] = 5
    assert read_settings(file, "tune")["lr"] == 1


@pytest.mark.parametrize(
    ("section", "task", "method", "message"),
    [
        ("tuen", None, None, "section 'tuen' is missing"),
        ("tune", "mbpp", None, "no task 'mbpp' in `task`; found mmlu, gsm8k"),
        ("tune", None, "three", "unknown method 'three'; `made_by` has one, none, two, bad"),
        ("tune", None, "bad", "section 'made_by.second.bad': expected a mapping, found int"),
        ("bare", None, "two", "method two has no part for 'bare'; it has generate, tune"),
    ],
)
def test_bad_names(file: Path, section: str, task: str | None, method: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_settings(file, section, task=task, method=method)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "params.yaml: no such params file"),
        ("a: [", "params.yaml: not readable YAML"),
        ("- 1", "params.yaml: expected a mapping of params, found [1]"),
        ("s: 3", "params.yaml: section 's': expected a mapping, found int"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_settings(path, "s")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_reader_of_a_params_file_has_a_value_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("a: &a {b: [1]}\nc: *a\n")
    first = read_params(file)
    first["a"]["b"].append(2)
    assert read_params(file) == {"a": {"b": [1]}, "c": {"b": [1]}}
    file.write_text("a: 3\n")
    assert read_params(file) == {"a": 3}
