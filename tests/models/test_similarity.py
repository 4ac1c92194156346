from __future__ import annotations

import pytest
import torch

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.similarity import halves, similarities

MODULE = "model.layers.0.mlp.up_proj"


def adapter(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter({MODULE: (torch.randn(2, 5, generator=draw), torch.randn(7, 2, generator=draw))}, 6.0)


def test_an_adapter_comes_apart_as_it_was_put_together() -> None:
    ended, began = adapter(0), adapter(1)
    found = halves(ended.minus(began), 2)
    for expected, half in zip((ended, began), found, strict=True):
        assert half is not None and half.alpha == expected.alpha
        for one, other in zip(half.factors[MODULE], expected.factors[MODULE], strict=True):
            assert torch.equal(one, other)
    assert halves(ended, 2) == (ended, None)
    with pytest.raises(UserError) as error:
        halves(ended, 3)
    assert str(error.value) == "the adapter has rank 2; expected 3, or 6 with its start"


def test_an_adapter_without_a_site() -> None:
    with pytest.raises(UserError) as error:
        similarities(lambda name: torch.ones(7, 5), adapter(0), {}, rank=2, num_layers=1)
    missing = "model.layers.0.mlp.down_proj"
    assert str(error.value) == f"the adapter has nothing at {missing}; expected all of ffn_up, ffn_down, attn_v, attn_o"


def test_an_adapter_that_adds_nothing() -> None:
    nothing = Adapter({MODULE: (torch.ones(2, 5), torch.zeros(7, 2))}, 6.0)
    with pytest.raises(UserError) as error:
        similarities(lambda name: torch.ones(7, 5), nothing, {}, rank=2, num_layers=1)
    reason = "one of the matrices is zero, the cosine similarity is undefined"
    assert str(error.value) == f"{MODULE}, trained update against weight: {reason}"
