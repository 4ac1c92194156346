from __future__ import annotations

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import Example
from pkt_stages.tasks import load

ROW = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "easy_sums"}


def test_a_row_becomes_a_question_with_letters() -> None:
    made = load("mmlu").example(ROW, "x")
    assert made.prompt == (
        "The following are multiple choice questions (with answers) about easy sums.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert (made.answer, made.prefix, made.reference) == ("The answer is: B", "The answer is:", {"answer": "B"})


def test_the_letter_must_be_the_answer() -> None:
    task = load("mmlu")
    assert task.score is not None
    assert [task.score({"answer": "C"}, letter) for letter in "ABCD"] == [0, 0, 1, 0]


def test_an_answer_is_one_of_the_letters() -> None:
    with pytest.raises(UserError) as caught:
        load("mmlu").check(Example("mmlu", "x", "?", "!", "", {"answer": "E"}))
    assert str(caught.value) == "example x: expected an answer of A, B, C, D, found 'E'"
