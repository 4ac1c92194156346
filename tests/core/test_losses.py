from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core import losses as core
from pkt_stages.core.hypernetwork import Hypernetwork, draw_weights

SITES = ("up_proj", "down_proj", "v_proj", "o_proj")


def test_penalty_agrees_with_the_published_code(golden: Path) -> None:
    fixture = load_file(golden / "laten" / "C_extract_translate_inject.safetensors")
    found = core.mean_square({name: fixture[f"translated.big.{name}"] for name in SITES})
    recorded = 0.0100568737834692 + 0.00998854823410511 + 0.011989493854343891 + 0.013516913168132305
    assert float(found) == pytest.approx(recorded, rel=1e-6)


def test_an_examples_loss_is_the_mean_over_its_supervised_tokens() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 1, -100], [2, 0, 4, 1]])
    log_p = logits.log_softmax(-1)
    expected = [
        -(log_p[0, 0, 3] + log_p[0, 1, 1]) / 2,
        -(log_p[1, 0, 0] + log_p[1, 1, 4] + log_p[1, 2, 1]) / 3,
    ]
    assert core.token_mean_loss(logits, labels).tolist() == pytest.approx([float(e) for e in expected])


class Counted(Hypernetwork):
    """Counts how often it is evaluated."""

    calls = 0

    def forward(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return super().forward(rows)


def problem() -> tuple[Counted, dict[str, Tensor], Tensor]:
    """A toy step: the loss of example i is the mean of (delta * direction_i)^3 over all entries of both sites."""
    generator = torch.Generator().manual_seed(3)
    network = Counted(["a", "b"], d_source=5, d_hidden=6, d_target=4)
    draw_weights(network, std=0.5, generator=generator)
    rows = {"a": torch.randn(2, 3, 5, generator=generator), "b": torch.randn(2, 2, 5, generator=generator)}
    return network, rows, torch.randn(7, 4, generator=generator)


def losses(direction: Tensor) -> core.MicroBatchLoss:
    return lambda delta: sum((delta[s].flatten(0, 1) @ direction.mT).pow(3).mean(0) for s in ("a", "b"))  # type: ignore


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("split", [[7], [1] * 7, [4, 3]])
def test_gradients_equal_the_plain_objectives_whatever_the_micro_batches(reduction: str, split: list[int]) -> None:
    network, rows, directions = problem()
    parts = [losses(part) for part in directions.split(split)]
    found = core.backward(network, rows, parts, penalty_weight=10.0, reduction=reduction)

    deltas = network(rows)
    lm, square = losses(directions)(deltas), sum(d.square().mean() for d in deltas.values())
    objective = lm.mean() + 10 * square if reduction == "mean" else (lm + 10 * square).sum()
    expected = torch.autograd.grad(objective, list(network.parameters()))
    for weight, gradient in zip(network.parameters(), expected, strict=True):
        assert weight.grad is not None
        assert float((weight.grad.double() - gradient.double()).norm() / gradient.double().norm()) < 1e-6
    assert found.objective == pytest.approx(float(objective.detach()), rel=1e-5)
    assert found.mean_square == pytest.approx(float(square.detach()), rel=1e-5)
    assert found.per_example.tolist() == pytest.approx(lm.tolist(), rel=1e-4)


def test_gradients_do_not_add_up_over_steps() -> None:
    network, rows, directions = problem()
    gradients = []
    for _ in range(2):
        core.backward(network, rows, [losses(directions)], penalty_weight=1.0, reduction="mean")
        gradients.append([weight.grad.clone() for weight in network.parameters() if weight.grad is not None])
    assert len(gradients[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_mapping_runs_once_per_step() -> None:
    network, rows, directions = problem()
    core.backward(network, rows, [losses(d) for d in directions.split(1)], penalty_weight=1.0, reduction="mean")
    assert network.calls == 1


def test_bad_arguments() -> None:
    network, rows, directions = problem()
    with pytest.raises(ValueError, match="reduction must be mean or sum, found 'max'"):
        core.backward(network, rows, [losses(directions)], penalty_weight=1.0, reduction="max")
    with pytest.raises(ValueError, match="a step needs at least one example"):
        core.backward(network, rows, [], penalty_weight=1.0, reduction="mean")


def test_range_of_values() -> None:
    found = core.value_range(torch.tensor([[-3.0, 0.0], [4.0, 0.0]]))
    assert found == {"min": -3.0, "max": 4.0, "rms": 2.5}
