"""From examples to token ids: chat templates, label masks, and the token whose prediction is attributed.

One rule for BOS everywhere (training, attribution, evaluation): exactly one if the tokenizer has one. A chat template
that writes its own gets none added; other templates get the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pkt_stages.errors import UserError
from pkt_stages.examples import Example
from pkt_stages.params import option

Template = Literal["chat", "tulu", "llama2", "none"]
Labels = Literal["answer", "all", "reference_code"]

# The authors strip `. " space ) newline , ]` and take the last token; a closing code fence is no answer either.
NOT_USEFUL = '. ")\n,]`'


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


def render_prompt(tokenizer: Any, template: Template, prompt: str) -> str:
    """The text up to where the assistant's answer begins.

    `chat`: the tokenizer's own; `tulu`: open-instruct's; `llama2`: Llama-2's; `none`: the prompt and a newline.

    Raises:
        UserError: `chat` with a tokenizer that has no template, or an unknown template.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"template 'chat': the tokenizer of {tokenizer.name_or_path} has no chat template;"
                " choose tulu, llama2 or none"
            )
        messages = [{"role": "user", "content": prompt}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
    if template == "tulu":
        return f"<|user|>\n{prompt}\n<|assistant|>\n"
    if template == "llama2":
        return f"[INST] {prompt} [/INST] "
    if template == "none":
        return f"{prompt}\n"
    raise UserError(f"unknown template {template!r}; expected one of {', '.join(get_args(Template))}")


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids with exactly one BOS (if the tokenizer has one), and where in `text` each token starts."""
    bos = getattr(tokenizer, "bos_token", None)
    written = bos is not None and text.startswith(bos)
    encoded = tokenizer(text, add_special_tokens=not written, return_offsets_mapping=True, verbose=False)
    ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    # Some tokenizers append EOS among their special tokens; an answer's end is not known to them.
    if not written and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids, starts = ids[:-1], starts[:-1]
    return ids, starts


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


def locate(tokenizer: Any, example: Example, *, template: Template, max_length: int) -> Located:
    """Cut an example before its last useful token (appendix A.2): what follows the answer's last word is dropped.

    Raises:
        UserError: the answer holds no useful token, or the context is longer than `max_length` tokens.
    """
    prompt = render_prompt(tokenizer, template, example.prompt)
    answer = example.answer.rstrip(NOT_USEFUL + "\r\t")
    ids, starts = tokenize(tokenizer, prompt + answer)
    if not answer.strip() or first_token_from(starts, len(prompt)) >= len(ids):
        raise UserError(f"example {example.id}: its answer {example.answer[:40]!r} holds no useful token")
    if len(ids) - 1 > max_length:
        raise UserError(f"example {example.id}: {len(ids) - 1} tokens of context, the model takes {max_length}")
    return Located(ids[:-1], ids[-1])


def first_token_from(starts: list[int], place: int) -> int:
    """The first token that starts at this place of the text or behind it; the number of tokens if none does."""
    return next((i for i, start in enumerate(starts) if start >= place and start > 0), len(starts))
