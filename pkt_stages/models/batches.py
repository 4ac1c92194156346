"""Rows of token ids, or labels, of different length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tensor:
    """The rows as one tensor [row, longest], filled up on the right or left."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*g, *r] if left else [*r, *g] for g, r in zip(gaps, rows, strict=True)])


def padding_mask(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """1 where `padded` puts a row's own values, 0 where it fills up: [row, longest]."""
    return padded([[1] * len(row) for row in rows], 0, left=left)
