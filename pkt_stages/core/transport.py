"""Carrying a change of weights from one model to another, through maps between what the two compute (METHODS 11).

Rows of activations are the same tokens in both models. With T_in [in_s, in_t] and T_out [out_s, out_t] from the
source's coordinates to the target's, a change dW_s [out_s, in_s] becomes dW_t = T_out^T dW_s T_in. Orthogonal maps
solve Procrustes' problem: the polar factor of the cross-covariance C = A^T B (Schönemann 1966; Theseus, 2602.12952).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

TOLERANCE = 1e-9
EPSILON = 1e-6


@dataclass(frozen=True)
class Polar:
    """An orthogonal map between two spaces, as far as the data determine it.

    Attributes:
        map: U V^T [d_s, d_t] over the `rank` largest singular values; orthonormal columns (d_s >= d_t) or rows at full
            rank. Without full rank the rest of the map is zero, where any other choice would be arbitrary.
        rank: singular values above the tolerance.
        full_rank: min(d_s, d_t).
    """

    map: Float64[Tensor, "d_s d_t"]
    rank: int
    full_rank: int


def polar(cross: Float[Tensor, "d_s d_t"], tolerance: float = TOLERANCE) -> Polar:
    """The polar factor of a cross-covariance, the orthogonal map that brings the source's activations nearest.

    Args:
        cross: A^T B, source by target.
        tolerance: singular values up to this share of the largest are rounding.
    """
    u, values, vh = torch.linalg.svd(cross.double(), full_matrices=False)
    kept = values > tolerance * values[0]
    return Polar(u[:, kept] @ vh[kept], int(kept.sum()), len(values))


def singular_map(
    source: Float[Tensor, "out_s in_s"],
    target: Float[Tensor, "out_t in_t"],
    rank: int | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Polar, Polar]:
    """From the i-th singular vectors of one weight to another's: U_s U_t^T and V_s V_t^T (Cross-LoRA, 2508.05232).

    A pair of singular vectors has no sign of its own; here the right one's entries have cubes with a sum above 0.

    Args:
        rank: leading pairs that are taken; by default all that both have.
        tolerance: singular values up to this share of a weight's largest are rounding.
    """
    sides, ranks = [], []
    for weight in (source, target):
        u, values, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        signs = torch.where(vh.pow(3).sum(1) < 0, -1.0, 1.0).double()
        sides.append((u * signs, vh * signs[:, None]))
        ranks.append(int((values > tolerance * values[0]).sum()))
    full = min(len(vh) for _, vh in sides)
    kept = min(*ranks, full if rank is None else rank)
    (u_s, vh_s), (u_t, vh_t) = sides
    return (
        Polar(u_s[:, :kept] @ u_t[:, :kept].mT, kept, full),
        Polar(vh_s[:kept].mT @ vh_t[:kept], kept, full),
    )


def ridge(gram: Float[Tensor, "n n"], cross: Float[Tensor, "n d"], penalty: float) -> Float64[Tensor, "n d"]:
    """(H^T H + l I)^-1 H^T Y from the products, l being `penalty` times the mean of H^T H's diagonal."""
    shift = penalty * gram.double().diagonal().mean()
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.linalg.solve(gram.double() + shift * identity, cross.double())


def masked(delta: Float[Tensor, "*shape"], descent: Float[Tensor, "*shape"], mode: str) -> Float[Tensor, "*shape"]:
    """Of a change only what goes downhill (GradFix, 2510.09658).

    Args:
        descent: sign of minus the loss's gradient; 0 where there is none, which keeps nothing.
        mode: `keep` drops entries of another sign; `force` gives all of them that sign.
    """
    if mode == "force":
        return delta.abs() * descent
    if mode == "keep":
        return torch.where(delta.sign() == descent, delta, 0.0)
    raise ValueError(f"mode must be keep or force, found {mode!r}")


def centred(
    cross: Float[Tensor, "d_s d_t"], first: Float[Tensor, " d_s"], second: Float[Tensor, " d_t"], count: int
) -> Float64[Tensor, "d_s d_t"]:
    """Sums of products of centred activations, from the sums of products and of either side over `count` rows."""
    return cross.double() - torch.outer(first.double(), second.double()) / count


