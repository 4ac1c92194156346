"""Every architecture through the commands, as source and as target; and what refuses it, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages import tasks
from pkt_stages.examples import write_jsonl
from pkt_stages.models.sites import context_length
from tests.conftest import write_examples
from tests.families import CASES, Case, save
from tests.methods.test_transport import texts

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", CASES)
def test_attribute_to_evaluate(pkt: Run, tmp_path: Path, name: str) -> None:
    """From two models of a family to an evaluated injection, which changes the answers' likelihood."""
    case = CASES[name]
    source = save(case, tmp_path / "source", seed=1, hidden_size=64, intermediate_size=56)
    target = save(case, tmp_path / "target", dtype=torch.bfloat16)

    def run(*words: object) -> str:
        status, printed, err = pkt(*words)
        assert status == 0, err
        return printed

    extract = write_examples(tmp_path / "extract.jsonl", ["It is 1.", "It is 2."])
    transfer = write_examples(tmp_path / "transfer.jsonl", ["It is 11."], start=10)
    align = write_examples(tmp_path / "align.jsonl", [f"The answer is {i}." for i in range(8)], start=100)
    for model in (source, target):
        run(
            *("attribute", "--model", model, "--extract", extract, "--transfer", transfer),
            *("--out", tmp_path / f"{model.name}.safetensors", "--scratch", tmp_path / "scratch"),
        )
    scores = (
        *("--source-scores", tmp_path / "source.safetensors"),
        *("--target-scores", tmp_path / "target.safetensors"),
    )
    run("select", *scores, "--source", source, "--out", tmp_path / "selection")
    run(
        *("align", "--target", target, "--selection", tmp_path / "selection", "--extract", extract, "--align", align),
        *("--out", tmp_path / "mapping", "--metrics", tmp_path / "align.json", "--scratch", tmp_path / "scratch"),
        *("--steps", 1, "--batch-size", 2, "--validation-size", 2, "--rate", 0.1, "--set", "init_std=0.05"),
        *("--lr", "1e-2"),
    )
    run(
        *("inject", "--target", target, "--selection", tmp_path / "selection", "--mapping", tmp_path / "mapping"),
        *("--out", tmp_path / "row"),
    )
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(2)]
    test = tmp_path / "test.jsonl"
    write_jsonl(test, [tasks.load("gsm8k").example(row, f"q{i}").to_row() for i, row in enumerate(rows)])
    run(
        *("evaluate", "--model", target, "--task", "gsm8k", "--test", test, "--nats-only"),
        *("--delta", tmp_path / "row", "--out", tmp_path / "m.json", "--scratch", tmp_path / "scratch"),
    )
    found = json.loads((tmp_path / "m.json").read_text())["runs"]
    run(
        *("evaluate", "--model", target, "--task", "gsm8k", "--test", test, "--nats-only"),
        *("--out", tmp_path / "base.json", "--scratch", tmp_path / "scratch"),
    )
    base = json.loads((tmp_path / "base.json").read_text())["runs"]
    assert [run["label"] for run in found] == ["toy_10"]
    assert found[0]["log_likelihoods"] != base[0]["log_likelihoods"]


@pytest.mark.parametrize("names", [("qwen2", "phi3"), ("llama3", "gemma")])
def test_compare(pkt: Run, tmp_path: Path, names: tuple[str, str]) -> None:
    """Models of one size need not have the same weights, nor mean the same by weights of the same names."""
    sizes = {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False}
    first, second = (save(CASES[name], tmp_path / name, **sizes) for name in names)
    given = ("--texts", texts(tmp_path / "t.jsonl"), "--num-texts", 4, "--reduction", "all")
    pair = ("--first", first, "--second", second, "--out", tmp_path / "o", "--metrics", tmp_path / "m.json")
    status, printed, err = pkt("compare", *pair, *given)
    assert status == 0, err
    assert "; no ranges, for their weights are not the same ones; 4 texts" in printed
    assert json.loads((tmp_path / "m.json").read_text())["ranges"] is None


