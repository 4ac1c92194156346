"""What does the source answer to the training prompts? Made once, for SeqKD: `pkt finetune --train` on its answers.

examples + the source -> the same prompts with the source's answers (.jsonl), and metrics. The source begins right after
the prompt, without the answer prefix that the evaluation forces.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import Template
from pkt_stages.errors import UserError
from pkt_stages.examples import Example, read_examples, training_file, write_rows
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkt_stages.evaluation.backends import Backend
    from pkt_stages.scratch import Batches


@dataclass(frozen=True)
class GenerateParams:
    """Settings of the generation."""

    template: Template = option("chat", "Prompt format: chat (the source tokenizer's own), tulu, llama2 or none.")
    max_new_tokens: int = option(512, "Tokens per answer, at most.")
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    seed: int = option(0, "Seed of sampling.")
    train_set: Literal["train", "align"] = option(
        "train", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )
    num_examples: int | None = option(None, "Only the first so many examples; None: all.")
    backend: Literal["hf", "vllm"] = option("hf", "What computes: hf (transformers) or vllm.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "Dtype of the weights; auto: stored.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, found {self.num_examples}")


@dataclass(frozen=True)
class Answer:
    """What the source wrote: its text, and whether it stopped by itself."""

    text: str
    ended: bool


def run(
    backend: Backend, examples: Sequence[Example], params: GenerateParams, scratch: Path
) -> tuple[list[Answer], Batches]:
    """One answer per example; and the finished batches, which wait in `scratch` for an interrupted run to go on.

    Raises:
        UserError: a prompt that leaves no room for an answer.
    """
    from pkt_stages.encoding import render_prompt, tokenize
    from pkt_stages.evaluation.backends import Request, Sampling, completion
    from pkt_stages.progress import track
    from pkt_stages.scratch import Batches, fingerprint

    requests = []
    for i, example in enumerate(examples):
        ids, _ = tokenize(backend.tokenizer, render_prompt(backend.tokenizer, params.template, example.prompt))
        if len(ids) + params.max_new_tokens > backend.max_length:
            raise UserError(
                f"example {example.id}: {len(ids)} tokens and max_new_tokens {params.max_new_tokens} are more than the"
                f" {backend.max_length} that the source takes; lower max_new_tokens"
            )
        requests.append(Request(ids, params.max_new_tokens, params.seed + i))
    # Answers may depend on what else is in a batch, in the last bit.
    size = backend.batch_size
    facts = ["generate", backend.identity, backend.name, backend.dtype, size, asdict(params), [r.ids for r in requests]]
    kept = Batches(scratch, f"generate-{fingerprint(facts, [])}")
    made: list[list[int]] = []
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    for number, batch in enumerate(track(batches, "batches of answers")):
        found = kept.read(number)
        if found is None:
            found = backend.generate(batch, Sampling(params.temperature, top_p=1.0, stops=()))
            kept.write(number, found)
        made += found
    answers = [
        Answer(completion(backend.tokenizer, r.ids, tokens, backend.ends, ()), any(t in backend.ends for t in tokens))
        for r, tokens in zip(requests, made, strict=True)
    ]
    return answers, kept


@with_params("generate", GenerateParams)
def generate(
    params: GenerateParams,
    source: Annotated[str, typer.Option(help="The source's model folder or hub name.")],
    train: Annotated[Path, typer.Option(help="Examples whose prompts to answer (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Where to write the prompts with the source's answers (.jsonl).")],
    metrics: Annotated[Path, typer.Option(help="Where to write counts (JSON).")],
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    task: Annotated[str | None, typer.Option(help="Part of the params section to use.")] = None,
    method: Annotated[str | None, typer.Option(help="Entry of `methods` in the params to use.")] = None,
    scratch: Annotated[
        Path, typer.Option(help="Folder for finished batches, to go on after a kill.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
    revision: Annotated[str | None, typer.Option(help="The source's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.", envvar="PKT_EVALUATE_BATCH_SIZE")] = 64,
) -> None:
    """Let the source answer the training prompts; empty answers are left out and reported."""
    from pkt_stages.evaluation.backends import HfBackend, VllmBackend
    from pkt_stages.models import load

    watch = Stopwatch()
    examples = training_file(params.train_set, train, align)
    asked = read_examples(examples)
    if params.num_examples is not None and len(asked) < params.num_examples:
        raise UserError(f"{examples}: holds {len(asked)} examples, num_examples asks for {params.num_examples}")
    asked = asked[: params.num_examples]
    load.check_device(device)
    ref = load.resolve(source, revision)
    identity = load.identity(ref)
    load.load_config(ref)
    tokenizer = load.load_tokenizer(ref)
    with ExitStack() as stack:
        backend: Any
        if params.backend == "vllm":
            backend = VllmBackend(
                ref.location,
                tokenizer,
                identity="{name}@{revision}".format(**identity),
                revision=ref.revision,
                dtype=params.dtype,
                batch_size=batch_size,
                seed=params.seed,
            )
            stack.enter_context(closing(backend))
        else:
            model = load.load_model(ref, dtype=params.dtype, device=device)
            backend = HfBackend(model, tokenizer, batch_size=batch_size)
        answers, kept = run(backend, asked, params, scratch)
    # Training needs a text to follow.
    empty = [e.id for e, a in zip(asked, answers, strict=True) if not a.text.strip()]
    if len(empty) == len(asked):
        raise UserError(f"{source}: all {len(asked)} answers are empty; look at the template {params.template!r}")
    written = [
        Example(e.dataset, e.id, e.prompt, a.text) for e, a in zip(asked, answers, strict=True) if a.text.strip()
    ]
    write_rows(out, (example.to_row() for example in written))
    artifacts.write_json(
        metrics,
        {
            "source": identity,
            "params": asdict(params),
            "num_examples": len(written),
            "num_asked": len(asked),
            "empty_ids": empty,
            "cut_off_ids": [e.id for e, a in zip(asked, answers, strict=True) if not a.ended],
        },
    )
    kept.remove()
    if empty:
        typer.echo(f"warning: {len(empty)} of {len(asked)} answers are empty and left out, e.g. {empty[0]}", err=True)
    cut_off = sum(not a.ended for a in answers)
    watch.summary("generate", f"{len(written)} answers, {cut_off} of them cut off at max_new_tokens", out)