def whitened(
    cross: Float[Tensor, "d_s d_t"],
    gram_source: Float[Tensor, "d_s d_s"],
    gram_target: Float[Tensor, "d_t d_t"],
    power: float,
    *,
    relative: bool = False,
) -> Float64[Tensor, "d_s d_t"]:
    """(A^T A)^-p C (B^T B)^-p; p in 0 .. 0.5.

    Args:
        relative: eigenvalues are floored at `EPSILON` times their mean; else at `EPSILON` itself as in Theseus' and
            BiCo's code, which leaves nothing of whitening where the values are that small, as gradients are.
    """
    if power == 0:
        return cross.double()
    return _power(gram_source, -power, relative) @ cross.double() @ _power(gram_target, -power, relative)


def _power(gram: Tensor, exponent: float, relative: bool) -> Tensor:
    gram = gram.double()
    floor = EPSILON * (float(gram.diagonal().mean()) if relative else 1.0)
    values, vectors = torch.linalg.eigh(gram + floor * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return (vectors * values.clamp(min=floor) ** exponent) @ vectors.mT


def head_map(
    cross: Float[Tensor, "n_s n_t"], heads: Sequence[Sequence[int]], num_source_heads: int, tolerance: float = TOLERANCE
) -> Polar:
    """One orthogonal map per target head, from the heads of the source that it is paired with; zero elsewhere.

    Args:
        cross: A^T B of the heads' outputs, head by head.
        heads: by target head the source heads; of several the blocks of `cross` are added and all get the same map, so
            that a change of the target's head is the sum of theirs (Theseus with GQA).

    Returns:
        the whole map; its ranks are sums over the target's heads.
    """
    blocks = cross.double().unflatten(1, (len(heads), -1)).unflatten(0, (num_source_heads, -1))
    made = torch.zeros_like(blocks)
    rank = full = 0
    for target, paired in enumerate(heads):
        if not paired:
            continue
        found = polar(torch.stack([blocks[source, :, target] for source in paired]).sum(0), tolerance)
        for source in paired:
            made[source, :, target] = found.map
        rank, full = rank + found.rank, full + found.full_rank
    return Polar(made.flatten(2).flatten(0, 1), rank, full)


def random_isometry(d_source: int, d_target: int, generator: Generator) -> Float64[Tensor, "d_s d_t"]:
    """A random map with orthonormal columns or rows, whichever are fewer; the control of a fitted one."""
    tall = torch.randn(max(d_source, d_target), min(d_source, d_target), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    return q if d_source >= d_target else q.mT


def correlation(
    cross: Float[Tensor, "d_s d_t"],
    sums: tuple[Float[Tensor, " d_s"], Float[Tensor, " d_t"]],
    squares: tuple[Float[Tensor, " d_s"], Float[Tensor, " d_t"]],
    count: int,
) -> Float64[Tensor, "d_s d_t"]:
    """Pearson's correlation of every source unit with every target unit; 0 where one does not vary.

    Args:
        cross: sums of products over `count` rows; `sums` and `squares`: of either side's values and their squares.
    """
    variances = [square.double() - total.double() ** 2 / count for total, square in zip(sums, squares, strict=True)]
    # What is left of a constant is rounding.
    scales = [
        torch.where(variance > 1e-12 * square.double(), variance, torch.inf).rsqrt()
        for variance, square in zip(variances, squares, strict=True)
    ]
    return centred(cross, *sums, count) * scales[0][:, None] * scales[1]


def procrustes_residual(
    cross: Float[Tensor, "d_s d_t"],
    sums: tuple[Float[Tensor, " d_s"], Float[Tensor, " d_t"]],
    squares: tuple[Float[Tensor, " d_s"], Float[Tensor, " d_t"]],
    count: int,
) -> float:
    """What the best rotation leaves of the distance between two sets of activations, 0 (equal) .. 1 (unrelated).

    ||s A T - B|| / ||B|| for centred A [token, d_s] and B [token, d_t], the narrower padded with zeros, with the
    orthogonal T and the scale s that make it least: sqrt(1 - (||A^T B||_* / (||A|| ||B||))^2), the nuclear norm being
    the sum of singular values (Schönemann 1966; as a distance of networks Ding et al. 2021).

    Args:
        as of `correlation`.

    Raises:
        ValueError: one side does not vary.
    """
    norms = [
        float(square.double().sum() - total.double().square().sum() / count)
        for total, square in zip(sums, squares, strict=True)
    ]
    if not min(norms) > 0:
        raise ValueError("activations that do not vary have no Procrustes residual")
    alike = float(torch.linalg.svdvals(centred(cross, *sums, count)).sum()) / (norms[0] * norms[1]) ** 0.5
    return max(0.0, 1 - alike**2) ** 0.5


def assignment(similarity: Float[Tensor, "n_s n_t"]) -> Tensor:
    """By target unit the source unit of the one-to-one pairing with the largest sum; -1 for targets left over."""
    from scipy.optimize import linear_sum_assignment

    sources, targets = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    found = torch.full((similarity.shape[1],), -1, dtype=torch.int64)
    found[torch.from_numpy(targets)] = torch.from_numpy(sources)
    return found


def head_likeness(
    cross: Float[Tensor, "n_s n_t"],
    sums: tuple[Float[Tensor, " n_s"], Float[Tensor, " n_t"]],
    grams: tuple[Float[Tensor, "h_s d d"], Float[Tensor, "h_t d_t d_t"]],
    count: int,
) -> Float64[Tensor, "h_s h_t"]:
    """Linear CKA of the outputs of every head of the source and of the target; 0 for a head without output.

    Args:
        cross: sums of products over `count` rows, head by head; `sums`: of either side's values; `grams`: of the
            products inside each head.
    """
    blocks = centred(cross, *sums, count).unflatten(1, (len(grams[1]), -1)).unflatten(0, (len(grams[0]), -1))
    shared = blocks.square().sum((1, 3))
    own = []
    for gram, total in zip(grams, sums, strict=True):
        means = total.double().unflatten(0, (len(gram), -1))
        own.append((gram.double() - means[:, :, None] * means[:, None, :] / count).square().sum((1, 2)).sqrt())
    scale = own[0][:, None] * own[1]
    return torch.where(scale > 0, shared / torch.where(scale > 0, scale, 1.0), 0.0)


def matched_heads(likeness: Float[Tensor, "h_s h_t"], num_source_kv: int, num_target_kv: int) -> Tensor:
    """By target head its source head, -1 for none: groups that share keys and values are matched as wholes.

    Args:
        num_source_kv, num_target_kv: key/value heads.
    """
    groups = likeness.unflatten(1, (num_target_kv, -1)).unflatten(0, (num_source_kv, -1))
    inside = torch.empty(num_source_kv, num_target_kv, groups.shape[3], dtype=torch.int64)
    total = torch.empty(inside.shape[:2], dtype=torch.float64)
    for s in range(inside.shape[0]):
        for t in range(inside.shape[1]):
            inside[s, t] = assignment(groups[s, :, t])
            kept = inside[s, t] >= 0
            total[s, t] = groups[s, inside[s, t][kept], t, kept.nonzero().flatten()].sum()
    found = torch.full((num_target_kv, groups.shape[3]), -1)
    for t, s in enumerate(assignment(total).tolist()):
        if s >= 0:
            found[t] = torch.where(inside[s, t] >= 0, s * groups.shape[1] + inside[s, t], -1)
    return found.flatten()


def proportional_pairs(num_source: int, num_target: int) -> list[tuple[int, int]]:
    """(source, target) layers at the same share of the depth, one for each target layer; halves go to the even."""
    if num_target == 1:
        return [(0, 0)]
    # The ratio first, as in Theseus' code: its rounding decides some halves.
    ratio = (num_source - 1) / (num_target - 1)
    return [(round(target * ratio), target) for target in range(num_target)]


def order_preserving_pairs(similarity: Float[Tensor, "l_s l_t"]) -> list[tuple[int, int]]:
    """(source, target) layers, both rising, as many as the shallower model has, with the largest sum of similarity.

    A dynamic programme; of equal sums the one with the earliest partners.
    """
    table = similarity.double().tolist()
    swapped = len(table) < len(table[0])
    if swapped:
        table = [list(column) for column in zip(*table, strict=True)]
    many, few = len(table), len(table[0])
    # best[i][j]: of the last few - j of the shallower model with the last many - i of the deeper one.
    best = [[0.0 if j == few else float("-inf") for j in range(few + 1)] for _ in range(many + 1)]
    for i in range(many - 1, -1, -1):
        for j in range(few - 1, -1, -1):
            best[i][j] = max(best[i + 1][j], table[i][j] + best[i + 1][j + 1])
    pairs, i = [], 0
    for j in range(few):
        while best[i][j] > table[i][j] + best[i + 1][j + 1]:
            i += 1
        pairs.append((j, i) if swapped else (i, j))
        i += 1
    return pairs
