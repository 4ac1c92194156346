from __future__ import annotations

import re

import pytest
import yaml

from pkt_stages.tasks import load


def last_number(text: str) -> str:
    """With the task file's own expression, as the harness applies it."""
    filters = yaml.safe_load(load("gsm8k").file.read_text())["filter_list"][0]["filter"]
    found = re.findall(filters[0]["regex_pattern"], text)
    return str(found[filters[0]["group_select"]]) if found else str(filters[0]["fallback"])


def score(text: str, answer: str) -> float:
    task = load("gsm8k")
    assert task.score is not None
    return task.score({"answer": answer}, last_number(text))


def test_a_row_loses_its_calculations() -> None:
    row = {"question": "Q?", "answer": "1 + 1 = <<1+1=2>>2.\nDone.\n#### 1,002"}
    made = load("gsm8k").example(row, "x")
    assert made.prompt == "Answer the following question.\n\nQuestion: Q?"
    assert made.answer == "Answer: 1 + 1 = 2. Done. So the answer is 1,002."
    assert (made.prefix, made.reference) == ("Answer:", {"answer": "1,002"})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 18.", "18"),
        ("She pays $1,234.", "1234"),
        ("18.00", "18"),
        ("-7 degrees", "-7"),
        ("$-5 or -$5.50", "-5.5"),
        ("between 3-4", "4"),
        ("5 + 6 = 11. So the answer is 11", "11"),
        (".5 of it", "0.5"),
        ("1,000,000 dollars", "1000000"),
        ("10 apples, 12, and", "12"),
    ],
)
def test_last_number(text: str, answer: str) -> None:
    assert score(text, answer) == 1.0


@pytest.mark.parametrize(("text", "answer"), [("none", "1"), ("18.5", "18"), ("it is 18 of 20", "18"), ("", "0")])
def test_other_numbers_do_not_count(text: str, answer: str) -> None:
    assert score(text, answer) == 0.0
