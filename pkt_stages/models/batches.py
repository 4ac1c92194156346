"""Rows of token ids, or labels, of different length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Texts as one model reads them.

    Attributes:
        ids: token ids, by text.
        places: by text, which of its tokens are samples, in order; None: all.
    """

    ids: Sequence[list[int]]
    places: Sequence[list[int]] | None = None

    def some(self, texts: Sequence[int]) -> Batch:
        """These of the texts."""
        return Batch([self.ids[i] for i in texts], [self.places[i] for i in texts] if self.places is not None else None)

    def samples(self) -> Tensor:
        """Where in the padded rows the samples are: bool [text, longest]."""
        if self.places is None:
            return padding_mask(self.ids).bool()
        found = torch.zeros(len(self.ids), max(map(len, self.ids)), dtype=torch.bool)
        for row, places in zip(found, self.places, strict=True):
            row[places] = True
        return found


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tensor:
    """The rows as one tensor [row, longest], filled up on the right or left."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*g, *r] if left else [*r, *g] for g, r in zip(gaps, rows, strict=True)])


def padding_mask(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """1 where `padded` puts a row's own values, 0 where it fills up: [row, longest]."""
    return padded([[1] * len(row) for row in rows], 0, left=left)
