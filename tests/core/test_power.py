"""Power and recovered gaps, against simulation and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pkt_stages.core.statistics import compare, detectable, mcnemar, recovered, sign_flip


def answers(n: int, row_only: int, target_only: int) -> tuple[Tensor, Tensor]:
    row, target = torch.zeros(1, n), torch.zeros(1, n)
    row[0, :row_only] = 1
    target[0, row_only : row_only + target_only] = 1
    return row, target


@pytest.mark.parametrize(("n", "changed"), [(100, 0), (100, 30), (256, 10)])
def test_what_mcnemar_detects_it_detects_four_times_in_five(n: int, changed: int) -> None:
    """Draw pairs of answers that truly differ by what `detectable` says, and by half of it."""
    row, target = answers(n, changed // 2, changed - changed // 2)
    smallest = detectable(row, target, "mcnemar", 0.05)
    generator = torch.Generator().manual_seed(0)
    shown = {}
    for true in (smallest, smallest / 2):
        share = max(changed / n, true)
        drawn = torch.rand(600, n, generator=generator)
        wins, losses = drawn < (share + true) / 2, (drawn >= (share + true) / 2) & (drawn < share)
        found = [mcnemar(w.double(), x.double()) <= 0.05 for w, x in zip(wins, losses, strict=True)]
        shown[true] = sum(found) / len(found)
    assert shown[smallest] == pytest.approx(0.8, abs=0.05)
    assert shown[smallest / 2] < 0.6


def test_what_the_sign_flip_test_detects() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    smallest = detectable(noise, torch.zeros(1, 200), "sign_flip", 0.05)
    assert smallest == pytest.approx((1.959964 + 0.841621) * float(noise.std()) / 200**0.5, rel=1e-5)
    shown = [
        sign_flip(smallest + torch.randn(200, generator=generator, dtype=torch.float64), generator, 2000) <= 0.05
        for _ in range(300)
    ]
    assert sum(shown) / len(shown) == pytest.approx(0.8, abs=0.07)


def test_fewer_examples_and_stricter_levels_show_less() -> None:
    plain = [detectable(*answers(n, 0, 0), "mcnemar", 0.05) for n in (256, 64, 6)]
    assert plain == sorted(plain)
    assert detectable(*answers(256, 0, 0), "mcnemar", 0.05 / 12) > plain[0]
    # With five examples the smallest two-sided p is 1/16: nothing can be shown.
    assert detectable(*answers(5, 0, 0), "mcnemar", 0.05) == float("inf")
    # Runs in which no example differs: as if one answer each had been compared.
    assert detectable(torch.zeros(3, 256), torch.zeros(1, 256), "sign_flip", 0.05) == plain[0]


def test_unit_multiplies_what_has_the_results_unit() -> None:
    row, target = answers(40, 12, 3)
    shares, points = (compare(row, target, torch.Generator().manual_seed(0), unit=unit) for unit in (1.0, 100.0))
    for name in ("difference", "stderr", "low", "high"):
        assert getattr(points, name) == pytest.approx(100 * getattr(shares, name))
    assert points.p_value == shares.p_value
    assert detectable(row, target, "mcnemar", 0.05, unit=100.0) == pytest.approx(
        100 * detectable(row, target, "mcnemar", 0.05)
    )


def test_many_values_are_resampled_as_few_are() -> None:
    """Above 64 distinct differences examples are drawn, below it counts: equal results but for chance."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(300, generator=generator, dtype=torch.float64).mul(3).round().div(3) + 0.1
    many = few + 1e-7 * torch.arange(300)
    assert len(few.unique()) < 64 < len(many.unique())
    zero = torch.zeros(1, 300)
    one, two = (compare(x[None], zero, torch.Generator().manual_seed(1), 20_000) for x in (few, many))
    for name in ("low", "high"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=0.01)
    assert one.p_value == pytest.approx(two.p_value, abs=0.01)


def test_recovered_by_hand() -> None:
    """Half of the gap on every example, whatever the gap: no error."""
    target, oracle = torch.tensor([[-2.0, -1.0, -3.0, -2.0]]), torch.tensor([[-1.0, -0.5, -1.0, -1.5]])
    found = recovered((target + oracle) / 2, target, oracle)
    assert found is not None and found.share == pytest.approx(0.5) and found.stderr == pytest.approx(0, abs=1e-12)
    nothing = recovered(target, target, oracle)
    assert nothing is not None and nothing.share == 0
    whole = recovered(oracle, target, oracle)
    assert whole is not None and (whole.share, whole.stderr) == (1.0, 0.0)


def test_no_gap_no_share() -> None:
    target = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert recovered(target, target, torch.tensor([[1.0, 0.0, 0.0, 1.0]])) is None


def test_the_error_of_a_share_is_that_of_its_ratio() -> None:
    """Against resampled examples."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(1, 400).double()
    oracle = 1 + 0.5 * torch.randn(1, 400, generator=generator, dtype=torch.float64)
    row = 0.3 * oracle + 0.4 * torch.randn(1, 400, generator=generator, dtype=torch.float64)
    found = recovered(row, target, oracle)
    assert found is not None
    shares = []
    for _ in range(2000):
        some = torch.randint(400, (400,), generator=generator)
        shares.append(float(row[0, some].mean() / oracle[0, some].mean()))
    assert found.stderr == pytest.approx(float(torch.tensor(shares).std()), rel=0.1)


def test_seeds_that_differ_widen_the_error() -> None:
    target, oracle = torch.zeros(1, 4), torch.ones(1, 4)
    found = recovered(torch.tensor([[0.2] * 4, [-0.2] * 4]), target, oracle)
    assert found is not None and found.share == pytest.approx(0)
    assert found.stderr == pytest.approx(0.2)  # sd 0.283 over sqrt(2)
