"""Seeking's sub-matrices: which part of the source's weights the target's take, and reading them (appendix B.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.artifacts import Artifact
from pkt_stages.core.sensitivity import evenly_spaced, submatrix_sums
from pkt_stages.errors import UserError
from pkt_stages.models.load import is_same
from pkt_stages.models.recipe import Block
from pkt_stages.models.sites import Geometry, module_name
from pkt_stages.progress import track

UNLAYERED = ("embedding", "head")


@dataclass(frozen=True)
class Submatrix:
    """Where one weight of the target comes from.

    Attributes:
        weight, layer: of the target; 0 for embedding and head.
        name: the source's parameter.
        corner: row and column of the source's weight where the sub-matrix begins.
        share: part of the weight's sensitivity that lies in the sub-matrix, 0 .. 1.
        margin: (best - second best placement) / best; 0 is a tie.
    """

    weight: str
    layer: int
    name: str
    corner: tuple[int, int]
    share: float
    margin: float


def densest(
    sums: Mapping[str, Tensor], layers: Sequence[int], weights: Sequence[str], target: Geometry
) -> list[Submatrix]:
    """For every weight of the target the sub-matrix of its shape with the largest sensitivity; of equal ones the first.

    Args:
        sums: sensitivity of the source's parameters by name.
        layers: the source layer of each of the target's.
    """
    places = [(w, *place) for w in weights for place in enumerate(layers[:1] if w in UNLAYERED else layers)]
    found = []
    for weight, place, layer in track(places, "sub-matrices"):
        name = f"{module_name(weight, layer)}.weight"
        placements = submatrix_sums(sums[name], target.weight_shape(weight))
        best = placements.flatten().topk(min(2, placements.numel())).values.tolist()
        corner = divmod(int(placements.argmax()), placements.shape[1])
        total = float(sums[name].double().sum())
        margin = (best[0] - best[1]) / best[0] if len(best) > 1 and best[0] > 0 else 0.0
        found.append(Submatrix(weight, place, name, corner, best[0] / total if total else 0.0, margin))
    return found


def other_block(
    block: str, part: Submatrix, shape: Sequence[int], size: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Rows and columns of a source's weight that stand beside the densest sub-matrix as a control.

    Args:
        block: `random`, a contiguous one at a random place; `uniform`, evenly spaced rows and columns.
        part: the densest, which says whose weight it is.
        shape: of the source's weight; `size`: of the target's.
        seed: of the place, another one for every weight.
    """
    if block == "uniform":
        return evenly_spaced(size[0], shape[0]), evenly_spaced(size[1], shape[1])
    digest = hashlib.sha256(f"{seed}|{part.name}|{part.layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    row, column = (int(torch.randint(n - m + 1, (), generator=generator)) for n, m in zip(shape, size, strict=True))
    return torch.arange(row, row + size[0]), torch.arange(column, column + size[1])


def check_sizes(source: Geometry, target: Geometry, weights: Sequence[str]) -> None:
    """Raise UserError unless every weight of the target fits into the source's."""
    if source.num_layers < target.num_layers:
        raise UserError(
            f"the source has {source.num_layers} layers, the target {target.num_layers}; Seeking needs as many"
        )
    for weight in weights:
        large, small = source.weight_shape(weight), target.weight_shape(weight)
        if weight in UNLAYERED and large[0] != small[0]:
            raise UserError(f"{weight}: vocabularies of {large[0]} and {small[0]} tokens; use sites paper")
        if large[0] < small[0] or large[1] < small[1]:
            raise UserError(
                f"{weight}: the source's {large[0]}x{large[1]} holds no sub-matrix of the target's"
                f" {small[0]}x{small[1]}; swap the two if that was not meant"
            )


def read_submatrices(
    found: Artifact, target: Mapping[str, Any], model: str, block: Block = "sensitive"
) -> dict[str, Tensor]:
    """The tensors of a `submatrices` artifact by the module of the target that they belong to.

    Raises:
        UserError: they were made for another target, or hold no such blocks.
    """
    made_for = found.meta.get("target", {}).get("model", {})
    if not is_same(made_for, target):
        raise UserError(
            f"{found.path}: made for the target {made_for.get('name')} at {made_for.get('revision')},"
            f" found {model} at {target['revision']}; run `pkt seek` for this target"
        )
    kind = "submatrix" if block == "sensitive" else block
    submatrices = {}
    for name in found.shapes:
        if (match := re.fullmatch(rf"(\w+)\.{kind}\.(\d+)", name)) is not None:
            submatrices[module_name(match[1], int(match[2]))] = found[name]
    if not submatrices:
        raise UserError(f"{found.path}: holds no {block} blocks; run `pkt seek` with more_blocks: [{block}]")
    return submatrices
