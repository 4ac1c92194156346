"""Makes a safetensors folder of a model whose checkpoint is pickled, which no stage opens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch


def convert(
    model: Annotated[str, typer.Option(help="Model folder, folder with hub.yaml, or hub name (owner/name).")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision (commit hash).")] = None,
) -> None:
    """Read a pickled checkpoint, weights only (no code in it is run), and write it as a folder of safetensors."""
    from pkt_stages.models.load import load_config, load_tokenizer, read_whole, resolve

    watch = Stopwatch()
    ref = resolve(model, revision)
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    load_config(ref)
    tokenizer = load_tokenizer(ref)
    loaded = read_whole(ref, dtype="auto", use_safetensors=False, weights_only=True)
    beside = out.with_name(f".{out.name}.new")
    if beside.exists():  # of a run that was killed
        shutil.rmtree(beside)
    loaded.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(out)
    watch.summary("convert", f"{sum(p.numel() for p in loaded.parameters()):,} parameters as safetensors", out)
