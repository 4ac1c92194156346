"""How well does the target learn from the source's logits? (METHODS section 6; the paper's distillation baselines)

train examples + a source and a target with one vocabulary -> per seed a LoRA adapter in PEFT's format, relative to the
untouched target, and metrics. Supervised KD follows the gold answers, GKD the target's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pkt_stages.encoding import Template
from pkt_stages.examples import training_file
from pkt_stages.models.recipe import Recipe, Schedule, check_adapter_settings
from pkt_stages.options import Stopwatch, option, with_params


@dataclass(frozen=True)
class DistillParams:
    """Settings of the distillation."""

    objective: Literal["kd", "gkd"] = option("kd", "Whose answers: kd (gold) or gkd (the target's own).")
    beta: float = option(0.0, "Divergence: 0 is KL(source || target), 1 is KL(target || source), between: mixed.")
    temperature: float = option(1.0, "Of the target's own answers; the divergence has none.")
    max_new_tokens: int = option(256, "Tokens of each of the target's own answers, at most.")
    rank: int = option(16, "Rank r of the adapter.")
    alpha: float = option(16.0, "The update is alpha / rank times B A.")
    dropout: float = option(0.0, "Dropout of the adapter's input, 0 .. 1; acts on the target's own answers, too.")
    epochs: int = option(5, "Passes over the examples.")
    batch_size: int = option(64, "Examples per optimizer step.")
    lr: float = option(1e-5, "Learning rate of AdamW after the warm-up.")
    lr_schedule: Schedule = option("linear", "Course of the rate after the warm-up: constant, linear or cosine.")
    warmup_ratio: float = option(0.03, "Share of the steps in which the rate rises from 0.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Longer gradients are scaled to this norm; 0: never.")
    template: Template = option("chat", "Prompt format: chat (the target tokenizer's own), tulu, llama2 or none.")
    max_length: int = option(1024, "Longest example, tokens; a longer one is an error.")
    train_set: Literal["train", "align"] = option(
        "train", "Examples to train on: the train set, or the align set (the paper's < 100 examples)."
    )
    num_examples: int | None = option(None, "Only the first so many examples; None: all.")
    seeds: tuple[int, ...] = option((0,), "One training each: of the initial weights, data order and answers.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("float32", "Both models' dtype in training.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        self.recipe().check()
        check_adapter_settings(self)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, found {self.beta}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")

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


@with_params("distill", DistillParams)
def distill(
    params: DistillParams,
    method: Annotated[str, typer.Option(help="The method's name: its part of `methods` in the params file.")],
    source: Annotated[str, typer.Option(help="The source's model folder or hub name.")],
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    train: Annotated[Path, typer.Option(help="Examples to train on (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one adapter per seed (seed_0, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses and counts (JSON).")],
    align: Annotated[Path | None, typer.Option(help="Align examples (.jsonl), for train_set align.")] = None,
    task: Annotated[str | None, typer.Option(help="Part of the params section to use.")] = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the losses.")] = None,
    scratch: Annotated[
        Path, typer.Option(help="Folder for unfinished runs and finished seeds.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
    source_revision: Annotated[str | None, typer.Option(help="The source's hub revision (commit hash).")] = None,
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.", envvar="PKT_DEVICE")] = "cpu",
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.", envvar="PKT_MICRO_BATCH")] = 4,
) -> None:
    """Train LoRA adapters towards the source's logits, one per seed: supervised KD and GKD."""
    from pkt_stages import artifacts
    from pkt_stages.curves import curve_writer
    from pkt_stages.models import distillation, load, lora, training
    from pkt_stages.scratch import check_out, fingerprint

    watch = Stopwatch()
    load.check_device(device)
    check_out(out, *training.SEEDS)
    refs = {"source": load.resolve(source, source_revision), "target": load.resolve(target, revision)}
    identities = {side: load.identity(ref) for side, ref in refs.items()}
    configs = {side: load.load_config(ref) for side, ref in refs.items()}
    tokenizer = load.load_tokenizer(refs["target"])
    num_tokens = distillation.check_vocabularies(load.load_tokenizer(refs["source"]), tokenizer)
    examples = training.read_train(
        tokenizer,
        training_file(params.train_set, train, align),
        num_examples=params.num_examples,
        template=params.template,
        max_length=params.max_length,
        labels="answer",
    )
    settings = distillation.Distillation(params.objective, params.beta, params.temperature, params.max_new_tokens)
    distillation.check_lengths(examples, settings, configs["target"].max_position_embeddings)
    sizes = lora.Lora(
        modules=lora.site_modules(configs["target"].num_hidden_layers),
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
    )
    models: dict[str, Any] = {}

    def start(seed: int) -> training.Start:
        if not models:
            models["source"] = load.load_model(refs["source"], dtype=params.dtype, device=device)
        model = load.load_model(refs["target"], dtype=params.dtype, device=device)
        distillation.cut_vocabularies(models["source"], model, num_tokens)
        return training.started(model, sizes, init="random", blocks={}, examples=examples)

    def trainer(started: training.Start, arguments: dict[str, Any]) -> Any:
        return distillation.gkd_trainer(started.model, models["source"], tokenizer, examples, settings, arguments)

    values = {name: value for name, value in asdict(params).items() if name != "seeds"}
    facts = ["distill", identities, values, [asdict(e) for e in examples], device, micro_batch_size]
    folders = {seed: scratch / f"distill-{fingerprint([*facts, seed], [])}" for seed in params.seeds}
    with curve_writer(curves) as log:
        records = training.train_seeds(
            params.seeds,
            folder_of=folders.__getitem__,
            start=start,
            trainer=trainer,
            recipe=params.recipe(),
            micro_batch_size=micro_batch_size,
            device=device,
            base_model=str(identities["target"]["name"]),
            log=log,
        )
    training.publish(out, folders)
    result: dict[str, Any] = {
        "method": method,
        **identities,
        "params": asdict(params),
        **training.summary(records),
        **training.token_counts(examples, params.recipe()),
    }
    if params.objective == "gkd":
        del result["num_supervised_tokens"]  # of the gold answers, which are not used
    artifacts.write_json(metrics, result)
    first, last = result["first_epoch_loss"], result["last_epoch_loss"]
    watch.summary("distill", f"{method}, {len(records)} seeds, loss by epoch {first:.4f} -> {last:.4f}", out)
