"""How do source rows become rows of the target? Train the mapping on a few align examples (paper 4.3; METHODS 4).

selection + source rows + examples -> one `mapping` per step with the step that did best on align examples held out from
training (mean answer loss with the rows of the final (transfer) examples injected), and metrics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages.encoding import Encoded, EncodingParams, Labels
from pkt_stages.errors import UserError
from pkt_stages.methods import Method
from pkt_stages.models.recipe import ALIGNMENT, AlignmentParams
from pkt_stages.options import (
    SCRATCH,
    Device,
    DType,
    MethodName,
    MicroBatch,
    Scratch,
    Stopwatch,
    Target,
    Task,
    option,
    with_method,
)

if TYPE_CHECKING:
    from pkt_stages.curves import Log
    from pkt_stages.models.alignment import Alignment, Data
    from pkt_stages.models.selection import Selection
    from pkt_stages.scratch import Steps


@dataclass(frozen=True)
class AlignParams(AlignmentParams, EncodingParams):
    """Settings of the alignment, whatever the mapping."""

    variant: str = option("default", "Variant of the selection: default, or a name of `select.variants`.")
    rate: float = option(
        0.1, "Share of the target's neurons that receive a delta, up to select's max_rate.", gt=0, le=1
    )
    labels: Labels = option("answer", "Tokens that training supervises: answer, all or reference_code.")
    dtype: DType = option("auto", "The target's dtype in training; auto: the checkpoint's.")


def run(alignment: Alignment, params: AlignParams, meta: dict[str, Any], kept: Steps, log: Log) -> dict[str, Any]:
    """Train, going on from what `kept` holds; the metrics of all steps. `kept` then holds a checkpoint of each.

    Args:
        meta: of the checkpoints.
        log: receives each step's record.
    """
    from pkt_stages import artifacts
    from pkt_stages.models.alignment import choose
    from pkt_stages.models.load import weights_hash
    from pkt_stages.progress import track

    state = kept.last()
    if state is None:
        without, steps = alignment.held_out_loss(), []
    else:
        alignment.restore(state)
        without, steps = state["validation_loss_without_delta"], state["steps"]
        typer.echo(f"align: going on after step {len(steps)}", err=True)
    for record in steps:
        log(record)
    for index in track(range(len(steps), params.steps), "alignment steps"):
        try:
            record = alignment.step(index)
        except UserError as error:
            raise UserError(f"{error}; {kept.describe()}") from None
        weights = alignment.weights()
        record["weights_hash"] = weights_hash(weights)
        steps = [*steps, record]
        artifacts.save(kept.checkpoint(index + 1), artifacts.MAPPING, weights, {**meta, "step": index + 1})
        kept.save({**alignment.state(), "validation_loss_without_delta": without, "steps": steps})
        log(record)
    return {
        "chosen_step": choose(steps),
        "validation_loss_without_delta": without,
        "steps": steps,
        "validation_ids": alignment.validation_ids,
        "transfer_ids": list(alignment.selection.examples("transfer")),
        "units": {"loss": "nats per token"},
        **meta,
    }


@with_method("align", AlignParams, functions=ALIGNMENT, code="laten")
def align(
    params: AlignParams,
    by: Method,
    target: Target,
    selection: Annotated[Path, typer.Option(help="Folder of `pkt select`.")],
    extract: Annotated[Path, typer.Option(help="The extract examples that were attributed (.jsonl).")],
    align: Annotated[Path, typer.Option(help="The align examples (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one mapping per step (step_01.safetensors, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses, delta ranges and the chosen step (JSON).")],
    task: Task = None,
    method: MethodName = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the same numbers.")] = None,
    scratch: Scratch = SCRATCH,
    device: Device = "cpu",
    micro_batch_size: MicroBatch = 4,
) -> None:
    """Train the mapping from source rows to target rows; one checkpoint per step, chosen on held-out examples."""
    from pkt_stages import artifacts
    from pkt_stages.curves import curve_writer
    from pkt_stages.models import load
    from pkt_stages.models.alignment import Alignment, draw
    from pkt_stages.models.selection import check_target, open_selection, stored_files
    from pkt_stages.scratch import CHOSEN, Steps, fingerprint
    from pkt_stages.templates import dated

    watch = Stopwatch()
    load.check_device(device)
    chosen = open_selection(selection, rate=params.rate, variant=params.variant)
    ref = load.resolve(target)
    check_target(chosen, load.identity(ref), target)
    tokenizer = load.load_tokenizer(ref)
    data = read_data(tokenizer, chosen, extract, align, params)
    draw(list(data.align), params)  # complain before a large model is loaded
    artifacts.check_replaceable(out, CHOSEN)
    meta = {side: chosen.meta[side] for side in ("source", "target")}
    meta |= {"method": method, "params": asdict(params) | by.facts(), **dated(tokenizer, params.template)}
    facts = [meta, asdict(data), device, micro_batch_size]
    kept = Steps(scratch, fingerprint(facts, stored_files(selection)))
    model = load.load_model(ref, dtype=params.dtype, device=device)
    alignment = Alignment(model, chosen, data, params, by, micro_batch_size=micro_batch_size)
    with curve_writer(curves) as log:
        made = run(alignment, params, meta, kept, log)
    hashes = {step["step"]: step["weights_hash"] for step in made["steps"]}
    kept.publish(out, {"chosen_step": made["chosen_step"], "weights_hash": hashes, **meta})
    artifacts.write_json(metrics, made | {"selection": chosen.meta["params"]})
    kept.remove()
    before, after = made["validation_loss_without_delta"], made["steps"][made["chosen_step"] - 1]["validation_loss"]
    what = f"step {made['chosen_step']} of {params.steps}, held-out loss {before:.4f} -> {after:.4f}"
    watch.summary("align", what, out)


def read_data(tokenizer: Any, selection: Selection, extract: Path, align: Path, params: AlignParams) -> Data:
    """Read and encode the examples, and check that the extract examples are those of the selection.

    Raises:
        UserError: malformed or too long examples, other ids than the selection's, too few for the steps.
    """
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models.alignment import Data

    known, found = selection.examples("extract"), read_examples(extract)
    if [e.id for e in found] != list(known):
        missing = sorted(set(known) ^ {e.id for e in found}) or ["their order"]
        raise UserError(
            f"{extract}: not the extract examples of the selection ({len(found)} here, {len(known)} there;"
            f" {missing[0]} differs)"
        )
    if params.steps > len(known):
        raise UserError(f"{params.steps} steps need as many extract examples, the selection has {len(known)}")
    if params.steps > selection.num_steps:
        raise UserError(
            f"{params.steps} steps need the rows of as many extract examples, the selection stores those of"
            f" {selection.num_steps}; set `select.steps` to {params.steps} and run `pkt select` again"
        )
    selection.transferred(None)  # there must be some
    aligned = read_examples(align)

    def encoded(examples: Any, labels: Labels) -> dict[str, Encoded]:
        return {
            e.id: encode(tokenizer, e, template=params.template, max_length=params.max_length, labels=labels)
            for e in examples
        }

    return Data(encoded(found, params.labels), encoded(aligned, params.labels), encoded(aligned, "answer"))
