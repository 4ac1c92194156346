from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import from_benchmark, read_examples, write_rows

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_rows_come_back(tmp_path: Path) -> None:
    row = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "easy_sums"}
    made = from_benchmark("mmlu", row, "x")
    write_rows(tmp_path / "e.jsonl", [made.to_row()])
    assert read_examples(tmp_path / "e.jsonl") == [made]


def test_mmlu() -> None:
    row = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "easy_sums"}
    made = from_benchmark("mmlu", row, "x")
    assert made.prompt == (
        "The following are multiple choice questions (with answers) about easy sums.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert (made.answer, made.prefix, made.reference) == ("The answer is: B", "The answer is:", {"answer": "B"})


def test_gsm8k() -> None:
    row = {"question": "Q?", "answer": "1 + 1 = <<1+1=2>>2.\nDone.\n#### 1,002"}
    made = from_benchmark("gsm8k", row, "x")
    assert made.prompt == "Answer the following question.\n\nQuestion: Q?"
    assert made.answer == "Answer: 1 + 1 = 2. Done. So the answer is 1,002."
    assert made.reference == {"answer": "1,002"}


def test_humaneval() -> None:
    row = {
        "prompt": 'def f(x):\n    """Doc."""\n',
        "canonical_solution": "    return x\n",
        "test": "t",
        "entry_point": "f",
    }
    made = from_benchmark("humaneval", row, "x")
    assert made.answer == 'Here is the completed function:\n\n\n```python\ndef f(x):\n    """Doc."""\n    return x\n```'
    assert made.answer.startswith(made.prefix)


def test_mbpp_keeps_imports_and_nested_defaults_in_the_signature() -> None:
    code = "import re\r\ndef f(a=(1, 2), b=3):\r\n  return 1"
    made = from_benchmark("mbpp", {"text": "Write f.", "code": code, "test_list": ["assert f() == 1"]}, "x")
    assert made.prompt == "Complete the following python function.\n\n\nWrite f.\nimport re\ndef f(a=(1, 2), b=3)"
    assert made.answer.startswith(made.prefix + ":\n  return 1")


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        ("mmlu", {"question": "?"}, "row x: not in the mmlu schema (KeyError: 'choices')"),
        ("gsm8k", {"question": "?", "answer": "7"}, "row x: not in the gsm8k schema (KeyError: '#### in `answer`')"),
        ("squad", {}, "unknown benchmark schema 'squad'; expected one of mmlu, gsm8k, humaneval, mbpp, evol_instruct"),
    ],
)
def test_rows_in_another_schema(schema: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_benchmark(schema, row, "x")
    assert str(caught.value) == message


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
