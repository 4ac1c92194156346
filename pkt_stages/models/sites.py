"""Where a model keeps its neurons: four sites a layer, always seen as rows `[neuron, d_model]` (METHODS section 1).

| site     | weight                             | neuron is |
|----------|------------------------------------|-----------|
| ffn_up   | mlp.up_proj [d_ff, d]              | row       |
| ffn_down | mlp.down_proj [d, d_ff]            | column    |
| attn_v   | self_attn.v_proj [n_kv*d_head, d]  | row       |
| attn_o   | self_attn.o_proj [d, n_heads*d_head] | column  |

With grouped-query attention several attention neurons read one v_proj row; `weight_index` says which. Names and shapes
are Llama's; `FAMILIES` says what other architectures do differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pkt_stages.errors import UserError, shown

if TYPE_CHECKING:
    from torch import Tensor

SITES = ("ffn_up", "ffn_down", "attn_v", "attn_o")
SUBLAYER_OF_SITE = {"ffn_up": "ffn", "ffn_down": "ffn", "attn_v": "attn", "attn_o": "attn"}

# What Seeking's own repository moves beside the four sites; the last two are not of a layer.
OTHER_WEIGHTS = ("ffn_gate", "attn_q", "attn_k", "embedding", "head")
# All projections of a layer.
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")
_STORED_AS_COLUMNS = frozenset({"ffn_down", "attn_o"})

_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ATTENTION = {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"}
_FEED_FORWARD = {weight: module.replace("mlp", "feed_forward") for weight, module in _MLP.items()}
# Weights of one matrix stand in its order.
_FUSED_MLP = {"ffn_gate": "mlp.gate_up_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_ATTENTION = dict.fromkeys(("attn_q", "attn_k", "attn_v"), "self_attn.qkv_proj") | {"attn_o": "self_attn.o_proj"}
_NEOX = dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attention.query_key_value") | {
    "attn_o": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_PRE_NORMS = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
_GEMMA_PRE_NORMS = {"attn": "input_layernorm", "ffn": "pre_feedforward_layernorm"}
_POST_NORMS = {"attn": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"}
_MOE = "its FFN is a mixture of experts: which neurons a layer has depends on the token"
_FORESIGHT = "its tokens see those behind them"
# What any config may switch off, as transformers reads it, with the reason why it may not.
_ALWAYS = {"is_causal": _FORESIGHT, "return_dict": "what models return is read by name"}


@dataclass(frozen=True)
class Family:
    """How the models of one architecture name and store their weights, and how they add their blocks.

    A layer adds to the residual stream h, one after the other or, where `parallel` says so, from the same h,

        multiplier * after(block(before(h))),   block: attention, FFN

    and logits are W_U norm(h) / logits_scaling, or c tanh(. / c) of that. What is not said here changes no neuron's
    contribution: norms and RoPE of q and k, attention's softcap, scale and window.

    Attributes:
        base: the model below the head.
        norm, embedding: its final norm and its embedding.
        modules: by weight, its module inside a layer; without `ffn_gate` the FFN has no gate.
        fused: q, k and v, and gate and up, are one matrix each: one below the other (`stacked`), or q, k and v of each
            head (`by_head`). None: every weight is a matrix of its own.
        before, after: norms in front of and behind the blocks, by sublayer.
        gain_offset: what a norm adds to its weight.
        centred: norms subtract the mean and add a bias (LayerNorm); else RMS norm.
        parallel: the config's name for whether both blocks read the same stream.
        multiplier, logits_scaling, logits_softcap, eps, d_ff: the config's names of these.
        embedding_scale: the config's name of what embeddings are multiplied by; `sqrt` is the square root of d_model.
        attention_softcap: the config's name of that of attention, which torch's own attention passes over.
        window: the config's name of how many tokens some layers attend to, or all (`windowed` None).
        windowed: what `layer_types` calls those layers; without it the family reads no `layer_types`.
        renamed: beginnings of names in checkpoints, and what they are in the model.
        never: settings that may not be set, with the reason.
    """

    base: str = "model"
    norm: str = "norm"
    embedding_name: str = "embed_tokens"
    modules: Mapping[str, str] = field(default_factory=lambda: _MLP | _ATTENTION)
    fused: Literal["stacked", "by_head"] | None = None
    before: Mapping[str, str] = field(default_factory=lambda: _PRE_NORMS)
    after: Mapping[str, str] = field(default_factory=dict)
    gain_offset: float = 0.0
    centred: bool = False
    parallel: str | None = None
    multiplier: str | None = None
    logits_scaling: str | None = None
    logits_softcap: str | None = None
    embedding_scale: str | None = None
    eps: str = "rms_norm_eps"
    d_ff: str = "intermediate_size"
    attention_softcap: str | None = None
    window: str | None = None
    windowed: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    never: Mapping[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> str:
        return f"{self.base}.{self.embedding_name}"

    @property
    def final_norm(self) -> str:
        return f"{self.base}.{self.norm}"

    def layer(self, number: int) -> str:
        """A layer's module."""
        return f"{self.base}.layers.{number}"

    def block(self, sublayer: str, layer: int) -> str:
        """The module of a sublayer: attention (`attn`) or FFN (`ffn`)."""
        inside = self.modules["attn_o" if sublayer == "attn" else "ffn_down"].partition(".")[0]
        return f"{self.layer(layer)}.{inside}"

    def norm_behind(self, sublayer: str, layer: int) -> str | None:
        """The norm behind a block, None if there is none."""
        return f"{self.layer(layer)}.{self.after[sublayer]}" if self.after else None

    def gain(self, weight: Tensor) -> Tensor:
        """What a norm multiplies by, from its weight."""
        return weight + self.gain_offset if self.gain_offset else weight

    def module(self, weight: str, layer: int) -> str:
        """The module that holds a site's or another weight, alone or with others; embedding and head have no layer."""
        if weight == "head":
            return "lm_head"
        return self.embedding if weight == "embedding" else f"{self.layer(layer)}.{self.modules[weight]}"

    def weight(self, weight: str, layer: int) -> str:
        """The checkpoint's name of it."""
        return f"{self.module(weight, layer)}.weight"

    def stored_index(self, weight: str, index: Tensor, sizes: Geometry) -> Tensor:
        """Where rows (or columns) of a weight lie in the matrix that holds it."""
        shared = [other for other, module in self.modules.items() if module == self.modules[weight]]
        if len(shared) == 1:
            return index
        if self.fused == "by_head":
            return (index // sizes.d_head * len(shared) + shared.index(weight)) * sizes.d_head + index % sizes.d_head
        return index + sum(sizes.weight_shape(other)[0] for other in shared[: shared.index(weight)])

    def whole_matrices(self) -> str | None:
        """Why what moves whole matrices does not take such a model; None if it does."""
        if self.fused is not None:
            return "it keeps several weights in one matrix"
        return None if self.modules == _LLAMA.modules else "its weights have other names than Llama's"

    def foldable(self) -> str | None:
        """Why the gains of its norms cannot be folded into the weights behind them; None if they can."""
        if self.centred:
            return "its norms subtract the mean"
        return None if self.before else "its blocks read the residual stream without a norm in front of them"


_IN_ALL = Family(window="sliding_window")
_IN_SOME = Family(window="sliding_window", windowed="sliding_attention")
_GEMMA = Family(gain_offset=1.0, embedding_scale="sqrt", never={"use_bidirectional_attention": _FORESIGHT})
_GEMMA_3 = replace(
    _GEMMA,
    before=_GEMMA_PRE_NORMS,
    after=_POST_NORMS,
    logits_softcap="final_logit_softcapping",
    window="sliding_window",
    windowed="sliding_attention",
)
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": _IN_ALL,
    "qwen2": _IN_SOME,
    "qwen3": _IN_SOME,
    "smollm3": _IN_SOME,
    "granite": Family(
        multiplier="residual_multiplier", logits_scaling="logits_scaling", embedding_scale="embedding_multiplier"
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA_3, attention_softcap="attn_logit_softcapping"),
    "gemma3_text": _GEMMA_3,
    "olmo2": Family(before={}, after=_POST_NORMS),
    "phi3": replace(_IN_ALL, modules=_FUSED_MLP | _FUSED_ATTENTION, fused="stacked"),
    "gpt_neox": Family(
        base="gpt_neox",
        norm="final_layer_norm",
        embedding_name="embed_in",
        modules=_NEOX,
        fused="by_head",
        centred=True,
        parallel="use_parallel_residual",
        eps="layer_norm_eps",
        renamed={"embed_out.": "lm_head."},
    ),
    "llama4_text": Family(
        modules=_FEED_FORWARD | _ATTENTION,
        d_ff="intermediate_size_mlp",
        window="attention_chunk_size",
        windowed="chunked_attention",
        never={"moe_layers": _MOE},
    ),
}
SUPPORTED = tuple(FAMILIES)
_LLAMA = FAMILIES["llama"]
_REFUSED = {
    "gemma3": "it takes images; save its language model alone (Gemma3ForCausalLM)",
    "llama4": f"it takes images, and {_MOE}",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3"), _MOE),
    "gpt2": "its weights are stored transposed and its positions are embedded",
    "opt": "its positions are embedded and its FFN has no gate",
    "phi": "its head has a bias and its FFN has no gate",
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


def family(config: Any) -> Family:
    """What a config's architecture is like.

    Raises:
        UserError: the architecture is not one of `SUPPORTED`, or a setting is not covered, by name and with the reason.
    """
    kind = getattr(config, "model_type", "unknown")
    if kind not in FAMILIES:
        raise UserError(
            f"architecture {kind!r} is not supported: {_REFUSED.get(kind, 'its residual arithmetic was not checked')};"
            f" supported are {', '.join(SUPPORTED)}"
        )
    found = FAMILIES[kind]
    for name, value, reason in _not_covered(config, found):
        raise UserError(f"config: {name} {shown(value)} of architecture {kind!r} is not supported: {reason}")
    return found


def _not_covered(config: Any, kind: Family) -> Iterator[tuple[str, Any, str]]:
    """Settings that are not covered: name, value and reason."""
    if getattr(config, "is_heterogeneous", False):
        yield "per_layer_config", list(config.to_dict()["per_layer_config"]), "these layers differ from the others"
        return  # transformers gives no others of such a config
    for name, reason in kind.never.items():
        if value := getattr(config, name, None):
            yield name, value, reason
    for name, reason in _ALWAYS.items():
        if not (value := getattr(config, name, True)):
            yield name, value, reason
    if kind.fused != "by_head" and getattr(config, "head_dim", 0) is None:
        yield "head_dim", None, "transformers takes a number or no such key here; take it out"
    if kind.window is None:
        return
    window, of_layers = getattr(config, kind.window, None), getattr(config, "layer_types", None) or []
    if kind.windowed is None:
        used = window is not None
    else:
        for layers in of_layers:
            if layers not in ("full_attention", kind.windowed):
                yield "layer_types", layers, f"its layers are full_attention or {kind.windowed}"
        # Whoever cannot switch windows off makes their mask in any case.
        used = kind.windowed in of_layers or not hasattr(config, "use_sliding_window")
    if used and not (window is not None and window > 0):
        yield kind.window, window, "expected a number above 0"


def context_length(config: Any, *, left: bool = False) -> int | None:
    """The longest text that a model takes, tokens; None if its config does not say.

    With longrope no longer than its frequencies are the short ones: beyond that all tokens of a batch get others, also
    those of shorter texts beside it.

    Args:
        left: texts are filled up on the left. Llama 4's attention counts that as positions where it scales queries with
            them (`attn_temperature_tuning`), from `floor_scale` on.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    every = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # one, or by kind of layer
    short = [rope.get("original_max_position_embeddings") for rope in every if rope.get("rope_type") == "longrope"]
    if left and getattr(config, "attn_temperature_tuning", False):
        short.append(max(1, config.floor_scale - 1))
    return min(filter(None, (getattr(config, "max_position_embeddings", None), *short)), default=None)


def setting(config: Any, name: str | None) -> float:
    """A number of a config; 1 for a family without such a setting (None)."""
    return float(getattr(config, name)) if name is not None else 1.0


def in_parallel(config: Any) -> bool:
    """Whether attention and FFN of a layer read the same stream."""
    name = family(config).parallel
    return name is not None and bool(getattr(config, name))


def geometry(config: Any) -> Geometry:
    """Read the sizes from a Hugging Face config and refuse what the maths does not cover.

    Raises:
        UserError: as `family`; heads that cannot be shared evenly.
    """
    found = family(config)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise UserError(f"config: {num_heads} heads cannot share {num_kv_heads} key/value heads evenly")
    own_width = None if found.fused == "by_head" else getattr(config, "head_dim", None)
    return Geometry(
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ff=getattr(config, found.d_ff),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_head=own_width or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
    )


def check_same_shape(first: Geometry, second: Geometry, tuned: str, base: str) -> None:
    """Raise UserError unless a trained model and its base, which are called so, are of one shape."""
    if first != second:
        name = next(name for name in vars(first) if getattr(first, name) != getattr(second, name))
        raise UserError(
            f"{tuned}: {name} {getattr(first, name)}, its base model {base} has {getattr(second, name)}; what training"
            " added is the difference of two models of one shape"
        )


def check_whole_matrices(config: Any, what: str) -> None:
    """Raise UserError unless each weight is a matrix of its own with Llama's name, as what moves matrices takes them.

    Args:
        what: that moves them.
    """
    if reason := family(config).whole_matrices():
        raise UserError(f"architecture {config.model_type!r}: {what} moves whole matrices, and {reason}")


def module_name(weight: str, layer: int) -> str:
    """The module of a site's or another weight (`OTHER_WEIGHTS`) as Llama names it; see `check_whole_matrices`."""
    return _LLAMA.module(weight, layer)


def weight_name(layer: int, site: str) -> str:
    """Llama's name of a site's weight in the checkpoint."""
    return _LLAMA.weight(site, layer)


def as_rows(weight: Tensor, site: str) -> Tensor:
    """A view of a site's weight as `[weight row, d_model]`; writing to it writes to the weight."""
    return weight.mT if site in _STORED_AS_COLUMNS else weight


def feature_of(site: str) -> str:
    """'output' if a neuron is one output feature of its projection (a row), 'input' if one input feature (a column)."""
    return "input" if site in _STORED_AS_COLUMNS else "output"
