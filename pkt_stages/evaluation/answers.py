"""A model's own answers to prompts, without the answer prefix that the evaluation forces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkt_stages.encoding import tokenize
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import Backend, Request, Sampling, completion
from pkt_stages.examples import Example
from pkt_stages.progress import track
from pkt_stages.scratch import Batches, fingerprint
from pkt_stages.templates import Template, render_prompt


@dataclass(frozen=True)
class Answer:
    """What the model wrote: its text, and whether it stopped by itself."""

    text: str
    ended: bool


def answered(
    backend: Backend,
    examples: Sequence[Example],
    *,
    template: Template,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    scratch: Path,
) -> tuple[list[Answer], Batches]:
    """One answer per example; and the finished batches, which wait in `scratch` for an interrupted run to go on.

    Args:
        seed: of the first example's random numbers, the next one's is one more.

    Raises:
        UserError: a prompt that leaves no room for an answer.
    """
    requests = []
    for i, example in enumerate(examples):
        ids, _ = tokenize(backend.tokenizer, render_prompt(backend.tokenizer, template, example.prompt))
        if len(ids) + max_new_tokens > backend.max_length:
            raise UserError(
                f"example {example.id}: {len(ids)} tokens and max_new_tokens {max_new_tokens} are more than the"
                f" {backend.max_length} that the source takes; lower max_new_tokens"
            )
        requests.append(Request(ids, max_new_tokens, seed + i))
    # Answers may depend on what else is in a batch, in the last bit.
    size = backend.batch_size
    facts = [backend.identity, backend.name, backend.dtype, size, max_new_tokens, temperature, seed]
    kept = Batches(scratch, f"generate-{fingerprint([*facts, [r.ids for r in requests]], [])}")
    made: list[list[int]] = []
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    for number, batch in enumerate(track(batches, "batches of answers")):
        found = kept.read(number)
        if found is None:
            found = backend.generate(batch, Sampling(temperature, top_p=1.0, stops=()))
            kept.write(number, found)
        made += found
    ends = backend.ends
    answers = [
        Answer(completion(backend.tokenizer, r.ids, tokens, ends, ()), any(token in ends for token in tokens))
        for r, tokens in zip(requests, made, strict=True)
    ]
    return answers, kept
