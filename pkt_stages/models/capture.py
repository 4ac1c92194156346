"""Forward passes, and what every layer computed at the predicting position (METHODS section 2).

What a block adds to the residual stream is its output behind the norm and the multiplier that its architecture may have
there. Such a norm divides by the size of the block's whole output, which is held fixed as the final norm's is: it goes
into the coefficients, and the gain into the subvalues (`subvalues`), so that a neuron adds coefficient times subvalue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.models.batches import padded
from pkt_stages.models.sites import Family, Geometry, as_rows, family, geometry, setting

MAX_TOKENS = 2048  # of a batch, filling included
# Fields of `Captured` by sublayer.
_COEFFICIENTS = {"ffn": ("ffn_coefficients",), "attn": ("attn_coefficients", "attn_coefficients_last")}


@dataclass(frozen=True)
class Captured:
    """The residual stream and coefficients at the last position of one context; float32, on the model's device(s).

    Attributes:
        layer_input: [layer, d_model] h_{l-1}.
        attn_output: [layer, d_model] A_l, what attention adds.
        ffn_output: [layer, d_model] F_l, what the FFN adds.
        ffn_coefficients: [layer, d_ff] c, the input of down_proj: act(gate) * up, or act(up) without a gate.
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
    sizes, kind = geometry(model.config), family(model.config)
    kept: dict[str, list[Tensor]] = defaultdict(list)
    rows = torch.arange(len(contexts))
    last = torch.tensor([len(context) - 1 for context in contexts])

    def keep_input(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept[name].append(inputs[0][rows, last].float())

        return hook

    def keep_output(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[name].append((output[0] if isinstance(output, tuple) else output)[rows, last].float())

        return hook

    def keep_weights(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        kept["weight"].append(output[1][rows, :, last, last].float())

    handles = []

    def before(module: str, name: str) -> None:
        handles.append(model.get_submodule(module).register_forward_pre_hook(keep_input(name)))

    def behind(module: str, hook: Any) -> None:
        handles.append(model.get_submodule(module).register_forward_hook(hook))

    try:
        for layer in range(sizes.num_layers):
            before(kind.layer(layer), "input")
            behind(kind.block("attn", layer), keep_weights)
            behind(kind.module("attn_v", layer), keep_output("value"))
            before(kind.module("attn_o", layer), "attn_coefficients")
            before(kind.module("ffn_down", layer), "ffn_coefficients")
            for sublayer in ("attn", "ffn"):
                norm = kind.norm_behind(sublayer, layer)
                behind(norm or kind.block(sublayer, layer), keep_output(sublayer))
                if norm is not None:
                    before(norm, f"{sublayer}_unnormed")
        before(kind.final_norm, "final")
        with eager(model):
            ids = padded(contexts, 0).to(model.get_input_embeddings().weight.device)
            getattr(model, kind.base)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    home = kept["final"][0].device
    stacked = {name: torch.stack([t.to(home) for t in found], dim=1) for name, found in kept.items()}
    stacked["attn_coefficients_last"] = _own_value(kind, sizes, stacked["weight"], stacked["value"])
    eps, multiplier = setting(model.config, kind.eps), setting(model.config, kind.multiplier)
    for sublayer, names in _COEFFICIENTS.items():
        if (output := stacked.get(f"{sublayer}_unnormed")) is not None:
            size = (output.square().mean(-1, keepdim=True) + eps).sqrt()
            stacked |= {name: stacked[name] / size for name in names}
    return [
        Captured(
            layer_input=stacked["input"][i],
            attn_output=stacked["attn"][i] * multiplier,
            ffn_output=stacked["ffn"][i] * multiplier,
            **{name: stacked[name][i] for names in _COEFFICIENTS.values() for name in names},
            final=stacked["final"][i, 0],
        )
        for i in range(len(contexts))
    ]


def _own_value(kind: Family, sizes: Geometry, weight: Tensor, value: Tensor) -> Tensor:
    """[.., head] weights on the position itself times its values [.., row of their matrix], per attention neuron."""
    neurons = torch.arange(sizes.num_attn_neurons, device=value.device)
    places = kind.stored_index("attn_v", sizes.weight_index("attn_v", neurons), sizes)
    return weight.repeat_interleave(sizes.d_head, dim=-1) * value[..., places]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that returns its weights, for the time of the context."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def subvalues(model: Any, layer: int, sublayer: str, neurons: Any = slice(None)) -> Tensor:
    """What neurons of a sublayer add to the stream at coefficient 1, [neuron, d_model] float32.

    A column of o_proj or down_proj, times the gain of the norm behind the block and the block's multiplier.

    Args:
        neurons: which, as an index.
    """
    kind, site = family(model.config), "attn_o" if sublayer == "attn" else "ffn_down"
    found = as_rows(model.get_parameter(kind.weight(site, layer)), site)[neurons].float()
    if (norm := kind.norm_behind(sublayer, layer)) is not None:
        found = found * kind.gain(model.get_submodule(norm).weight.float())
    return found * setting(model.config, kind.multiplier) if kind.multiplier is not None else found


@dataclass(frozen=True)
class Lens:
    """The logit lens without its division: logits of x are U x / size + shift, or capped: c tanh(. / c) of that.

    Attributes:
        unembedding: [vocab, d_model] U = W_U * gamma, float32.
        gamma: [d_model] gain of the final norm over what the model divides its logits by.
        eps: of the norm.
        shift: [vocab] what a bias of the norm adds; None without one.
        centred: the norm subtracts the mean, so that vectors enter without theirs.
        softcap: c; None: logits are not capped.
    """

    unembedding: Tensor
    gamma: Tensor
    eps: float
    shift: Tensor | None
    centred: bool
    softcap: float | None

    def entering(self, vectors: Tensor) -> Tensor:
        """Vectors [.., d_model] as they enter."""
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors


def lens(model: Any) -> Lens:
    """The model's logit lens, on the device of its final norm."""
    kind, config = family(model.config), model.config
    norm = model.get_submodule(kind.final_norm)
    gamma = kind.gain(norm.weight.float()) / setting(config, kind.logits_scaling)
    head = model.get_output_embeddings().weight.to(gamma.device).float()
    shift = head @ norm.bias.float() / setting(config, kind.logits_scaling) if kind.centred else None
    softcap = getattr(config, kind.logits_softcap) if kind.logits_softcap else None
    return Lens(head * gamma, gamma, setting(config, kind.eps), shift, kind.centred, softcap)
