"""What is the target with the source's knowledge in it? (METHODS section 4, end)

The chosen mapping + the rows of each transfer example -> one sparse change per example, with the hash of the merged
weights. Whole models are no artifact: `pkt export` writes one from base and change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts, methods
from pkt_stages.errors import UserError
from pkt_stages.options import Device, DType, Stopwatch, Target, option, with_params
from pkt_stages.params import build

if TYPE_CHECKING:
    from pkt_stages.artifacts import Artifact
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.selection import Selection


@dataclass(frozen=True)
class InjectParams:
    """Settings of the injection."""

    dtype: DType = option("auto", "Dtype of the merged weights; auto: the checkpoint's. The sum is taken in float32.")


@dataclass(frozen=True)
class Trained:
    """What `pkt align` made.

    Attributes:
        mappings: by step, the chosen or the given one, or all.
        meta: of chosen.json: the models, the method, the settings in force.
        by: the method's code with the settings that it was trained with.
    """

    mappings: Mapping[int, Artifact]
    meta: Mapping[str, Any]
    by: methods.Method


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
    examples = chosen_examples(chosen, example, selection)
    model = load.load_model(ref, dtype=params.dtype, device=device)
    base_hash = load.weights_hash(model.state_dict())
    made: dict[str, dict[str, SparseDelta]] = {}
    facts: dict[str, dict[str, Any]] = {}
    pairs = [(number, place) for number in trained.mappings for place in examples]
    for number, place in track(pairs, "deltas"):
        id, index = examples[place]
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


def open_trained(folder: Path, step: int | None, *, every_step: bool) -> Trained:
    """The mapping of the chosen (or the given) step, or those of all, with the code that they are of.

    Raises:
        UserError: files that are missing, malformed, or of different runs of `pkt align`; code that is gone.
    """
    from pkt_stages.models.load import weights_hash
    from pkt_stages.scratch import CHOSEN, checkpoint_name

    path = folder / CHOSEN
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        hashes = {int(number): str(value) for number, value in meta["weights_hash"].items()}
        wanted = int(meta["chosen_step"]) if step is None else step
        settings, name = dict(meta["params"]), str(meta["params"]["code"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder of `pkt align`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not written by `pkt align` ({type(error).__name__}: {error})") from None
    if wanted not in hashes:
        raise UserError(f"step {wanted} is not one of the {len(hashes)} steps in {folder}")
    code = methods.load(name, "mapping")
    own = {field.name: settings[field.name] for field in fields(code.Params) if field.name in settings}
    mappings = {}
    for number in sorted(hashes) if every_step else [wanted]:
        mappings[number] = artifacts.load(folder / checkpoint_name(number), artifacts.MAPPING)
        if weights_hash(mappings[number].tensors()) != hashes[number]:
            raise UserError(f"{mappings[number].path}: not of the same run of `pkt align` as {path}")
    return Trained(mappings, meta, methods.Method(name, code, build(code.Params, own, f"{path}: params")))


def check_models(selection: Selection, trained: Trained, folder: Path) -> None:
    """Raise UserError unless the mapping was trained between the selection's source and target."""
    for side in ("source", "target"):
        if trained.meta.get(side) != selection.meta[side]:
            raise UserError(
                f"{folder}: trained for another {side} than the selection's,"
                f" {selection.meta[side]['model']['name']}; run `pkt align` again"
            )


def chosen_examples(selection: Selection, wanted: str | None, folder: Path) -> dict[int, tuple[str, int]]:
    """Transfer examples by number: their id, and their index in the selection; all, or the wanted one.

    Raises:
        UserError: the selection has none, or not the wanted one.
    """
    known = dict(enumerate(selection.examples("transfer").items()))
    if not known:
        raise UserError(f"{folder}: names no transfer example; attribute transfer.jsonl, too (--transfer)")
    if wanted is None:
        return known
    chosen = {n: entry for n, entry in known.items() if wanted == entry[0]}
    chosen = chosen or {n: entry for n, entry in known.items() if wanted == str(n)}
    if not chosen:
        names = ", ".join(f"{n}: {id}" for n, (id, _) in known.items())
        raise UserError(f"{folder}: has no transfer example {wanted!r}; found {names}")
    return chosen
