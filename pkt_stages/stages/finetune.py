"""How well does the target learn a task from examples, and does it matter what LoRA starts from? (METHODS 5 and 6)

train examples + a target (+ the source's sub-matrices, for Seeking) -> per seed a LoRA adapter in PEFT's format,
relative to the untouched target, and metrics. PostPKT's rows of the paper's table 1, and SeqKD on generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import Labels
from pkt_stages.errors import UserError
from pkt_stages.examples import training_file
from pkt_stages.models.recipe import Block, Init, TrainingParams
from pkt_stages.options import (
    SCRATCH,
    Device,
    MethodName,
    MicroBatch,
    Scratch,
    Stopwatch,
    Target,
    Task,
    option,
    with_params,
)
from pkt_stages.parallel import joined
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.trainer import Trained
    from pkt_stages.models.training import Job, Place


@dataclass(frozen=True)
class FinetuneParams(TrainingParams):
    """Settings of the training."""

    init: Init = option("random", "What LoRA starts from: random, pissa or seeking.")
    block: Block = option(
        "sensitive", "Of init seeking, the part of the source's weights: sensitive, or another of seek.more_blocks."
    )
    labels: Labels = option("answer", "Tokens that training supervises: answer, all or reference_code.")


def run(
    job: Job[FinetuneParams], place: Place, target: ModelRef, submatrices: Mapping[str, Tensor]
) -> dict[int, Trained]:
    """A training of the target per seed, on the job's examples.

    Args:
        submatrices: for `seeking`, the source's values by module, which then receive an adapter; else empty.
    """
    from transformers import Trainer, TrainingArguments

    from pkt_stages.models import load, lora, train_set, training

    params, config = job.params, load.load_config(target)
    modules = tuple(submatrices) or lora.site_modules(config)
    sizes = lora.Lora(modules, params.rank, params.alpha, params.dropout)

    def start() -> lora.Start:
        model = load.load_model(target, dtype=params.dtype, device=place.own_device)
        return lora.started(model, sizes, params.init, submatrices, job.examples)

    def make_trainer(model: Any, arguments: dict[str, Any]) -> Any:
        data: Any = train_set.rows(job.examples)
        return Trainer(model, TrainingArguments(**arguments), data_collator=train_set.collate, train_dataset=data)

    return training.train_seeds(job, place, start=start, make_trainer=make_trainer)


@with_params("finetune", FinetuneParams)
def finetune(
    params: FinetuneParams,
    target: Target,
    train: Annotated[Path, typer.Option(help="Examples to train on (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one adapter per seed (seed_0, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses and counts (JSON).")],
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`; for init seeking only.")] = None,
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    method: MethodName = None,
    task: Task = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the losses.")] = None,
    scratch: Scratch = SCRATCH,
    device: Device = "cpu",
    micro_batch_size: MicroBatch = 4,
) -> None:
    """Train LoRA adapters on examples, one per seed: PostPKT (random, PiSSA, Seeking) and SeqKD.

    Several processes (torchrun, accelerate) divide every batch, each with the whole model. Dropout draws other numbers
    with another micro-batch size.
    """
    from pkt_stages.models import changes, load, train_set, training
    from pkt_stages.models.submatrices import read_submatrices

    watch = Stopwatch()
    if (submatrices is not None) != (params.init == "seeking"):
        needed = "needs --submatrices (from `pkt seek`)" if submatrices is None else "has no use for --submatrices"
        raise UserError(f"init {params.init} {needed}")
    artifacts.check_replaceable(out, changes.LIST)
    ref = load.resolve(target)
    identity, source, values = load.identity(ref), None, {}
    if submatrices is not None:
        found = artifacts.load(submatrices, artifacts.SUBMATRICES)
        values = read_submatrices(found, identity, target, params.block)
        source = found.meta.get("source", {}).get("model")
    path = training_file(params.train_set, train, align)
    tokenizer = load.load_tokenizer(ref)
    examples = train_set.read_train(tokenizer, path, params, params.labels)
    files, date = [submatrices] if submatrices else [], dated(tokenizer, params.template)
    job = training.Job("finetune", method, params, identity, source, examples, files, date)
    with joined() as group:
        trained = run(job, training.Place(scratch, device, micro_batch_size, curves, group), ref, values)
        if not group.is_first:
            return
    watch.summary("finetune", training.publish(job, trained, out, metrics), out)
