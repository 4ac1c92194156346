from __future__ import annotations

import pytest
import torch

from pkt_stages.core.selection import num_selected, pair_layers, ranked, top_neurons


def test_best_layers_in_depth_order() -> None:
    source = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    target = torch.tensor([[5.0, 1.0]])
    assert pair_layers(source, target).tolist() == [[[1, 0], [3, 1]]]


def test_a_shallower_source_meets_the_targets_best_layers() -> None:
    source = torch.tensor([[0.2, 0.1]])
    target = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert pair_layers(source, target).tolist() == [[[0, 1], [1, 3]]]


def test_layers_are_chosen_per_example() -> None:
    source = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    target = torch.zeros(2, 2)
    assert pair_layers(source, target)[..., 0].tolist() == [[0, 1], [1, 2]]


def test_ties_go_to_the_lower_index() -> None:
    assert ranked(torch.tensor([1.0, 2.0, 2.0, 1.0])).tolist() == [1, 2, 0, 3]
    assert pair_layers(torch.zeros(1, 5), torch.zeros(1, 2))[0, :, 0].tolist() == [0, 1]


def test_neurons_come_in_score_order_from_the_chosen_layers() -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0], [9.0, 7.0, 8.0]]])
    assert top_neurons(scores, torch.tensor([[1]]), 2).tolist() == [[[0, 2]]]
    assert top_neurons(scores, torch.tensor([[0, 1]]), 3).tolist() == [[[1, 2, 0], [0, 2, 1]]]


def test_more_neurons_than_there_are() -> None:
    with pytest.raises(ValueError, match="4 neurons wanted, a layer has 3"):
        top_neurons(torch.zeros(1, 1, 3), torch.tensor([[0]]), 4)


@pytest.mark.parametrize(
    ("rate", "size", "expected"), [(0.1, 160, 16), (0.1, 64, 6), (0.29, 100, 29), (1.0, 7, 7), (0.05, 10, 0)]
)
def test_share_of_neurons(rate: float, size: int, expected: int) -> None:
    assert num_selected(rate, size) == expected
