"""Small random models of every architecture, with odd settings, and what the tests need to know of them by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conftest import save_tokenizer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """An architecture with some settings, and where its blocks lie in a layer.

    Attributes:
        behind: norms behind attention and FFN.
        offset: of a norm's gain.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = "model"
    norm: str = "norm"
    attn: str = "self_attn"
    o: str = "o_proj"
    ffn: str = "mlp"
    down: str = "down_proj"
    behind: tuple[str, str] | None = None
    offset: float = 0.0

    def config(self, **more: Any) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.kind, **(SIZES | dict(self.settings) | more))


_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
_ROPES: dict[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_NEOX: dict[str, Any] = {"base": "gpt_neox", "norm": "final_layer_norm", "attn": "attention", "o": "dense"}
_NEOX |= {"down": "dense_4h_to_h"}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CASES = {
    "llama": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": Case("llama", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 64}}),
    "mistral": Case("mistral", {"sliding_window": 4}),
    "qwen2": Case("qwen2", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "smollm3": Case(
        "smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 4, "mlp_bias": True}
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 3.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gemma": Case("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}, offset=1.0),
    "gemma2": Case(
        "gemma2",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 6.0,
            "attn_logit_softcapping": 2.0,
        },
        behind=_BEHIND,
        offset=1.0,
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": _ROPES,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        behind=_BEHIND,
        offset=1.0,
    ),
    "olmo2": Case("olmo2", {"attention_bias": True}, behind=_BEHIND),
    "phi3": Case("phi3", {"rope_parameters": _PARTIAL, "sliding_window": 4}),
    "neox": Case("gpt_neox", {"head_dim": None, "num_key_value_heads": None, "rope_parameters": _PARTIAL}, **_NEOX),
    "neox, in turn": Case(
        "gpt_neox",
        {
            "head_dim": None,
            "num_key_value_heads": None,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
        **_NEOX,
    ),
    "llama4": Case("llama4_text", {"moe_layers": [], "intermediate_size_mlp": 56}, ffn="feed_forward"),
}


def make(case: Case, *, seed: int = 0, **more: Any) -> Any:
    """A random model whose gains and biases are random, too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(case.config(**more)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                is_gain = "norm" in name and name.endswith("weight")
                weight.copy_(0.3 * torch.randn_like(weight) + (1 - case.offset if is_gain else 0.0))
    return model


def save(case: Case, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """The same as a folder with the byte tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # whose lines would stand among those of a command
    model = make(case, seed=seed, **more).to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
