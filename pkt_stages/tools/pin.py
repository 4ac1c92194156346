"""Which commit is that? Writes the commits of models and data sets on the hub into the `hub.yaml` that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pkt_stages import hub
from pkt_stages.artifacts import written_whole
from pkt_stages.errors import UserError


def pin(
    paths: Annotated[list[Path], typer.Argument(help="hub.yaml files, or folders to look for them in.")],
    update: Annotated[
        bool, typer.Option("--update", help="Also those that are pinned already: to what `main` is today.")
    ] = False,
) -> None:
    """Write today's commit of every model and data set into its hub.yaml; the stages that depend on it become stale."""
    files = [found for path in paths for found in ([path] if path.is_file() else sorted(path.rglob(hub.POINTER)))]
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: no {hub.POINTER} there; give such files, or a folder with some")
    for file in files:
        content = hub.read_pointer(file)
        for entry, kind in entries(file, content):
            if hub.is_pinned(entry["revision"]) and not update:
                typer.echo(f"{file}: {entry['repo']} stays at {entry['revision']}")
                continue
            asked = "main" if hub.is_pinned(entry["revision"]) else entry["revision"]
            commit, names = hub.commit_of(entry["repo"], asked, kind)
            typer.echo(f"{file}: {entry['repo']} {entry['revision']} -> {commit}")
            entry["revision"] = commit
            if kind == "model" and not any(name.endswith(".safetensors") for name in names):
                typer.echo(f"{file}: note: {entry['repo']} has no safetensors; `pkt convert` makes a folder of them")
        # A file of several entries is written when all of them are known.
        with written_whole(file) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def entries(file: Path, content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The mappings with a repository and a revision, with what they are: one model, or a data set per pool."""
    if "repo" in content:
        hub.read_model_pointer(file)
        return [(content, "model")]
    for pool in content:
        hub.read_data_pointer(file, pool)
    return [(entry, "dataset") for entry in content.values()]
