"""Plain texts as token ids, for looking at what models compute on them (METHODS section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkt_stages.encoding import tokenize
from pkt_stages.errors import UserError
from pkt_stages.examples import read_jsonl
from pkt_stages.models.load import ModelRef, load_config, load_tokenizer


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
    limit = getattr(load_config(ref), "max_position_embeddings", None) or 2**31
    encoded = [tokenize(tokenizer, text)[0][:max_tokens] for text in texts]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > limit:
            raise UserError(
                f"{path}: text {number} has {len(ids)} tokens, {ref.location} takes {limit}; set max_tokens to cut it"
            )
    return encoded


def check_equal_lengths(encoded: Sequence[Sequence[list[int]]], path: Path, refs: Sequence[ModelRef]) -> None:
    """Raise UserError unless two models cut the texts into equally many tokens, so that tokens can be samples."""
    for number, (one, other) in enumerate(zip(*encoded, strict=True), start=1):
        if len(one) != len(other):
            raise UserError(
                f"{path}: text {number} has {len(one)} tokens for {refs[0].location} and {len(other)} for"
                f" {refs[1].location}; where tokens are samples they must be the same; use reduction mean or last"
            )


def same_tokens(
    refs: Sequence[ModelRef], path: Path, count: int, max_tokens: int | None, batch_size: int
) -> list[list[list[int]]]:
    """Token ids of the first texts of a file, which are the same for all models; some texts at a time.

    Raises:
        UserError: as `read_texts` and `encode_texts`; tokenizers that divide a text differently.
    """
    raw = read_texts(path, count)
    ids = [encode_texts(ref, raw, path, max_tokens) for ref in refs]
    if any(other != ids[0] for other in ids[1:]):
        raise UserError(f"{path}: the models' tokenizers divide them differently; transport needs equal tokens")
    return [ids[0][start : start + batch_size] for start in range(0, len(ids[0]), batch_size)]
