from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from pkt_stages.core.statistics import (
    compare,
    detectable,
    holm,
    mcnemar,
    mean_and_deviation,
    paired_bootstrap,
    rank_correlation,
    sign_flip,
    standard_error,
    wilson,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_standard_error_and_deviation() -> None:
    assert standard_error(doubles(1, 0, 1, 1)) == pytest.approx((0.1875 / 3) ** 0.5)  # sqrt(p (1 - p) / (n - 1))
    assert standard_error(doubles(0.5)) == 0.0
    assert mean_and_deviation(doubles(60, 62, 67)) == pytest.approx((63.0, 13**0.5))
    assert mean_and_deviation(doubles(60)) == (60.0, None)
    for function in (standard_error, mean_and_deviation):
        with pytest.raises(ValueError, match=r"no (value|run) to average"):
            function(doubles())


def test_mcnemar_by_hand() -> None:
    """Nine examples that only the row gets right, one that only the target does: 2 (1 + 10) / 2^10."""
    row = doubles(*[1] * 9, 0, 1, 1, 0)
    target = doubles(*[0] * 9, 1, 1, 1, 0)
    assert mcnemar(row, target) == pytest.approx(22 / 1024)
    assert mcnemar(target, row) == pytest.approx(22 / 1024)
    assert mcnemar(row, row) == 1.0


DIFFERENCES = doubles(1, 1, 0, 1 / 3, -1 / 3, 1)


def test_bootstrap_against_all_resamples() -> None:
    """All 6^6 resamples of six differences, each as likely."""
    drawn = torch.tensor(list(product(range(6), repeat=6)))
    means = DIFFERENCES[drawn].mean(1)
    low, high, p_value = paired_bootstrap(DIFFERENCES, generator(), num_resamples=200_000)
    assert low == pytest.approx(float(means.quantile(0.025)), abs=1e-9)
    assert high == pytest.approx(float(means.quantile(0.975)), abs=1e-9)
    exact = 2 * min((means <= 1e-9).double().mean().item(), (means >= -1e-9).double().mean().item())
    assert p_value == pytest.approx(exact, abs=1e-3)


def test_bootstrap_against_drawing_examples() -> None:
    """Counts per distinct value are the same thing as examples drawn one by one."""
    differences = torch.rand(40, generator=generator(3), dtype=torch.float64) - 0.4
    drawn = torch.randint(40, (100_000, 40), generator=generator(1))
    means = differences[drawn].mean(1)
    low, high, _ = paired_bootstrap(differences, generator(2), num_resamples=100_000)
    assert low == pytest.approx(float(means.quantile(0.025)), abs=2e-3)
    assert high == pytest.approx(float(means.quantile(0.975)), abs=2e-3)


def test_sign_flip_against_all_patterns() -> None:
    patterns = torch.tensor(list(product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    sums = (patterns * DIFFERENCES).sum(1).abs()
    exact = (sums >= DIFFERENCES.sum() - 1e-9).double().mean().item()
    assert sign_flip(DIFFERENCES, generator(), num_resamples=200_000) == pytest.approx(exact, abs=4e-3)


def test_sign_flip_is_mcnemar_for_one_run() -> None:
    row, target = doubles(*[1] * 9, 0, 1, 0, 1), doubles(*[0] * 9, 1, 1, 0, 0)
    exact = mcnemar(row, target)
    assert sign_flip(row - target, generator(), num_resamples=200_000) == pytest.approx(exact, abs=2e-3)


def test_the_test_fits_the_results() -> None:
    one, target = doubles(1, 0, 1, 1)[None], doubles(1, 0, 0, 0)[None]
    assert compare(one, target, generator()).test == "mcnemar"
    assert compare(one, target, generator()).p_value == 0.5
    assert compare(one.expand(3, -1), target, generator()).test == "sign_flip"
    assert compare(one * 0.95, target, generator()).test == "sign_flip"
    assert compare(one, target.expand(2, -1), generator()).test == "sign_flip"


def test_points_over_runs() -> None:
    row, target = torch.stack([doubles(1, 1, 0, 1), doubles(1, 0, 0, 1)]), doubles(1, 0, 0, 0)[None]
    found = compare(row, target, generator(), unit=100.0)
    assert found.difference == pytest.approx(37.5)
    assert found.stderr == pytest.approx(100 * (0.6875 / 3 / 4) ** 0.5)  # of 0, 0.5, 0, 1


results = st.integers(2, 30).flatmap(
    lambda n: st.tuples(
        *[
            st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n), min_size=r, max_size=r)
            for r in (2, 1)
        ]
    )
)


@settings(max_examples=30, deadline=None)
@given(results)
def test_exchanging_the_sides_turns_the_difference_round(pair: tuple[list[list[float]], list[list[float]]]) -> None:
    row, target = (torch.tensor(x, dtype=torch.float64) for x in pair)
    there, back = compare(row, target, generator()), compare(target, row, generator())
    assert back.difference == pytest.approx(-there.difference)
    assert back.stderr == pytest.approx(there.stderr)
    # Other random numbers, so up to a step or two of the few values that means of so few examples have.
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=201 / row.shape[1])
    assert back.p_value == pytest.approx(there.p_value, abs=0.04)
    differences = row.mean(0) - target.mean(0)
    assert sign_flip(differences, generator()) == sign_flip(-differences, generator())
    assert there.low - 1e-9 <= there.difference <= there.high + 1e-9
    assert 0 < there.p_value <= 1


