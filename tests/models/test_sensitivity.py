from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.core.delta import low_rank_factors
from pkt_stages.core.sensitivity import submatrix_sums, top_layers
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.sensitivity import Sensitivity, sensitivities
from tests.conftest import make_model

WEIGHTS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"self_attn.{x}_proj" for x in "qkvo"))


@pytest.fixture(scope="module")
def recorded(golden: Path) -> tuple[dict[str, torch.Tensor], dict]:
    folder = golden / "seeking"
    return load_file(folder / "E_seeking.safetensors"), json.loads((folder / "E_seeking.json").read_text())


@pytest.fixture(scope="module")
def found(golden: Path, recorded: tuple[dict[str, torch.Tensor], dict]) -> Sensitivity:
    model = load_model(resolve(str(golden / "reference_models" / "source")))
    before = weights_hash(model.state_dict())
    examples = [
        (n, Encoded(recorded[0][f"{n}.input_ids"].tolist(), recorded[0][f"{n}.labels"].tolist()))
        for n in ("ex1", "ex2")
    ]
    made = sensitivities(model, examples, {name for name, _ in model.named_parameters()})
    assert weights_hash(model.state_dict()) == before
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    return made


def test_sums_agree_with_the_published_code(found: Sensitivity, recorded: tuple[dict[str, torch.Tensor], dict]) -> None:
    for name in (n for n in recorded[0] if n.startswith("sens_sum.")):
        ours, theirs = found.weights[name.removeprefix("sens_sum.")], recorded[0][name]
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    theirs = [recorded[1]["layer_sensitivity"][str(layer)] for layer in range(6)]
    assert found.layers.tolist() == pytest.approx(theirs, rel=1e-5)
    assert top_layers(found.layers, 4).tolist() == recorded[1]["selected_layers"]


def test_submatrices_agree_with_the_published_code(
    found: Sensitivity, recorded: tuple[dict[str, torch.Tensor], dict]
) -> None:
    num = 0
    for name, place in recorded[1]["submatrices"].items():
        scores = found.weights[name.removesuffix("^T")]
        scores = scores.mT if name.endswith("^T") else scores
        sums = submatrix_sums(scores, tuple(place["tgt"]))
        assert list(divmod(int(sums.argmax()), sums.shape[1])) == place["top_left"], name
        num += 1
    assert num == 4 * 7 + 2


def test_factors_agree_with_the_published_code(golden: Path, recorded: tuple[dict[str, torch.Tensor], dict]) -> None:
    weights = load_file(golden / "reference_models" / "source" / "model.safetensors")
    for name in (n for n in recorded[0] if n.startswith("BA.")):
        place = recorded[1]["submatrices"][name.removeprefix("BA.")]
        (row, column), (height, width) = place["top_left"], place["tgt"]
        a, b = low_rank_factors(weights[name.removeprefix("BA.")][row : row + height, column : column + width], 4)
        assert ((b @ a - recorded[0][name]).norm() / recorded[0][name].norm()).item() < 1e-5


def test_as_a_plain_float64_backward(target_folder: Path) -> None:
    """Also under grouped-query attention and with a parameter that nothing asked for."""
    model = load_model(resolve(str(target_folder)), dtype="float32")
    examples = [(f"e{i}", Encoded([0, 70 + i, 80, 90, 1], [-100, -100, 80, 90, 1])) for i in range(2)]
    name = "model.layers.1.self_attn.v_proj.weight"
    made = sensitivities(model, examples, {name})
    assert set(made.weights) == {name}
    double = load_model(resolve(str(target_folder))).double().requires_grad_(True)
    total, layers = torch.zeros_like(double.get_parameter(name)), torch.zeros(3, dtype=torch.float64)
    for _, example in examples:
        double.zero_grad()
        logits = double(torch.tensor([example.ids])).logits[0]
        labels = torch.tensor(example.labels)[1:]
        torch.nn.functional.cross_entropy(logits[:-1][labels >= 0], labels[labels >= 0]).backward()
        total += (double.get_parameter(name) * double.get_parameter(name).grad).abs().detach()
        for layer in range(3):
            parameters = double.model.layers[layer].parameters()
            layers[layer] += sum(float((p * p.grad).abs().sum().detach()) for p in parameters)
    torch.testing.assert_close(made.weights[name].double(), total, rtol=1e-4, atol=1e-9)
    assert made.layers.tolist() == pytest.approx(layers.tolist(), rel=1e-5)


def test_a_gradient_that_is_not_finite(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    with pytest.raises(UserError, match=r"example e: its loss is (nan|inf); use a wider dtype"):
        sensitivities(model, [("e", Encoded([0, 70, 5, 1], [-100, 70, 5, 1]))], set())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_finite_loss_with_a_gradient_that_is_not(target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(resolve(str(target_folder)))
    name = "model.layers.1.mlp.up_proj.weight"

    def loss_with_a_root_of_zero(model: torch.nn.Module, examples: list[Encoded]) -> torch.Tensor:
        return (model.get_parameter(name).square().sum() * 0).sqrt()[None]

    monkeypatch.setattr("pkt_stages.models.sensitivity.example_losses", loss_with_a_root_of_zero)
    with pytest.raises(UserError, match=rf"^example e: the gradient of {name} is not finite; use a wider dtype$"):
        sensitivities(model, [("e", Encoded([0, 70, 5, 1], [-100, 70, 5, 1]))], {name})
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_tied_embeddings_count_both_uses(tmp_path: Path) -> None:
    """|theta * (gradient as embedding + gradient as head)|, not the sum of two absolute values."""
    folder = make_model(tmp_path / "tied", seed=6, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    example = Encoded([0, 70, 80, 90, 1], [-100, -100, 80, 90, 1])
    model = load_model(resolve(str(folder)), dtype="float32")
    assert model.lm_head.weight is model.get_parameter(name)
    made = sensitivities(model, [("e", example)], {name})
    double = load_model(resolve(str(folder))).double().requires_grad_(True)
    logits = double(torch.tensor([example.ids])).logits[0]
    torch.nn.functional.cross_entropy(logits[1:-1], torch.tensor(example.labels[2:])).backward()
    weight = double.get_parameter(name)
    assert weight.grad is not None
    expected = (weight * weight.grad).abs().detach()
    # By norm: where the two uses nearly cancel, a single float32 entry keeps few digits.
    assert ((made.weights[name].double() - expected).norm() / expected.norm()).item() < 1e-5
