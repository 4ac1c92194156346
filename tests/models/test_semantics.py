"""The layers that SemAlign chooses, what they are trained towards, and its loss, against slow loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, set_seed

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.load import ModelRef, load_model, resolve
from pkt_stages.models.lora import Lora, site_modules, started
from pkt_stages.models.semantics import SemanticTrainer, Supervision, ffn_outputs, layer_scores, supervise
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]
EXAMPLES = [
    Encoded([0, 9, 30, 41, 12, 1], [-100, -100, -100, 41, 12, 1]),
    Encoded([0, 70, 8, 1], [-100, -100, 8, 1]),
    Encoded([0, 33, 64, 90, 7, 55, 1], [-100, -100, -100, -100, -100, 55, 1]),
]
BATCHES = [EXAMPLES[:2], EXAMPLES[2:]]
NUM_TOKENS = 261  # of the tests' tokenizer; their models' vocabularies have 264 rows


def supervised(example: Encoded) -> list[int]:
    """Positions that predict a supervised token."""
    return [i for i, label in enumerate(example.labels[1:]) if label != -100]


def states(model: Any, example: Encoded) -> list[Tensor]:
    """[token, d_model] FFN outputs of each layer, an example at a time."""
    with torch.no_grad(), ffn_outputs(model, range(model.config.num_hidden_layers)) as outputs:
        model(torch.tensor([example.ids]))
    return [output[0] for output in outputs]


def basis(model: Any) -> Tensor:
    """S [d_model, token] of a double model, its final gain folded into the head."""
    weight = (model.lm_head.weight * model.model.norm.weight)[:NUM_TOKENS]
    return torch.nn.functional.normalize(torch.linalg.pinv(weight), dim=0)


def made(source: Path, target: Path, **settings: Any) -> Supervision:
    given: dict[str, Any] = {"num_paired": 1, "pairing": "depth", "layer_loss": "source", **settings}
    refs: list[ModelRef] = [resolve(str(folder)) for folder in (source, target)]
    return supervise(*refs, EXAMPLES, dtype="float32", device="cpu", micro_batch_size=2, **given)


@pytest.fixture(scope="module")
def gained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms have gains of their own."""
    folder = make_model(tmp_path_factory.mktemp("models") / "gained", seed=5)
    model = load_model(resolve(str(folder)))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2.0, generator=generator)
    model.save_pretrained(folder)
    return folder


def test_a_score_is_what_the_loss_owes_to_a_layers_output(source_folder: Path) -> None:
    """d loss / d s with the FFN's output scaled by s at s = 1, by differences; the mean of absolute values."""
    model = load_model(resolve(str(source_folder))).double()

    def loss(layer: int, scale: float, example: Encoded) -> float:
        handle = model.model.layers[layer].mlp.register_forward_hook(lambda _m, _i, output: scale * output)
        with torch.no_grad():
            logs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        handle.remove()
        at = supervised(example)
        return -sum(float(logs[i, example.ids[i + 1]]) for i in at) / len(at)

    expected = [
        sum(abs(loss(layer, 1 + 1e-3, e) - loss(layer, 1 - 1e-3, e)) / 2e-3 for e in EXAMPLES) / len(EXAMPLES)
        for layer in range(4)
    ]
    # transformers' norms compute in float32, which leaves a difference of losses three digits.
    assert layer_scores(model, BATCHES) == pytest.approx(expected, rel=2e-3)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("layer_loss", ["source", "permuted"])
def test_what_is_wanted_is_the_sources_state_recomposed(layer_loss: str, source_folder: Path, gained: Path) -> None:
    """Decomposed into cosines with the source's directions, recomposed with the target's; token by token."""
    found = made(source_folder, gained, num_paired=4, layer_loss=layer_loss)
    assert found.pairs == [(0, 0), (1, 1), (3, 2)]  # floor(4 k / 3)
    source, target = (load_model(resolve(str(folder))).double() for folder in (source_folder, gained))
    theirs, ours = basis(source), basis(target)
    if layer_loss == "permuted":
        theirs = theirs[:, torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(0))]
    assert found.wanted is not None
    for example, wanted in zip(EXAMPLES, found.wanted, strict=True):
        outputs = states(source, example)
        assert wanted.shape == (len(supervised(example)), 3, 64) and wanted.dtype == torch.float32
        for place, position in enumerate(supervised(example)):
            for pair, (layer, _) in enumerate(found.pairs):
                h = outputs[layer][position]
                cosines = [float(s @ h / h.norm()) for s in theirs.mT]
                recomposed = sum(a * s for a, s in zip(cosines, ours.mT, strict=True))
                assert isinstance(recomposed, Tensor)
                expected = (recomposed / recomposed.norm()).float()
                torch.testing.assert_close(wanted[place, pair], expected, rtol=1e-4, atol=1e-5)


def test_the_same_model_wants_its_own_state_drawn_to_its_directions(gained: Path) -> None:
    """With S_s = S_t the target is S S^T h, not h: what the layer loss of an identical model is."""
    found = made(gained, gained)
    assert found.wanted is not None and found.facts["head_rank"] == {"source": 64, "target": 64}
    model = load_model(resolve(str(gained))).double()
    directions, layer = basis(model), found.pairs[0][0]
    assert found.pairs == [(layer, layer)]
    losses = []
    for example, wanted in zip(EXAMPLES, found.wanted, strict=True):
        for place, position in enumerate(supervised(example)):
            h = states(model, example)[layer][position]
            itself = directions @ (directions.mT @ h)
            losses.append(1 - float(h @ itself) / float(h.norm() * itself.norm()))
            assert 1 - float(h @ wanted[place, 0].double()) / float(h.norm()) == pytest.approx(losses[-1], abs=1e-5)
    assert 0.01 < min(losses) < max(losses) < 1


