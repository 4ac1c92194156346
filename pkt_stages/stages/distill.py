"""How well does the target learn from the source's logits? (METHODS section 6; the paper's distillation baselines)

train examples + a source and a target with one vocabulary -> per seed a LoRA adapter in PEFT's format, relative to the
untouched target, and metrics. Supervised KD follows the gold answers, GKD the target's own; ULD the gold ones between
models with different tokenizers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.examples import Example, read_examples, training_file
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.options import (
    SCRATCH,
    Device,
    MethodName,
    MicroBatch,
    Scratch,
    Source,
    Stopwatch,
    Target,
    Task,
    option,
    with_params,
)
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.trainer import Trained
    from pkt_stages.models.training import Job, Place


@dataclass(frozen=True)
class DistillParams(TrainingParams):
    """Settings of the distillation; on as few examples as the paper's, with other numbers than fine-tuning's."""

    objective: Literal["kd", "gkd", "uld"] = option(
        "kd",
        "Whose answers: kd (gold), gkd (the target's own), or uld: gold, and sorted probabilities, for two tokenizers.",
    )
    beta: float = option(
        0.0, "Divergence: 0 is KL(source || target), 1 is KL(target || source), between: mixed.", ge=0, le=1
    )
    temperature: float = option(1.0, "Of the target's own answers; the divergence has none.", gt=0)
    max_new_tokens: int = option(512, "Tokens of each of the target's own answers, at most.", ge=1)
    batch_size: int = option(16, "Examples per optimizer step.", ge=1)
    lr: float = option(1e-5, "Learning rate of AdamW after the warm-up.", gt=0)
    train_set: Literal["train", "align"] = option(
        "align", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )


def run(job: Job[DistillParams], place: Place, refs: Sequence[ModelRef], raw: Sequence[Example]) -> dict[int, Trained]:
    """A training of the target per seed, towards the source's logits on the job's examples.

    Args:
        refs: source and target.
        raw: the job's examples, not encoded.

    Raises:
        UserError: other tokens than the source's (but for uld), tokenizers that read other characters, an example that
            is too long for the source, or a prompt that leaves no room for an answer.
    """
    from pkt_stages.encoding import encode, tokens_at
    from pkt_stages.models import distillation, load, lora, texts, training
    from pkt_stages.models.sites import context_length

    source, target = refs
    params, config, tokenizer = job.params, load.load_config(target), load.load_tokenizer(target)
    of_source = load.load_tokenizer(source)
    across = params.objective == "uld"
    num_tokens = 0 if across else distillation.check_vocabularies(of_source, tokenizer)
    pairs, ends = [], []
    for example, encoded in zip(raw, job.examples, strict=True) if across else ():
        both = (tokenizer, of_source)
        texts.check_same_reading(
            [texts.read_by(t, tokens_at(t, example.answer)[0]) for t in both], (target, source), f"example {example.id}"
        )
        pairs.append((encoded, encode(of_source, example, template=params.template, max_length=params.max_length)))
        found = [distillation.answer_ends(t, example, params.template, side) for side, t in enumerate(both)]
        ends.append((found[0], found[1]))
    if params.objective == "gkd":
        distillation.check_lengths(job.examples, params.max_new_tokens, context_length(config, left=True) or 2**31)
    modules = lora.site_modules(config)
    sizes = lora.Lora(modules, params.rank, params.alpha, params.dropout)

    @functools.cache
    def loaded_source() -> Any:
        return load.load_model(source, dtype=params.dtype, device=place.own_device)

    def start() -> lora.Start:
        from_logits = loaded_source()
        model = load.load_model(target, dtype=params.dtype, device=place.own_device)
        if not across:
            distillation.cut_vocabularies(from_logits, model, num_tokens)
        return lora.started(model, sizes, "random", {}, job.examples)

    def make_trainer(model: Any, arguments: dict[str, Any]) -> Any:
        if across:
            return distillation.uld_trainer(model, loaded_source(), pairs, ends, arguments)
        return distillation.gkd_trainer(
            model,
            loaded_source(),
            tokenizer,
            job.examples,
            arguments,
            own_answers=params.objective == "gkd",
            beta=params.beta,
            temperature=params.temperature,
            max_new_tokens=params.max_new_tokens,
        )

    return training.train_seeds(job, place, start=start, make_trainer=make_trainer)


@with_params("distill", DistillParams)
def distill(
    params: DistillParams,
    source: Source,
    target: Target,
    train: Annotated[Path, typer.Option(help="Examples to train on (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one adapter per seed (seed_0, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses and counts (JSON).")],
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    method: MethodName = None,
    task: Task = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the losses.")] = None,
    scratch: Scratch = SCRATCH,
    device: Device = "cpu",
    micro_batch_size: MicroBatch = 4,
) -> None:
    """Train LoRA adapters towards the source's logits, one per seed: supervised KD, GKD and ULD."""
    from pkt_stages.models import changes, load, train_set, training

    watch = Stopwatch()
    load.check_device(device)
    artifacts.check_replaceable(out, changes.LIST)
    refs = [load.resolve(model) for model in (source, target)]
    of_source, of_target = map(load.identity, refs)
    path = training_file(params.train_set, train, align)
    tokenizer = load.load_tokenizer(refs[1])
    examples = train_set.read_train(tokenizer, path, params)
    facts = dated(tokenizer, params.template)
    job = training.Job("distill", method, params, of_target, of_source, examples, facts=facts)
    raw = read_examples(path, params.num_examples)
    trained = run(job, training.Place(scratch, device, micro_batch_size, curves), refs, raw)
    told = training.publish(job, trained, out, metrics, on_answers=params.objective == "kd")
    watch.summary("distill", told, out)
