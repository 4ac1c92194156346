from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.inject import SparseDelta, injected
from pkt_stages.models.load import load_model, resolve, weights_hash
from tests.models.deltas import IDS, logits_of, random_delta


@pytest.fixture
def model(target_folder: Path) -> Any:
    return load_model(resolve(str(target_folder)))


def test_taking_out_is_bitwise(model: Any) -> None:
    before, plain = weights_hash(model.state_dict()), logits_of(model)
    with pytest.raises(RuntimeError, match="on the way"), injected(model, random_delta(model, k=20, scale=0.3)):  # noqa: PT012
        inside = logits_of(model)
        assert weights_hash(model.state_dict()) == before
        raise RuntimeError("on the way")
    assert not torch.equal(inside, plain)
    assert torch.equal(logits_of(model), plain)


def test_gradients_reach_the_rows_and_equal_finite_differences(model: Any) -> None:
    delta = random_delta(model, k=40, scale=0.1)
    model.double()

    def loss(rows: dict[str, Tensor]) -> Tensor:
        moved = {s: SparseDelta(p.layers, p.neurons, rows[s]) for s, p in delta.items()}
        with injected(model, moved):
            found: Tensor = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[0, -1, 5]
        return found

    rows = {site: part.rows.clone().requires_grad_() for site, part in delta.items()}
    loss(rows).backward()
    for site, part in rows.items():
        direction = torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-3
        with torch.no_grad():
            up, down = (loss({**rows, site: part + sign * step * direction}) for sign in (1, -1))
        assert float((part.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=2e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_passes_the_gradient_of_a_young_delta(target_folder: Path) -> None:
    """Deltas of 1e-9 are zero in float16; their gradient must not be."""
    exact = load_model(resolve(str(target_folder)), dtype="float32")
    half = load_model(resolve(str(target_folder)), dtype="float16")
    gradients = []
    for model in (exact, half):
        part = random_delta(exact, k=4, scale=1e-9)["ffn_up"]
        rows = part.rows.clone().requires_grad_()
        with injected(model, {"ffn_up": SparseDelta(part.layers, part.neurons, rows)}):
            model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[0, -1, 5].backward()
        gradients.append(rows.grad)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05


def test_an_unknown_site(model: Any) -> None:
    part = random_delta(model, k=4, scale=1.0)["ffn_up"]
    with (
        pytest.raises(UserError, match="unknown site 'ffn_gate'; expected one of ffn_up, ffn_down, attn_v, attn_o"),
        injected(model, {"ffn_gate": part}),
    ):
        raise AssertionError("not reached")
