"""How well does the target learn a task from examples, and does it matter what LoRA starts from? (METHODS 5 and 6)

train examples + a target (+ the source's sub-matrices, for Seeking) -> per seed a LoRA adapter in PEFT's format,
relative to the untouched target, and metrics. PostPKT's rows of the paper's table 1, and SeqKD on generations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pkt_stages.encoding import Labels, Template
from pkt_stages.errors import UserError
from pkt_stages.examples import training_file
from pkt_stages.models.recipe import Recipe, Schedule, check_adapter_settings
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.parallel import joined


@dataclass(frozen=True)
class FinetuneParams:
    """Settings of the training."""

    init: Literal["random", "pissa", "seeking"] = option("random", "What LoRA starts from: random, pissa or seeking.")
    rank: int = option(16, "Rank r of the adapter that is trained.")
    alpha: float = option(16.0, "The update is alpha / rank times B A.")
    dropout: float = option(0.05, "Dropout of the adapter's input, 0 .. 1.")
    epochs: int = option(5, "Passes over the examples.")
    batch_size: int = option(64, "Examples per optimizer step.")
    lr: float = option(3e-4, "Learning rate of AdamW after the warm-up.")
    lr_schedule: Schedule = option("linear", "Course of the rate after the warm-up.")
    warmup_ratio: float = option(0.03, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Longer gradients are scaled to this norm; 0: never.")
    labels: Labels = option("answer", "Tokens that training supervises: answer, all or reference_code.")
    template: Template = option("chat", "Prompt format: chat (the tokenizer's own), tulu, llama2 or none.")
    max_length: int = option(1024, "Longest example, tokens; a longer one is an error.")
    train_set: Literal["train", "align"] = option(
        "train", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )
    num_examples: int | None = option(None, "Only the first so many examples; None: all.")
    seeds: tuple[int, ...] = option((0,), "One training each: of the initial weights, data order and dropout.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("float32", "The target's dtype in training.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        self.recipe().check()
        check_adapter_settings(self)

    def recipe(self) -> Recipe:
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            lr_schedule=self.lr_schedule,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


@with_params("finetune", FinetuneParams)
def finetune(
    params: FinetuneParams,
    method: Annotated[str, typer.Option(help="The method's name: its part of `methods` in the params file.")],
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    train: Annotated[Path, typer.Option(help="Examples to train on (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one adapter per seed (seed_0, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses and counts (JSON).")],
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`; for init seeking only.")] = None,
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    task: Annotated[str | None, typer.Option(help="Part of the params section to use.")] = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the losses.")] = None,
    scratch: Annotated[
        Path, typer.Option(help="Folder for unfinished runs and finished seeds.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    micro_batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Examples at a time; changes memory, and what dropout draws.", envvar="PKT_MICRO_BATCH"
        ),
    ] = 4,
) -> None:
    """Train LoRA adapters on examples, one per seed: PostPKT (random, PiSSA, Seeking) and SeqKD.

    Several processes (torchrun, accelerate) divide every batch, each with the whole model.
    """
    from pkt_stages import artifacts
    from pkt_stages.curves import curve_writer
    from pkt_stages.models import load, lora, training
    from pkt_stages.scratch import check_out, fingerprint

    watch = Stopwatch()
    if (submatrices is not None) != (params.init == "seeking"):
        needed = "needs --submatrices (from `pkt seek`)" if submatrices is None else "has no use for --submatrices"
        raise UserError(f"method {method}: init {params.init} {needed}")
    check_out(out, *training.SEEDS)
    ref = load.resolve(target, revision)
    identity = load.identity(ref)
    config = load.load_config(ref)
    blocks = {}
    if submatrices is not None:
        blocks = lora.read_blocks(artifacts.load(submatrices, "submatrices"), identity, target)
    examples = training.read_train(
        load.load_tokenizer(ref),
        training_file(params.train_set, train, align),
        num_examples=params.num_examples,
        template=params.template,
        max_length=params.max_length,
        labels=params.labels,
    )
    sizes = lora.Lora(
        modules=tuple(blocks) or lora.site_modules(config.num_hidden_layers),
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
    )

    def start(seed: int) -> training.Start:
        model = load.load_model(ref, dtype=params.dtype, device=device)
        return training.started(model, sizes, init=params.init, blocks=blocks, examples=examples)

    def trainer(started: training.Start, arguments: dict[str, Any]) -> Any:
        from transformers import Trainer, TrainingArguments

        data: Any = [{"ids": e.ids, "labels": e.labels} for e in examples]
        return Trainer(
            started.model, TrainingArguments(**arguments), data_collator=training.collate, train_dataset=data
        )

    settings = {name: value for name, value in asdict(params).items() if name != "seeds"}
    facts = ["finetune", identity, settings, [asdict(e) for e in examples], device, micro_batch_size]
    files = [submatrices] if submatrices is not None else []
    with joined() as group:
        device = group.device(device)
        load.check_device(device)
        facts += [group.size] if group.size > 1 else []
        folders = {seed: scratch / f"finetune-{fingerprint([*facts, seed], files)}" for seed in params.seeds}
        with curve_writer(curves if group.is_first else None) as log:
            records = training.train_seeds(
                params.seeds,
                folder_of=folders.__getitem__,
                start=start,
                trainer=trainer,
                recipe=params.recipe(),
                micro_batch_size=micro_batch_size,
                device=device,
                base_model=str(identity["name"]),
                log=log,
                group=group,
            )
        if not group.is_first:
            return
    training.publish(out, folders)
    result: dict[str, Any] = {
        "method": method,
        "target": identity,
        "params": asdict(params),
        **training.summary(records),
        **training.token_counts(examples, params.recipe()),
    }
    artifacts.write_json(metrics, result)
    first, last = result["first_epoch_loss"], result["last_epoch_loss"]
    watch.summary("finetune", f"{method}, {len(records)} seeds, loss by epoch {first:.4f} -> {last:.4f}", out)
