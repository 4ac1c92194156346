from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import Example, read_examples, training_file, write_jsonl

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "made",
    [
        Example("gsm8k", "x", "1+1?", "2"),
        Example("mbpp", "é", "Schreib f.", "def f(): ...", "def f()", {"test_list": ["assert f()"], "setup": ""}),
    ],
)
def test_examples_come_back(tmp_path: Path, made: Example) -> None:
    write_jsonl(tmp_path / "e.jsonl", [made.to_row()])
    assert read_examples(tmp_path / "e.jsonl") == [made]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no example; expected one JSON object a line"),
        (["{}", ""], "line 1: expected `messages` with one user and one assistant turn, found none"),
        ([json.dumps(GOOD), "{"], "line 2: not JSON"),
        ([json.dumps(GOOD), "", "[1]"], "line 3: expected a JSON object, found list"),
        ([json.dumps({"messages": [1, 2]})], "line 1: expected `messages` with one user and one assistant turn"),
        (
            [json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]})],
            "line 1: a message's `content` is empty or not text",
        ),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of examples"):
        read_examples(tmp_path / "none.jsonl")


def test_what_is_trained_on() -> None:
    train, align = Path("train"), Path("align")
    assert training_file("train", train, align) == training_file("train", train, None) == train
    assert training_file("align", train, align) == align
    with pytest.raises(UserError, match=r"^train_set align needs --align$"):
        training_file("align", train, None)


def test_only_the_first_examples(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    write_jsonl(path, [Example("toy", str(i), "?", "!").to_row() for i in range(3)])
    assert [e.id for e in read_examples(path, 2)] == ["0", "1"]
    assert len(read_examples(path, 3)) == len(read_examples(path)) == 3
    with pytest.raises(UserError) as caught:
        read_examples(path, 4)
    assert str(caught.value) == f"{path}: holds 3 examples, num_examples asks for 4"
