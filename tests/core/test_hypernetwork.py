from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core import hypernetwork as core
from pkt_stages.core.schedule import Rates, draw_examples, rates

SITE_OF = {"up_proj": "ffn_up", "down_proj": "ffn_down", "v_proj": "attn_v", "o_proj": "attn_o"}
COLUMNS = ("down_proj", "o_proj")


def as_rows(name: str, knowledge: Tensor) -> Tensor:
    return knowledge.mT if name in COLUMNS else knowledge


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("size", ["small", "big"])
def test_forward_agrees_with_the_published_code(golden: Path, size: str) -> None:
    fixture = load_file(golden / "laten" / "C_extract_translate_inject.safetensors")
    for name, site in SITE_OF.items():
        weights = {
            f"{site}.{place}.weight": fixture[f"translator.{size}.network.{name}.{place}.weight"] for place in (0, 2)
        }
        rows = {site: as_rows(name, fixture[f"teacher_knowledge.{name}"])}
        mapped = core.forward(weights, rows)[site]
        assert relative(mapped, as_rows(name, fixture[f"translated.{size}.{name}"])) < 1e-6


def test_penalty_agrees_with_the_published_code(golden: Path) -> None:
    fixture = load_file(golden / "laten" / "C_extract_translate_inject.safetensors")
    found = core.mean_square({name: fixture[f"translated.big.{name}"] for name in SITE_OF})
    recorded = 0.0100568737834692 + 0.00998854823410511 + 0.011989493854343891 + 0.013516913168132305
    assert float(found) == pytest.approx(recorded, rel=1e-6)


def test_forward_by_hand() -> None:
    weights = {"ffn_up.0.weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "ffn_up.2.weight": torch.eye(2) * 3}
    mapped = core.forward(weights, {"ffn_up": torch.tensor([[[2.0, 5.0], [-1.0, -4.0]]])})
    assert mapped["ffn_up"].tolist() == [[[6.0, 0.0], [0.0, 12.0]]]


def test_initial_weights_are_seeded_normal_and_small() -> None:
    def made(seed: int) -> core.Weights:
        generator = torch.Generator().manual_seed(seed)
        return core.init_weights(["a", "b"], d_source=60, d_hidden=50, d_target=40, std=1e-5, generator=generator)

    first, again, other = made(0), made(0), made(1)
    assert {name: tuple(w.shape) for name, w in first.items()} == {
        "a.0.weight": (50, 60),
        "a.2.weight": (40, 50),
        "b.0.weight": (50, 60),
        "b.2.weight": (40, 50),
    }
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    everything = torch.cat([w.flatten() for w in first.values()])
    assert everything.dtype == torch.float32
    assert float(everything.std()) == pytest.approx(1e-5, rel=0.03)


def test_an_examples_loss_is_the_mean_over_its_supervised_tokens() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, 1, -100], [2, 0, 4, 1]])
    log_p = logits.log_softmax(-1)
    expected = [
        -(log_p[0, 0, 3] + log_p[0, 1, 1]) / 2,
        -(log_p[1, 0, 0] + log_p[1, 1, 4] + log_p[1, 2, 1]) / 3,
    ]
    assert core.token_mean_loss(logits, labels).tolist() == pytest.approx([float(e) for e in expected])


def problem() -> tuple[core.Weights, dict[str, Tensor], Tensor]:
    """A toy step: the loss of example i is the mean of (delta * direction_i)^3 over all entries of both sites."""
    generator = torch.Generator().manual_seed(3)
    weights = core.init_weights(["a", "b"], d_source=5, d_hidden=6, d_target=4, std=0.5, generator=generator)
    rows = {"a": torch.randn(2, 3, 5, generator=generator), "b": torch.randn(2, 2, 5, generator=generator)}
    return weights, rows, torch.randn(7, 4, generator=generator)


