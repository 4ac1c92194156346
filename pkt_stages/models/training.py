"""What the commands that train adapters do alike: a training per seed, its adapters through the door, its metrics.

A seed has a scratch folder, named after a fingerprint of all that determines its result but the other seeds, so that an
added seed is trained alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from pkt_stages.artifacts import write_json
from pkt_stages.curves import curve_writer
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models import trainer
from pkt_stages.models.changes import write_changes
from pkt_stages.models.lora import Start
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.models.train_set import counts
from pkt_stages.models.trainer import Trained
from pkt_stages.parallel import Group
from pkt_stages.scratch import fingerprint

Params = TypeVar("Params", bound=TrainingParams, covariant=True)


@dataclass(frozen=True)
class Job(Generic[Params]):
    """What is trained; it determines the result.

    Attributes:
        command: that trains.
        method: that it trains for, if that has a name.
        params: the command's settings.
        target: its identity.
        source: the identity of the source that takes part; None if there is none.
        examples: encoded for the target.
        files: others that the result depends on.
        facts: what else its files say of it: the date that the template was told (`templates.dated`), the layers.
    """

    command: str
    method: str | None
    params: Params
    target: Mapping[str, Any]
    source: Mapping[str, Any] | None
    examples: Sequence[Encoded]
    files: Sequence[Path] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where it runs; changes results by rounding at most (and by what dropout draws).

    Attributes:
        scratch: folder for the seeds' folders.
        device: cpu, cuda, cuda:N or auto.
        micro_batch_size: examples at a time.
        curves: folder for dvclive's curves, if they are wanted.
        group: the processes that divide every batch.
    """

    scratch: Path
    device: str
    micro_batch_size: int
    curves: Path | None = None
    group: Group = Group()

    @property
    def own_device(self) -> str:
        """This process's."""
        return self.group.device(self.device)


def train_seeds(
    job: Job[TrainingParams],
    place: Place,
    *,
    start: Callable[[], Start],
    make_trainer: Callable[[Any, dict[str, Any]], Any],
) -> dict[int, Trained]:
    """Train each seed whose scratch folder holds no result; all results by seed.

    Args:
        start, make_trainer: see `trainer.train`.

    Raises:
        UserError: a loss that is not finite, several GPUs for one process, or a batch that cannot be divided.
    """
    group, params = place.group, job.params
    if group.size == 1 and place.device not in ("cpu", "auto") and torch.cuda.device_count() > 1:
        # Trainer would split batches over them.
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible, one process trains on one; set CUDA_VISIBLE_DEVICES, or"
            " start one process per GPU with torchrun"
        )
    if params.batch_size % group.size:
        raise UserError(f"batch_size {params.batch_size} cannot be divided among {group.size} processes")
    run = f"{job.command}-{_fingerprint(job, place)}"
    found = {}
    with curve_writer(place.curves if group.is_first else None) as log:
        for seed in params.seeds:
            folder = place.scratch / f"{run}-{seed}"
            group.wait()  # or one process would find what another one has just finished
            result = trainer.finished(folder)
            group.wait()
            if result is None:
                size, device = place.micro_batch_size, place.own_device
                result = trainer.train(
                    seed,
                    folder,
                    start=start,
                    make_trainer=make_trainer,
                    arguments=trainer.training_arguments(params, folder / "trainer", seed, size, device, group.size),
                    base_model=str(job.target["name"]),
                    log=log,
                    group=group,
                )
                gc.collect()  # a Trainer holds its model in a cycle
            else:
                for step in result.record["steps"]:
                    log(trainer.named(seed, step))
            found[seed] = result
    return found


def _fingerprint(job: Job[TrainingParams], place: Place) -> str:
    settings = {name: value for name, value in asdict(job.params).items() if name != "seeds"}
    facts = [job.target, job.source, settings, [asdict(e) for e in job.examples]]
    return fingerprint([*facts, place.device, place.micro_batch_size, place.group.size], job.files)


def publish(
    job: Job[TrainingParams],
    trained: Mapping[int, Trained],
    out: Path,
    metrics: Path,
    *,
    on_answers: bool = True,
    unit: str = "nats",
) -> str:
    """Write the adapters as `seed_<n>`, and losses and counts; what to tell of them.

    Args:
        on_answers: it is the examples' own answers that are learned, so their tokens are counted.
        unit: of the loss of a supervised token.
    """
    meta = {
        "command": job.command,
        "method": job.method,
        "target": job.target,
        "source": job.source,
        "params": asdict(job.params),
        **job.facts,
    }
    adapters = {f"seed_{seed}": result.adapter for seed, result in trained.items()}
    write_changes(out, adapters, meta, {f"seed_{seed}": {"seed": seed} for seed in trained})
    found = {**meta, **summary(trained, unit), **counts(job.examples, job.params)}
    if not on_answers:
        del found["num_supervised_tokens"]
    write_json(metrics, found)
    first, last = found["first_epoch_loss"], found["last_epoch_loss"]
    name = f"{job.method}, " if job.method is not None else ""
    return f"{name}{len(trained)} seeds, loss by epoch {first:.4f} -> {last:.4f}"


def summary(trained: Mapping[int, Trained], unit: str) -> dict[str, Any]:
    """What the metrics say about the seeds: each one's record with its losses by step, and means over the seeds.

    `curve`, the mean loss by step, is a list of records because that is what `dvc plots` draws.
    """
    losses = [result.record["loss_by_epoch"] for result in trained.values()]
    seeds = {
        str(seed): {name: value for name, value in result.record.items() if name != "steps"}
        | {"loss_by_step": [step["loss"] for step in result.record["steps"]]}
        for seed, result in trained.items()
    }
    steps = zip(*(record["loss_by_step"] for record in seeds.values()), strict=True)
    return {
        "seeds": seeds,
        "curve": [{"step": number, "loss": sum(step) / len(step)} for number, step in enumerate(steps, start=1)],
        "first_epoch_loss": sum(loss[0] for loss in losses) / len(losses),
        "last_epoch_loss": sum(loss[-1] for loss in losses) / len(losses),
        "units": {"loss": f"{unit} per supervised token"},
    }
