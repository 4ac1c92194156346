"""From examples to token ids: label masks, and the token whose prediction is attributed.

Two rules hold everywhere (training, attribution, evaluation, texts). BOS: exactly one if the tokenizer has one; a chat
template that writes its own gets none added, other templates get the tokenizer's. Control tokens (BOS, EOS, those of
roles) come from the template and the tokenizer alone: what looks like one in an example is text and is read as such.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pkt_stages.errors import UserError
from pkt_stages.examples import Example
from pkt_stages.params import option
from pkt_stages.templates import Controls, Prompt, Template, check_free, controls, render_prompt

Labels = Literal["answer", "all", "reference_code"]

# The authors strip `. " space ) newline , ]` and take the last token; a closing code fence is no answer either.
NOT_USEFUL = '. ")\n,]`'
# Letters, digits and underscores; else what there is of other signs.
_LAST_WORD = re.compile(r"(\w+|[^\w\s]+)$")
Cut = Literal["token", "word"]


@dataclass(frozen=True)
class PromptParams:
    """Setting of what puts prompts to a model."""

    template: Template = option("chat", "Prompt format: chat (the tokenizer's own), tulu, llama2 or none.")


@dataclass(frozen=True)
class EncodingParams(PromptParams):
    """Settings of what takes losses of examples."""

    max_length: int = option(2048, "Longest example, tokens; a longer one is an error.", ge=1)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example with the labels of a causal language model (-100 where no loss is taken)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Located:
    """An example cut before its last useful token: the context, and the token it should predict next."""

    context: list[int]
    predicted: int


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids with exactly one BOS (if the tokenizer has one), and where in `text` each token starts.

    Args:
        text: a `Prompt`, whose template's control tokens count, or any other text, which has none.

    Raises:
        UserError: as `tokens_at`.
    """
    ids, spans = tokens_at(tokenizer, text)
    return ids, [start for start, _ in spans]


Spans = list[tuple[int, int]]


def tokens_at(tokenizer: Any, text: str) -> tuple[list[int], Spans]:
    """As `tokenize`, with the characters from .. to of `text` that each token is made of; (0, 0) for BOS.

    A character of several tokens is all of theirs.

    Raises:
        UserError: the tokenizer cannot say where tokens start, or makes a control token of text.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer is no fast one (tokenizer.json); convert it")
    prompt = text if isinstance(text, Prompt) else Prompt("") + text
    known = controls(tokenizer, prompt.markers)
    found = list(known.pattern.finditer(prompt))
    written = [match[0] for match in found if prompt.owns(match)]
    run = _as_text if len(written) < len(found) else _as_it_is
    ids, spans = run(tokenizer, prompt, False)
    forbidden = _forbidden(tokenizer, known)
    if sum(id in forbidden for id in ids) > len(written):  # what looks so after normalisation only
        run = _as_text
        ids, spans = run(tokenizer, prompt, False)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos not in written or (bos == eos and not prompt.lstrip().startswith(bos)):
        ids, spans = run(tokenizer, prompt, True)
        # Some tokenizers append EOS among their special tokens; an answer's end is not known to them.
        if ids and ids[-1] == tokenizer.eos_token_id and spans[-1] == (0, 0):
            ids, spans = ids[:-1], spans[:-1]
    return ids, spans


def _as_it_is(tokenizer: Any, prompt: Prompt, special: bool) -> tuple[list[int], Spans]:
    """Ids and spans of a text in which every control token is one.

    Args:
        special: whether to add what the tokenizer adds: BOS, and with some EOS.
    """
    made = tokenizer(str(prompt), add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return list(made["input_ids"]), list(made["offset_mapping"])


def _as_text(tokenizer: Any, prompt: Prompt, special: bool) -> tuple[list[int], Spans]:
    """The same, where what an example's text has of control tokens is none.

    A copy of the tokenizer knows no control token but by its stand-in, which takes the place of those of the template.
    """
    check_free(tokenizer, prompt)
    known = controls(tokenizer, prompt.markers)
    blind, ids = _blind(tokenizer, prompt.markers)
    made = blind.encode(
        known.pattern.sub(lambda found: known.stand_ins[found[0]] if prompt.owns(found) else found[0], prompt),
        add_special_tokens=special,
    )
    forbidden = _forbidden(tokenizer, known)
    for id, (start, end) in zip(made.ids, made.offsets, strict=True):
        if end > start and id in forbidden:
            around = prompt[max(0, start - 30) : end + 30]
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer has no way to read {prompt[start:end]!r} in {around!r} as"
                " text; leave such examples out"
            )
    return [ids.get(id, id) for id in made.ids], list(made.offsets)


def _forbidden(tokenizer: Any, known: Controls) -> set[int]:
    """The ids that no text may become; that of unknown characters is no control token where text has them."""
    return set(known.ids.values()) - {tokenizer.unk_token_id}


@functools.lru_cache(maxsize=8)
def _blind(tokenizer: Any, markers: frozenset[str]) -> tuple[Any, dict[int, int]]:
    """A copy of a tokenizer that knows its control tokens by their stand-ins only, and their ids by the copy's."""
    from tokenizers import AddedToken, Tokenizer

    known = controls(tokenizer, markers)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in markers
    blind = Tokenizer.from_str(json.dumps(state))
    for token in state["added_tokens"]:
        if token["content"] in known.ids:
            how = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized")}
            blind.add_tokens([AddedToken(known.stand_ins[token["content"]], special=False, **how)])
    blind.encode_special_tokens = True  # its word for: read them as text
    own = {token.content: id for id, token in blind.get_added_tokens_decoder().items()}
    return blind, {own[known.stand_ins[text]]: id for text, id in known.ids.items()}


