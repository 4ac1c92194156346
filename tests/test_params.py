from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from pkt_stages.errors import UserError
from pkt_stages.params import build, read_method, read_section


@dataclass(frozen=True)
class Example:
    rate: float = 0.1
    steps: int = 4
    rule: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    limit: int | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")


def test_values_and_defaults() -> None:
    made = build(Example, {"rate": 1, "names": ["x"], "limit": 3}, "here")
    assert made == Example(rate=1.0, names=("x",), limit=3)
    assert isinstance(made.rate, float)
    assert build(Example, {"rate": "3e-5", "limit": None}, "here").rate == 3e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stpes": 3}, "here: unknown key 'stpes'; expected one of rate, steps, rule, names, limit, flag"),
        ({"steps": "3"}, "here: steps: expected int, found '3'"),
        ({"steps": True}, "here: steps: expected int, found True"),
        ({"steps": 2.5}, "here: steps: expected int, found 2.5"),
        ({"flag": 1}, "here: flag: expected bool, found 1"),
        ({"rate": "much"}, "here: rate: expected float, found 'much'"),
        ({"rate": None}, "here: rate: expected float, found None"),
        ({"rule": "c"}, "here: rule: expected one of a, b, found 'c'"),
        ({"names": "x"}, "here: names: expected a list, found 'x'"),
        ({"names": [1]}, "here: names: expected str, found 1"),
        ({"steps": 0}, "here: steps must be at least 1, found 0"),
    ],
)
def test_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Example, values, "here")
    assert str(caught.value) == message


def test_a_tasks_part_overrides_what_is_common(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("s: {common: {a: 1, b: 2}, mmlu: {b: 3}, gsm8k: {}}\nflat: {a: 5}\n")
    assert read_section(path, "s", "mmlu") == {"a": 1, "b": 3}
    assert read_section(path, "s", "gsm8k") == {"a": 1, "b": 2}
    assert read_section(path, "s") == {"a": 1, "b": 2}
    assert read_section(path, "flat", "mmlu") == {"a": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "params.yaml: no such params file"),
        ("a: [", "params.yaml: not readable YAML"),
        ("- 1", "params.yaml: section 's' is missing"),
        ("s: 3", "params.yaml: section 's': expected a mapping, found int"),
        ("s: {common: 1}", "params.yaml: s.common: expected a mapping, found int"),
        ("s: {common: {}}", "params.yaml: section 's' has no part for task 'mbpp'; add `s.mbpp: {}`"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_section(path, "s", "mbpp")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


METHODS = "methods:\n  one: {lr: 1}\n  two: {generate: {seed: 1}, finetune: {lr: 2}}\n  none: {}\n  bad: 3\n"


def test_settings_of_a_method(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(METHODS)
    assert read_method(path, "one", "finetune") == {"lr": 1}
    assert read_method(path, "two", "finetune") == {"lr": 2}
    assert read_method(path, "two", "generate") == {"seed": 1}
    assert read_method(path, "none", "finetune") == {}
    for method, section, message in (
        ("three", "finetune", "unknown method 'three'; `methods` has one, two, none, bad"),
        ("bad", "finetune", "methods.bad: expected a mapping, found int"),
        ("two", "align", "methods.two has no part for 'align'; it has generate, finetune"),
    ):
        with pytest.raises(UserError) as caught:
            read_method(path, method, section)
        assert str(caught.value) == f"{path}: {message}"
