"""A latent space's directions by token, and how vectors go from one model's space to another's along them (SemAlign v1,
arXiv 2510.24208; METHODS section 11).

A model's semantic basis is S [d, token], the unit-normed columns of the pseudoinverse of its head [token, d]: s_v is
the direction that means token v. A source's vector h becomes S_t S_s^T h / |h| (its equations 1 and 2): decomposed into
cosines with the source's directions, recomposed with the target's. That is one fixed linear map [d_target, d_source],
so neither bases nor coefficients are ever held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Singular values of a head up to this share of the largest are rounding: the pseudoinverse leaves their directions out.
TOLERANCE = 1e-5
_ROWS = 4096  # tokens at a time


def inverse_gram(head: Float[Tensor, "token d"]) -> tuple[Float[Tensor, "d d"], int]:
    """The pseudoinverse of W^T W, float64, and its rank; a token's column of pinv(W) is its row of W times that."""
    gram = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for rows in head.split(_ROWS):
        gram += rows.double().mT @ rows.double()
    values, vectors = torch.linalg.eigh(gram)
    kept = values > TOLERANCE**2 * values[-1]
    return vectors[:, kept] / values[kept] @ vectors[:, kept].mT, int(kept.sum())


def basis_map(
    source_head: Float[Tensor, "token d_source"],
    target_head: Float[Tensor, "token d_target"],
    order: Int[Tensor, " token"] | None = None,
) -> tuple[Float[Tensor, "d_target d_source"], dict[str, int]]:
    """S_t S_s^T, float64, summed over the tokens, and the rank of each side's head.

    Args:
        source_head, target_head: of the same tokens in the same order.
        order: the source's token whose direction stands for each; a permutation takes the meaning away and leaves the
            rest.

    Raises:
        ValueError: a token without a direction (its row is zero).
    """
    (theirs, source_rank), (ours, target_rank) = inverse_gram(source_head), inverse_gram(target_head)
    tokens = torch.arange(len(source_head), device=source_head.device)
    order = tokens if order is None else order
    total = torch.zeros(target_head.shape[1], source_head.shape[1], dtype=torch.float64, device=source_head.device)
    for here in tokens.split(_ROWS):
        there = order[here]
        columns = _units(target_head[here].double() @ ours, here, "target")
        total += columns.mT @ _units(source_head[there].double() @ theirs, there, "source")
    return total, {"source": source_rank, "target": target_rank}


def _units(rows: Tensor, tokens: Tensor, side: str) -> Tensor:
    norms = rows.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        token = int(tokens[int((~(norms > 0)).flatten().nonzero()[0])])
        raise ValueError(f"the {side}'s head has no direction for token {token} (a row of zeros, or not finite)")
    return rows / norms


def layer_pairs(
    scores: Sequence[float], num_target_layers: int, count: int, *, by_depth: bool = True
) -> list[tuple[int, int]]:
    """Pairs (source layer, target layer), from 0 and by depth, of the source's `count` highest-scored layers (4.1).

    Target layer k of L_t has the counterpart max(1, floor(k L_s / L_t)) in the source, both counted from 1. A layer of
    the source leads to the first target layer whose counterpart lies as deep or deeper. Equal scores go by depth;
    layers that lead to the same one of the target are one pair.

    Args:
        by_depth: pair the target's layer with its counterpart, as the paper does; else with the layer that led to it
            (of several the highest-scored), which differs where counterparts skip that layer.
    """
    num = len(scores)
    counterparts = [max(1, num * k // num_target_layers) - 1 for k in range(1, num_target_layers + 1)]
    found: dict[int, int] = {}
    for layer in sorted(range(num), key=lambda layer: (-scores[layer], layer))[:count]:
        target = next(k for k, counterpart in enumerate(counterparts) if counterpart >= layer)
        found.setdefault(target, counterparts[target] if by_depth else layer)
    return [(found[target], target) for target in sorted(found)]


def away_from(states: Float[Tensor, "position d"], wanted: Float[Tensor, "position d"]) -> Float[Tensor, " position"]:
    """1 - cos(state, wanted), 0 .. 2 (4.3, L_layer before its mean)."""
    return 1 - torch.nn.functional.cosine_similarity(states, wanted, dim=-1)


def away_from_label(
    logits: Float[Tensor, "position vocab"], labels: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """1 - cos(logits, the label's one-hot vector) = 1 - z_label / |z|, 0 .. 2 (4.3, L_out before its mean)."""
    return 1 - logits.gather(-1, labels[:, None])[:, 0] / logits.norm(dim=-1)
