"""Low-rank factors of a matrix, as LoRA holds them (METHODS section 5)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor


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
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (sign * vh).float(), (u * s * sign.mT).float()
