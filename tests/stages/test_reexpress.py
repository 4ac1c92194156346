"""A model written again computes the same, for every family, option and composition; what cannot be is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pkt_stages.stages import reexpress as stage
from tests.conftest import save_tokenizer

Run = Callable[..., tuple[int, str, str]]
SIZES = {
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LARGER = ("--num-layers", 4, "--d-model", 96, "--d-ff", 56, "--num-heads", 8, "--num-kv-heads", 4)
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 4}),
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}


def make(folder: Path, family: str, **changes: Any) -> Path:
    """A random model whose gains and biases are random, too."""
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**(SIZES | more | changes)))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 1:
                gain = name.endswith("norm.weight")
                weight.copy_(0.3 * torch.randn_like(weight) + float(gain))
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(2 * 20).view(2, 20) * 7 % 264
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(pkt: Run, tmp_path: Path, family: str) -> None:
    model, out = make(tmp_path / "m", family), tmp_path / "out"
    status, printed, err = pkt("reexpress", "--model", model, "--out", out, *LARGER)
    assert status == 0, err
    assert printed.startswith("reexpress: m as 4 x 96, FFN 56, 8 heads, ")
    assert torch.allclose(logits(out), logits(model), atol=1e-4)
    config = AutoConfig.from_pretrained(out)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (96, 4, 12)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama, biases", "llama, tied"])
@pytest.mark.parametrize(
    ("permute", "rotate", "filler"), itertools.product((True, False), (True, False), ("zero", "random"))
)
@pytest.mark.parametrize("shape", [(), LARGER, ("--num-layers", 3), ("--d-ff", 41), ("--d-model", 52)])
def test_every_composition(
    pkt: Run, tmp_path: Path, family: str, permute: bool, rotate: bool, filler: str, shape: tuple[object, ...]
) -> None:
    model, out = make(tmp_path / "m", family), tmp_path / "out"
    options = ("--permute" if permute else "--no-permute", "--rotate" if rotate else "--no-rotate", "--filler", filler)
    status, _, err = pkt("reexpress", "--model", model, "--out", out, *options, *shape)
    assert status == 0, err
    assert torch.allclose(logits(out), logits(model), atol=1e-4)
    same = load_file(out / "model.safetensors")
    if not (permute or rotate or shape):
        before = load_file(model / "model.safetensors")
        assert same.keys() == before.keys() and all(torch.equal(same[name], before[name]) for name in before)


@pytest.mark.parametrize("heads", [(8, 8), (16, 4), (8, 4), (16, 16)])
def test_key_value_heads_may_be_shared_by_more_or_fewer(pkt: Run, tmp_path: Path, heads: tuple[int, int]) -> None:
    """2 groups of 2: as single heads, as wider groups, as more groups."""
    model, out = make(tmp_path / "m", "llama, biases"), tmp_path / "out"
    shape = ("--num-heads", heads[0], "--num-kv-heads", heads[1])
    assert pkt("reexpress", "--model", model, "--out", out, *shape)[0] == 0
    assert torch.allclose(logits(out), logits(model), atol=1e-4)


def test_two_runs_are_equal_and_a_seed_is_another_model(pkt: Run, tmp_path: Path) -> None:
    model = make(tmp_path / "m", "llama, biases")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert pkt("reexpress", "--model", model, "--out", tmp_path / name, *LARGER, "--seed", seed)[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_base_and_trained_model_share_their_filler(pkt: Run, tmp_path: Path) -> None:
    """Where the model has nothing, the difference of two models is zero; elsewhere it is not."""
    base = make(tmp_path / "base", "llama, biases")
    trained = make(tmp_path / "trained", "llama, biases")
    weights = {n: w + 0.1 * torch.randn_like(w) for n, w in load_file(base / "model.safetensors").items()}
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    for folder in (base, trained):
        assert pkt("reexpress", "--model", folder, "--out", tmp_path / f"{folder.name}-out", *LARGER)[0] == 0
    one, two = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("base", "trained"))
    changed = {name: (one[name] != two[name]).any(1) for name in one if name.endswith("gate_proj.weight")}
    assert sorted(int(rows.sum()) for rows in changed.values()) == [0, 0, 40, 40]


def test_shape_of_another_model(pkt: Run, tmp_path: Path) -> None:
    model = make(tmp_path / "m", "llama, biases")
    like = make(tmp_path / "like", "llama, biases", hidden_size=96, intermediate_size=64, num_hidden_layers=3)
    out = tmp_path / "out"
    assert pkt("reexpress", "--model", model, "--like", like, "--num-layers", 2, "--out", out)[0] == 0
    config = AutoConfig.from_pretrained(out)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 64, 2)
    assert json.loads((out / "reexpression.json").read_text())["of"]["name"] == "m"


def test_large_models_are_written_in_shards(pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHARD_BYTES", 60_000)
    model, out = make(tmp_path / "m", "llama, biases"), tmp_path / "out"
    assert pkt("reexpress", "--model", model, "--out", out, *LARGER)[0] == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 3
    assert torch.allclose(logits(out), logits(model), atol=1e-4)


def test_vllm_loads_it(pkt: Run, tmp_path: Path) -> None:
    from pkt_stages.evaluation.backends import Continuation, HfBackend, VllmBackend
    from pkt_stages.models.load import load_model, load_tokenizer, resolve

    # vLLM knows few head widths.
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model, out = make(tmp_path / "m", "qwen2", **sizes), tmp_path / "out"
    larger = ("--d-model", 96, "--num-heads", 3, "--num-kv-heads", 1)
    assert pkt("reexpress", "--model", model, "--out", out, *larger)[0] == 0
    ref = resolve(str(model))
    hf = HfBackend(load_model(ref), load_tokenizer(ref))
    vllm = VllmBackend(str(out), load_tokenizer(ref), identity="x", dtype="float32")
    asked = [Continuation([0, 50, 51], [70, 80]), Continuation([0, 60], [7, 8, 9])]
    for one, two in zip(hf.continuation_logprobs(asked), vllm.continuation_logprobs(asked), strict=True):
        assert one == pytest.approx(two, abs=1e-4)
    vllm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--d-model", 47),
            "d_model 47 is smaller than the model's 48; a model can be written again in a shape that is as large or"
            " larger everywhere",
        ),
        (
            ("--num-heads", 9, "--num-kv-heads", 2),
            "9 heads cannot share 2 key/value heads evenly",
        ),
        (
            ("--num-heads", 6, "--num-kv-heads", 6),
            None,
        ),
        (
            ("--d-model", 49),
            "llama in this shape: The hidden size (49) is not a multiple of the number of attention heads (4).; choose"
            " another",
        ),
        (
            ("--num-heads", 4, "--num-kv-heads", 3),
            "4 heads cannot share 3 key/value heads evenly",
        ),
    ],
)
def test_bad_shapes(pkt: Run, tmp_path: Path, options: tuple[object, ...], message: str | None) -> None:
    model, out = make(tmp_path / "m", "llama, biases"), tmp_path / "out"
    status, _, err = pkt("reexpress", "--model", model, "--out", out, *options)
    assert (status, err) == ((2, f"pkt: error: {message}\n") if message else (0, ""))
    assert out.exists() is (message is None)


def test_more_groups_than_fit(pkt: Run, tmp_path: Path) -> None:
    """12 heads in 4 groups of 3 need two of the 6 new groups of 2 each: 8."""
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}
    model = make(tmp_path / "m", "llama, biases", **sizes)
    status, _, err = pkt(
        "reexpress", "--model", model, "--out", tmp_path / "out", "--num-heads", 12, "--num-kv-heads", 6
    )
    assert status == 2
    assert err == "pkt: error: 12 heads on 6 key/value heads: the model's 12 on 4 need 8 of these\n"


def test_another_head_width(pkt: Run, tmp_path: Path) -> None:
    model, like = make(tmp_path / "m", "llama, biases"), make(tmp_path / "like", "llama, biases", head_dim=16)
    status, _, err = pkt("reexpress", "--model", model, "--like", like, "--out", tmp_path / "out")
    assert (status, err) == (
        2,
        "pkt: error: d_head 16 is not the model's 12; RoPE ties the entries of a head together\n",
    )


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_gains_that_cannot_be_folded(pkt: Run, tmp_path: Path, value: float) -> None:
    model, out = make(tmp_path / "m", "llama, biases"), tmp_path / "out"
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    status, _, err = pkt("reexpress", "--model", model, "--out", out)
    assert status == 2
    assert "1 gains of model.layers.1.input_layernorm are zero or not finite" in err
    assert not out.exists()


def test_a_width_that_only_one_engine_reads(pkt: Run, tmp_path: Path) -> None:
    model, out = make(tmp_path / "m", "qwen2"), tmp_path / "out"
    status, _, err = pkt("reexpress", "--model", model, "--out", out, "--d-model", 96)
    assert status == 2
    assert "qwen2 with 4 heads of 12 at d_model 96: vLLM takes" in err and "choose d_model 48" in err


def test_another_folder_is_not_replaced(pkt: Run, tmp_path: Path) -> None:
    model = make(tmp_path / "m", "llama, biases")
    status, _, err = pkt("reexpress", "--model", model, "--out", model)
    assert status == 2 and "no reexpression.json, so it is not ours to replace" in err


def test_help_says_what_it_is_for(pkt: Run) -> None:
    assert "positive control" in " ".join(pkt("reexpress", "--help")[1].split())
