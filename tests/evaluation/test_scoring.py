from __future__ import annotations

import itertools

import pytest

from pkt_stages.evaluation.scoring import best, pass_at_k, same_number


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    for n, passed in itertools.product(range(1, 7), range(7)):
        if passed > n:
            continue
        outcomes = [True] * passed + [False] * (n - passed)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_best_choice_is_the_first_of_the_likeliest() -> None:
    assert best("ABCD", [-2.0, -3.0, -1.0, -9.0]) == "C"
    assert best("ABCD", [-1.0, -3.0, -1.0, -9.0]) == "A"


@pytest.mark.parametrize(
    ("found", "answer", "same"),
    [
        ("$1,234.", "1234", True),
        ("18.0", "18", True),
        ("NaN", "NaN", False),
        ("", "0", False),
        ("1 0", "10", True),
        ("\u22123", "-3", True),
    ],
)
def test_numbers_are_compared_as_decimals(found: str, answer: str, same: bool) -> None:
    assert same_number(found, answer) is same
