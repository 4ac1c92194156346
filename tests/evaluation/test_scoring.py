from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from pkt_stages.evaluation import scoring
from pkt_stages.evaluation.scoring import pass_at_k, same_number


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
TASKS = Path(scoring.__file__).parent / "tasks"


def last_number(text: str) -> str:
    """With the task file's own expression, as the harness applies it."""
    filters = yaml.load((TASKS / "gsm8k.yaml").read_text(), Loader)["filter_list"][0]["filter"]
    found = re.findall(filters[0]["regex_pattern"], text)
    return found[filters[0]["group_select"]] if found else filters[0]["fallback"]


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
    assert same_number(last_number(text), answer)


@pytest.mark.parametrize(("text", "answer"), [("none", "1"), ("18.5", "18"), ("it is 18 of 20", "18"), ("", "0")])
def test_other_numbers_do_not_count(text: str, answer: str) -> None:
    assert not same_number(last_number(text), answer)


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    for n, passed in itertools.product(range(1, 7), range(7)):
        if passed > n:
            continue
        outcomes = [True] * passed + [False] * (n - passed)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_mmlu_takes_the_best_letter() -> None:
    doc = {"reference": json.dumps({"answer": "C"})}
    assert scoring.mmlu(doc, [(-2.0, False), (-3.0, False), (-1.0, False), (-9.0, False)]) == {"accuracy": 1.0}
    assert scoring.mmlu(doc, [(-1.0, False), (-3.0, False), (-1.0, False), (-9.0, False)]) == {"accuracy": 0.0}


def test_stop_strings_are_those_of_the_protocol() -> None:
    until = {
        t: yaml.load((TASKS / f"{t}.yaml").read_text(), Loader)["generation_kwargs"]["until"]
        for t in ("humaneval", "mbpp", "gsm8k")
    }
    assert until == {
        "humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"],
        "mbpp": ["```"],
        "gsm8k": [],
    }
