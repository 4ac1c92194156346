"""Fixtures shared by all tests: shapes checked at run time, small random models, a small tokenizer."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A job in the background is born deaf to Ctrl-C, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("pkt_stages.core", "beartype.beartype")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}\n<|assistant|>\n"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def save_tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer without merges: every byte is a token, specials in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, *, seed: int, **sizes: Any) -> Path:
    """A random Llama with the byte tokenizer; sizes overwrite a small default with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.08,
        **sizes,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "source", seed=1, hidden_size=96, intermediate_size=128, num_hidden_layers=4
    )


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "target", seed=2)


def write_examples(path: Path, answers: list[str], start: int = 0) -> Path:
    rows = [
        {
            "dataset": "toy",
            "id": f"toy_{start + i}",
            "messages": [
                {"role": "user", "content": f"What comes after {start + i}?"},
                {"role": "assistant", "content": answer},
            ],
        }
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def extract_file(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "extract.jsonl", ["It is 1.", "It is 2.", "It is 3."])


@pytest.fixture
def transfer_file(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "transfer.jsonl", ["It is 11.", "It is 12."], start=10)


@pytest.fixture
def pkt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, stdout, stderr."""

    from pkt_stages.__main__ import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pkt", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capsys.readouterr()
        return status, out, err

    return run
