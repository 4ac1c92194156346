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


def _one_row(n: int) -> torch.Tensor:
    matrix = torch.zeros(n, n)
    matrix[3] = torch.linspace(-1, 1, n)
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(96, 96),
        torch.zeros(64, 160),
        torch.zeros(160, 64),
        _one_row(96),
        torch.eye(96),
        torch.full((96, 128), 6.5e4),
        torch.block_diag(*[torch.ones(4, 4)] * 24),
        torch.diag(torch.logspace(0, -7, 96)),
        torch.full((96, 96), 1e-40),
        torch.cat([torch.randn(48, 96, generator=torch.Generator().manual_seed(5))] * 2),
    ],
    ids=["zero", "wide zero", "tall zero", "one row", "identity", "constant", "blocks", "steep", "denormal", "twice"],
)
def test_blocks_that_pruning_or_no_training_leaves(matrix: torch.Tensor) -> None:
    """Zero, of lower rank than asked for, or of equal singular values: the best approximation, the same every time."""
    rank, values = 4, torch.linalg.svdvals(matrix.double())
    a, b = low_rank_factors(matrix, rank)
    error = float((b.double() @ a.double() - matrix.double()).norm())
    assert error <= float(values[rank:].norm()) * (1 + 1e-6) + 1e-6 * float(values[0])
    torch.testing.assert_close(a @ a.mT, torch.eye(rank), atol=1e-5, rtol=0)
    again = low_rank_factors(matrix, rank)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