def test_identical_results_show_nothing() -> None:
    same = torch.rand(3, 50, generator=generator(), dtype=torch.float64).round()
    found = compare(same, same, generator())
    assert (found.difference, found.stderr, found.low, found.high) == (0, 0, 0, 0)
    assert (found.p_value, found.bootstrap_p) == (1, 1)
    assert compare(same[:1], same[:1], generator()).p_value == 1


def test_a_seed_decides_the_numbers() -> None:
    row, target = (torch.rand(2, 100, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    assert compare(row, target, generator(5)) == compare(row, target, generator(5))
    assert compare(row, target, generator(5)) != compare(row, target, generator(6))


def test_a_sure_difference_has_the_smallest_p_that_the_resamples_allow() -> None:
    found = compare(torch.ones(2, 100), torch.zeros(1, 100), generator(), num_resamples=999, unit=100.0)
    assert (found.low, found.high, found.p_value, found.bootstrap_p) == (100, 100, 0.001, 0.002)


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no result to compare"):
        compare(torch.zeros(0, 4), torch.zeros(1, 4), generator())


def test_detectable_by_mcnemar_by_hand() -> None:
    """Ten examples at level .05: six wins or more and no loss are shown (2 / 64), five are not (2 / 32)."""
    row, target = doubles(1, *[0] * 9)[None], torch.zeros(1, 10, dtype=torch.float64)
    found = detectable(row, target, "mcnemar", 0.05)
    chance = sum(math.comb(10, k) * found**k * (1 - found) ** (10 - k) for k in range(6, 11))
    assert chance == pytest.approx(0.8, abs=1e-3)
    assert detectable(row, target, "mcnemar", 0.05, unit=100.0) == pytest.approx(100 * found)
    # Five examples can show nothing; more power and a stricter level need more.
    assert detectable(row[:, :5], target[:, :5], "mcnemar", 0.05) == math.inf
    assert detectable(row, target, "mcnemar", 0.05, power=0.9) > found
    assert detectable(row, target, "mcnemar", 0.02) > found


def test_holm_by_hand() -> None:
    assert holm(doubles(0.01, 0.04, 0.03, 0.005)).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(doubles(0.5, 0.9)).tolist() == [1.0, 1.0]
    assert holm(doubles(0.04)).tolist() == [0.04]
    assert holm(doubles()).tolist() == []


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_s_interval(right: int, n: int, low: float, high: float) -> None:
    """Against the values of Newcombe's (1998) formula, method 3."""
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)
    with pytest.raises(ValueError, match="no trial"):
        wilson(0, 0)


def test_rank_correlation_by_hand() -> None:
    found = rank_correlation(doubles(1, 2, 3, 4, 5), doubles(20, 10, 40, 30, 50), generator())
    assert found is not None and found.rho == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Orders as far from 0: their squared differences sum to 4 or less, or to 36 or more.
    far = sum(not 4 < sum((i - p[i]) ** 2 for i in range(5)) < 36 for p in permutations(range(5)))
    assert found.p_value == pytest.approx(far / 120, abs=0.01)
    assert found.low < 0.8 < found.high <= 1
    # Any rising function keeps ranks; ties share theirs.
    found = rank_correlation(doubles(1, 2, 3, 4), doubles(1, 4, 9, 1000), generator())
    assert found is not None and (found.rho, found.high) == (pytest.approx(1), pytest.approx(1))
    assert found.p_value == pytest.approx(2 / 24, abs=0.01)
    found = rank_correlation(doubles(1, 1, 2), doubles(1, 2, 3), generator())
    assert found is not None and found.rho == pytest.approx(0.75**0.5)


def test_no_rank_correlation() -> None:
    assert rank_correlation(doubles(1, 1, 1), doubles(1, 2, 3), generator()) is None
    with pytest.raises(ValueError, match="2 and 2 values; a rank correlation needs 3 pairs"):
        rank_correlation(doubles(1, 2), doubles(1, 2), generator())
