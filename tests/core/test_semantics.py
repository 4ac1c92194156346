from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pkt_stages.core.semantics import away_from, away_from_label, basis_map, inverse_gram, layer_pairs


def head(num_tokens: int, d: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(weight: Tensor) -> Tensor:
    """S [d, token], one column at a time."""
    columns = torch.linalg.pinv(weight).mT
    return torch.stack([column / column.square().sum().sqrt() for column in columns], dim=1)


def test_the_map_of_a_head_worked_by_hand() -> None:
    """W^T W = [[2, 1], [1, 2]]; columns of pinv(W) along (2, -1), (-1, 2) and (1, 1)."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found, ranks = basis_map(weight, weight)
    assert found.dtype == torch.float64 and ranks == {"source": 2, "target": 2}
    torch.testing.assert_close(found, torch.tensor([[1.5, -0.3], [-0.3, 1.5]], dtype=torch.float64))


@pytest.mark.parametrize("num_tokens", [40, 5000])  # the second is more than is read at a time
def test_the_map_is_decomposition_and_recomposition(num_tokens: int) -> None:
    """Equations 1 and 2 token by token: cosines with the source's directions, then the target's with these weights."""
    source, target, order = head(num_tokens, 7, 0), head(num_tokens, 5, 1), torch.randperm(num_tokens)
    h = torch.randn(7, dtype=torch.float64)
    for given in (None, order):
        meant = source if given is None else source[given]
        weights = [float(column @ h) / float(h.norm()) for column in basis(meant).mT]
        expected = sum(w * column for w, column in zip(weights, basis(target).mT, strict=True))
        found, _ = basis_map(source, target, given)
        torch.testing.assert_close(found @ h / h.norm(), expected, rtol=1e-9, atol=1e-9)


def test_a_rotated_and_widened_source_means_the_same() -> None:
    """W E with E E^T = I has rank d in d' dimensions: the pseudoinverse leaves the rest out, the map undoes E."""
    source, target = head(50, 6, 0), head(50, 4, 1)
    rotation = torch.linalg.qr(head(9, 9, 2))[0][:6]
    found, ranks = basis_map((source @ rotation).float(), target)
    assert ranks == {"source": 6, "target": 4}
    assert inverse_gram(source)[1] == 6
    torch.testing.assert_close(found, basis_map(source, target)[0] @ rotation, rtol=1e-5, atol=1e-5)


def test_where_directions_fill_the_space_evenly_a_model_teaches_itself_nothing() -> None:
    """S S^T = c I (here the axes, four times, of any length): a state is its own target, at the minimum."""
    axes = torch.cat([scale * torch.eye(5, dtype=torch.float64) for scale in (1.0, -1.0, 3.0, -3.0)])
    found, _ = basis_map(axes, axes)
    torch.testing.assert_close(found, 4 * torch.eye(5, dtype=torch.float64))
    states = head(8, 5, 3).requires_grad_()
    losses = away_from(states, states.detach() @ found.mT)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    assert float(losses.detach().abs().max()) < 1e-15 and float(gradient.abs().max()) < 1e-15
    # Elsewhere it does not: a state is drawn towards the directions that lie close together.
    crowded, _ = basis_map(weight := head(50, 5, 4) * torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64), weight)
    assert float(away_from(states.detach(), states.detach() @ crowded.mT).min()) > 1e-3


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_token_without_a_direction(side: str) -> None:
    heads = {"source": head(9, 4, 0), "target": head(9, 3, 1)}
    heads[side][6] = 0
    with pytest.raises(ValueError, match=rf"the {side}'s head has no direction for token 6 \(a row of zeros"):
        basis_map(heads["source"], heads["target"])


@pytest.mark.parametrize(
    ("scores", "num_target", "count", "by_depth", "pairs"),
    [
        # The paper's figure 3: the 20th of 20 layers leads to the 10th of 10.
        ([0.0] * 19 + [1.0], 10, 1, True, [(19, 9)]),
        # Counterparts of 2 layers in 4 are the 2nd and 4th; the 1st leads to a layer whose counterpart it is not.
        ([3.0, 0.0, 0.0, 1.0], 2, 1, True, [(1, 0)]),
        ([3.0, 0.0, 0.0, 1.0], 2, 1, False, [(0, 0)]),
        ([3.0, 0.0, 0.0, 1.0], 2, 2, True, [(1, 0), (3, 1)]),
        ([1.0, 3.0, 0.0, 2.0], 2, 3, False, [(1, 0), (3, 1)]),  # the 2nd and the 1st lead to one layer: the better one
        # 40 to 32: floor(1.25 k); the 5th has no counterpart of its own depth but k = 4.
        ([0.0] * 4 + [1.0] + [0.0] * 35, 32, 1, True, [(4, 3)]),
        ([0.0] * 3 + [1.0] + [0.0] * 36, 32, 1, True, [(4, 3)]),
        ([0.0] * 3 + [1.0] + [0.0] * 36, 32, 1, False, [(3, 3)]),
        # A target with more layers shares the source's.
        ([0.0, 1.0], 5, 2, True, [(0, 0), (1, 4)]),
        ([1.0, 1.0, 1.0], 3, 2, True, [(0, 0), (1, 1)]),  # a tie goes by depth
    ],
)
def test_layers_are_paired_by_depth(
    scores: list[float], num_target: int, count: int, by_depth: bool, pairs: list[tuple[int, int]]
) -> None:
    assert layer_pairs(scores, num_target, count, by_depth=by_depth) == pairs


def test_the_two_losses_by_hand() -> None:
    states = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    wanted = torch.tensor([[6.0, 8.0], [5.0, 0.0], [-2.0, 0.0]])
    torch.testing.assert_close(away_from(states, wanted), torch.tensor([0.0, 1.0, 2.0]))
    logits = torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 0.0]])
    torch.testing.assert_close(away_from_label(logits, torch.tensor([0, 1])), torch.tensor([0.4, 2.0]))


def test_their_gradients_are_the_formulas_own() -> None:
    """d(1 - cos)/dh = -(w/|w| - cos h/|h|) / |h|, a loop over positions."""
    states, wanted, labels = head(6, 5, 0).requires_grad_(), head(6, 5, 1), torch.tensor([0, 4, 2, 1, 1, 3])
    (towards,) = torch.autograd.grad(away_from(states, wanted).sum(), states)
    (labelled,) = torch.autograd.grad(away_from_label(states, labels).sum(), states)
    for i, h in enumerate(states.detach()):
        for found, w in ((towards, wanted[i]), (labelled, torch.eye(5, dtype=torch.float64)[labels[i]])):
            cosine = float(h @ w) / float(h.norm() * w.norm())
            torch.testing.assert_close(found[i], -(w / w.norm() - cosine * h / h.norm()) / h.norm())
