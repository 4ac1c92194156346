"""Training of an adapter with transformers' Trainer: once per seed, resumable, with the same bytes in the end.

A seed has a scratch folder, named after a fingerprint of all that determines its result but the other seeds. Its
finished adapter stays there, so that an added seed is trained alone; Trainer's checkpoints go when the seed is done.

The loss of a step is Trainer's: the mean over the supervised tokens of the whole batch, whatever the micro-batches.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from pkt_stages import artifacts
from pkt_stages.curves import Log
from pkt_stages.encoding import Encoded, Labels, Template, encode
from pkt_stages.errors import UserError
from pkt_stages.examples import read_examples
from pkt_stages.models import adapters, lora
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.load import weights_hash
from pkt_stages.models.recipe import Recipe
from pkt_stages.parallel import Group
from pkt_stages.progress import track
from pkt_stages.scratch import replaced

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_WHOLE = "whole"  # a checkpoint with this file was written to its end
_CHECKPOINTS = 10  # per run
SEEDS = ("seed_*", "adapter of a seed")  # what an output folder holds


@dataclass(frozen=True)
class Start:
    """A model that is ready to be trained.

    Attributes:
        model: with its adapter (PEFT).
        alpha: the adapter's.
        subtracted: the adapter whose update was taken from the base weights, if any.
        facts: JSON to record.
    """

    model: Any
    alpha: float
    subtracted: Adapter | None
    facts: Mapping[str, Any]


def started(
    model: Any, sizes: lora.Lora, *, init: lora.Init, blocks: Mapping[str, Tensor], examples: Sequence[Encoded]
) -> Start:
    """Put an adapter into the model, and check on the first examples' logits that nothing changed by that.

    In 16 bits the reduced base of `pissa` and `seeking` is rounded; the finished adapter is for the unrounded one.

    Args:
        blocks: for `seeking`, the source's values by module.

    Raises:
        UserError: the adapter does not fit the model, or its logits changed by more than rounding.
    """
    lora.check_sizes(model, sizes)
    lora.check_blocks(model, blocks)
    before = lora.logits_of(model, examples[:4])
    dtype = str(model.dtype).removeprefix("torch.")
    model = lora.INITIALISATIONS[init](model, sizes, blocks)
    error = lora.unchanged_error(before, lora.logits_of(model, examples[:4]), dtype)
    subtracted = lora.adapter_of(model, sizes.alpha) if init in lora.SUBTRACTED else None
    return Start(model, sizes.alpha, subtracted, {"initial_logits_error": error})


def train_seeds(
    seeds: Sequence[int],
    *,
    folder_of: Callable[[int], Path],
    start: Callable[[int], Start],
    trainer: Callable[[Start, dict[str, Any]], Any],
    recipe: Recipe,
    micro_batch_size: int,
    device: str,
    base_model: str,
    log: Log,
    group: Group | None = None,
) -> dict[str, dict[str, Any]]:
    """Train each seed whose scratch folder holds no result; the records by seed.

    Args:
        folder_of: a seed's scratch folder.
        start: makes the model for a seed, always in the same way; Python's, numpy's and torch's generators are seeded.
        trainer: makes the Trainer from it and the values for its TrainingArguments.
        base_model: the target's name, for the adapter's config.
        log: receives the numbers of each step.
        group: the processes that divide every batch.

    Raises:
        UserError: a loss that is not finite, several GPUs for one process, or a batch that cannot be divided.
    """
    group = group or Group()
    if group.size == 1 and device not in ("cpu", "auto") and torch.cuda.device_count() > 1:
        # Trainer would split batches over them.
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible, one process trains on one; set CUDA_VISIBLE_DEVICES, or"
            " start one process per GPU with torchrun"
        )
    if recipe.batch_size % group.size:
        raise UserError(f"batch_size {recipe.batch_size} cannot be divided among {group.size} processes")
    records = {}
    for seed in seeds:
        folder = folder_of(seed)
        group.wait()  # or one process would find what another one has just finished
        record = _finished(folder)
        group.wait()
        if record is None:
            record = _train(
                seed,
                folder,
                start=start,
                trainer=trainer,
                arguments=_arguments(recipe, folder / "trainer", seed, micro_batch_size, device, group.size),
                base_model=base_model,
                log=log,
                group=group,
            )
            gc.collect()  # a Trainer holds its model in a cycle
        else:
            for step in record["steps"]:
                log(_named(seed, step))
        records[str(seed)] = record
    return records


def summary(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the metrics say about the seeds: each one's record with its losses by step, and means over the seeds."""
    losses = [record["loss_by_epoch"] for record in records.values()]
    seeds = {
        seed: {name: value for name, value in record.items() if name != "steps"}
        | {"loss_by_step": [step["loss"] for step in record["steps"]]}
        for seed, record in records.items()
    }
    return {
        "seeds": seeds,
        "first_epoch_loss": sum(loss[0] for loss in losses) / len(losses),
        "last_epoch_loss": sum(loss[-1] for loss in losses) / len(losses),
        "units": {"loss": "nats per supervised token"},
    }


