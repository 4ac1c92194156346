from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pkt_stages import tasks
from pkt_stages.encoding import _as_it_is, _as_text, encode, locate, render_prompt, tokenize
from pkt_stages.errors import UserError
from pkt_stages.evaluation.likelihood import continuation
from pkt_stages.examples import Example, read_jsonl
from tests.conftest import CHAT_TEMPLATE, save_tokenizer

DATA = Path(__file__).parents[1] / "data/tiny"
TEMPLATES: Any = ("chat", "tulu", "llama2", "none")


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


# --- whose tokens these are ---------------------------------------------------------------------------------------

SPECIALS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>", "<s></s><s>")


def is_text(tokenizer: Any, ids: list[int], text: str) -> bool:
    """Whether none of these tokens is a special one, and they say this text."""
    return not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("looks", SPECIALS)
def test_text_is_no_control_token_anywhere(tokenizer: Any, template: Any, looks: str) -> None:
    """Every byte is a token, so that what the text becomes can be read off behind what the template writes."""
    for prompt, answer in (
        (f"{looks}2+2?", "4."),
        ("2+2?", f"4{looks}."),
        (f"Is {looks} it?{looks}", f"{looks} is{looks}"),
    ):
        prefix = answer[: len(answer) // 2]
        e = Example("toy", "x", prompt, answer, prefix=prefix)
        plain = Example("toy", "x", "2+2?", "4.")
        rest = len(encode(tokenizer, plain, template=template, max_length=999).ids) - len("2+2?4.")
        made = encode(tokenizer, e, template=template, max_length=999)
        assert len(made.ids) == rest + len(prompt) + len(answer)
        assert made.ids.count(tokenizer.bos_token_id) == made.ids.count(tokenizer.eos_token_id) == 1
        supervised = [label for label in made.labels if label != -100]
        assert is_text(tokenizer, supervised[:-1], answer)
        asked, _ = tokenize(tokenizer, render_prompt(tokenizer, template, prompt))
        assert asked == made.ids[: len(asked)]
        place = next(i for i in range(len(asked)) if asked[i : i + len(prompt)] == list_of(tokenizer, prompt))
        assert is_text(tokenizer, asked[place : place + len(prompt)], prompt)
        one = continuation(tokenizer, e, template, 999)
        assert is_text(tokenizer, one.tokens, answer.removeprefix(prefix))
        found = locate(tokenizer, e, template=template, max_length=999)
        assert [*found.context, found.predicted] == made.ids[: len(found.context) + 1]


def list_of(tokenizer: Any, text: str) -> list[int]:
    """The bytes of a text as tokens."""
    return [tokenizer.convert_tokens_to_ids(chr(byte) if byte != 32 else "\u0120") for byte in text.encode()]


@pytest.mark.parametrize("looks", SPECIALS)
def test_texts_have_no_control_tokens(tokenizer: Any, looks: str) -> None:
    ids, starts = tokenize(tokenizer, f"a {looks} b{looks}")
    assert ids[0] == tokenizer.bos_token_id
    assert is_text(tokenizer, ids[1:], f"a {looks} b{looks}")
    assert starts == [0, *range(len(ids) - 1)]


def test_roles_that_the_tokenizer_does_not_call_special(tmp_path: Path) -> None:
    """As some chat models have them: added as ordinary words, written by the template."""
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.add_tokens(["<|im_start|>", "<think>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|user|>", "<|im_start|>user").replace(
        "<|assistant|>", "<|im_start|>"
    )
    role, thought = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>"])
    for prompt, times in (("Hi?", 0), ("Hi<|im_start|>?", 0), ("<think> <|im_start|>", 1)):
        ids, _ = tokenize(tokenizer, render_prompt(tokenizer, "chat", prompt) + "<|im_start|>!")
        assert ids.count(role) == 2
        assert ids.count(thought) == times  # the template writes none: a word like others
    assert tokenize(tokenizer, "<|im_start|>")[0].count(role) == 1  # nor does a text know of the template


@pytest.mark.parametrize("before", ["", "\n", "  ", "Be kind.\n"])
def test_no_second_bos(tokenizer: Any, tmp_path: Path, before: str) -> None:
    other = save_tokenizer(tmp_path)
    other.chat_template = before + CHAT_TEMPLATE
    for prompt in ("2+2?", "<s>2+2?"):
        ids, _ = tokenize(other, render_prompt(other, "chat", prompt))
        assert ids.count(other.bos_token_id) == 1
        assert tokenize(other, render_prompt(other, "none", prompt))[0].count(other.bos_token_id) == 1


@pytest.mark.parametrize("answer", ["4.", "4.</s>", "</s>"])
def test_an_eos_of_the_tokenizer_s_own(tmp_path: Path, answer: str) -> None:
    other = save_tokenizer(tmp_path)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for template in TEMPLATES:
        made = encode(other, Example("toy", "x", "2+2?", answer), template=template, max_length=99)
        assert (made.ids.count(0), made.ids.count(1)) == (1, 1)


def test_a_bos_that_ends_texts_too(tmp_path: Path) -> None:
    """One token for both: a template that writes it behind the prompt has written no BOS."""
    other = save_tokenizer(tmp_path)
    other.eos_token = "<s>"
    other.chat_template = "{{ messages[0].content }}<s>"
    assert tokenize(other, render_prompt(other, "chat", "Hi"))[0] == [0, *list_of(other, "Hi"), 0]


def sentencepiece() -> Any:
    """As Llama-2's: a space in front of every part between control tokens, pieces instead of bytes."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyzT<>/|_?.", "[", "]", "IN", "I", "N", "S"]
    made = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("I", "N")], unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Replace("\u2581", " ")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """Its vocabulary holds the control tokens as pieces, which text would find by itself."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz<>/?."]
    made = Tokenizer(models.Unigram([(word, 0.0 if i < 3 else -1.0 - i) for i, word in enumerate(words)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_parts_between_control_tokens_stay_as_they_are() -> None:
    """Whether an example's text holds such a token changes nothing in front of it."""
    other = sentencepiece()
    other.chat_template = "<s>[INST] {{ messages[0].content|trim }} [/INST]"
    words = other.convert_ids_to_tokens
    assert words(tokenize(other, render_prompt(other, "chat", " a b "))[0]) == words(
        tokenize(other, "[INST] a b [/INST]")[0]
    )
    ids, _ = tokenize(other, render_prompt(other, "chat", " a <s> b "))
    assert words(ids) == ["<s>", *"\u2581[", "IN", *"ST]\u2581a\u2581<s>\u2581b\u2581[/", "IN", *"ST]"]
    assert words(tokenize(other, "a \u00e9 </s>")[0]) == ["<s>", *"\u2581a\u2581", "<unk>", *"\u2581</s>"]


def test_a_tokenizer_that_cannot_read_it_as_text() -> None:
    with pytest.raises(UserError, match=r"no way to read '<s>' in 'a <s> b' as text; leave such examples out$"):
        tokenize(unigram(), "a <s> b")
    assert tokenize(unigram(), "a b")[0][0] == 1


def test_what_looks_like_a_control_token_after_normalisation() -> None:
    """Wide brackets become narrow ones, and the tokenizer looks for its special tokens after that."""
    words = ["<unk>", "<s>", *"ab <>/s"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.NFKC()
    made.add_special_tokens([AddedToken("<s>", normalized=True)])
    other = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", unk_token="<unk>")
    wide = "a \uff1cs\uff1e b"
    assert other(wide, add_special_tokens=False)["input_ids"].count(1) == 1
    assert other.convert_ids_to_tokens(tokenize(other, wide)[0]) == [*"a <s> b"]
    other.chat_template = "<s>{{ messages[0].content }}"
    found = tokenize(other, render_prompt(other, "chat", wide) + wide)[0]
    assert other.convert_ids_to_tokens(found) == ["<s>", *"a <s> ba <s> b"]


def test_a_text_that_writes_stand_ins(tokenizer: Any) -> None:
    ids, _ = tokenize(tokenizer, "\U000f0000\U000f0000\U000f0000")
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    message = r"a text with control tokens of .* and the undefined character U\+F0003 \('.* <s>'\): remove one of them$"
    for run in (lambda text: render_prompt(tokenizer, "chat", text), lambda text: tokenize(tokenizer, text)):
        with pytest.raises(UserError, match=message):
            run("\U000f0003 <s>")


def test_a_tokenizer_that_does_not_know_where_tokens_start(tokenizer: Any) -> None:
    class Slow:
        is_fast, name_or_path = False, "a/model"

    with pytest.raises(UserError, match=r"^a/model: its tokenizer is no fast one \(tokenizer.json\); convert it$"):
        tokenize(Slow(), "a")


# SHA-256 over the ids of the shipped rows, as they were before text and control tokens were told apart (1367fa1).
IDS = "765be52f8ae19b860550751271c0610f88088631bf0ffbec19cb3d8bf30684a4"


def test_ids_of_shipped_examples_are_what_they_were() -> None:
    tokenizer, total = AutoTokenizer.from_pretrained(DATA / "target-chat"), hashlib.sha256()
    for task in tasks.names():
        for number, row in read_jsonl(DATA / task / "test.jsonl"):
            e = tasks.load(task).example(row, str(number))
            for template in TEMPLATES:
                made = encode(tokenizer, e, template=template, max_length=9999)
                total.update(f"{made.ids} {made.labels}".encode())
                if number % 16 == 1:  # nor would they be others for a text with control tokens
                    text = render_prompt(tokenizer, template, e.prompt) + e.answer
                    assert _as_text(tokenizer, text, False) == _as_it_is(tokenizer, text, False)
    for _, row in read_jsonl(DATA / "texts/texts.jsonl"):
        total.update(f"{tokenize(tokenizer, row['text'])}".encode())
    assert total.hexdigest() == IDS
