"""How likely is the reference answer? (METHODS section 12) Teacher forcing behind the protocol's own prompt and prefix.

It needs no generation, and sees changes far smaller than one answer in a few hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pkt_stages.encoding import first_token_from, tokenize
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import Backend, Continuation
from pkt_stages.evaluation.requests import in_batches
from pkt_stages.examples import Example
from pkt_stages.scratch import Batches
from pkt_stages.templates import Template, render_prompt


def answer_log_likelihoods(
    backend: Backend,
    examples: Sequence[Example],
    *,
    template: Template,
    facts: Any = None,
    scratch: Path | None = None,
    used: list[Batches] | None = None,
) -> list[float]:
    """Per example the mean log-likelihood of the reference answer's tokens behind its prefix, in nats per token.

    The end of the answer (EOS) is no token of it.

    Args:
        facts: what determines the result besides the requests and the backend.
        scratch, used: a folder for finished batches, see `in_batches`.

    Raises:
        UserError: an answer that does not begin with its prefix or has nothing behind it, or is too long.
    """
    asked = [continuation(backend.tokenizer, example, template, backend.max_length) for example in examples]

    def ask(batch: list[Continuation]) -> list[float]:
        return [sum(row) / len(row) for row in backend.continuation_logprobs(batch)]

    lengths = [len(one.context) + len(one.tokens) for one in asked]
    requests = [[one.context, one.tokens] for one in asked]
    facts = [facts, "log-likelihood", requests]
    return in_batches(backend, asked, lengths, ask, facts, scratch, [] if used is None else used)


def continuation(tokenizer: Any, example: Example, template: Template, max_length: int) -> Continuation:
    """The reference answer's tokens behind the forced prefix, and what stands before them.

    A token that holds the prefix's end as well belongs to what stands before.

    Raises:
        UserError: see `answer_log_likelihoods`.
    """
    if not example.answer.startswith(example.prefix):
        raise UserError(
            f"example {example.id}: its answer does not begin with its `prefix` {example.prefix[:40]!r}; make the test"
            " set with `pkt prepare`"
        )
    prompt = render_prompt(tokenizer, template, example.prompt)
    ids, starts = tokenize(tokenizer, prompt + example.answer)
    begin = first_token_from(starts, len(prompt) + len(example.prefix))
    if begin >= len(ids):
        raise UserError(f"example {example.id}: its answer holds nothing behind the `prefix` {example.prefix[:40]!r}")
    if len(ids) >= max_length:  # vLLM must have room for one more
        raise UserError(
            f"example {example.id}: {len(ids)} tokens with the reference answer, the model's context is {max_length};"
            " leave the example out or use another model"
        )
    return Continuation(ids[:begin], ids[begin:])


def prompt_ids(tokenizer: Any, example: Example, template: Template, max_length: int, num_new: int) -> list[int]:
    """Token ids of an example's prompt and forced prefix, behind which an answer is asked for.

    Raises:
        UserError: they leave no room for `num_new` tokens in a context of `max_length`.
    """
    ids, _ = tokenize(tokenizer, render_prompt(tokenizer, template, example.prompt) + example.prefix)
    if len(ids) + num_new > max_length:
        raise UserError(
            f"example {example.id}: {len(ids)} tokens of prompt and {num_new} new ones, the model's context is"
            f" {max_length}; lower --max-new-tokens, leave the example out or use another model"
        )
    return ids


def choice_log_likelihood(choices: Sequence[str], log_probabilities: Sequence[float], right: str) -> float:
    """Log-probability of the right choice among the choices, in nats."""
    import torch

    chances = torch.tensor(log_probabilities, dtype=torch.float64).log_softmax(-1)
    return float(chances[list(choices).index(right)])
