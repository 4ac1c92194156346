from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core.similarity import (
    CkaSums,
    bin_edges,
    centred_gram,
    cosine,
    histogram,
    hsic,
    minibatches,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, term by term in float64."""
    k, m = (f.double() @ f.double().T for f in (x, y))
    n = len(k)
    for gram in (k, m):
        for i in range(n):
            gram[i, i] = 0.0
    trace = sum(float(k[i, j] * m[j, i]) for i in range(n) for j in range(n))
    sums = float(k.sum()) * float(m.sum()) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * sum(float(k[:, i].sum() * m[i].sum()) for i in range(n))
    return (trace + sums - last) / (n * (n - 3))


def cka(x: Tensor, y: Tensor, size: int | None = None) -> float:
    sums = CkaSums()
    for batch in minibatches(len(x), size or len(x)):
        sums.add(centred_gram(x[None, list(batch)]), centred_gram(y[None, list(batch)]))
    return float(sums.cka())


def test_unbiased_hsic_against_the_slow_formula() -> None:
    first, second = draw(3, 9, 5), draw(2, 9, 7, seed=1)
    found = hsic(centred_gram(first), centred_gram(second))
    expected = torch.tensor([[slow_hsic(x, y) for y in second] for x in first], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_values_of_ckatorch(golden: Path) -> None:
    tensors = load_file(golden / "cka" / "F_cka.safetensors")
    values = json.loads((golden / "cka" / "F_cka.json").read_text())
    x, y = tensors["X"], tensors["Y"]
    assert cka(x, y) == pytest.approx(values["cka_base_unbiased"], rel=1e-6)
    for count, size in ((10, 20), (5, 40), (4, 50)):
        assert cka(x, y, size) == pytest.approx(values[f"cka_batch_{count}x{size}"], rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 12), st.integers(1, 6), st.integers(0, 1000))
def test_equal_features_and_invariances(n: int, d: int, seed: int) -> None:
    x = draw(n, d, seed=seed)
    assert cka(x, x) == pytest.approx(1)
    rotation = torch.linalg.qr(draw(d, d, seed=seed + 1).double()).Q
    y = draw(n, 3, seed=seed + 2)
    moved = 2.5 * x.double() @ rotation + draw(1, d, seed=seed + 3).double()
    assert cka(moved, y) == pytest.approx(cka(x, y), abs=1e-8)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)


def test_unrelated_features_have_none() -> None:
    """Where the biased estimate says 0.9: two random matrices with more features than samples."""
    x, y = draw(50, 500), draw(50, 500, seed=1)
    assert abs(cka(x, y)) < 0.02
    biased = [f.double() - f.double().mean(0) for f in (x, y)]
    k, m = (f @ f.T for f in biased)
    assert float((k * m).sum() / (k.norm() * m.norm())) > 0.8


def test_a_last_minibatch_that_is_too_small_joins_the_one_before() -> None:
    assert minibatches(11, 4) == [range(4), range(4, 11)]
    assert minibatches(12, 4) == [range(4), range(4, 8), range(8, 12)]
    assert minibatches(5, 200) == [range(5)]
    for count, size in ((3, 8), (8, 3)):
        with pytest.raises(ValueError, match="3 samples; unbiased HSIC needs at least 4"):
            minibatches(count, size)
    with pytest.raises(ValueError, match="3 samples"):
        centred_gram(draw(1, 3, 5))


def test_constant_features() -> None:
    x = draw(2, 8, 4)
    constant = torch.full((1, 8, 3), 0.1) + torch.tensor([0.0, 1e-9, 1.0])
    sums = CkaSums()
    sums.add(centred_gram(x), centred_gram(torch.cat([draw(1, 8, 3), constant])))
    with pytest.raises(ValueError, match="second layer 1: its features do not vary, CKA is undefined"):
        sums.cka()


def test_cosine_by_rows_and_flattened() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0], [0.0, -4.0], [5.0, 0.0]])
    rows, flat = cosine(a, b)
    assert rows == pytest.approx((2**-0.5 - 1) / 2)
    assert flat == pytest.approx((1 - 8) / (5**0.5 * 43**0.5))
    with pytest.raises(ValueError, match="one of the matrices is zero"):
        cosine(a[2:], b[2:])


def test_histogram_of_either_sign() -> None:
    edges = bin_edges(1e-3, 1.0, 1)
    assert edges.tolist() == pytest.approx([-1, -0.1, -0.01, -0.001, 0.001, 0.01, 0.1, 1])
    values = torch.tensor([0.0, 5e-4, -5e-4, 0.05, -0.5, 3.0, -2.0])
    counts = histogram(values, edges)
    assert counts.tolist() == [1, 1, 0, 0, 3, 0, 1, 0, 1]
