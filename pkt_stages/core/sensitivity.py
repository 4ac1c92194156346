"""Where the source's sensitivity lies densest (Zhong et al. 2023; paper appendix B.2; METHODS section 5)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def submatrix_sums(scores: Float[Tensor, "rows columns"], shape: tuple[int, int]) -> Float[Tensor, "down right"]:
    """Sum of the contiguous sub-matrix of `shape` at every placement, float64, from a summed-area table.

    Raises:
        ValueError: the scores are smaller than the sub-matrix on a side.
    """
    height, width = shape
    if height > scores.shape[0] or width > scores.shape[1]:
        raise ValueError(f"no {height}x{width} sub-matrix in a {scores.shape[0]}x{scores.shape[1]} matrix")
    # Along one side after the other: the table of the rows' windows is smaller than the whole one.
    return _windows(_windows(scores.double(), height).mT, width).mT.contiguous()


def _windows(values: Float[Tensor, "n m"], length: int) -> Float[Tensor, "windows m"]:
    """Sums of every `length` consecutive rows."""
    table = torch.zeros(values.shape[0] + 1, values.shape[1], dtype=values.dtype, device=values.device)
    torch.cumsum(values, 0, out=table[1:])
    return table[length:] - table[:-length]


def evenly_spaced(count: int, among: int) -> Int64[Tensor, " count"]:
    """Which of `among` a smaller dimension of `count` takes (weight selection, 2311.18823).

    Multiples of the ratio if it is a whole number, so that the last one is not reached; else evenly from the first to
    the last, rounded half to even after float32 arithmetic, as published.

    Raises:
        ValueError: there are fewer.
    """
    if count > among:
        raise ValueError(f"{count} wanted, there are {among}")
    if among % count == 0:
        return torch.arange(count) * (among // count)
    return torch.linspace(0, among - 1, count).round().long()


def top_layers(sensitivity: Float[Tensor, " source_layer"], count: int) -> Int64[Tensor, " count"]:
    """The `count` most sensitive layers in depth order; of equal ones the earlier.

    Raises:
        ValueError: there are fewer layers.
    """
    if count > len(sensitivity):
        raise ValueError(f"{count} layers wanted, there are {len(sensitivity)}")
    return sensitivity.sort(descending=True, stable=True).indices[:count].sort().values
