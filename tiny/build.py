"""The steps of the build: data, tokenizer, each model, scores; each writes below `out` and can run alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from pkt_stages.errors import UserError
from pkt_stages.examples import read_jsonl, write_jsonl
from tiny.corpus import Corpus, write_data
from tiny.scoring import Score, score_model
from tiny.settings import MODELS, ModelSettings
from tiny.tokenizer import save_tokenizer, train_tokenizer
from tiny.training import Trainer

TOKENIZER_OF = "target-chat"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_folders(models: Iterable[ModelSettings]) -> tuple[str, ...]:
    """The folders that building these models writes."""
    return tuple(
        f"{settings.name}-{phase}"
        for settings in models
        for phase in ("base", "early", "chat")
        if (phase != "base" or settings.base_steps > settings.first_step) and (phase != "early" or settings.early_steps)
    )


MODEL_FOLDERS = model_folders(MODELS.values())  # those that are shipped


def build_data(out: Path, corpus: Corpus) -> None:
    """Write the benchmark files and the held-out texts."""
    write_data(out, corpus)
    Console().print(f"data: {len(corpus.test)} tasks, pool and test rows -> {out}")


def build_tokenizer(out: Path, corpus: Corpus) -> None:
    """Train the tokenizer and put the same files into every model folder."""
    tokenizer = train_tokenizer(corpus)
    for folder in MODEL_FOLDERS:
        save_tokenizer(tokenizer, out / folder)
    Console().print(f"tokenizer: {len(tokenizer)} entries -> {len(MODEL_FOLDERS)} model folders in {out}")


def build_model(out: Path, scratch: Path, corpus: Corpus, settings: ModelSettings) -> None:
    """Train one model on one thread, from its checkpoint in `scratch` if there is one; write base, chat and log.

    Raises:
        UserError: if the tokenizer, or the model that it starts from, has not been built.
    """
    name = settings.name
    tokenizer = _read_tokenizer(out / TOKENIZER_OF)
    torch.set_num_threads(1)  # one thread's order of summation: the same bytes on any number of cores
    start = _read_model(out / settings.starts_from) if settings.starts_from else None
    trainer = Trainer(settings, corpus, tokenizer, scratch / f"{name}-{corpus.seed}.pt", start)
    if settings.base_steps > settings.first_step:
        _train(trainer, settings, "base", settings.base_steps, out)
    if settings.early_steps:
        _train(trainer, settings, "early", settings.early_steps, out)
    _train(trainer, settings, "chat", settings.total_steps, out)
    log = out / "training_log.jsonl"
    others = [row for _, row in read_jsonl(log) if row["model"] != name] if log.exists() else []
    write_jsonl(log, sorted(others + trainer.log, key=lambda row: (row["model"], row["step"])))


def build_scores(out: Path, corpus: Corpus) -> None:
    """Score the chat models on the test sets by level and write `scores.json`."""
    scores = {}
    for folder in (f"{name}-chat" for name in MODELS):
        model = LlamaForCausalLM.from_pretrained(str(out / folder))
        scores[folder] = score_model(model, _read_tokenizer(out / folder), corpus.test)
        Console().print(f"{folder}: " + ", ".join(_describe(task, score) for task, score in scores[folder].items()))
    rows = {folder: {task: score.as_json() for task, score in tasks.items()} for folder, tasks in scores.items()}
    (out / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _describe(task: str, score: Score) -> str:
    return f"{task} {100 * score.accuracy:.1f} % of {score.count}"


def _train(trainer: Trainer, settings: ModelSettings, phase: str, until: int, out: Path) -> None:
    """Train to step `until` and write the model; a trainer that is past it already leaves the folder alone."""
    if trainer.step > until:
        return
    folder = out / f"{settings.name}-{phase}"
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task(f"{settings.name} {phase}", total=until, completed=trainer.step)
        trainer.run(until, lambda: progress.advance(task))
    trainer.model.save_pretrained(str(folder))
    if folder.name not in MODEL_FOLDERS:  # those have theirs from `build_tokenizer`
        for file in TOKENIZER_FILES:
            shutil.copyfile(out / TOKENIZER_OF / file, folder / file)
    Console().print(f"{settings.name} {phase}: {trainer.tokens:,} tokens in {trainer.step} steps -> {folder}")


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder}: no tokenizer there; build it first: python -m tiny --only tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _read_model(folder: Path) -> LlamaForCausalLM:
    if not (folder / "model.safetensors").exists():
        name = folder.name.rpartition("-")[0]
        raise UserError(f"{folder}: no model there; build it first: python -m tiny --only {name}")
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(str(folder))
    return model
