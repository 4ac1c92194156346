"""Hands on what a method made: the target with it as a complete Hugging Face folder, or a low-rank change for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import AnyBase, Device, DType, Model, Stopwatch

if TYPE_CHECKING:
    from pkt_stages.models.changes import Stored
    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.merge import MergeReport


def export(
    model: Model,
    delta: Annotated[Path, typer.Option(help="What a method made: a row's folder, a delta, or a PEFT adapter.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    run: Annotated[str | None, typer.Option(help="Which change of the row, by label or number from 0.")] = None,
    scale: Annotated[float, typer.Option(min=0, help="Factor of the change, as `pkt scale` chose it.")] = 1.0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write a PEFT adapter instead of a whole model.")] = False,
    dtype: Annotated[DType, typer.Option(help="Dtype of the weights; auto: the checkpoint's.")] = "auto",
    allow_rounding_loss: Annotated[
        bool, typer.Option("--allow-rounding-loss", help="Go on if rounding loses over half of the delta's norm.")
    ] = False,
    any_base: AnyBase = False,
    device: Device = "cpu",
) -> None:
    """Write a row of the table as a model that needs nothing of this project, or as a LoRA adapter."""
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.load import check_device, identity, load_config, resolve
    from pkt_stages.models.merge import ROUNDING_WARN

    watch = Stopwatch()
    if adapter and (dtype != "auto" or allow_rounding_loss or scale != 1):
        raise UserError("--dtype, --scale and --allow-rounding-loss are for whole models; leave them out, or --adapter")
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    ref = resolve(model)
    check_device(device)
    load_config(ref)
    stored = changes_of(delta, identity(ref), any_base=any_base).one(run)
    if adapter:
        write_adapter(ref, stored, out)
        shown = "as a PEFT adapter"
    else:
        report = write_model(ref, stored, out, dtype, device, scale=scale, allow_rounding_loss=allow_rounding_loss)
        if report.rounding_loss > ROUNDING_WARN:
            lost = f"rounding loses {report.rounding_loss:.1%} of the delta's norm"
            typer.echo(f"warning: {stored.label}: {lost}", err=True)
        shown = f"in the target, {report.changed_weights:,} weights changed"
    watch.summary("export", f"{stored.label} {shown}", out)


def write_adapter(ref: ModelRef, stored: Stored, out: Path) -> None:
    """Write a low-rank change as PEFT does.

    Raises:
        UserError: a change of another kind, or one that does not fit the target.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pkt_stages.models.adapters import Adapter, save_adapter
    from pkt_stages.models.load import identity, load_config
    from pkt_stages.models.merge import check

    change = stored.load()
    if not isinstance(change, Adapter):
        raise UserError(
            f"{stored.path}: a {stored.kind} change, which is no product of two factors as PEFT's adapters are; leave"
            " out --adapter for a whole model"
        )
    with torch.device("meta"):
        check(AutoModelForCausalLM.from_config(load_config(ref)), change)
    base = identity(ref)
    save_adapter(out, change, str(base["name"]), base)


def write_model(
    ref: ModelRef, stored: Stored, out: Path, dtype: str, device: str, *, scale: float, allow_rounding_loss: bool
) -> MergeReport:
    """Write weights (safetensors), config and tokenizer, read the weights back, and only then give them their name.

    Raises:
        UserError: as `merge`, or the folder cannot be written.
    """
    from pkt_stages.models.load import ModelRef, load_model, save_model, weights_hash
    from pkt_stages.models.merge import merge

    model = load_model(ref, dtype=dtype, device=device)
    before = weights_hash(model.state_dict())
    report = merge(model, stored.load(), scale=scale, allow_rounding_loss=allow_rounding_loss)
    expected = weights_hash(model.state_dict())
    assert expected != before, "merging changed no weight"
    with artifacts.replaced_folder(out, "config.json") as folder:
        save_model(model, ref, folder)
        del model
        # Published code saves an unchanged base without noticing.
        saved = load_model(ModelRef(str(folder)), device=device)
        assert weights_hash(saved.state_dict()) == expected, "the saved weights are not the merged ones"
    return report
