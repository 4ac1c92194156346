"""The shipped weights: stated shapes, float32, untied, small enough for git, and really trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pkt_stages.examples import read_jsonl
from pkt_stages.tasks import load
from tiny.build import MODEL_FOLDERS, model_folders
from tiny.corpus import Corpus
from tiny.settings import CONTEXT_LENGTH, MODELS, STUDIES, VOCAB_SIZE

MAX_MEGABYTES = 28


@pytest.mark.parametrize("folder", MODEL_FOLDERS)
def test_shapes(shipped: Path, folder: str) -> None:
    settings = MODELS[folder.rpartition("-")[0]]
    model = AutoModelForCausalLM.from_pretrained(str(shipped / folder))
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert (config.num_hidden_layers, config.hidden_size) == (settings.num_layers, settings.d_model)
    assert (config.num_attention_heads, config.intermediate_size) == (settings.num_heads, settings.d_ff)
    assert (config.head_dim, config.vocab_size) == (32, VOCAB_SIZE)
    assert config.max_position_embeddings == CONTEXT_LENGTH and not config.tie_word_embeddings
    with safe_open(shipped / folder / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" in stored.keys()  # noqa: SIM118 - safe_open is no mapping
        for name in stored.keys():  # noqa: SIM118
            assert stored.get_slice(name).get_dtype() == "F32"
            assert bool(torch.isfinite(stored.get_tensor(name)).all()), name


def test_source_and_target_differ_in_every_size() -> None:
    source, target = MODELS["source"], MODELS["target"]
    for size in ("num_layers", "d_model", "num_heads", "d_ff"):
        assert getattr(source, size) > getattr(target, size)


def test_everything_fits_into_git(shipped: Path) -> None:
    """What is shipped: models that `pkt reexpress` writes beside it, and those of the studies, are git's to ignore."""
    made = {path.parent for path in shipped.rglob("reexpression.json")}
    made |= {shipped / folder for models in STUDIES.values() for folder in model_folders(models)}
    files = [path for path in shipped.rglob("*") if path.is_file() and path.parent not in made]
    assert sum(path.stat().st_size for path in files) <= MAX_MEGABYTES * 2**20


@pytest.mark.parametrize("name", list(MODELS))
def test_chat_went_on_from_base(shipped: Path, name: str) -> None:
    base = _weight(shipped / (MODELS[name].starts_from or f"{name}-base"))
    for phase in ("early", "chat") if MODELS[name].early_steps else ("chat",):
        chat = _weight(shipped / f"{name}-{phase}")
        cosine = torch.nn.functional.cosine_similarity(base.flatten(), chat.flatten(), dim=0)
        assert 0.3 < float(cosine) < 0.99999


def test_models_of_one_base_are_nearer_than_those_trained_apart(shipped: Path) -> None:
    """Another chat training of one base is a sibling; other initial weights lead elsewhere."""
    weights = {name: _weight(shipped / f"{name}-chat").flatten() for name in ("target", "sibling", "trained-apart")}
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(weights["target"], weights["sibling"], dim=0)) > 0.3
    assert abs(float(cosine(weights["target"], weights["trained-apart"], dim=0))) < 0.1


def test_the_source_knows_more_facts_than_the_target(shipped: Path, corpus: Corpus) -> None:
    rows = [graded.row for graded in corpus.test["mmlu"]]
    right = {name: _quiz_accuracy(shipped / f"{name}-chat", rows) for name in MODELS}
    assert right["source"] > right["target"] + 0.15


def test_log_tells_of_both_trainings(shipped: Path) -> None:
    rows = [row for _, row in read_jsonl(shipped / "training_log.jsonl")]
    for name, settings in MODELS.items():
        mine = [row for row in rows if row["model"] == name]
        assert mine[-1]["step"] == settings.total_steps
        if settings.starts_from:  # its base has learned already, so only the chat format is left
            assert {row["phase"] for row in mine} == {"chat"}
            assert mine[0]["step"] > settings.first_step == settings.base_steps
            assert mine[-1]["loss"] < mine[0]["loss"]
        else:
            assert {row["phase"] for row in mine} == {"base", "chat"}
            assert mine[-1]["loss"] < mine[0]["loss"] / 5
        assert [row["tokens"] for row in mine] == sorted(row["tokens"] for row in mine)


def test_models_of_the_studies_are_ignored_one_by_one(shipped: Path) -> None:
    ignored = (shipped.parents[1] / ".gitignore").read_text().splitlines()
    studied = [folder for models in STUDIES.values() for folder in model_folders(models)]
    assert {"drifted-30-base", "source-gsm8k-chat", "trained-apart-4x96-chat"} <= set(studied)
    assert not set(studied) & set(MODEL_FOLDERS)
    assert all(f"/data/tiny/{folder}/" in ignored for folder in studied)


def _weight(folder: Path) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return stored.get_tensor("model.layers.1.mlp.down_proj.weight")


def _quiz_accuracy(folder: Path, rows: list[dict[str, object]]) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in "ABCD"]
    examples = [load("mmlu").example(row, "") for row in rows]
    texts = [f"<|user|>\n{example.prompt}\n<|assistant|>\n{example.prefix}" for example in examples]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        choices = model(**encoded).logits[:, -1, letters].argmax(-1).tolist()
    answers = ["ABCD".index(example.reference["answer"]) for example in examples]
    return sum(a == b for a, b in zip(choices, answers, strict=True)) / len(rows)
