"""Raw texts on which models are compared (METHODS section 7): a team's own file, or a text data set of the hub.

Headings (wikitext's ` = Title = `) and blank rows are no texts and are left out; the order is kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pkt_stages import hub
from pkt_stages.errors import UserError
from pkt_stages.examples import read_jsonl, write_jsonl
from pkt_stages.options import Stopwatch

HEADING = re.compile(r"\s*=\s.*\s=\s*")


def run(texts: list[str]) -> list[str]:
    """The texts without headings and blanks."""
    return [text for text in texts if text.strip() and not HEADING.fullmatch(text)]


def texts(
    data: Annotated[Path, typer.Option(help="Folder with texts.jsonl (rows with the key `text`), or hub.yaml.")],
    out: Annotated[Path, typer.Option(help="Where to write the texts (.jsonl).")],
) -> None:
    """Collect the texts that `pkt compare` compares models on."""
    watch = Stopwatch()
    file = data / "texts.jsonl"
    if file.is_file() or not (data / hub.POINTER).is_file():
        numbered = [(f"{file}, line {n}", row) for n, row in read_jsonl(file)]
    else:
        split = hub.read_data_pointer(data / hub.POINTER, "texts")
        numbered = [(f"{split.repo}, row {n}", row) for n, row in enumerate(hub.read_hub_rows(split), start=1)]
    for where, row in numbered:
        if not isinstance(row.get("text"), str):
            raise UserError(f"{where}: expected a key `text` with a text, found {sorted(row)}")
    found = run([row["text"] for _, row in numbered])
    if not found:
        raise UserError(f"{data}: holds no text")
    write_jsonl(out, [{"text": text} for text in found])
    watch.summary("texts", f"{len(found)} texts of {len(numbered)} rows", out)
