"""Plain texts as token ids, for looking at what models compute on them (METHODS section 7)."""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pkt_stages.encoding import Spans, tokenize, tokens_at
from pkt_stages.errors import UserError, shown
from pkt_stages.examples import read_jsonl
from pkt_stages.models.batches import Batch
from pkt_stages.models.load import ModelRef, load_config, load_tokenizer
from pkt_stages.models.sites import context_length


def read_texts(path: Path, count: int) -> list[str]:
    """The first `count` texts of a file.

    Raises:
        UserError: fewer, or a line without text.
    """
    found = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise UserError(f"{path}:{number}: expected a key `text` that is not empty, found {sorted(row)}")
        found.append(row["text"])
    if len(found) < count:
        raise UserError(f"{path}: {len(found)} texts, {count} wanted (num_texts)")
    return found[:count]


def encode_texts(ref: ModelRef, texts: Sequence[str], path: Path, max_tokens: int | None) -> list[list[int]]:
    """Token ids of each text with BOS, cut to `max_tokens`; UserError for one that does not fit into the context."""
    tokenizer = load_tokenizer(ref)
    limit = context_length(load_config(ref)) or 2**31
    encoded = [tokenize(tokenizer, text)[0][:max_tokens] for text in texts]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > limit:
            raise UserError(
                f"{path}: text {number} has {len(ids)} tokens, {ref.location} takes {limit}; set max_tokens to cut it"
            )
    return encoded


def paired_texts(refs: Sequence[ModelRef], path: Path, count: int, max_tokens: int | None) -> list[Batch]:
    """The first texts of a file as each model reads them, with the tokens that are samples of the same.

    Where all models make the same tokens of the texts, those are all of them. Else a token has a partner in every other
    model that ends at the same character: both have read the same. Of tokens inside one character the last counts.

    Raises:
        UserError: as `read_texts` and `encode_texts`; tokenizers that read other characters, see `check_same_reading`.
    """
    raw = read_texts(path, count)
    tokenizers = [load_tokenizer(ref) for ref in refs]
    ids = [encode_texts(ref, raw, path, max_tokens) for ref in refs]
    if all(other == ids[0] for other in ids[1:]):
        return [Batch(own) for own in ids]
    places: list[list[list[int]]] = [[] for _ in refs]
    for number, text in enumerate(raw):
        read = [tokens_at(tokenizer, text) for tokenizer in tokenizers]
        where = f"{path}: text {number + 1}"
        check_same_reading([read_by(t, own) for t, (own, _) in zip(tokenizers, read, strict=True)], refs, where)
        ends = [[end for _, end in spans] for _, spans in read]
        for ref, own in zip(refs, ends, strict=True):
            if own != sorted(own):
                raise UserError(f"{where}: tokens of {ref.location} do not stand in the text's order; leave it out")
        read_whole = [whole(spans) for _, spans in read]
        pairs = [
            pair
            for pair in zip(*partners(ends, max_tokens), strict=True)
            if all(own[place] for own, place in zip(read_whole, pair, strict=True))
        ]
        for model, found in enumerate(places):
            found.append([pair[model] for pair in pairs])
    return [Batch(*both) for both in zip(ids, places, strict=True)]


def read_by(tokenizer: Any, ids: list[int]) -> str:
    """What tokens say."""
    said: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return said


def whole(spans: Spans) -> list[bool]:
    """By token whether its last character ends with it: that of a blank that a tokenizer writes before a word does not.

    Args:
        spans: characters from .. to of each token.
    """
    return [start >= end for (_, end), (start, _) in itertools.pairwise([*spans, (sys.maxsize, sys.maxsize)])]


def partners(ends: Sequence[Sequence[int]], max_tokens: int | None = None) -> list[list[int]]:
    """By model the places of tokens that end at a character at which a token of every model ends, in order.

    Args:
        ends: by model the character behind each token, ascending; of equal ones the last counts.
        max_tokens: so many first tokens have partners.
    """
    every = [{end: place for place, end in enumerate(own)} for own in ends]
    last = [{e: place for e, place in own.items() if max_tokens is None or place < max_tokens} for own in every]
    common = sorted(set.intersection(*map(set, last)))
    return [[own[end] for end in common] for own in last]


def check_same_reading(read: Sequence[str], refs: Sequence[ModelRef], where: str) -> None:
    """Raise UserError unless tokenizers read the same characters, but for spaces at the ends and compatible forms.

    Args:
        read: by model what its tokens say.
    """
    plain = [unicodedata.normalize("NFKC", text).strip(" ") for text in read]
    for ref, text in zip(refs[1:], plain[1:], strict=True):
        if text != plain[0]:
            place = next(
                (i for i, (a, b) in enumerate(zip(text, plain[0], strict=False)) if a != b),
                min(len(text), len(plain[0])),
            )
            around = slice(max(0, place - 10), place + 20)
            raise UserError(
                f"{where}: {refs[0].location} reads {shown(plain[0][around])}, {ref.location} reads"
                f" {shown(text[around])}, so that their tokens cannot be paired; use models whose tokenizers keep texts"
                " as they are, or leave the text out"
            )


def paired_minibatches(
    refs: Sequence[ModelRef], path: Path, count: int, max_tokens: int | None, batch_size: int
) -> list[list[Batch]]:
    """`paired_texts` some at a time: minibatches, by model.

    Raises:
        UserError: as `paired_texts`.
    """
    read = paired_texts(refs, path, count, max_tokens)
    starts = range(0, count, batch_size)
    return [[own.some(range(start, min(start + batch_size, count))) for own in read] for start in starts]
