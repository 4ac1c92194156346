"""One training of an adapter with transformers' Trainer: resumable, with the same bytes in the end.

It has a scratch folder, where its finished adapter stays; Trainer's checkpoints go when it is done. The loss of a step
is Trainer's: the mean over the supervised tokens of the whole batch, whatever the micro-batches.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from pkt_stages.artifacts import content_hash, flush
from pkt_stages.curves import Log
from pkt_stages.errors import UserError
from pkt_stages.models import adapters, lora
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.load import weights_hash
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.parallel import Group
from pkt_stages.progress import track
from pkt_stages.scratch import read_value, set_aside, write_value

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
RECORD, BEGUN = "record.json", "begun.json"  # of a finished training, of one that has begun
_WHOLE = "whole"  # a checkpoint with this file was written to its end; it holds the others' hashes
_CHECKPOINTS = 10  # per run


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        adapter: relative to the untouched target.
        record: its losses by step and epoch, and more, as JSON values.
    """

    adapter: Adapter
    record: dict[str, Any]


def finished(folder: Path) -> Trained | None:
    """What lies in a scratch folder, if it is there as it was written."""
    record: dict[str, Any] | None = read_value(folder / RECORD)
    if record is None:
        return None
    try:
        adapter = adapters.load_adapter(folder / "adapter")
        if _hash(adapter) == record["adapter_hash"]:
            return Trained(adapter, record)
    except UserError:
        set_aside(folder / "adapter")
        return None
    set_aside(folder / "adapter")
    return None


def training_arguments(
    params: TrainingParams, folder: Path, seed: int, micro_batch_size: int, device: str, num_processes: int
) -> dict[str, Any]:
    """Values for TrainingArguments."""
    part = params.batch_size // num_processes
    micro = max(n for n in range(1, min(micro_batch_size, part) + 1) if part % n == 0)
    return {
        "output_dir": str(folder),
        "num_train_epochs": params.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": part // micro,
        "learning_rate": params.lr,
        "lr_scheduler_type": _SCHEDULES[params.lr_schedule],
        "warmup_steps": params.warmup_ratio,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
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


def train(
    seed: int,
    folder: Path,
    *,
    start: Callable[[], lora.Start],
    make_trainer: Callable[[Any, dict[str, Any]], Any],
    arguments: dict[str, Any],
    base_model: str,
    log: Log,
    group: Group,
) -> Trained:
    """Train, going on from the last checkpoint in `folder`, and leave the result there.

    Args:
        start: makes the model, always in the same way; Python's, numpy's and torch's generators are seeded.
        make_trainer: makes the Trainer from it and the values for its TrainingArguments.
        base_model: the target's name, for the adapter's config.
        log: receives the numbers of each step.
        group: the processes that divide every batch.

    Raises:
        UserError: a loss that is not finite.
    """
    set_seed(seed)
    started = start()
    first = lora.adapter_of(started.model, started.alpha)
    # What was subtracted from the base must be what an interrupted run subtracted, or its checkpoints do not fit.
    begun = {"initial_hash": _hash(first)}
    checkpoints = Path(arguments["output_dir"])
    if group.is_first and read_value(folder / BEGUN) != begun:
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_value(folder / BEGUN, begun)
    last = _last_whole(checkpoints) if group.is_first else None
    group.wait()
    run = make_trainer(started.model, arguments)
    run.remove_callback(PrinterCallback)
    watch = _Watch(seed, log, group)
    run.add_callback(watch)
    with closing(watch):
        run.train(resume_from_checkpoint=group.gather(last)[0])

    trained = lora.adapter_of(run.model, started.alpha)
    result = trained if started.subtracted is None else trained.minus(started.subtracted)
    steps = _steps(run.state.log_history)
    record = {
        "initial_logits_error": started.error,
        "num_trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "adapter_hash": _hash(result),
        "adapter_rank": result.rank,
        "loss_by_epoch": _by_epoch(steps, run.args.num_train_epochs),
        "steps": steps,
    }
    if group.is_first:
        adapters.save_adapter(folder / "adapter", result, base_model=base_model)
        write_value(folder / RECORD, record)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return Trained(result, record)


def named(seed: int, step: Mapping[str, Any]) -> dict[str, Any]:
    """A step's numbers below its seed, for the log."""
    return {"step": step["step"], f"seed_{seed}": {k: v for k, v in step.items() if k != "step"}}


def _hash(adapter: Adapter) -> str:
    pairs = adapter.factors.items()
    return weights_hash({f"{name}.{letter}": f for name, pair in pairs for letter, f in zip("AB", pair, strict=True)})


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end and is still as it was; others are set aside."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    for checkpoint in sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        hashes = read_value(checkpoint / _WHOLE)
        if hashes is None:
            continue  # without its mark it counts no longer
        if hashes == _hashes(checkpoint):
            return str(checkpoint)
        set_aside(checkpoint)
    return None


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Of what a checkpoint holds, by name."""
    return {path.name: content_hash(path) for path in _files(checkpoint)}


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != _WHOLE)


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
            self._log(named(self._seed, step))
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
            self._log(named(self._seed, step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._group.wait()  # every process has written its part
        if self._group.is_first:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not checkpoint.is_dir():
                raise UserError(f"{checkpoint}: was removed while this ran; run again")
            for path in _files(checkpoint):
                flush(path)
            write_value(checkpoint / _WHOLE, _hashes(checkpoint))
