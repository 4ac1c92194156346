"""What is the target with the source's knowledge in it? (METHODS section 4, end)

The chosen mapping + the rows of each transfer example -> one sparse change per example, with the hash of the merged
weights. Whole models are no artifact: `pkt export` writes one from base and change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.options import Device, DType, Stopwatch, Target, option, with_params

if TYPE_CHECKING:
    from pkt_stages.models.alignment import Trained
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.selection import Selection


@dataclass(frozen=True)
class InjectParams:
    """Settings of the injection."""

    dtype: DType = option("auto", "Dtype of the merged weights; auto: the checkpoint's. The sum is taken in float32.")


def run(selection: Selection, trained: Trained, step: int, example: int, device: str) -> dict[str, SparseDelta]:
    """The delta of one example: its source rows through the mapping, at its target neurons."""
    import torch

    by, seed = trained.by, trained.meta["params"]["seed"]
    sizes = {f"d_{side}": selection.width(side) for side in ("source", "target")}
    network = by.code.mapping(by.settings, generator=torch.Generator().manual_seed(seed), **sizes).to(device)
    network.load_state_dict(trained.mappings[step].tensors())
    with torch.no_grad():
        rows = by.code.source_rows(selection, example, by.settings, seed=seed)
        mapped = network({site: part.to(device) for site, part in rows.items()})
    placed: dict[str, SparseDelta] = by.code.place(selection, example, {s: part.cpu() for s, part in mapped.items()})
    return placed


@with_params("inject", InjectParams)
def inject(
    params: InjectParams,
    target: Target,
    selection: Annotated[Path, typer.Option(help="Folder of `pkt select`.")],
    mapping: Annotated[Path, typer.Option(help="Folder of `pkt align`.")],
    out: Annotated[Path, typer.Option(help="Folder for the changes, one per transfer example.")],
    example: Annotated[
        str | None, typer.Option(help="Only this transfer example, by id or by number from 0 (default: all).")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Another step than the chosen one.")] = None,
    every_step: Annotated[
        bool, typer.Option("--every-step", help="The changes of every step, labelled step_01/<example>, ...")
    ] = False,
    allow_rounding_loss: Annotated[
        bool, typer.Option("--allow-rounding-loss", help="Go on if rounding loses over half of the delta's norm.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Map each transfer example's source rows to the target's width: what LaTen adds to the target."""
    from pkt_stages.core.losses import value_range
    from pkt_stages.models import load
    from pkt_stages.models.alignment import check_models, open_trained
    from pkt_stages.models.changes import write_changes
    from pkt_stages.models.merge import ROUNDING_WARN, merged
    from pkt_stages.models.selection import check_target, open_selection
    from pkt_stages.progress import track
    from pkt_stages.scratch import checkpoint_name

    watch = Stopwatch()
    load.check_device(device)
    if every_step and step is not None:
        raise UserError("--every-step and --step contradict each other; leave one out")
    trained = open_trained(mapping, step, every_step=every_step)
    settings = trained.meta["params"]
    chosen = open_selection(selection, rate=settings["rate"], variant=settings["variant"])
    check_models(chosen, trained, mapping)
    ref = load.resolve(target)
    check_target(chosen, load.identity(ref), target)
    examples = chosen.transferred(example)
    model = load.load_model(ref, dtype=params.dtype, device=device)
    base_hash = load.weights_hash(model.state_dict())
    made: dict[str, dict[str, SparseDelta]] = {}
    facts: dict[str, dict[str, Any]] = {}
    pairs = [(number, id, index) for number in trained.mappings for id, index in examples.items()]
    for number, id, index in track(pairs, "deltas"):
        label = f"{Path(checkpoint_name(number)).stem}/{id}" if every_step else id
        delta = run(chosen, trained, number, index, "cuda" if device == "auto" else device)
        with merged(model, delta, allow_rounding_loss=allow_rounding_loss) as result:
            facts[label] = {
                "example": id,
                "step": number,
                "dtype": str(model.dtype).removeprefix("torch."),
                "rounding_loss": result.rounding_loss,
                "changed_weights": result.changed_weights,
                "weights_hash": load.weights_hash(model.state_dict()),
                "range": {site: value_range(part.rows) for site, part in delta.items()},
            }
            assert facts[label]["weights_hash"] != base_hash, "merging changed no weight"
        if result.rounding_loss > ROUNDING_WARN:
            typer.echo(f"warning: {id}: rounding loses {result.rounding_loss:.1%} of the delta's norm", err=True)
        made[label] = delta
    meta = {side: trained.meta[side]["model"] for side in ("source", "target")}
    meta |= {"command": "inject", "method": trained.meta["method"], "params": settings | {"inject": asdict(params)}}
    write_changes(out, made, meta | {"base_weights_hash": base_hash}, facts)
    worst = max(found["rounding_loss"] for found in facts.values())
    weights = max(found["changed_weights"] for found in facts.values())
    watch.summary(
        "inject",
        f"{len(made)} deltas at step {', '.join(map(str, trained.mappings))}, up to {weights:,} weights changed,"
        f" rounding loss up to {worst:.2%}",
        out,
    )
