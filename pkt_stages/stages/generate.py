"""What does the source answer to the training prompts? Made once, for SeqKD: `pkt finetune --train` on its answers.

examples + the source -> the same prompts with the source's answers (.jsonl), and metrics. The source begins right after
the prompt, without the answer prefix that the evaluation forces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.evaluation.settings import AnswerParams
from pkt_stages.examples import Example, read_examples, training_file, write_jsonl
from pkt_stages.options import (
    SCRATCH,
    BatchSize,
    Device,
    MethodName,
    Scratch,
    Source,
    Stopwatch,
    Task,
    option,
    with_params,
)
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from pkt_stages.evaluation.answers import Answer


@dataclass(frozen=True)
class GenerateParams(AnswerParams):
    """Settings of the generation."""

    train_set: Literal["train", "align"] = option(
        "train", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )
    num_examples: int | None = option(None, "Only the first so many examples; None: all.", ge=1)


def run(asked: Sequence[Example], answers: Sequence[Answer]) -> tuple[list[Example], dict[str, Any]]:
    """The examples with the source's answers, and counts. Empty answers are left out: training needs a text."""
    pairs = list(zip(asked, answers, strict=True))
    written = [Example(e.dataset, e.id, e.prompt, a.text) for e, a in pairs if a.text.strip()]
    return written, {
        "num_examples": len(written),
        "num_asked": len(asked),
        "empty_ids": [e.id for e, a in pairs if not a.text.strip()],
        "cut_off_ids": [e.id for e, a in pairs if not a.ended],
    }


@with_params("generate", GenerateParams)
def generate(
    params: GenerateParams,
    source: Source,
    train: Annotated[Path, typer.Option(help="Examples whose prompts to answer (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Where to write the prompts with the source's answers (.jsonl).")],
    metrics: Annotated[Path, typer.Option(help="Where to write counts (JSON).")],
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    task: Task = None,
    method: MethodName = None,
    scratch: Scratch = SCRATCH,
    device: Device = "cpu",
    batch_size: BatchSize = 64,
) -> None:
    """Let the source answer the training prompts; empty answers are left out and reported."""
    from pkt_stages.evaluation.answers import answered
    from pkt_stages.evaluation.backends import opened
    from pkt_stages.models import load

    watch = Stopwatch()
    asked = read_examples(training_file(params.train_set, train, align), params.num_examples)
    load.check_device(device)
    ref = load.resolve(source)
    identity = load.identity(ref)
    load.load_config(ref)
    engine: dict[str, Any] = {"backend": params.backend, "dtype": params.dtype, "seed": params.seed}
    tokenizer = load.load_tokenizer(ref)
    with opened(ref, tokenizer, batch_size=batch_size, device=device, **engine) as backend:
        answers, kept = answered(
            backend,
            asked,
            template=params.template,
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            seed=params.seed,
            scratch=scratch,
        )
    written, counts = run(asked, answers)
    if not written:
        raise UserError(f"{source}: all {len(asked)} answers are empty; look at the template {params.template!r}")
    write_jsonl(out, (example.to_row() for example in written))
    made = {"source": identity, "params": asdict(params), **dated(tokenizer, params.template)}
    artifacts.write_json(metrics, made | counts)
    kept.remove()
    if empty := counts["empty_ids"]:
        typer.echo(f"warning: {len(empty)} of {len(asked)} answers are empty and left out, e.g. {empty[0]}", err=True)
    cut_off = len(counts["cut_off_ids"])
    watch.summary("generate", f"{len(written)} answers, {cut_off} of them cut off at max_new_tokens", out)
