"""How fast does `pkt evaluate` generate, beside lm-evaluation-harness's own `hf` model and transformers' `generate`?

    python -m benchmarks.generation --model data/tiny/target-chat --test artifacts/tiny/examples/gsm8k/test.jsonl
    python -m benchmarks.generation --task humaneval --model .. --test artifacts/tiny/examples/humaneval/test.jsonl

One model in memory, the same prompts (token by token: it is checked), greedy, equal batches, three ways in turn:

    pkt       the requests of the harness through this project's model: tokens of prompts, batches, answers as text
    lm-eval   the same requests through `lm_eval.models.huggingface.HFLM`
    generate  transformers' `generate` on the same padded batches, which knows no stop strings: it ends a row at the
              end token only, and its tokens become no text

Tokens are those of the answers up to the end token, the stop string or the limit, counted once, so that the ratio of
two rates is that of two times. The best of `--repeats` turns counts. Times on a CPU are the processor's (of one thread,
with OMP_NUM_THREADS=1), which other work on the machine disturbs less than the clock; on a GPU the clock's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pkt_stages import tasks
from pkt_stages.evaluation.backends import HfBackend, Request, Sampling
from pkt_stages.evaluation.harness import HarnessModel
from pkt_stages.evaluation.likelihood import prompt_ids
from pkt_stages.examples import read_examples
from pkt_stages.models.load import load_model, load_tokenizer, resolve
from pkt_stages.templates import render_prompt

T = TypeVar("T")


def timed(run: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds that a call takes (see above), and what it gives."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    found = run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return clock() - start, found


def generated(model: Any, batches: list[list[list[int]]], pad: int, tokens: int) -> None:
    """Every batch of prompts through transformers' `generate`."""
    for batch in batches:
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=model.device)
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)


def main(
    model: Annotated[str, typer.Option(help="A model's folder.")],
    test: Annotated[Path, typer.Option(help="A test set of `pkt prepare`.")],
    task: str = "gsm8k",
    examples: Annotated[int, typer.Option(help="The first so many.")] = 128,
    tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 128,
    batch_size: int = 64,
    repeats: int = 3,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ref = resolve(model)
    tokenizer, loaded = load_tokenizer(ref), load_model(ref, dtype=dtype, device=device)
    chosen = read_examples(test)[:examples]
    until = tasks.load(task).harness()["generation_kwargs"]["until"]
    backend = HfBackend(loaded, tokenizer, batch_size=batch_size, identity="benchmark")
    ours = HarnessModel(backend, "chat", 0, None, [], "benchmark")
    theirs = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, device=device)
    settings = {"until": until, "max_gen_toks": tokens, "temperature": 0.0}

    prompts = [prompt_ids(tokenizer, example, "chat", backend.max_length, tokens) for example in chosen]
    texts = [str(render_prompt(tokenizer, "chat", example.prompt) + example.prefix) for example in chosen]
    read = [theirs.tok_batch_encode([text])[0][0].tolist() for text in texts]
    if unequal := sum(ids != other for ids, other in zip(prompts, read, strict=True)):
        raise SystemExit(f"{unequal} of {len(prompts)} prompts are other tokens to lm-eval")

    def instances(more: dict[str, Any]) -> list[Instance]:
        docs = [{"id": one.id, "prompt": one.prompt, "prefix": one.prefix} for one in chosen]
        return [
            Instance("generate_until", doc, (text, settings | more), 0) for doc, text in zip(docs, texts, strict=True)
        ]

    order = sorted(prompts, key=len, reverse=True)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    ways: dict[str, Callable[[], Any]] = {
        "pkt": lambda: ours.generate_until(instances({"top_p": 1.0})),
        "lm-eval": lambda: theirs.generate_until(instances({}), disable_tqdm=True),
        "generate": lambda: generated(loaded, batches, backend.ends[0], tokens),
    }
    best, said = dict.fromkeys(ways, float("inf")), {}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds, said[name] = timed(way, device)
            best[name] = min(best[name], seconds)
    asked = [Request(ids, tokens, 0) for ids in order]
    made = [
        answer
        for i in range(0, len(asked), batch_size)
        for answer in backend.generate(asked[i : i + batch_size], Sampling(0.0, 1.0, tuple(until)))
    ]
    written = sum(map(len, made))
    equal = sum(a == b for a, b in zip(said["pkt"], said["lm-eval"], strict=True))
    where = f"batches of {batch_size}, {dtype} on {device}"
    print(f"{len(prompts)} prompts of {task}, {written} tokens of answers, {where}")
    print(f"answers equal to lm-eval's: {equal} of {len(prompts)}")
    for name, seconds in best.items():
        rate = written / seconds
        print(f"{name:9} {seconds:7.2f} s, {rate:7.0f} tokens/s, pkt's rate to its: {seconds / best['pkt']:.2f}")


if __name__ == "__main__":
    typer.run(main)
