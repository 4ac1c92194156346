"""What is the target with the source's knowledge in it? (METHODS section 4, end)

The chosen mapping + the rows of each transfer example -> one sparse `delta` per example, with the hash of the merged
weights; on request a complete model folder. Whole models are no artifact: base + delta give them back.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from pkt_stages.artifacts import Artifact
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.transfer import Transfer


@dataclass(frozen=True)
class InjectParams:
    """Settings of the injection."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto", "Dtype of the merged weights; auto: the checkpoint's. The sum is taken in float32."
    )
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")


def run(transfer: Transfer, mapping: Artifact, example: int, device: str) -> dict[str, SparseDelta]:
    """The delta of one example: its source rows through the mapping, at its target neurons."""
    import torch

    from pkt_stages.core.hypernetwork import forward

    with torch.no_grad():
        weights = {name: weight.to(device) for name, weight in mapping.tensors().items()}
        rows = forward(weights, transfer.source_rows(example, device))
    return transfer.delta(example, {site: part.cpu() for site, part in rows.items()})


@with_params("inject", InjectParams)
def inject(
    params: InjectParams,
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    selection: Annotated[Path, typer.Option(help="Layer pairs and neurons, from `pkt select`.")],
    rows: Annotated[Path, typer.Option(help="The source's rows, from `pkt select`.")],
    hypernetwork: Annotated[Path, typer.Option(help="Folder of mappings, from `pkt align`.")],
    metrics_in: Annotated[Path, typer.Option(help="The metrics of `pkt align`, which name the chosen step.")],
    out: Annotated[Path, typer.Option(help="Folder for delta_0.safetensors, ..., one per transfer example.")],
    example: Annotated[
        str | None, typer.Option(help="Only this transfer example, by id or by number from 0 (default: all).")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Another step than the chosen one.")] = None,
    every_step: Annotated[
        bool, typer.Option("--every-step", help="Deltas of every step, in folders step_01, step_02, ... of --out.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Where to write rounding losses and hashes (JSON).")] = None,
    model_out: Annotated[
        Path | None, typer.Option(help="Folder for the complete merged model; needs one example.")
    ] = None,
    allow_rounding_loss: Annotated[
        bool, typer.Option("--allow-rounding-loss", help="Go on if rounding loses over half of the delta's norm.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", envvar="PKT_DEVICE")] = "cpu",
) -> None:
    """Map each transfer example's source rows and add them to the target: a sparse delta, or a whole model."""
    from pkt_stages.core.hypernetwork import value_range
    from pkt_stages.models import load
    from pkt_stages.models.inject import ROUNDING_WARN, delta_tensors, merged
    from pkt_stages.models.transfer import check_target, open_transfer
    from pkt_stages.progress import track

    watch = Stopwatch()
    load.check_device(device)
    if every_step and (step is not None or model_out is not None):
        raise UserError("--every-step goes with neither --step nor --model-out; leave one out")
    mappings = open_mappings(hypernetwork, metrics_in, step, every_step=every_step)
    first = next(iter(mappings.values()))
    trained = first.meta["params"]
    transfer = open_transfer(selection, rows, rate=trained["rate"], given=trained["given"], seed=trained["seed"])
    check_models(transfer, first, selection)
    ref = load.resolve(target, revision)
    check_target(transfer, load.identity(ref), target)
    chosen = chosen_examples(transfer, example, selection)
    if model_out is not None and len(chosen) > 1:
        raise UserError(f"--model-out writes one model, {selection} has {len(chosen)} transfer examples; add --example")
    if model_out is not None and model_out.exists():
        raise UserError(f"{model_out}: exists already; give a new folder for the model")
    model = load.load_model(ref, dtype=params.dtype, device=device)
    base_hash = load.weights_hash(model.state_dict())
    models = {side: transfer.meta[side] for side in ("source", "target")}
    settings = {"params": {"align": trained, "inject": asdict(params)}}
    made = {}
    pairs = [(number, place) for number in mappings for place in chosen]
    for number, place in track(pairs, "deltas"):
        id, index = chosen[place]
        delta = run(transfer, mappings[number], index, "cuda" if device == "auto" else device)
        with merged(model, delta, allow_rounding_loss=allow_rounding_loss) as result:
            facts: dict[str, Any] = {
                "example": {"id": id, "set": "transfer"},
                "step": number,
                "dtype": str(model.dtype).removeprefix("torch."),
                "rounding_loss": result.rounding_loss,
                "changed_weights": result.changed_weights,
                "weights_hash": load.weights_hash(model.state_dict()),
            }
            assert facts["weights_hash"] != base_hash, "merging changed no weight"
            if model_out is not None:
                save_model(model, ref, model_out, facts["weights_hash"])
        if result.rounding_loss > ROUNDING_WARN:
            typer.echo(f"warning: {id}: rounding loses {result.rounding_loss:.1%} of the delta's norm", err=True)
        made[number, place] = (delta, facts)
    for (number, place), (delta, facts) in made.items():
        folder = out / step_name(number) if every_step else out
        artifacts.save(folder / delta_name(place), "delta", delta_tensors(delta), {**facts, **models, **settings})
        if example is None:
            remove_older(folder, len(chosen))
    if report is not None:
        entries = [
            facts | {"delta": {site: value_range(part.rows) for site, part in delta.items()}}
            for delta, facts in made.values()
        ]
        artifacts.write_json(report, {"base_weights_hash": base_hash, "examples": entries, **models, **settings})
    worst = max(facts["rounding_loss"] for _, facts in made.values())
    weights = max(facts["changed_weights"] for _, facts in made.values())
    watch.summary(
        "inject",
        f"{len(made)} deltas at step {', '.join(map(str, mappings))}, up to {weights:,} weights changed,"
        f" rounding loss up to {worst:.2%}",
        out,
    )


def delta_name(place: int) -> str:
    """File name of the delta of a transfer example, numbered from 0 in the selection's order."""
    return f"delta_{place}.safetensors"


def step_name(number: int) -> str:
    """Name of a step's mapping or deltas, without suffix."""
    return f"step_{number:02d}"


def remove_older(out: Path, count: int) -> None:
    """Remove deltas of an earlier run that had more examples than this one's `count`."""
    current = {delta_name(place) for place in range(count)}
    for path in out.glob("delta_*.safetensors"):
        if path.name not in current:
            path.unlink()


def open_mappings(folder: Path, metrics: Path, step: int | None, *, every_step: bool) -> dict[int, Artifact]:
    """The mapping of the chosen (or the given) step, or those of all, by step.

    Raises:
        UserError: files that are missing, malformed, or of different runs of `pkt align`.
    """
    from pkt_stages.models.load import weights_hash

    try:
        found = json.loads(metrics.read_text(encoding="utf-8"))
        hashes = {int(entry["step"]): entry["weights_hash"] for entry in found["steps"]}
        wanted = int(found["chosen_step"]) if step is None else step
    except FileNotFoundError:
        raise UserError(f"{metrics}: no such file; expected the metrics of `pkt align`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{metrics}: not the metrics of `pkt align` ({reason})") from None
    if wanted not in hashes:
        raise UserError(f"step {wanted} is not one of the {len(hashes)} steps of {metrics}")
    mappings = {}
    for number in sorted(hashes) if every_step else [wanted]:
        path = folder / f"{step_name(number)}.safetensors"
        mappings[number] = artifacts.load(path, "hypernetwork")
        if weights_hash(mappings[number].tensors()) != hashes[number]:
            raise UserError(f"{path}: not of the same run of `pkt align` as {metrics}")
    return mappings


def check_models(transfer: Transfer, mapping: Artifact, selection: Path) -> None:
    """Raise UserError unless the mapping was trained between the selection's source and target."""
    for side in ("source", "target"):
        if mapping.meta[side] != transfer.meta[side]:
            raise UserError(
                f"{mapping.path}: trained for the {side} {mapping.meta[side]['model']['name']}, {selection} is for"
                f" {transfer.meta[side]['model']['name']}; run `pkt align` again"
            )


def chosen_examples(transfer: Transfer, wanted: str | None, selection: Path) -> dict[int, tuple[str, int]]:
    """Transfer examples by number: their id, and their index in the selection; all, or the wanted one.

    Raises:
        UserError: the selection has none, or not the wanted one.
    """
    known = dict(enumerate(transfer.examples("transfer").items()))
    if not known:
        raise UserError(f"{selection}: names no transfer example; attribute transfer.jsonl, too")
    if wanted is None:
        return known
    chosen = {n: entry for n, entry in known.items() if wanted == entry[0]}
    chosen = chosen or {n: entry for n, entry in known.items() if wanted == str(n)}
    if not chosen:
        names = ", ".join(f"{n}: {id}" for n, (id, _) in known.items())
        raise UserError(f"{selection}: has no transfer example {wanted!r}; found {names}")
    return chosen


def save_model(model: Any, ref: ModelRef, out: Path, expected_hash: str) -> None:
    """Write a Hugging Face folder (safetensors, config, tokenizer), read it back, and only then give it its name."""
    from pkt_stages.models.load import ModelRef, load_model, load_tokenizer, weights_hash

    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside)
        load_tokenizer(ref).save_pretrained(beside)
        # Published code saves an unchanged base without noticing.
        saved = load_model(ModelRef(str(beside)), device=str(model.device))
        assert weights_hash(saved.state_dict()) == expected_hash, "the saved weights are not the merged ones"
        beside.replace(out)
    except OSError as error:
        raise UserError(f"{out}: the model cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
