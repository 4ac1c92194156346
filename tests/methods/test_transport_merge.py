"""Transport & Merge against its authors' numbers, on copies of units, and through its command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core.optimal_transport import layer_weights, sinkhorn, unit_costs
from pkt_stages.methods.transport_merge import INPUT_OF, Params, Plans, fitted, mixture

GOLDEN = Path(__file__).parents[1] / "golden/transport"
CASES = {"deeper_source": (3, 5), "deeper_target": (5, 3)}
COMPONENTS = {"attn_q": "Q", "attn_k": "K", "attn_v": "V", "attn_o": "O"}
KINDS = {**COMPONENTS, "attn_in": "Q_pre", "heads": "O_pre"}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "K_transport_merge.safetensors")


def plans_of(recorded: dict[str, Tensor], case: str, params: Params) -> dict[str, Plans]:
    sides = []
    for side, count in zip("AB", CASES[case], strict=True):
        sides.append({k: [recorded[f"{case}.act{side}.{v}.{n}"] for n in range(count)] for k, v in KINDS.items()})
    return {name: fitted(sides[0][name], sides[1][name], params) for name in KINDS}


def models_of(recorded: dict[str, Tensor], case: str) -> list[Any]:
    def bias(side: str, weight: str, layer: int) -> Tensor | None:
        found = recorded.get(f"{case}.b{side}.{COMPONENTS[weight]}.{layer}")
        return None if found is None else found.double()

    return [
        SimpleNamespace(
            stored=lambda w, n, side=side: recorded[f"{case}.W{side}.{COMPONENTS[w]}.{n}"].double(),
            stored_bias=lambda w, n, side=side: bias(side, w, n),
        )
        for side in "AB"
    ]


@pytest.mark.parametrize("case", CASES)
def test_corrected_numbers(recorded: dict[str, Tensor], case: str) -> None:
    plans, models = plans_of(recorded, case, Params()), models_of(recorded, case)
    for weight, name in COMPONENTS.items():
        found = layer_weights(plans[weight].layers, plans[INPUT_OF[weight]].layers)
        torch.testing.assert_close(found, recorded[f"{case}.corr.{name}.layer_weights"], rtol=0, atol=1e-9)
        for layer in range(CASES[case][0]):
            mixed = mixture(models, plans, weight, layer, published=False)
            expected = recorded[f"{case}.corr.{name}.{layer}.W_hot"]
            torch.testing.assert_close(mixed["weight"], expected, rtol=0, atol=1e-9)
            merged = 0.9 * models[0].stored(weight, layer) + 0.1 * mixed["weight"]
            torch.testing.assert_close(merged, recorded[f"{case}.corr.{name}.{layer}.W"], rtol=0, atol=1e-9)
            if (bias := recorded.get(f"{case}.corr.{name}.{layer}.b")) is not None:
                mixed_bias = 0.9 * models[0].stored_bias(weight, layer) + 0.1 * mixed["bias"]
                torch.testing.assert_close(mixed_bias, bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_published_numbers(recorded: dict[str, Tensor], case: str) -> None:
    """The authors' own run with float32 plans; layers behind the shallower model's depth only shrink."""
    plans, models = plans_of(recorded, case, Params(published=True)), models_of(recorded, case)
    for name, kind in KINDS.items():
        for layer, row in enumerate(plans[name].units):
            for other, plan in enumerate(row):
                expected = recorded[f"{case}.pub32.{kind}.Qplan.{layer}.{other}"].double()
                torch.testing.assert_close(plan, expected, rtol=0, atol=1e-5)
        expected = recorded[f"{case}.pub32.{kind}.P"].double()
        torch.testing.assert_close(plans[name].layers, expected, rtol=0, atol=1e-5)
    for weight, name in COMPONENTS.items():
        for layer in range(CASES[case][0]):
            own = models[0].stored(weight, layer)
            mixed = mixture(models, plans, weight, layer, published=True)
            merged = 0.9 * own + 0.1 * mixed.get("weight", torch.zeros_like(own))
            expected = recorded[f"{case}.pub32.fused.{name}.{layer}.W"].double()
            torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
            assert bool(mixed) == (layer < min(CASES[case]))
            if mixed:
                assert mixed["weight"].norm() < 0.01 * own.norm()


def test_copies_of_units_are_recovered(recorded: dict[str, Tensor]) -> None:
    """The target's units are copies of the source's: its weights are the source's, divided among the input's copies."""
    y_in, w, copy_in, copy_out = (recorded[f"dup.{name}"] for name in ("Y_in", "W_B", "copy_in", "copy_out"))
    y_out = y_in @ w.mT

    def plan(target: Tensor, source: Tensor) -> Tensor:
        return sinkhorn(unit_costs(target, source), 0.01, rounds=100_000, tolerance=1e-13)

    q_out, q_in = plan(y_out[:, copy_out], y_out), plan(y_in[:, copy_in], y_in)
    found = (q_out * len(q_out)) @ w @ (q_in * q_in.shape[1]).mT
    torch.testing.assert_close(found, recorded["dup.W_hot"], rtol=0, atol=1e-9)
    outputs = y_in[:, copy_in] @ found.mT
    torch.testing.assert_close(outputs, y_out[:, copy_out], rtol=0, atol=2e-6 * float(y_out.abs().max()))


def test_a_unit_that_does_not_vary_is_like_none() -> None:
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    still = values.clone()
    still[:, 1] = 7.3
    costs = unit_costs(still, values)
    assert torch.equal(costs[1], torch.ones(3).double())
    assert costs.diagonal()[[0, 2]].abs().max() < 1e-12


def test_a_row_through_the_command(pkt: Any, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    """Models of two shapes; the row is deterministic, and its control takes the target's own weights away."""
    lines = [
        json.dumps({"text": f"A text about {word} and {word[::-1]}."}) for word in ("rain", "a fox", "seven", "it")
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    given = ("--target", target_folder, "--source", source_folder, "--texts", tmp_path / "texts.jsonl")
    command = ("derive", "--code", "transport_merge", *given, "--set=num_texts=4", "--set=batch_size=3")
    rows = {}
    for name, more in (("row", ()), ("again", ()), ("none", ["--set=plans=none"]), ("pub", ["--set=published=true"])):
        status, _, err = pkt(*command, "--out", tmp_path / name, *more)
        assert status == 0, err
        rows[name] = load_file(tmp_path / name / "delta_0.safetensors")
    before = load_file(target_folder / "model.safetensors")
    assert rows["row"].keys() == rows["none"].keys()
    assert {name.split(".")[-2] for name in rows["row"]} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, weight in rows["none"].items():
        assert torch.equal(weight, -before[name])
        assert torch.equal(rows["row"][name], rows["again"][name])
        assert (rows["row"][name] + before[name]).norm() > 5 * (rows["pub"][name] + before[name]).norm()
    _, _, err = pkt("derive", "--code", "transport_merge", *given[:4], "--out", tmp_path / "x")
    assert "the method takes --target and --source and --texts, nothing else; found --target and --source" in err
