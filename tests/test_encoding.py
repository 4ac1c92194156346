from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkt_stages.encoding import encode, locate, render_prompt, tokenize
from pkt_stages.errors import UserError
from pkt_stages.examples import Example
from tests.conftest import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def example(answer: str) -> Example:
    return Example(dataset="toy", id="toy_1", prompt="2+2?", answer=answer)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("chat", "<s><|user|>\n2+2?\n<|assistant|>\n"),
        ("tulu", "<|user|>\n2+2?\n<|assistant|>\n"),
        ("llama2", "[INST] 2+2? [/INST] "),
        ("none", "2+2?\n"),
    ],
)
def test_templates_and_one_bos_in_each(tokenizer: Any, template: Any, text: str) -> None:
    assert render_prompt(tokenizer, template, "2+2?") == text
    ids, _ = tokenize(tokenizer, text)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_unknown_template(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="unknown template 'chatml'; expected one of chat, tulu, llama2, none"):
        render_prompt(tokenizer, "chatml", "x")  # type: ignore[arg-type]


def test_labels_begin_with_the_answer_and_end_with_eos(tokenizer: Any) -> None:
    made = encode(tokenizer, example("4."), template="chat", max_length=99)
    supervised = [label for label in made.labels if label != -100]
    assert tokenizer.decode(supervised[:-1]) == "4."
    assert supervised[-1] == made.ids[-1] == tokenizer.eos_token_id
    assert len(made.ids) == len(made.labels)


def test_reference_code_never_supervises_the_first_answer_token(tokenizer: Any) -> None:
    ours = encode(tokenizer, example("4."), template="chat", max_length=99).labels
    theirs = encode(tokenizer, example("4."), template="chat", max_length=99, labels="reference_code").labels
    assert theirs.count(-100) == ours.count(-100) + 1


def test_all_supervises_the_prompt_without_bos(tokenizer: Any) -> None:
    made = encode(tokenizer, example("4."), template="chat", max_length=99, labels="all")
    assert made.labels == [-100, *made.ids[1:]]


def test_too_long(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"example toy_1: \d+ tokens, more than the 5 that are allowed"):
        encode(tokenizer, example("4."), template="chat", max_length=5)
    with pytest.raises(UserError, match=r"example toy_1: \d+ tokens of context, the model takes 5"):
        locate(tokenizer, example("4."), template="chat", max_length=5)


@pytest.mark.parametrize(
    ("answer", "last"),
    [
        ("So the answer is 12.", "2"),
        ("The answer is: D", "D"),
        ('He said "yes".\n', "s"),
        ("f(x, [1])\n", "1"),
        ("```python\ndef f():\n    return x\n```", "x"),
    ],
)
def test_the_last_useful_token(tokenizer: Any, answer: str, last: str) -> None:
    found = locate(tokenizer, example(answer), template="chat", max_length=999)
    assert tokenizer.decode([found.predicted]) == last
    text = render_prompt(tokenizer, "chat", "2+2?") + answer
    assert text.startswith(tokenizer.decode(found.context))


@pytest.mark.parametrize("answer", ['. " )', "```"])
def test_an_answer_without_a_useful_token(tokenizer: Any, answer: str) -> None:
    with pytest.raises(UserError, match=r"example toy_1: its answer .* holds no useful token"):
        locate(tokenizer, example(answer), template="chat", max_length=99)


def test_a_tokenizer_without_template(tmp_path: Path) -> None:
    bare = save_tokenizer(tmp_path)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template; choose tulu, llama2 or none"):
        render_prompt(bare, "chat", "x")
