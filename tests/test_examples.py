from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import Example, check_ids, read_examples, training_file, write_jsonl

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
        ([json.dumps(GOOD | {"prefix": None})], "line 1: `prefix` is NoneType; expected text"),
        ([json.dumps(GOOD | {"dataset": 3})], "line 1: `dataset` is int; expected text"),
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


@pytest.mark.parametrize("id", [None, "", " \t", 3, True, ["a"], {"a": "b"}])
def test_ids_are_texts(tmp_path: Path, id: object) -> None:
    path = tmp_path / "e.jsonl"
    write_jsonl(path, [GOOD | {"id": "x"}, GOOD | {"id": id}])
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value) == f"{path}, line 2: `id` is {id!r}; expected a text of its own, or no `id` at all"


def test_ids_stand_once(tmp_path: Path) -> None:
    """Also one that is given to a row which is called after its line, and behind what is asked for."""
    path = tmp_path / "e.jsonl"
    for ids in (["a", "b", "a"], ["e_2", None, "a"]):
        write_jsonl(path, [GOOD | ({"id": id} if id is not None else {}) for id in ids])
        with pytest.raises(UserError) as caught:
            read_examples(path, 1)
        assert str(caught.value) == f"{path}: id {ids[0]!r} is there twice; give each example one of its own"
    a, b = Example("", "a", "?", "!"), Example("", "b", "?", "!")
    check_ids({"one": [a], "other": [b]})
    with pytest.raises(UserError, match=r"^other: id 'a' is in one, too; give each example one of its own$"):
        check_ids({"one": [a], "other": [b, a]})


MARK = "\ufeff"


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [
        ("", "\n", "\n"),
        ("", "\n", ""),
        ("", "\r\n", "\r\n"),
        ("\n\n", "\n \n", "\n\n"),
        (MARK, "\n", "\n"),
        (MARK, "\r\n", "\r\n"),
        (MARK + "\r\n", "\r\n", ""),
        (MARK, "\n" + MARK, "\n" + MARK),  # files that were put together
    ],
)
def test_files_of_other_systems(tmp_path: Path, before: str, between: str, after: str) -> None:
    texts = ["a\u2028b", "c\u00a0d\x85e", "\U0001f600", f"{MARK}f{MARK}"]
    rows = [Example("toy", str(i), text, text) for i, text in enumerate(texts)]
    path = tmp_path / "e.jsonl"
    lines = [json.dumps(row.to_row(), ensure_ascii=False) for row in rows]
    path.write_bytes((before + between.join(lines) + after).encode())
    assert read_examples(path) == rows


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"e\.jsonl: cannot be read as UTF-8 text \("):
        read_examples(path)
