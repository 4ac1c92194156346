from __future__ import annotations

import pytest
import yaml

from pkt_stages.tasks import load


def score(text: str, answer: str) -> float:
    task = load("gsm8k")
    assert task.score is not None and task.extract is not None
    return task.score({"answer": answer}, task.extract(text))


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
        ("The total is **$29.00**.", "29"),
        ("\\boxed{18}", "18"),
        # Minus signs, as they are typed and as they are set; between numbers they are none.
        *((f"It is {minus}3 degrees", "-3") for minus in "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"),
        *((f"It is {minus}$1,234.50.", "-1234.5") for minus in "-\u2013\u2212"),
        ("x=\u22123", "-3"),
        ("3\u20135 years", "5"),
        ("10\u22125 pens", "5"),
        ("He is 5\u2014 7 at most", "7"),  # an em dash is none
        # Commas of thousands, in India's way, too; those of a list.
        ("It costs 12,34,567 rupees", "1234567"),
        ("1234,567", "1234567"),
        ("The answer is 1,2,3", "3"),
        ("1,2", "2"),
        ("1,234,5", "5"),
        ("1,2345", "2345"),
        ("$80,000 + $120,000 = $200,000", "200000"),
        # What stands behind a number does not belong to it: both harnesses take the last one.
        ("It grew by 50%.", "50"),
        ("That is 1/2", "2"),
        ("72kg", "72"),
        ("18 (in 2 weeks)", "2"),
    ],
)
def test_last_number(text: str, answer: str) -> None:
    assert score(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("none", "1"),
        ("18.5", "18"),
        ("it is 18 of 20", "18"),
        ("", "0"),
        ("It is \u22123", "3"),
        ("It is 3", "-3"),
        ("1,2,3", "123"),
    ],
)
def test_other_numbers_do_not_count(text: str, answer: str) -> None:
    assert score(text, answer) == 0.0


def test_another_question_ends_the_answer() -> None:
    """As in lm-evaluation-harness; the prompt's own word for it."""
    task = load("gsm8k")
    stops = yaml.safe_load(task.file.read_text())["generation_kwargs"]["until"]
    prompt = task.example({"question": "Q?", "answer": "#### 1"}, "x").prompt
    assert stops == ["Question:"] and stops[0] in prompt
