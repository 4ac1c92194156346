"""The shared tokenizer: the same files everywhere, and no token across the end of a prompt or forced prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pkt_stages.tasks import load
from tiny.build import MODEL_FOLDERS
from tiny.corpus import Corpus
from tiny.settings import TASKS, VOCAB_SIZE
from tiny.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(shipped: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(shipped / "source-chat"))


def test_training_reproduces_the_shipped_files_in_every_folder(corpus: Corpus, shipped: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(corpus), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    for folder in MODEL_FOLDERS:
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (shipped / folder / path.name).read_bytes(), (folder, path.name)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_continuation_tokenise_as_the_whole(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    its = load(task)
    for graded in corpus.test[task] + corpus.pool[task]:
        example = its.example(graded.row, "")
        start = f"<|user|>\n{example.prompt}\n<|assistant|>\n{example.prefix}"
        rest = example.answer[len(example.prefix) :]
        whole = tokenizer.encode(start + rest, add_special_tokens=False)
        parts = [tokenizer.encode(text, add_special_tokens=False) for text in (start, rest)]
        assert parts[0] + parts[1] == whole
        assert tokenizer.decode(whole) == start + rest
        assert len(whole) < 200


def test_digits_newlines_indents_and_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("The 407\n\n    x 12", add_special_tokens=False)]
    assert tokens == ["The", " 4", "0", "7", "\n", "\n", "    ", "x", " 1", "2"]
    assert not [text for text in tokenizer.get_vocab() if sum(character.isdigit() for character in text) > 1]
    letters = [tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in "ABCD"]
    assert all(len(ids) == 1 for ids in letters) and len({ids[0] for ids in letters}) == 4


def test_any_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Größe: 12,5 €\n\tif (x!=3) { return 'ü'; }  日本"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("The color")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert ids[1:] == tokenizer.encode("The color", add_special_tokens=False)
    for special in ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s><|user|>\nHi?\n<|assistant|>\nYes.</s>"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<s><|user|>\nHi?\n<|assistant|>\n"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == "Yes.</s>"
