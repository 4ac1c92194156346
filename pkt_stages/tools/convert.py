"""Makes a safetensors folder of a model whose checkpoint is pickled, which no stage opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Model, Stopwatch


def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
) -> None:
    """Read a pickled checkpoint, weights only (no code in it is run), and write it as a folder of safetensors."""
    from pkt_stages.models.load import load_tokenizer, put_together, resolve, save_model
    from pkt_stages.models.rows import Checkpoint

    watch = Stopwatch()
    ref = resolve(model)
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    load_tokenizer(ref)  # before the weights, which take long
    checkpoint = Checkpoint(ref, pickled=True)
    loaded = put_together(ref, checkpoint, checkpoint.dtype, "cpu")
    with artifacts.replaced_folder(out, "config.json") as folder:
        save_model(loaded, ref, folder)
    watch.summary("convert", f"{sum(p.numel() for p in loaded.parameters()):,} parameters as safetensors", out)
