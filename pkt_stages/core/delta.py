"""Low-rank factors of a matrix, as LoRA holds them (METHODS section 5)."""

from __future__ import annotations

import numpy
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

# Up to one singular vector in so many, Lanczos is faster than the whole decomposition.
SMALL_RANK = 8


def low_rank_factors(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float32[Tensor, "rank in"], Float32[Tensor, "out rank"]]:
    """A = V_r^T and B = U_r S_r of the singular value decomposition: B A is the best approximation of that rank.

    The signs of singular vectors are arbitrary; each row of A has its entry of largest size positive.

    Raises:
        ValueError: the rank is below 1 or above the matrix's smaller side.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} of a {matrix.shape[0]}x{matrix.shape[1]} matrix; use 1 to {min(matrix.shape)}")
    u, s, vh = _leading(matrix.double(), rank)
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (sign * vh).float(), (u * s * sign.mT).float()


def _leading(matrix: Float64[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular vectors and values: U [out, rank], S [rank], V^T [rank, in].

    For a few of many, Lanczos finds the leading eigenvectors of the Gram matrix of the smaller side; projected onto
    them the matrix is thin, and its decomposition is exact. Squaring costs (s_1 / s_rank)^2 of float64's 1e-16. Where
    Lanczos fails (a zero matrix, say) the whole decomposition is taken.
    """
    if SMALL_RANK * rank >= min(matrix.shape):
        return _decomposed(matrix, rank)
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh = _leading(matrix.mT, rank)
        return uh.mT, s, v.mT
    from scipy.sparse.linalg import ArpackError, eigsh

    gram = (matrix @ matrix.mT).cpu().numpy()
    # Fixed, for equal bytes: of a matrix of low rank, or of equal singular values, it draws further vectors.
    draws = numpy.random.default_rng(0)
    try:
        found = eigsh(gram, k=rank, v0=draws.standard_normal(len(gram)), rng=draws)[1]
    except ArpackError:
        return _decomposed(matrix, rank)
    basis = torch.linalg.qr(torch.from_numpy(found).to(matrix.device)).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _decomposed(matrix: Float64[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
