"""How much of a change does the target bear? Its factor is chosen on held-out align examples (METHODS section 11).

A row that knows no task + the align sets of all tasks -> a factor for each of its changes: the one with the highest
log-likelihood of the examples' answers, mean over tasks of the mean over examples. No test example is seen. Factor 0 is
noted down for comparison but not chosen: a row acts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import PromptParams
from pkt_stages.examples import Example, align_files, read_examples
from pkt_stages.options import AnyBase, BatchSize, Device, DType, Model, Stopwatch, option, with_params
from pkt_stages.progress import track
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from pkt_stages.models.changes import Stored
    from pkt_stages.models.load import ModelRef

Likelihoods = dict[float, dict[str, float]]  # nats by factor and task


@dataclass(frozen=True)
class ScaleParams(PromptParams):
    """What is tried, and on what."""

    scales: tuple[float, ...] = option((0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), "Factors to choose from.", gt=0, le=100)
    tasks: tuple[str, ...] = option((), "Tasks whose examples count; none: all that are there.")
    dtype: DType = option("auto", "Dtype of the weights; auto: stored.")
    limit: int | None = option(None, "Only the first so many examples of each task.", ge=1)

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales: expected at least one")


def run(
    ref: ModelRef,
    changes: Mapping[str, Stored],
    examples: Mapping[str, Sequence[Example]],
    params: ScaleParams,
    *,
    batch_size: int,
    device: str,
) -> dict[str, Likelihoods]:
    """Log-likelihood of the answers in nats per token by change, factor (0: the model alone) and task.

    What rounding to the model's dtype would lose of a change counts as lost.

    Args:
        examples: by task.
    """
    from pkt_stages.evaluation.backends import HfBackend
    from pkt_stages.evaluation.engine import evaluate_model
    from pkt_stages.evaluation.likelihood import answer_log_likelihoods
    from pkt_stages.models.load import load_model, load_tokenizer
    from pkt_stages.models.merge import merged

    tokenizer = load_tokenizer(ref)
    model = load_model(ref, dtype=params.dtype, device=device)

    def nats() -> dict[str, float]:
        backend = HfBackend(model, tokenizer, batch_size=batch_size, identity="unused: nothing is kept")
        found = {}
        for task, asked in examples.items():
            if all(example.prefix and example.reference for example in asked):  # as test examples are
                evaluated = evaluate_model(backend, asked, task=task, template=params.template, nats_only=True)
                values = evaluated.log_likelihoods
            else:
                values = answer_log_likelihoods(backend, asked, template=params.template)
            found[task] = statistics.fmean(values)
        return found

    alone = nats()
    made = {}
    for label, stored in changes.items():
        change = stored.load()
        made[label] = {0.0: alone}
        for scale in track(params.scales, f"factors of {label}"):
            with merged(model, change, scale=scale, allow_rounding_loss=True):
                made[label][scale] = nats()
    return made


def best(likelihoods: Likelihoods) -> float:
    """The factor above 0 with the highest mean over tasks; of equal ones the first."""
    means = {scale: statistics.fmean(by_task.values()) for scale, by_task in likelihoods.items() if scale > 0}
    return max(means, key=means.__getitem__)


@with_params("scale", ScaleParams)
def scale(
    params: ScaleParams,
    model: Model,
    delta: Annotated[Path, typer.Option(help="What a method made: a row's folder, a delta, or a PEFT adapter.")],
    examples: Annotated[Path, typer.Option(help="Folder of examples: <task>/align.jsonl, from `pkt prepare`.")],
    out: Annotated[Path, typer.Option(help="Where to write the factors (JSON), for `pkt evaluate --scales`.")],
    any_base: AnyBase = False,
    batch_size: BatchSize = 64,
    device: Device = "cpu",
) -> None:
    """Choose the factor of each change on held-out align examples, by the likelihood of their answers."""
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.load import check_device, identity, load_config, load_tokenizer, resolve

    watch = Stopwatch()
    files = align_files(examples, params.tasks)
    asked = {task: read_examples(path)[: params.limit] for task, path in files.items()}
    ref = resolve(model)
    check_device(device)
    load_config(ref)
    model_identity = identity(ref)
    row = changes_of(delta, model_identity, any_base=any_base)
    found = run(ref, row.items, asked, params, batch_size=batch_size, device=device)
    chosen: dict[str, Any] = {
        label: {
            "scale": best(likelihoods),
            "change": row.items[label].content_hash,
            "nats": [[factor, by_task] for factor, by_task in likelihoods.items()],
        }
        for label, likelihoods in found.items()
    }
    counts = {task: len(rows) for task, rows in asked.items()}
    made = {"model": model_identity, "params": asdict(params), **dated(load_tokenizer(ref), params.template)}
    artifacts.write_json(out, {"chosen": chosen, "examples": counts, **made})
    shown = ", ".join(f"{label} {one['scale']:g}" for label, one in chosen.items())
    watch.summary("scale", f"{shown}, on {sum(counts.values())} examples of {len(counts)} tasks", out)
