"""Forward passes, and what every layer computed at the predicting position (METHODS section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.models.batches import padded
from pkt_stages.models.sites import Geometry, geometry

MAX_TOKENS = 2048  # of a batch, filling included


@dataclass(frozen=True)
class Captured:
    """The residual stream and coefficients at the last position of one context; float32, on the model's device(s).

    Attributes:
        layer_input: [layer, d_model] h_{l-1}.
        attn_output: [layer, d_model] A_l, what attention adds.
        ffn_output: [layer, d_model] F_l, what the FFN adds.
        ffn_coefficients: [layer, d_ff] c = act(gate) * up.
        attn_coefficients: [layer, attn_neuron] a, the head outputs before o_proj: a sum over all positions.
        attn_coefficients_last: [layer, attn_neuron] only the last position's weight on itself times its own value.
        final: [d_model] h_L, the last layer's output before the final norm.
    """

    layer_input: Tensor
    attn_output: Tensor
    ffn_output: Tensor
    ffn_coefficients: Tensor
    attn_coefficients: Tensor
    attn_coefficients_last: Tensor
    final: Tensor


def batches(contexts: Sequence[list[int]]) -> list[list[int]]:
    """Which contexts run together, as indices; depends on their lengths alone, so that bytes are equal everywhere."""
    found: list[list[int]] = []
    for i in sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), i)):
        if not found or (len(found[-1]) + 1) * len(contexts[i]) > MAX_TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def capture(model: Any, context: list[int]) -> Captured:
    """Run one context through the model (eager attention) and keep what its last position saw."""
    return capture_all(model, [context])[0]


@torch.no_grad()
def capture_all(model: Any, contexts: Sequence[list[int]]) -> list[Captured]:
    """Run contexts through the model at once (eager attention) and keep what the last position of each saw.

    Args:
        model: a supported causal language model.
        contexts: token ids, the first of them BOS where the model was trained with one. Shorter ones are filled up
            behind their last token, which attends to nothing behind itself.
    """
    sizes = geometry(model.config)
    kept: dict[str, list[Tensor]] = {n: [] for n in ("input", "attn", "ffn", "c", "a", "weight", "value", "final")}
    rows = torch.arange(len(contexts))
    last = torch.tensor([len(context) - 1 for context in contexts])

    def keep_input(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept[name].append(inputs[0][rows, last].float())

        return hook

    def keep_output(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            kept[name].append(output[rows, last].float())

        return hook

    def keep_attention(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        kept["attn"].append(output[0][rows, last].float())
        kept["weight"].append(output[1][rows, :, last, last].float())

    handles = []
    try:
        for layer in model.model.layers:
            handles += [
                layer.register_forward_pre_hook(keep_input("input")),
                layer.self_attn.register_forward_hook(keep_attention),
                layer.self_attn.v_proj.register_forward_hook(keep_output("value")),
                layer.self_attn.o_proj.register_forward_pre_hook(keep_input("a")),
                layer.mlp.register_forward_hook(keep_output("ffn")),
                layer.mlp.down_proj.register_forward_pre_hook(keep_input("c")),
            ]
        handles.append(model.model.norm.register_forward_pre_hook(keep_input("final")))
        with eager(model):
            ids = padded(contexts, 0).to(model.get_input_embeddings().weight.device)
            model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    home = kept["final"][0].device
    stacked = {name: torch.stack([t.to(home) for t in found], dim=1) for name, found in kept.items()}
    return [
        Captured(
            layer_input=stacked["input"][i],
            attn_output=stacked["attn"][i],
            ffn_output=stacked["ffn"][i],
            ffn_coefficients=stacked["c"][i],
            attn_coefficients=stacked["a"][i],
            attn_coefficients_last=_own_value(stacked["weight"][i], stacked["value"][i], sizes),
            final=stacked["final"][i, 0],
        )
        for i in range(len(contexts))
    ]


def _own_value(weight: Tensor, value: Tensor, sizes: Geometry) -> Tensor:
    """[layer, head] weights on the position itself times its values [layer, n_kv * d_head], per attention neuron."""
    heads = weight.repeat_interleave(sizes.d_head, dim=-1)
    neurons = torch.arange(sizes.num_attn_neurons, device=value.device)
    return heads * value[:, sizes.weight_index("attn_v", neurons)]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that returns its weights, for the time of the context."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def lens(model: Any) -> tuple[Tensor, float]:
    """The logit lens without its norm: W_U * gamma as float32 [vocab, d_model], and the final norm's eps."""
    gamma = model.model.norm.weight.float()
    head = model.get_output_embeddings().weight
    return head.to(gamma.device).float() * gamma, float(model.model.norm.variance_epsilon)
