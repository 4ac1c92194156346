"""Where a model keeps its neurons: four sites a layer, always seen as rows `[neuron, d_model]` (METHODS section 1).

| site     | weight                             | neuron is |
|----------|------------------------------------|-----------|
| ffn_up   | mlp.up_proj [d_ff, d]              | row       |
| ffn_down | mlp.down_proj [d, d_ff]            | column    |
| attn_v   | self_attn.v_proj [n_kv*d_head, d]  | row       |
| attn_o   | self_attn.o_proj [d, n_heads*d_head] | column  |

With grouped-query attention several attention neurons read one v_proj row; `weight_index` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SITES = ("ffn_up", "ffn_down", "attn_v", "attn_o")
SUBLAYER_OF_SITE = {"ffn_up": "ffn", "ffn_down": "ffn", "attn_v": "attn", "attn_o": "attn"}

_PROJECTION = {
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
}
# What Seeking's own repository moves beside the four sites; the last two are not of a layer.
OTHER_WEIGHTS = ("ffn_gate", "attn_q", "attn_k", "embedding", "head")
_OTHER_MODULE = {
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "embedding": "model.embed_tokens",
    "head": "lm_head",
}
EMBEDDING, HEAD = (f"{_OTHER_MODULE[weight]}.weight" for weight in ("embedding", "head"))  # one weight if they are tied
_STORED_AS_COLUMNS = frozenset({"ffn_down", "attn_o"})

# Residual stream h + attention(norm(h)), then + gated FFN(norm(.)), RMS norm with a plain scale, linear head.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_REFUSED = {
    "gemma": "its norms scale by 1 + weight",
    "gemma2": "it normalises each block's output before adding it to the residual stream",
    "gemma3": "it normalises each block's output before adding it to the residual stream",
    "gemma3_text": "it normalises each block's output before adding it to the residual stream",
    "olmo2": "it normalises each block's output before adding it to the residual stream",
    "mixtral": "its FFN is a mixture of experts",
    "qwen2_moe": "its FFN is a mixture of experts",
    "qwen3_moe": "its FFN is a mixture of experts",
    "gpt2": "its FFN has no gate and its norms subtract the mean",
    "gpt_neox": "its FFN has no gate and its norms subtract the mean",
    "opt": "its FFN has no gate and its norms subtract the mean",
    "phi": "its FFN has no gate and its blocks run in parallel",
    "phi3": "it stores up and gate as one matrix",
    "granite": "it multiplies each block's output before adding it to the residual stream",
}


SHAPE = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads")  # sizes that `pkt reexpress` can change


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that decide where neurons lie."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    d_head: int
    vocab_size: int

    @property
    def num_attn_neurons(self) -> int:
        return self.num_heads * self.d_head

    def num_neurons(self, site: str) -> int:
        return self.d_ff if SUBLAYER_OF_SITE[site] == "ffn" else self.num_attn_neurons

    def weight_shape(self, weight: str) -> tuple[int, int]:
        """Shape [out, in] of a site's or another weight as the checkpoint stores it."""
        attn, kv = self.num_attn_neurons, self.num_kv_heads * self.d_head
        return {
            "ffn_up": (self.d_ff, self.d_model),
            "ffn_gate": (self.d_ff, self.d_model),
            "ffn_down": (self.d_model, self.d_ff),
            "attn_q": (attn, self.d_model),
            "attn_k": (kv, self.d_model),
            "attn_v": (kv, self.d_model),
            "attn_o": (self.d_model, attn),
            "embedding": (self.vocab_size, self.d_model),
            "head": (self.vocab_size, self.d_model),
        }[weight]

    def weight_index(self, site: str, neurons: Tensor) -> Tensor:
        """The weight's row (or column) of each neuron; the identity except for attn_v under GQA.

        Attention neuron j reads v_proj row (j // d_head // group) * d_head + j % d_head, group = n_heads / n_kv.
        """
        if site != "attn_v" or self.num_heads == self.num_kv_heads:
            return neurons
        group = self.num_heads // self.num_kv_heads
        return (neurons // self.d_head // group) * self.d_head + neurons % self.d_head


def geometry(config: Any) -> Geometry:
    """Read the sizes from a Hugging Face config and refuse what the maths does not cover.

    Raises:
        UserError: the architecture is not one of `SUPPORTED`, by name and with the reason.
    """
    kind = getattr(config, "model_type", "unknown")
    if kind not in SUPPORTED:
        raise UserError(
            f"architecture {kind!r} is not supported: {_REFUSED.get(kind, 'its residual arithmetic was not checked')};"
            f" supported are {', '.join(SUPPORTED)}"
        )
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise UserError(f"config: {num_heads} heads cannot share {num_kv_heads} key/value heads evenly")
    return Geometry(
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
    )


def projection_name(layer: int, site: str) -> str:
    """The linear module that holds a site's neurons, as named in the model."""
    return f"model.layers.{layer}.{_PROJECTION[site]}"


def module_name(weight: str, layer: int) -> str:
    """The module that holds a site's or another weight (`OTHER_WEIGHTS`); embedding and head ignore the layer."""
    return projection_name(layer, weight) if weight in SITES else _OTHER_MODULE[weight].format(layer)


def weight_name(layer: int, site: str) -> str:
    """The checkpoint's name of a site's weight."""
    return projection_name(layer, site) + ".weight"


def as_rows(weight: Tensor, site: str) -> Tensor:
    """A view of a site's weight as `[weight row, d_model]`; writing to it writes to the weight."""
    return weight.mT if site in _STORED_AS_COLUMNS else weight


def feature_of(site: str) -> str:
    """'output' if a neuron is one output feature of its projection (a row), 'input' if one input feature (a column)."""
    return "input" if site in _STORED_AS_COLUMNS else "output"