FUSED = "moves whole matrices, and it keeps several weights in one matrix"
FOLD = "transports and reexpress fold the norms' gains into the weights, and "


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("phi3", "seek", f"Seeking {FUSED}"),
        ("neox", "grid", f"the grid {FUSED}"),
        ("llama4", "grid", "the grid moves whole matrices, and its weights have other names than Llama's"),
        ("phi3", "correlate", f"{FOLD}it keeps several weights in one matrix"),
        ("neox", "correlate", f"{FOLD}its norms subtract the mean"),
        ("olmo2", "correlate", f"{FOLD}its blocks read the residual stream without a norm in front of them"),
        ("neox", "reexpress", f"{FOLD}its norms subtract the mean"),
    ],
)
def test_what_is_not_exact_is_refused(pkt: Run, tmp_path: Path, name: str, command: str, said: str) -> None:
    model = save(CASES[name], tmp_path / "m")
    pair = ("--source", model, "--target", model)
    extract = write_examples(tmp_path / "extract.jsonl", ["It is 1."])
    words: dict[str, tuple[Any, ...]] = {
        "seek": ("seek", *pair, "--extract", extract, "--metrics", tmp_path / "m.json"),
        "grid": ("derive", "--code", "grid", *pair),
        "correlate": ("correlate", *pair, "--texts", texts(tmp_path / "t.jsonl")),
        "reexpress": ("reexpress", "--model", model),
    }
    status, _, err = pkt(*words[command], "--out", tmp_path / "o")
    assert (status, err) == (2, f"pkt: error: architecture {CASES[name].kind!r}: {said}\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma", "what its embeddings are multiplied by depends on d_model"),
        ("gemma3", "a norm behind each block has gains, which no other basis of the residual stream keeps"),
    ],
)
def test_what_cannot_be_written_again(pkt: Run, tmp_path: Path, name: str, why: str) -> None:
    status, _, err = pkt("reexpress", "--model", save(CASES[name], tmp_path / "m"), "--out", tmp_path / "o")
    kind = CASES[name].kind
    assert err == f"pkt: error: architecture {kind!r} cannot be written again: {why}; use a model of another one\n"
    assert status == 2 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            Case("llama4_text", {"moe_layers": [1], "num_local_experts": 2, "intermediate_size_mlp": 56}),
            "config: moe_layers [1] of architecture 'llama4_text' is not supported: its FFN is a mixture of experts:"
            " which neurons a layer has depends on the token",
        ),
        (
            Case("gemma3_text", {"use_bidirectional_attention": True}),
            "config: use_bidirectional_attention True of architecture 'gemma3_text' is not supported: its tokens see"
            " those behind them",
        ),
        (
            Case("gemma", {"use_bidirectional_attention": True}),
            "config: use_bidirectional_attention True of architecture 'gemma' is not supported: its tokens see those"
            " behind them",
        ),
        (
            Case("llama", {"is_causal": False}),
            "config: is_causal False of architecture 'llama' is not supported: its tokens see those behind them",
        ),
        (
            Case("llama", {"return_dict": False}),
            "config: return_dict False of architecture 'llama' is not supported: what models return is read by name",
        ),
        (
            Case("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}),
            "config: layer_types 'chunked_attention' of architecture 'qwen2' is not supported: its layers are"
            " full_attention or sliding_attention",
        ),
        (
            Case("smollm3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None}),
            "config: sliding_window None of architecture 'smollm3' is not supported: expected a number above 0",
        ),
        (
            Case("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": None}),
            "config: sliding_window None of architecture 'gemma2' is not supported: expected a number above 0",
        ),
        (
            Case("mistral", {"sliding_window": 0}),
            "config: sliding_window 0 of architecture 'mistral' is not supported: expected a number above 0",
        ),
        (
            Case("llama4_text", {"moe_layers": [], "attention_chunk_size": None}),
            "config: attention_chunk_size None of architecture 'llama4_text' is not supported: expected a number above",
        ),
        (
            Case("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 16}),
            "architecture 'qwen3_moe' is not supported: its FFN is a mixture of experts: which neurons a layer has"
            " depends on the token; supported are llama, ",
        ),
        (
            Case("stablelm", {}),
            "architecture 'stablelm' is not supported: its residual arithmetic was not checked; supported are llama, ",
        ),
    ],
)
def test_architectures_and_settings_that_are_refused(pkt: Run, tmp_path: Path, case: Case, said: str) -> None:
    model = save(case, tmp_path / "m")
    extract = write_examples(tmp_path / "extract.jsonl", ["It is 1."])
    status, _, err = pkt("attribute", "--model", model, "--extract", extract, "--out", tmp_path / "o")
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        (
            "granite",
            {"per_layer_config": {"1": {"residual_multiplier": 0.5}}},
            "per_layer_config ['1'] of architecture 'granite' is not supported: these layers differ from the others",
        ),
        (
            "qwen2",
            {"head_dim": None},
            "head_dim None of architecture 'qwen2' is not supported: transformers takes a number or no such key here;"
            " take it out",
        ),
    ],
)
def test_configs_that_transformers_explains_badly(
    pkt: Run, tmp_path: Path, name: str, written: dict[str, Any], said: str
) -> None:
    """The model that is meant is named, too."""
    model = save(CASES[name], tmp_path / "m")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | written))
    extract = write_examples(tmp_path / "extract.jsonl", ["It is 1."])
    status, _, err = pkt("attribute", "--model", model, "--extract", extract, "--out", tmp_path / "o")
    assert (status, err) == (2, f"pkt: error: {model}: config: {said}\n")
    assert not (tmp_path / "o").exists()


def test_longrope(pkt: Run, tmp_path: Path) -> None:
    """A text beyond the original context would give all tokens of its batch other frequencies: it is too long."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"original_max_position_embeddings": 64}
    case = Case("llama", {"rope_parameters": rope})
    assert context_length(case.config()) == 64
    layered = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert context_length(CASES["gemma3"].config(rope_parameters=layered)) == 64
    assert context_length(CASES["llama3"].config()) == 256  # whose original one is 64
    extract = write_examples(tmp_path / "extract.jsonl", ["It is 1.", f"It is {'very ' * 20}2."])
    words = ("attribute", "--extract", extract, "--out", tmp_path / "o", "--model", save(case, tmp_path / "m"))
    status, _, err = pkt(*words)
    assert status == 2 and "example toy_1: " in err and err.endswith(" tokens of context, the model takes 64\n")


def test_llama_4_scales_queries_by_columns(pkt: Run, tmp_path: Path) -> None:
    """Which count what a batch is filled up with on the left; a text for which that matters is too long to evaluate."""
    case = Case("llama4_text", {**CASES["llama4"].settings, "no_rope_layers": [1, 0], "floor_scale": 32})
    assert context_length(case.config()) == 256 and context_length(case.config(), left=True) == 31
    model, test = save(case, tmp_path / "m"), tmp_path / "test.jsonl"
    row = {"question": "1 + 1?" * 9, "answer": "#### 2"}
    write_jsonl(test, [tasks.load("gsm8k").example(row, "q").to_row()])
    given = ("--task", "gsm8k", "--test", test, "--nats-only", "--out", tmp_path / "o", "--scratch", tmp_path / "s")
    status, _, err = pkt("evaluate", "--model", model, *given)
    assert status == 2 and " tokens with the reference answer, the model's context is 31; " in err
    assert not (tmp_path / "o").exists()