def publish(out: Path, folders: Mapping[int, Path]) -> None:
    """Put the finished adapters into `out` as `seed_<n>`, in place of those of an earlier run; all or none appear."""
    with replaced(out, *SEEDS) as beside:
        for seed, folder in folders.items():
            shutil.copytree(folder / "adapter", beside / f"seed_{seed}")


def read_train(
    tokenizer: Any, path: Path, *, num_examples: int | None, template: Template, max_length: int, labels: Labels
) -> list[Encoded]:
    """The first examples of a file, encoded; all of them by default.

    Raises:
        UserError: malformed or too long examples, or fewer than asked for.
    """
    found = read_examples(path)
    if num_examples is not None and len(found) < num_examples:
        raise UserError(f"{path}: holds {len(found)} examples, num_examples asks for {num_examples}")
    chosen = found[:num_examples]
    return [encode(tokenizer, e, template=template, max_length=max_length, labels=labels) for e in chosen]


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tensor:
    """Rows of different length as one tensor [row, longest], filled up on the right or left."""
    longest = max(map(len, rows))
    gaps = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([[*g, *r] if left else [*r, *g] for g, r in zip(gaps, rows, strict=True)])


def collate(examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Encoded examples (`ids`, `labels`) as a batch, padded on the right."""
    ids = [example["ids"] for example in examples]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([example["labels"] for example in examples], -100),
    }


def token_counts(examples: Sequence[Encoded], recipe: Recipe) -> dict[str, int]:
    """How much a run trains on: examples, optimizer steps, supervised tokens over all epochs."""
    supervised = sum(label != -100 for e in examples for label in e.labels[1:])
    return {
        "num_examples": len(examples),
        "num_steps": recipe.epochs * math.ceil(len(examples) / recipe.batch_size),
        "num_supervised_tokens": recipe.epochs * supervised,
    }


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a seed whose adapter is there as it was written."""
    try:
        record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    try:
        whole = _hash(adapters.load_adapter(folder / "adapter")) == record["adapter_hash"]
    except (UserError, KeyError):
        return None
    return record if whole else None


def _arguments(
    recipe: Recipe, folder: Path, seed: int, micro_batch_size: int, device: str, num_processes: int
) -> dict[str, Any]:
    """Values for TrainingArguments."""
    part = recipe.batch_size // num_processes
    micro = max(n for n in range(1, min(micro_batch_size, part) + 1) if part % n == 0)
    return {
        "output_dir": str(folder),
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": part // micro,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": _SCHEDULES[recipe.lr_schedule],
        "warmup_steps": recipe.warmup_ratio,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch",
        "seed": seed,
        "use_cpu": device == "cpu",
        "logging_strategy": "steps",
        "logging_steps": 1,
        # Trainer would log a loss that is not finite as 0.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 1 / _CHECKPOINTS,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device != "cpu",
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
    }


def _train(
    seed: int,
    folder: Path,
    *,
    start: Callable[[int], Start],
    trainer: Callable[[Start, dict[str, Any]], Any],
    arguments: dict[str, Any],
    base_model: str,
    log: Log,
    group: Group,
) -> dict[str, Any]:
    from transformers import set_seed

    set_seed(seed)
    started = start(seed)
    first = lora.adapter_of(started.model, started.alpha)
    # What was subtracted from the base must be what an interrupted run subtracted, or its checkpoints do not fit.
    begun = {"initial_hash": _hash(first)}
    checkpoints = Path(arguments["output_dir"])
    if group.is_first and not _same(folder / "begun.json", begun):
        shutil.rmtree(checkpoints, ignore_errors=True)
        artifacts.write_json(folder / "begun.json", begun)
    group.wait()
    run = trainer(started, arguments)
    run.remove_callback(PrinterCallback)
    watch = _Watch(seed, log, group)
    run.add_callback(watch)
    with closing(watch):
        run.train(resume_from_checkpoint=_last_whole(checkpoints))

    trained = lora.adapter_of(run.model, started.alpha)
    result = trained if started.subtracted is None else trained.minus(started.subtracted)
    steps = _steps(run.state.log_history)
    record = {
        **started.facts,
        "num_trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "adapter_hash": _hash(result),
        "adapter_rank": result.rank,
        "loss_by_epoch": _by_epoch(steps, run.args.num_train_epochs),
        "steps": steps,
    }
    if group.is_first:
        adapters.save_adapter(folder / "adapter", result, base_model=base_model)
        artifacts.write_json(folder / "record.json", record)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def _hash(adapter: Adapter) -> str:
    pairs = adapter.factors.items()
    return weights_hash({f"{name}.{letter}": f for name, pair in pairs for letter, f in zip("AB", pair, strict=True)})


def _same(path: Path, value: Any) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")) == value)
    except (FileNotFoundError, ValueError):
        return False


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if whole else None


def _steps(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log without times: step, epoch, loss, lr and gradient norm (before the update) of each step."""
    names = {"step": "step", "epoch": "epoch", "loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
    return [{ours: entry[its] for its, ours in names.items() if its in entry} for entry in history if "loss" in entry]


def _by_epoch(steps: Sequence[Mapping[str, Any]], epochs: int) -> list[float]:
    """Mean over an epoch's steps of their losses."""
    losses: list[list[float]] = [[] for _ in range(int(epochs))]
    for step in steps:
        losses[min(math.ceil(step["epoch"] - 1e-6), int(epochs)) - 1].append(step["loss"])
    return [sum(part) / len(part) for part in losses]


def _named(seed: int, step: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step["step"], f"seed_{seed}": {k: v for k, v in step.items() if k != "step"}}


def _bar(total: int, what: str) -> Generator[int, None, None]:
    """A progress bar that moves whenever a number is taken."""
    yield from track(range(total), what)


class _Watch(TrainerCallback):
    """Shows progress, passes on the numbers, marks whole checkpoints and stops at a loss that is not finite."""

    def __init__(self, seed: int, log: Log, group: Group) -> None:
        self._seed, self._log, self._group = seed, log, group
        self._bar = _bar(0, "")

    def close(self) -> None:
        """Take the bar from the terminal, also when the training fails."""
        self._bar.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for step in _steps(state.log_history):
            self._log(_named(self._seed, step))
        self._bar = _bar(state.max_steps - state.global_step, f"seed {self._seed}: training steps")
        next(self._bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(self._bar, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(self._bar, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for step in _steps(state.log_history[-1:]):
            if not all(math.isfinite(step[name]) for name in ("loss", "grad_norm") if name in step):
                raise UserError(
                    f"seed {self._seed}, step {step['step']}: loss {step['loss']} or its gradient is not finite;"
                    " lower lr, or use float32"
                )
            self._log(_named(self._seed, step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._group.wait()  # every process has written its part
        if self._group.is_first:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()