def test_a_source_in_another_shape_wants_what_the_target_itself_would(
    pkt: Run, gained: Path, target_folder: Path, tmp_path: Path
) -> None:
    """Where theory says exact: width, basis and gains of the source drop out, filler neurons and layers too."""
    wide = make_model(tmp_path / "wide", seed=6, hidden_size=96, intermediate_size=128, num_attention_heads=6)
    written = tmp_path / "written"
    status, _, err = pkt("reexpress", "--model", gained, "--like", wide, "--seed", 0, "--out", written)
    assert status == 0, err
    itself, other = made(gained, gained, num_paired=3), made(written, gained, num_paired=3)
    assert itself.pairs == other.pairs == [(0, 0), (1, 1), (2, 2)]
    assert other.facts["head_rank"] == {"source": 64, "target": 64}
    assert other.facts["source_layer_scores"] == pytest.approx(itself.facts["source_layer_scores"], rel=1e-3)
    assert itself.wanted is not None and other.wanted is not None
    for ours, theirs in zip(itself.wanted, other.wanted, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    away = made(target_folder, gained, num_paired=3)
    assert away.wanted is not None and float((away.wanted[0] - itself.wanted[0]).abs().max()) > 0.1


def test_a_layer_that_adds_nothing_gives_no_direction(pkt: Run, gained: Path, tmp_path: Path) -> None:
    deep = make_model(tmp_path / "deep", seed=6, num_hidden_layers=6)
    written = tmp_path / "written"
    assert pkt("reexpress", "--model", gained, "--like", deep, "--seed", 0, "--out", written)[0] == 0
    model = load_model(resolve(str(written)))
    filled = {layer for layer, output in enumerate(states(model, EXAMPLES[0])) if not bool(output.any())}
    assert len(filled) == 3 and {0, 2, 4} & filled != {0, 2, 4}
    with pytest.raises(UserError) as caught:
        made(written, gained, num_paired=6)
    layer = min(filled & {1, 3, 5})
    assert str(caught.value) == (
        f"the source's FFN of layer {layer} adds nothing that its head can read, so that there is no direction to"
        " train towards; choose another num_paired, or pairing important"
    )
    # Its important layers are those that are no filler, and in them are the right states.
    found, itself = made(written, gained, num_paired=1, pairing="important"), made(gained, gained, num_paired=3)
    source_layer = found.pairs[0][0]
    real = sorted(set(range(6)) - filled)
    assert source_layer in real and found.wanted is not None and itself.wanted is not None
    expected = itself.wanted[0][:, real.index(source_layer)]
    torch.testing.assert_close(found.wanted[0][:, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("output_loss", ["cosine", "cross_entropy"])
@pytest.mark.parametrize("layer_loss", ["none", "source"])
def test_the_loss_and_its_gradient_are_those_of_a_slow_loop(
    output_loss: Any, layer_loss: str, source_folder: Path, gained: Path, tmp_path: Path
) -> None:
    """The first step's loss and gradient norm, over a batch in two parts; every supervised token counts the same."""
    supervision = made(source_folder, gained, num_paired=4, layer_loss=layer_loss)
    layers = [layer for _, layer in supervision.pairs]
    sizes = Lora(site_modules(LlamaConfig(), layers), rank=2, alpha=4.0, dropout=0.0)

    def start() -> Any:
        set_seed(0)
        return started(load_model(resolve(str(gained))), sizes, "random", {}, EXAMPLES).model

    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments |= {"max_steps": 1, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "max_grad_norm": 1e9}
    trainer = SemanticTrainer(start(), arguments, EXAMPLES, output_loss, supervision)
    trainer.train()
    record = trainer.state.log_history[0]

    model = start().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for place, example in enumerate(EXAMPLES):
        with ffn_outputs(model.get_base_model(), range(3)) as outputs:
            logits = model(torch.tensor([example.ids])).logits[0]
        for step, position in enumerate(supervised(example)):
            z, label = logits[position], example.ids[position + 1]
            total = total + (1 - z[label] / z.norm() if output_loss == "cosine" else -z.log_softmax(-1)[label])
            if layer_loss == "source":
                assert supervision.wanted is not None
                for pair, layer in enumerate(layers):
                    h, w = outputs[layer][0, position], supervision.wanted[place][step, pair].double()
                    total = total + (1 - h @ w / (h.norm() * w.norm())) / len(layers)
            count += 1
    loss = total / count
    assert count == 7
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0
    assert not any(module._forward_hooks for module in trainer._target.modules())


def test_a_token_that_the_head_has_no_direction_for(source_folder: Path, tmp_path: Path) -> None:
    target = make_model(tmp_path / "target", seed=2)
    model = load_model(resolve(str(target)))
    model.lm_head.weight.data[17] = 0
    model.save_pretrained(target)
    with pytest.raises(UserError) as caught:
        made(source_folder, target)
    assert str(caught.value) == (
        "the target's head has no direction for token 17 (a row of zeros, or not finite); use another model"
    )


def test_more_layers_than_the_source_has(source_folder: Path, target_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        made(source_folder, target_folder, num_paired=5)
    assert str(caught.value) == "num_paired 5: the source has 4 layers; choose at most that many"
