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
