"""`python -m tiny`: rebuild `data/tiny` from its seed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pkt_stages.errors import UserError
from tiny.settings import MODELS, SEED, STUDIES

app = typer.Typer(add_completion=False)


class Part(StrEnum):
    """What `--only` can name: the parts of a whole build in their order, then the models of the studies."""

    DATA = "data"
    TOKENIZER = "tokenizer"
    SOURCE = "source"
    TARGET = "target"
    SIBLING = "sibling"
    TRAINED_APART = "trained-apart"
    SCORES = "scores"
    SIZES = "sizes"
    EXPERTS = "experts"


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder of the pair and its data.")] = Path("data/tiny"),
    scratch: Annotated[Path, typer.Option(help="Folder of the training checkpoints.")] = Path(".scratch/tiny"),
    only: Annotated[Part | None, typer.Option(help="Build this part alone.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, initial weights and data order.")] = SEED,
) -> None:
    """Build data, tokenizer, models and scores; an interrupted training goes on from its checkpoint."""
    from tiny import build as steps  # torch and transformers take seconds to import
    from tiny.corpus import Corpus

    corpus = Corpus(seed)
    try:
        for part in [part for part in Part if part not in STUDIES] if only is None else (only,):
            if part is Part.DATA:
                steps.build_data(out, corpus)
            elif part is Part.TOKENIZER:
                steps.build_tokenizer(out, corpus)
            elif part is Part.SCORES:
                steps.build_scores(out, corpus)
            else:
                for settings in STUDIES.get(part) or (MODELS[part],):
                    steps.build_model(out, scratch, corpus, settings)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