def losses(direction: Tensor) -> core.MicroBatchLoss:
    return lambda delta: sum((delta[s].flatten(0, 1) @ direction.mT).pow(3).mean(0) for s in ("a", "b"))  # type: ignore


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("split", [[7], [1] * 7, [4, 3]])
def test_gradients_equal_the_plain_objectives_whatever_the_micro_batches(reduction: str, split: list[int]) -> None:
    weights, rows, directions = problem()
    for weight in weights.values():
        weight.requires_grad_()
    parts = [losses(part) for part in directions.split(split)]
    found = core.backward(weights, rows, parts, penalty_weight=10.0, reduction=reduction)

    deltas = core.forward(weights, rows)
    lm, square = losses(directions)(deltas), sum(d.square().mean() for d in deltas.values())
    objective = lm.mean() + 10 * square if reduction == "mean" else (lm + 10 * square).sum()
    expected = torch.autograd.grad(objective, list(weights.values()))
    for weight, gradient in zip(weights.values(), expected, strict=True):
        assert relative(weight.grad, gradient) < 1e-6
    assert found.objective == pytest.approx(float(objective.detach()), rel=1e-5)
    assert found.mean_square == pytest.approx(float(square.detach()), rel=1e-5)
    assert found.per_example.tolist() == pytest.approx(lm.tolist(), rel=1e-4)


def test_gradients_do_not_add_up_over_steps() -> None:
    weights, rows, directions = problem()
    for weight in weights.values():
        weight.requires_grad_()
    gradients = []
    for _ in range(2):
        core.backward(weights, rows, [losses(directions)], penalty_weight=1.0, reduction="mean")
        gradients.append([weight.grad.clone() for weight in weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_mapping_runs_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, rows, directions = problem()
    for weight in weights.values():
        weight.requires_grad_()
    calls = []
    plain = core.forward
    monkeypatch.setattr(core, "forward", lambda *a: calls.append(1) or plain(*a))
    core.backward(weights, rows, [losses(d) for d in directions.split(1)], penalty_weight=1.0, reduction="mean")
    assert len(calls) == 1


def test_bad_arguments() -> None:
    weights, rows, directions = problem()
    with pytest.raises(ValueError, match="reduction must be mean or sum, found 'max'"):
        core.backward(weights, rows, [losses(directions)], penalty_weight=1.0, reduction="max")
    with pytest.raises(ValueError, match="a step needs at least one example"):
        core.backward(weights, rows, [], penalty_weight=1.0, reduction="mean")
    with pytest.raises(ValueError, match="schedule must be constant or onecycle, found 'linear'"):
        rates("linear", 0, lr=1.0, beta1=0.9, total_steps=1)
    with pytest.raises(ValueError, match="step 4 is outside a cycle of 4 steps"):
        rates("onecycle", 4, lr=1.0, beta1=0.9, total_steps=4)
    with pytest.raises(ValueError, match="7 examples are fewer than 4 \\+ 4"):
        draw_examples(7, num_held_out=4, per_step=4, steps=1, seed=0)


def test_onecycle_agrees_with_the_published_code(golden: Path) -> None:
    recorded = json.loads((golden / "laten" / "D_onecycle_schedule.json").read_text())
    assert set(recorded) == {"1", "2", "3", "4", "8", "16", "20", "32"}
    for total, steps in recorded.items():
        for step, expected in enumerate(steps):
            found = rates("onecycle", step, lr=3e-5, beta1=0.9, total_steps=int(total))
            assert found.lr == pytest.approx(expected["lr"], rel=1e-9)
            assert found.beta1 == pytest.approx(expected["beta1"], rel=1e-9)


def test_a_cycle_of_ten_starts_at_its_peak() -> None:
    """torch's own scheduler divides by zero there."""
    found = rates("onecycle", 0, lr=3e-5, beta1=0.9, total_steps=10)
    assert (found.lr, found.beta1) == (pytest.approx(3e-5), pytest.approx(0.85))


def test_constant_rates() -> None:
    assert {rates("constant", step, lr=0.1, beta1=0.7, total_steps=3) for step in range(9)} == {Rates(0.1, 0.7)}


def test_held_out_examples_are_never_drawn() -> None:
    held_out, steps = draw_examples(12, num_held_out=4, per_step=5, steps=50, seed=1)
    assert len(set(held_out)) == 4
    assert all(len(set(step)) == 5 for step in steps)
    assert {i for step in steps for i in step} == set(range(12)) - set(held_out)
    assert draw_examples(12, num_held_out=4, per_step=5, steps=2, seed=1) == (held_out, steps[:2])
    assert draw_examples(12, num_held_out=4, per_step=5, steps=50, seed=2) != (held_out, steps)


def test_range_of_values() -> None:
    found = core.value_range(torch.tensor([[-3.0, 0.0], [4.0, 0.0]]))
    assert found == {"min": -3.0, "max": 4.0, "rms": 2.5}
