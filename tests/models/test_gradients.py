"""Gradients at the outputs of projections: against plain autograd, and BiCo's own code end to end on a small net."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pkt_stages.core import transport
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.correlation import activations
from pkt_stages.models.gradients import NORMS, gradient_sums, output_gradients
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import PROJECTIONS, module_name

GOLDEN = Path(__file__).parents[1] / "golden/transport"
PAIRS = [(1, 0), (3, 2)]


@pytest.fixture(scope="module")
def models(source_folder: Path, target_folder: Path) -> list[Any]:
    return [load_model(resolve(str(folder)), dtype="float32") for folder in (source_folder, target_folder)]


@pytest.fixture(scope="module")
def examples() -> list[Encoded]:
    """Of different lengths, with the loss on the last tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 264, (length,), generator=draw).tolist() for length in (9, 14, 6)]
    return [Encoded(one, [-100] * (len(one) - 4) + one[-4:]) for one in ids]


def plain(model: Any, example: Encoded) -> dict[tuple[str, int], Tensor]:
    """By transformers' own loss, with the outputs retained."""
    kept: dict[tuple[str, int], Tensor] = {}

    def retain(place: tuple[str, int]) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[place] = output

        return hook

    handles = []
    for layer in range(model.config.num_hidden_layers):
        names = {weight: module_name(weight, layer) for weight in PROJECTIONS}
        norms = {"attn_in": "input_layernorm", "ffn_in": "post_attention_layernorm"}
        names |= {name: f"model.layers.{layer}.{norm}" for name, norm in norms.items()}
        for name, module in names.items():
            handles.append(model.get_submodule(module).register_forward_hook(retain((name, layer))))
    embedded = model.get_input_embeddings()(torch.tensor([example.ids])).requires_grad_(True)
    model(inputs_embeds=embedded, labels=torch.tensor([example.labels])).loss.backward()
    for handle in handles:
        handle.remove()
    return {place: output.grad[0].double() for place, output in kept.items() if output.grad is not None}


def test_sums_are_those_of_plain_autograd(models: list[Any], examples: list[Encoded]) -> None:
    """Every place, both sides' own products, padded minibatches; what a pair has does not depend on the others."""
    found = gradient_sums(models, [examples[:2], examples[2:]], PAIRS, grams=True)
    alone = gradient_sums(models, [examples[:2], examples[2:]], PAIRS[1:], grams=True)
    every = [[plain(model, example) for example in examples] for model in models]
    for pair in PAIRS:
        assert found[pair].keys() == {*PROJECTIONS, *NORMS}
        for name, sums in found[pair].items():
            a, b = (torch.cat([one[name, layer] for one in side]) for side, layer in zip(every, pair, strict=True))
            assert len(a) == len(b) == 29 and sums.grams is not None
            for ours, theirs in (
                (sums.cross, a.mT @ b),
                (sums.sums[0], a.sum(0)),
                (sums.sums[1], b.sum(0)),
                (sums.grams[0], a.mT @ a),
                (sums.grams[1], b.mT @ b),
            ):
                assert float((ours - theirs).norm()) < 1e-5 * float(theirs.norm()), (pair, name)
    for name, sums in alone[PAIRS[1]].items():
        torch.testing.assert_close(sums.cross, found[PAIRS[1]][name].cross, rtol=1e-5, atol=1e-12)


def test_behind_the_last_attention_only_what_predicts_the_answer_has_a_gradient(
    models: list[Any], examples: list[Encoded]
) -> None:
    """Of the 14 tokens of one example the 4 in front of the answer's; keys and values of all before them count."""
    gradients = plain(models[1], examples[1])
    rows = {name: gradients[name, 2].any(-1).nonzero().flatten().tolist() for name in ("ffn_down", "attn_q", "attn_v")}
    assert rows["ffn_down"] == rows["attn_q"] == [9, 10, 11, 12]
    assert rows["attn_v"] == list(range(13))


def test_models_are_left_as_they_were(models: list[Any], examples: list[Encoded]) -> None:
    gradient_sums(models, [examples], PAIRS, grams=False)
    for model in models:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_no_answer_is_an_error(models: list[Any], examples: list[Encoded]) -> None:
    silent = [Encoded(example.ids, [-100] * len(example.ids)) for example in examples]
    with pytest.raises(UserError, match=r"layer 1 of the source: the answers' gradients are zero or not finite; use"):
        gradient_sums(models, [silent], PAIRS, grams=False)


class Net(nn.Module):
    """The net of the fixture: fc2(tanh(ln(fc1 x))), ln without a mean."""

    def __init__(self, recorded: dict[str, Tensor], which: str) -> None:
        super().__init__()
        shapes = [recorded[f"tiny.{which}.{name}.weight"].shape for name in ("fc1", "fc2")]
        self.fc1, self.fc2 = (nn.Linear(shape[1], shape[0]).double() for shape in shapes)
        self.ln = nn.RMSNorm(shapes[0][0], eps=1e-6).double()
        self.load_state_dict({name: recorded[f"tiny.{which}.{name}"] for name in self.state_dict()})

    def forward(self, x: Tensor) -> Any:
        return self.fc2(torch.tanh(self.ln(self.fc1(x))))


@pytest.mark.parametrize(("key", "power", "centre"), [("p00.raw", 0.0, False), ("p25.cent", 0.25, True)])
def test_bico_end_to_end(key: str, power: float, centre: bool) -> None:
    """Weights by both maps, biases and gains by the output's, equal to the authors' code to 1e-9.

    Input maps from gradients, W^T dL/dy, need not be unique; the biases and gains that they leave alone are equal.
    """
    recorded = load_file(GOLDEN / "J_bico.safetensors")
    names = ("fc1", "ln", "fc2")
    kept: dict[tuple[str, str], list[list[Tensor]]] = {(n, k): [[], []] for n in names for k in ("input", "gradient")}
    for side, which in enumerate(("source", "target")):
        net = Net(recorded, which)
        for start, end in pairwise(range(0, 51, 10)):
            rows = recorded["tiny.rows_used"][start:end]
            modules = [(name, net.get_submodule(name)) for name in names]
            with activations(net, ((*one, False) for one in modules)) as inputs, output_gradients(modules) as gradients:
                made = net(recorded["tiny.x"][rows])
                (made - recorded["tiny.y"][rows, : made.shape[1]]).square().mean().backward()
            for name in names:
                kept[name, "input"][side].append(inputs[name][0].detach())
                kept[name, "gradient"][side].append(gradients[name])

    def fitted(name: str, kind: str) -> Tensor:
        a, b = (torch.cat(parts) for parts in kept[name, kind])
        cross, grams = a.mT @ b, [a.mT @ a, b.mT @ b]
        if centre:
            cross = transport.centred(cross, a.sum(0), b.sum(0), len(a))
            grams = [transport.centred(g, x.sum(0), x.sum(0), len(a)) for g, x in zip(grams, (a, b), strict=True)]
        return transport.polar(transport.whitened(cross, grams[0], grams[1], power), tolerance=1e-7).map

    compared = 0
    for method in ("bico", "bico_gradin"):
        for name in names:
            output = fitted(name, "gradient")
            for part in ("weight", "bias"):
                if (whole := f"tiny.{method}.{key}.{name}.{part}") in recorded:
                    delta = recorded[f"tiny.delta.{name}.{part}"]
                    moved = output.mT @ delta
                    if delta.ndim == 2:
                        moved = moved @ fitted(name, "input")
                    torch.testing.assert_close(moved, recorded[whole], rtol=0, atol=1e-9)
                    compared += 1
    assert compared == 5 + 3
