"""The pair's one tokenizer: byte-level BPE whose pieces never reach across the end of a prompt or a forced prefix.

Digits, newlines and punctuation stand alone and a word keeps its leading space, so that tokenising `prompt + prefix`
and generating gives the same tokens as tokenising the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny.corpus import Corpus
from tiny.settings import CONTEXT_LENGTH, EVEN, TOKENIZER_DOCUMENTS, VOCAB_SIZE

SPECIALS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
PIECES = r'\n| {4}|"""|```| ?(?:==|!=|<=|>=|//)| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s'
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Learn the merges from the first TOKENIZER_DOCUMENTS raw and chat documents of their own random stream."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def _texts(corpus: Corpus) -> Iterator[str]:
    rng = Random(f"tokenizer-{corpus.seed}")
    for number in range(TOKENIZER_DOCUMENTS):
        document = corpus.chat_document(rng, EVEN.families) if number % 2 else corpus.raw_document(rng, EVEN)
        yield document.text
