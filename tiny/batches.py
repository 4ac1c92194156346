"""Documents of one training step as padded micro-batches with a loss weight per token."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tiny.corpus import Corpus, Document
from tiny.settings import (
    ANSWER_WEIGHT,
    PROMPT_WEIGHT,
    RAW_SHARE_IN_CHAT,
    ModelSettings,
)


def step_batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, settings: ModelSettings, step: int
) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step, shortest documents first: ids [document, token], loss weights [document, token].

    A weight belongs to the token it stands at (the prediction made one position earlier); padding weighs 0. The
    documents are a function of the seed, the model's name and the step, so an interrupted run goes on unchanged.
    """
    rng = Random(f"train-{corpus.seed}-{settings.name}-{step}")
    documents = [_document(corpus, settings, step, rng) for _ in range(settings.documents_per_step)]
    rows = [_weighted_tokens(document, tokenizer) for document in documents]
    rows.sort(key=lambda row: len(row[0]))
    return [_pad(chunk, tokenizer.pad_token_id) for chunk in _split(rows, settings.micro_batches)]


def _document(corpus: Corpus, settings: ModelSettings, step: int, rng: Random) -> Document:
    """Raw text up to `base_steps`; then exchanges in the chat format, with some raw text among them."""
    if step < settings.base_steps or rng.random() < RAW_SHARE_IN_CHAT:
        return corpus.raw_document(rng, settings.raw)
    return corpus.chat_document(rng, settings.chat_families)


def _weighted_tokens(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Token ids of `<s>` + parts + `</s>` and their loss weights; parts are tokenised one by one, as in generation."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    pieces = tokenizer([text for text, _ in document.parts], add_special_tokens=False)["input_ids"]
    for piece, (_, learned) in zip(pieces, document.parts, strict=True):
        ids += piece
        weights += [document.weight if learned else PROMPT_WEIGHT] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*weights, ANSWER_WEIGHT]


def _split(rows: list[tuple[list[int], list[float]]], count: int) -> list[list[tuple[list[int], list[float]]]]:
    """Consecutive chunks of about equally many tokens."""
    total = sum(len(ids) for ids, _ in rows)
    chunks: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(count)]
    seen = 0
    for row in rows:
        chunks[min(count - 1, seen * count // total)].append(row)
        seen += len(row[0])
    return [chunk for chunk in chunks if chunk]


def _pad(rows: list[tuple[list[int], list[float]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_token_id] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return ids, weights
