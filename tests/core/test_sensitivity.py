from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pkt_stages.core.sensitivity import submatrix_sums, top_layers


def best(scores: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    sums = submatrix_sums(scores, shape)
    return divmod(int(sums.argmax()), sums.shape[1])


def slow_best(scores: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
    """Every placement in turn, as Seeking's published code does it."""
    largest, where = -1.0, (0, 0)
    for row in range(scores.shape[0] - shape[0] + 1):
        for column in range(scores.shape[1] - shape[1] + 1):
            total = float(scores[row : row + shape[0], column : column + shape[1]].double().sum())
            if total > largest:
                largest, where = total, (row, column)
    return where


def test_a_hand_worked_case() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    assert submatrix_sums(scores, (1, 2)).tolist() == [[3.0, 5.0], [9.0, 5.0]]
    assert submatrix_sums(scores, (2, 2)).tolist() == [[12.0, 10.0]]
    assert best(scores, (1, 2)) == (1, 0)
    assert best(scores, (2, 3)) == (0, 0)


def test_of_equal_sums_the_first_in_row_major_order() -> None:
    assert best(torch.ones(4, 5), (2, 2)) == (0, 0)
    scores = torch.zeros(4, 4)
    scores[0, 3] = scores[3, 0] = 1
    assert best(scores, (1, 1)) == (0, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_as_a_double_loop(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    scores = torch.randint(0, 9, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    shape = (min(height, rows), min(width, columns))
    assert best(scores, shape) == slow_best(scores, shape)


def test_real_scores_as_a_double_loop() -> None:
    """Sensitivities span many powers of ten; the table's differences must not blur them."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 30, generator=draw).mul(6).exp()
    sums = submatrix_sums(scores, (20, 25))
    for row, column in ((0, 0), (7, 5), (20, 2)):
        expected = float(scores[row : row + 20, column : column + 25].double().sum())
        assert sums[row, column].item() == pytest.approx(expected, rel=1e-12)
    assert best(scores, (20, 25)) == slow_best(scores, (20, 25))


def test_a_submatrix_larger_than_the_matrix() -> None:
    with pytest.raises(ValueError, match="no 2x4 sub-matrix in a 2x3 matrix"):
        best(torch.ones(2, 3), (2, 4))


def test_top_layers_in_depth_order() -> None:
    assert top_layers(torch.tensor([1.0, 5.0, 5.0, 2.0, 9.0]), 3).tolist() == [1, 2, 4]
    assert top_layers(torch.tensor([5.0, 5.0, 5.0]), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="4 layers wanted, there are 3"):
        top_layers(torch.ones(3), 4)
