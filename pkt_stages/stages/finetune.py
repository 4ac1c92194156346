"""How well does the target learn a task from examples, and does it matter what LoRA starts from? (METHODS 5 and 6)

train examples + a target (+ the source's sub-matrices, for Seeking; + the source, for SemAlign) -> per seed a LoRA
adapter in PEFT's format, relative to the untouched target, and metrics. PostPKT's rows of the paper's table 1, SeqKD on
generations, and SemAlign beside the plain training of the same weights (METHODS 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from pkt_stages.models.semantics import Supervision
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
    num_paired: int | None = option(
        None, "Train only the layers that pair with so many of the source's most important ones; None: all.", ge=1
    )
    pairing: Literal["depth", "important"] = option(
        "depth", "Their partners: the source's layers at their depth (SemAlign), or the important ones themselves."
    )
    output_loss: Literal["cross_entropy", "cosine"] = option(
        "cross_entropy", "Of the logits: cross_entropy, or cosine (SemAlign: 1 - cos to the label's one-hot vector)."
    )
    layer_loss: Literal["none", "source", "permuted"] = option(
        "none",
        "Added to it, 1 - cos of a trained layer's FFN output to the source's recomposed one (SemAlign): none, source,"
        " or permuted (the source's directions belong to other tokens, a control).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_paired is None and (self.layer_loss != "none" or self.output_loss != "cross_entropy"):
            raise ValueError("output_loss and layer_loss are those of paired layers; give num_paired, too")
        if self.num_paired is not None and self.init == "seeking":
            raise ValueError("init seeking trains all layers; num_paired goes with init random or pissa")


def run(
    job: Job[FinetuneParams],
    place: Place,
    target: ModelRef,
    submatrices: Mapping[str, Tensor],
    supervision: Supervision | None,
) -> dict[int, Trained]:
    """A training of the target per seed, on the job's examples.

    Args:
        submatrices: for `seeking`, the source's values by module, which then receive an adapter; else empty.
        supervision: for `num_paired`, the layers that are trained, and towards what; else None.
    """
    from transformers import Trainer, TrainingArguments

    from pkt_stages.models import load, lora, train_set, training
    from pkt_stages.models.semantics import SemanticTrainer

    params, config = job.params, load.load_config(target)
    layers = [layer for _, layer in supervision.pairs] if supervision else None
    modules = tuple(submatrices) or lora.site_modules(config, layers)
    sizes = lora.Lora(modules, params.rank, params.alpha, params.dropout)

    def start() -> lora.Start:
        model = load.load_model(target, dtype=params.dtype, device=place.own_device)
        return lora.started(model, sizes, params.init, submatrices, job.examples)

    def make_trainer(model: Any, arguments: dict[str, Any]) -> Any:
        if supervision is not None:
            return SemanticTrainer(model, arguments, job.examples, params.output_loss, supervision)
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
    source: Annotated[str | None, typer.Option(help="The source (as the target); for num_paired only.")] = None,
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    method: MethodName = None,
    task: Task = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the losses.")] = None,
    scratch: Scratch = SCRATCH,
    device: Device = "cpu",
    micro_batch_size: MicroBatch = 4,
) -> None:
    """Train LoRA adapters on examples, one per seed: PostPKT (random, PiSSA, Seeking), SeqKD and SemAlign.

    Several processes (torchrun, accelerate) divide every batch, each with the whole model. Dropout draws other numbers
    with another micro-batch size.
    """
    from pkt_stages.models import changes, load, semantics, train_set, training
    from pkt_stages.models.submatrices import read_submatrices

    watch = Stopwatch()
    if (submatrices is not None) != (params.init == "seeking"):
        needed = "needs --submatrices (from `pkt seek`)" if submatrices is None else "has no use for --submatrices"
        raise UserError(f"init {params.init} {needed}")
    if (source is not None) != (params.num_paired is not None):
        raise UserError(
            "without num_paired --source has no use"
            if source is not None
            else f"num_paired {params.num_paired} needs --source, whose layers are paired"
        )
    artifacts.check_replaceable(out, changes.LIST)
    ref = load.resolve(target)
    identity, of_source, values = load.identity(ref), None, {}
    if submatrices is not None:
        found = artifacts.load(submatrices, artifacts.SUBMATRICES)
        values = read_submatrices(found, identity, target, params.block)
        of_source = found.meta.get("source", {}).get("model")
    beside = load.resolve(source) if source is not None else None
    if beside is not None:
        of_source = load.identity(beside)
    path = training_file(params.train_set, train, align)
    tokenizer = load.load_tokenizer(ref)
    examples = train_set.read_train(tokenizer, path, params, params.labels)
    files, facts = [submatrices] if submatrices else [], dated(tokenizer, params.template)
    with joined() as group:
        place, supervision = training.Place(scratch, device, micro_batch_size, curves, group), None
        if beside is not None and params.num_paired is not None:
            supervision = semantics.supervise(
                beside,
                ref,
                examples,
                num_paired=params.num_paired,
                pairing=params.pairing,
                layer_loss=params.layer_loss,
                dtype=params.dtype,
                device=place.own_device,
                micro_batch_size=micro_batch_size,
            )
            facts = {**facts, **supervision.facts}
        job = training.Job("finetune", method, params, identity, of_source, examples, files, facts)
        trained = run(job, place, ref, values, supervision)
        if not group.is_first:
            return
    unit = "nats" if params.output_loss == "cross_entropy" else "1 - cosine"
    unit += "" if params.layer_loss == "none" else ", and 1 - cosine of layers,"
    watch.summary("finetune", training.publish(job, trained, out, metrics, unit=unit), out)
