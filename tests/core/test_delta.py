from __future__ import annotations

import pytest
import torch

from pkt_stages.core.delta import low_rank_factors


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_full_rank_gives_the_matrix_back(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = low_rank_factors(matrix, min(shape))
    torch.testing.assert_close(b @ a, matrix, rtol=0, atol=2e-6)


def test_the_best_approximation_of_its_rank() -> None:
    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    a, b = low_rank_factors(matrix, 3)
    assert a.shape == (3, 8) and b.shape == (12, 3)
    error = torch.linalg.norm((matrix - b @ a).double()).item()
    assert error == pytest.approx(torch.linalg.svdvals(matrix.double())[3:].norm().item(), rel=1e-5)
    torch.testing.assert_close(a @ a.mT, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(b.norm(dim=0), torch.linalg.svdvals(matrix)[:3])


def test_signs_do_not_depend_on_the_routine() -> None:
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    a, b = low_rank_factors(matrix, 2)
    assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all())
    turned = low_rank_factors(-matrix, 2)
    torch.testing.assert_close(turned[0], a)
    torch.testing.assert_close(turned[1], -b)


def test_a_rank_above_a_side() -> None:
    with pytest.raises(ValueError, match="rank 4 of a 3x9 matrix; use 1 to 3"):
        low_rank_factors(torch.ones(3, 9), 4)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90)])
def test_few_of_many_equal_the_whole_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b = low_rank_factors(matrix, 4)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close((b @ a).double(), u[:, :4] * s[:4] @ vh[:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.mT, torch.eye(4), atol=1e-6, rtol=0)
    again = low_rank_factors(matrix, 4)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


def test_a_matrix_of_lower_rank_than_asked_for() -> None:
    draw = torch.Generator().manual_seed(4)
    matrix = torch.randn(80, 2, generator=draw) @ torch.randn(2, 70, generator=draw)
    a, b = low_rank_factors(matrix, 5)
    torch.testing.assert_close(b @ a, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.mT, torch.eye(5), atol=1e-6, rtol=0)
