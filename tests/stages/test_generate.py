from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages.encoding import render_prompt, tokenize
from pkt_stages.evaluation.backends import HfBackend
from pkt_stages.examples import read_examples
from pkt_stages.models.load import identity, load_model, load_tokenizer, resolve
from tests.conftest import write_examples
from tests.stages.selection_files import options

Run = Callable[..., tuple[int, str, str]]
ANSWERS = [f"It is {i + 1}." for i in range(5)]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    names = {"out": "generated.jsonl", "metrics": "generate.json", "scratch": "scratch"}
    return {"train": write_examples(tmp_path / "train.jsonl", ANSWERS)} | {k: tmp_path / v for k, v in names.items()}


def generate(pkt: Run, source: Path, paths: dict[str, Path], *settings: str) -> tuple[int, str, str]:
    return pkt("generate", "--source", source, *options(**paths), "--max-new-tokens", "12", *settings)


def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path, *texts: str) -> None:
    """Let the backend write these answers, each with its end token."""
    tokenizer = load_tokenizer(resolve(str(folder)))
    ids = iter([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts])

    def answers(self: Any, requests: Sequence[Any], sampling: Any) -> list[list[int]]:
        return [next(ids) for _ in requests]

    monkeypatch.setattr(HfBackend, "generate", answers)


def test_answers_are_the_sources_greedy_ones(pkt: Run, source_folder: Path, paths: dict[str, Path]) -> None:
    status, printed, err = generate(pkt, source_folder, paths, "--batch-size", "2")
    assert status == 0, err
    ref = resolve(str(source_folder))
    model, tokenizer = load_model(ref), load_tokenizer(ref)
    found, asked = read_examples(paths["out"]), read_examples(paths["train"])
    assert [(e.dataset, e.id, e.prompt) for e in found] == [(e.dataset, e.id, e.prompt) for e in asked]
    cut_off = []
    for example in found:
        ids, _ = tokenize(tokenizer, render_prompt(tokenizer, "chat", example.prompt))
        made: list[int] = []
        while len(made) < 12 and made[-1:] != [tokenizer.eos_token_id]:
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        if made[-1] != tokenizer.eos_token_id:
            cut_off.append(example.id)
        assert example.answer == tokenizer.decode(made, skip_special_tokens=True)
    recorded = json.loads(paths["metrics"].read_text())
    assert recorded["source"] == identity(ref)
    assert (recorded["num_asked"], recorded["num_examples"], recorded["empty_ids"]) == (5, 5, [])
    assert recorded["cut_off_ids"] == cut_off
    assert printed.startswith(f"generate: 5 answers, {len(cut_off)} of them cut off at max_new_tokens -> ")
    assert not list(paths["scratch"].iterdir())


def test_finetune_reads_them(pkt: Run, source_folder: Path, target_folder: Path, paths: dict[str, Path]) -> None:
    assert generate(pkt, source_folder, paths, "--num-examples", "3")[0] == 0
    given = {"train": paths["out"], "out": paths["out"].with_name("adapters"), "metrics": paths["metrics"]}
    settings = ["--method", "seqkd", "--epochs", "1", "--rank", "2"]
    status, _, err = pkt("finetune", "--target", target_folder, *options(**given, scratch=paths["scratch"]), *settings)
    assert status == 0, err
    assert json.loads(paths["metrics"].read_text())["num_examples"] == 3


def test_an_interrupted_run_goes_on(
    pkt: Run, source_folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(pkt, source_folder, paths, "--batch-size", "2")[0] == 0
    whole = paths["out"].read_bytes(), paths["metrics"].read_bytes()
    for name in ("out", "metrics"):
        paths[name].unlink()
    sizes: list[int] = []
    ask = HfBackend.generate

    def counted(self: Any, requests: Sequence[Any], sampling: Any) -> Any:
        if len(sizes) == 2:
            sizes.append(0)
            raise InterruptedError
        sizes.append(len(requests))
        return ask(self, requests, sampling)

    monkeypatch.setattr(HfBackend, "generate", counted)
    with pytest.raises(InterruptedError):
        generate(pkt, source_folder, paths, "--batch-size", "2")
    assert not paths["out"].exists() and not paths["metrics"].exists()
    assert generate(pkt, source_folder, paths, "--batch-size", "2")[0] == 0
    assert sizes == [2, 2, 0, 1]
    assert (paths["out"].read_bytes(), paths["metrics"].read_bytes()) == whole


def test_sampled_answers_follow_the_seed(pkt: Run, source_folder: Path, paths: dict[str, Path]) -> None:
    made = []
    for seed in ("0", "0", "100"):
        assert generate(pkt, source_folder, paths, "--temperature", "1", "--seed", seed)[0] == 0
        made.append(paths["out"].read_text())
    assert made[0] == made[1] != made[2]


def test_empty_answers_are_left_out_and_reported(
    pkt: Run, source_folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, source_folder, "One.", "", "Three.", " \n", "Five.")
    status, printed, err = generate(pkt, source_folder, paths)
    assert status == 0
    assert err == "warning: 2 of 5 answers are empty and left out, e.g. toy_1\n"
    assert printed.startswith("generate: 3 answers, 0 of them cut off")
    assert [(e.id, e.answer) for e in read_examples(paths["out"])] == [
        ("toy_0", "One."),
        ("toy_2", "Three."),
        ("toy_4", "Five."),
    ]
    recorded = json.loads(paths["metrics"].read_text())
    assert (recorded["num_asked"], recorded["num_examples"]) == (5, 3)
    assert recorded["empty_ids"] == ["toy_1", "toy_3"]


def test_nothing_but_empty_answers(
    pkt: Run, source_folder: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, source_folder, *[""] * 5)
    status, _, err = generate(pkt, source_folder, paths)
    assert status == 2
    assert err == f"pkt: error: {source_folder}: all 5 answers are empty; look at the template 'chat'\n"
    assert not paths["out"].exists() and not paths["metrics"].exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--num-examples", "0"], "options of `generate`: num_examples must be at least 1, found 0"),
        (["--num-examples", "6"], "{train}: holds 5 examples, num_examples asks for 6"),
        (["--temperature", "-1"], "options of `generate`: temperature must be at least 0, found -1.0"),
        (
            ["--max-new-tokens", "250"],
            "example toy_0: 25 tokens and max_new_tokens 250 are more than the 256 that the source takes;"
            " lower max_new_tokens",
        ),
    ],
)
def test_bad_settings(settings: list[str], message: str, pkt: Run, source_folder: Path, paths: dict[str, Path]) -> None:
    status, _, err = generate(pkt, source_folder, paths, *settings)
    assert (status, err) == (2, f"pkt: error: {message.format(**paths)}\n")
    assert not paths["out"].exists()
