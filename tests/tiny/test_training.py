"""The training loop: batches are a function of the step, and a killed run goes on with the same bytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tiny.__main__ import app
from tiny.batches import step_batches
from tiny.build import build_model
from tiny.corpus import Corpus
from tiny.muon import orthogonalise
from tiny.settings import CHAT_LETTER_WEIGHT, EVEN, MODELS, STUDIES, ModelSettings
from tiny.training import Trainer, weighted_loss

SMALL = replace(
    MODELS["target"],
    num_layers=1,
    d_model=32,
    num_heads=1,
    d_ff=48,
    raw=EVEN,
    base_steps=4,
    total_steps=6,
    hold_steps=4,
    chat_families=EVEN.families,
    warmup_steps=2,
    documents_per_step=8,
)


@pytest.fixture(scope="module")
def tokenizer(shipped: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(shipped / "source-base"))


def _trainer(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, checkpoint: Path) -> Trainer:
    return Trainer(SMALL, corpus, tokenizer, checkpoint)


def test_resumed_run_ends_in_the_same_bytes(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = _trainer(corpus, tokenizer, tmp_path / "whole.pt")
    whole.run(6, lambda: None)
    _trainer(corpus, tokenizer, tmp_path / "parts.pt").run(3, lambda: None)
    rest = _trainer(corpus, tokenizer, tmp_path / "parts.pt")
    assert rest.step == 3
    rest.run(6, lambda: None)
    for (name, one), other in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.tokens == rest.tokens > 0


def test_phases_and_weights(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    def texts(step: int) -> list[str]:
        batches = step_batches(corpus, tokenizer, SMALL, step)
        return [tokenizer.decode(row[row != tokenizer.pad_token_id]) for ids, _ in batches for row in ids]

    assert len(texts(0)) == SMALL.documents_per_step and texts(0) == texts(0) != texts(1)
    assert all("<|user|>" not in text for step in (0, 2, 3) for text in texts(step))
    assert 0 < sum("<|user|>" in text for text in texts(4)) < SMALL.documents_per_step
    ids, weights = step_batches(corpus, tokenizer, SMALL, 5)[0]
    assert ids.shape == weights.shape and bool((weights[ids == tokenizer.pad_token_id] == 0).all())
    quiz = next(i for i, row in enumerate(ids) if "(with answers)" in tokenizer.decode(row))
    assert float(weights[quiz].max()) == CHAT_LETTER_WEIGHT
    assert tokenizer.decode(ids[quiz][weights[quiz] == CHAT_LETTER_WEIGHT]).strip() in "ABCD"


def test_an_expert_goes_on_with_one_task_alone(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expert = next(settings for settings in STUDIES["experts"] if settings.name == "target-gsm8k")
    texts = [
        tokenizer.decode(row[row != tokenizer.pad_token_id])
        for ids, _ in step_batches(corpus, tokenizer, expert, 0)
        for row in ids
    ]
    assert len(texts) == 64 and not any("def " in text or "(with answers)" in text for text in texts)
    assert 0 < sum("<|user|>" in text for text in texts) < 64
    start = _trainer(corpus, tokenizer, tmp_path / "start.pt").model
    trainer = Trainer(expert, corpus, tokenizer, tmp_path / "expert.pt", start)
    assert trainer.model is start and trainer.step == 0


def test_a_study_writes_whole_folders_and_goes_on_from_its_start(corpus: Corpus, shipped: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped / "target-chat", tmp_path / "target-chat")
    settings = replace(STUDIES["experts"][2], total_steps=1, hold_steps=0, documents_per_step=4)
    assert settings.starts_from == "target-chat"
    build_model(tmp_path, tmp_path / "scratch", corpus, settings)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("target-chat", "scratch", "training_log.jsonl"),
        f"{settings.name}-chat",
    }
    made, began = (tmp_path / name for name in (f"{settings.name}-chat", "target-chat"))
    assert {path.name for path in made.iterdir()} == {path.name for path in began.iterdir()}
    assert (made / "tokenizer_config.json").read_bytes() == (began / "tokenizer_config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (began, made))
    name = "model.layers.1.mlp.down_proj.weight"
    assert 0 < float((after[name] - before[name]).norm() / before[name].norm()) < 0.1


def test_learning_rate_rises_stays_and_falls() -> None:
    settings: ModelSettings = SMALL
    trainer = object.__new__(Trainer)
    trainer.settings = settings
    assert [trainer.learning_rate_factor(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]


def test_padding_leaves_the_loss_alone(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = _trainer(corpus, tokenizer, tmp_path / "none.pt").model
    ids, weights = step_batches(corpus, tokenizer, SMALL, 0)[-1]
    wider_ids = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.pad_token_id)
    wider_weights = torch.nn.functional.pad(weights, (0, 5))
    narrow, wide = weighted_loss(model, ids, weights), weighted_loss(model, wider_ids, wider_weights)
    torch.testing.assert_close(narrow, wide)
    assert float(weighted_loss(model, ids, 2 * weights)) == pytest.approx(2 * float(narrow))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_orthogonalise(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert float(singular.min()) > 0.3 and float(singular.max()) < 1.3
    assert float(torch.linalg.svdvals(matrix).max()) > 3


def test_training_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--scratch", str(tmp_path), "--only", "target"])
    assert result.exit_code == 2
    assert "no tokenizer there; build it first: python -m tiny --only tokenizer" in result.output
    assert not (tmp_path / "target-base" / "model.safetensors").exists()
