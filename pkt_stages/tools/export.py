"""Hands on what a method made: the target with it as a complete Hugging Face folder, or a low-rank change for PEFT.

Either with a card (README.md) that says what it is, of what it was made and how to load it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import AnyBase, Device, DType, Model, Stopwatch

if TYPE_CHECKING:
    from pkt_stages.models.adapters import Adapter
    from pkt_stages.models.changes import Stored
    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.merge import MergeReport


SHARD = "5GB"  # of weights at most in a file


def export(
    model: Model,
    delta: Annotated[Path, typer.Option(help="What a method made: a row's folder, a delta, or a PEFT adapter.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    run: Annotated[str | None, typer.Option(help="Which change of the row, by label or number from 0.")] = None,
    scale: Annotated[float, typer.Option(min=0, help="Factor of the change, as `pkt scale` chose it.")] = 1.0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write a PEFT adapter instead of a whole model.")] = False,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Metrics of this row from `pkt evaluate`, for the card; repeatable.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Dtype of the weights; auto: the checkpoint's.")] = "auto",
    shard: Annotated[str, typer.Option(help="Weights in a file, at most, e.g. 5GB; more make an index.")] = SHARD,
    allow_rounding_loss: Annotated[
        bool, typer.Option("--allow-rounding-loss", help="Go on if rounding loses over half of the delta's norm.")
    ] = False,
    any_base: AnyBase = False,
    device: Device = "cpu",
) -> None:
    """Write a row of the table as a model that needs nothing of this project, or as a LoRA adapter."""
    from pkt_stages.models.adapters import save_adapter
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.load import check_device, identity, load_config, resolve
    from pkt_stages.models.merge import ROUNDING_WARN
    from pkt_stages.tools.card import CARD, card, read_scores

    watch = Stopwatch()
    if adapter and (dtype != "auto" or allow_rounding_loss or shard != SHARD):
        raise UserError("--dtype, --shard and --allow-rounding-loss are for whole models; leave them out, or --adapter")
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", shard):
        raise UserError(f"--shard {shard}: expected a size like 5GB, in KB, MB or GB")
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    ref = resolve(model)
    check_device(device)
    load_config(ref)
    base = identity(ref)
    row = changes_of(delta, base, any_base=any_base)
    stored = row.one(run)
    found = read_scores(scores or [], row, stored, scale)
    with artifacts.replaced_folder(out, CARD) as folder:
        if adapter:
            change = adapter_of(ref, stored, scale)
            save_adapter(folder, change, str(base["name"]), base)
            shown = "as a PEFT adapter"
            facts = {"rank and alpha": f"{change.rank} and {change.alpha:g}, the factor in it"}
        else:
            how: Any = {"scale": scale, "shard": shard, "allow_rounding_loss": allow_rounding_loss}
            report, kind = write_model(ref, stored, folder, dtype, device, **how)
            if report.rounding_loss > ROUNDING_WARN:
                lost = f"rounding loses {report.rounding_loss:.1%} of the delta's norm"
                typer.echo(f"warning: {stored.label}: {lost}", err=True)
            shown = f"in the target, {report.changed_weights:,} weights changed"
            many = f"{report.changed_weights:,} in {len(report.changed)} tensors"
            facts = {
                "weights changed": many,
                "dtype": f"{kind}; rounding lost {report.rounding_loss:.2%} of the change",
            }
        text = card(row, stored, base, facts=facts, scale=scale, scores=found, adapter=adapter)
        (folder / CARD).write_text(text, encoding="utf-8")
    watch.summary("export", f"{stored.label} {shown}", out)


def adapter_of(ref: ModelRef, stored: Stored, scale: float) -> Adapter:
    """A low-rank change times a factor, after a look whether it fits.

    Raises:
        UserError: a change of another kind, or one that does not fit the target.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from pkt_stages.models.adapters import Adapter
    from pkt_stages.models.load import load_config
    from pkt_stages.models.merge import check

    change = stored.load()
    if not isinstance(change, Adapter):
        raise UserError(
            f"{stored.path}: a {stored.kind} change, which is no product of two factors as PEFT's adapters are; leave"
            " out --adapter for a whole model"
        )
    with torch.device("meta"):
        check(AutoModelForCausalLM.from_config(load_config(ref)), change)
    return Adapter(change.factors, change.alpha * scale)


def write_model(
    ref: ModelRef,
    stored: Stored,
    folder: Path,
    dtype: str,
    device: str,
    *,
    scale: float,
    shard: str,
    allow_rounding_loss: bool,
) -> tuple[MergeReport, str]:
    """Write weights (safetensors), config and tokenizer, and read the weights back.

    Returns:
        what merging did, and the weights' dtype.

    Raises:
        UserError: as `merge`.
    """
    import torch

    from pkt_stages.models.load import ModelRef, load_model, save_model
    from pkt_stages.models.merge import merge

    model = load_model(ref, dtype=dtype, device=device)
    report = merge(model, stored.load(), scale=scale, allow_rounding_loss=allow_rounding_loss)
    save_model(model, ref, folder, shard=shard)
    # Published code saves an unchanged base without noticing. Read from the files' pages, not into the device's memory.
    saved, expected = (found.state_dict() for found in (load_model(ModelRef(str(folder)), device="cpu"), model))
    assert saved.keys() == expected.keys() and all(
        torch.equal(saved[name], weight.cpu()) for name, weight in expected.items()
    ), "the saved weights are not the merged ones"
    return report, str(model.dtype).removeprefix("torch.")