def encode(
    tokenizer: Any, example: Example, *, template: Template, max_length: int, labels: Labels = "answer"
) -> Encoded:
    """Prompt, answer and EOS with labels.

    Args:
        labels: `answer` supervises the answer with its EOS; `all` the prompt as well (without BOS);
            `reference_code` what the published code does: EOS is counted into the prompt, so that the answer's first
            token is never supervised (METHODS section 9).

    Raises:
        UserError: the example is longer than `max_length` tokens.
    """
    prompt = render_prompt(tokenizer, template, example.prompt)
    ids, starts = tokenize(tokenizer, prompt + example.answer)
    ids = [*ids, tokenizer.eos_token_id]
    if len(ids) > max_length:
        raise UserError(f"example {example.id}: {len(ids)} tokens, more than the {max_length} that are allowed")
    first_answer = first_token_from(starts, len(prompt))
    begin = {"answer": first_answer, "all": int(ids[0] == tokenizer.bos_token_id), "reference_code": first_answer + 1}
    hidden = begin[labels]
    return Encoded(ids, [-100] * hidden + ids[hidden:])


def locate(tokenizer: Any, example: Example, *, template: Template, max_length: int, cut: Cut = "token") -> Located:
    """Cut an example before its last useful token (appendix A.2): what follows the answer's last word is dropped.

    Args:
        cut: `word` cuts before the first token of the last useful word instead, which begins at the same character for
            every tokenizer.

    Raises:
        UserError: the answer holds no useful token, or the context is longer than `max_length` tokens.
    """
    prompt = render_prompt(tokenizer, template, example.prompt)
    answer = example.answer.rstrip(NOT_USEFUL + "\r\t")
    ids, spans = tokens_at(tokenizer, prompt + answer)
    first = first_token_from([start for start, _ in spans], len(prompt))
    if not answer.strip() or first >= len(ids):
        raise UserError(f"example {example.id}: its answer {example.answer[:40]!r} holds no useful token")
    place = len(ids) - 1
    if cut == "word":
        word = _LAST_WORD.search(answer.rstrip())
        assert word is not None  # it is not empty
        begins = len(prompt) + word.start()
        place = next(i for i, (_, end) in enumerate(spans) if end > begins)
    if place > max_length:
        raise UserError(f"example {example.id}: {place} tokens of context, the model takes {max_length}")
    return Located(ids[:place], ids[place])


def first_token_from(starts: list[int], place: int) -> int:
    """The first token that starts at this place of the text or behind it; the number of tokens if none does."""
    return next((i for i, start in enumerate(starts) if start >= place and start > 0), len(starts))
