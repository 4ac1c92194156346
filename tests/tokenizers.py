"""Tokenizers that divide the same texts differently, put together by hand: training one breaks ties as it likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import CHAT_TEMPLATE

TEXTS = [
    "The café costs €12,50 — naïve, isn't it?",
    "Ж 你好 world 🙂🙂 done",
    "  two  spaces and a\ttab\nand lines\n\n",
    "1234567 + 89 = 1234656",
    "e\u0301 is not \u00e9, ﬁne",
]
SPECIALS = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
# Tokens, as are all their beginnings.
WORDS = {
    "bytes": ["The", " café", " cost", "s", " €1", "123", "45", "67", " wor", "ld", " two", "nd", " spa", "ces", " is"],
    "other bytes": ["Th", " ca", "fé", " costs", "12", "34", "567", " 89", " world", "wo", " spaces", "ab", " 🙂🙂"],
    "metaspace": [
        "▁The",
        "▁caf",
        "é▁",
        "osts",
        "€12",
        "1234",
        "▁wo",
        "rld",
        "🙂🙂",
        "▁tw",
        "o▁",
        "▁spaces▁",
        "and▁",
        "▁,",
    ],
}
WORDS["lower"] = WORDS["bytes"]


def save(folder: Path, kind: str) -> Any:
    """`bytes` and `other bytes` (byte-level BPE; some tokens end inside a character), `metaspace` (SentencePiece's way,
    with byte fallback) or `lower` (byte-level, reads no capitals)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "metaspace":
        words: Sequence[str] = WORDS[kind]
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(
            set("".join(words)) | set("abcdefghijklmnopqrst")
        )
    else:
        words = [as_bytes.pre_tokenize_str(word)[0][0] for word in WORDS[kind]]
        words = [*words, as_bytes.pre_tokenize_str(" 你")[0][0][:-1]]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = dict.fromkeys([*SPECIALS, *alphabet, *("".join(merge) for merge in merges)])
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    if kind == "lower":
        made.normalizer = normalizers.Lowercase()
    made.add_special_tokens(SPECIALS)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return fast
