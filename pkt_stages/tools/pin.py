"""Which commit is that? Writes the commits of models and data sets on the hub into the `hub.yaml` that name them."""

from __future__ import annotations

from collections.abc import Sequence
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
    files = []
    for path in paths:
        there = [path] if path.is_file() else sorted(path.rglob(hub.POINTER))
        if not there:
            raise UserError(f"{path}: no {hub.POINTER} there; give such files, or a folder with some")
        files += there
    missed: list[str] = []
    # A malformed file ends this before the hub is asked and any is written.
    for file, found in [(file, entries(file)) for file in files]:
        text = before = file.read_bytes().decode()
        for keys, repo, revision in found:
            pinned = hub.is_pinned(revision)
            if pinned and not update:
                typer.echo(f"{file}: {repo} stays at {revision}")
                continue
            try:
                commit, names = hub.commit_of(repo, "main" if pinned else revision, "dataset" if keys else "model")
                text = replaced(text, keys, commit) if commit != revision else text
            except UserError as error:
                typer.echo(f"{file}: {error}")
                missed.append(repo)
                continue
            typer.echo(f"{file}: {repo} " + (f"{revision} -> {commit}" if commit != revision else f"stays at {commit}"))
            if not keys and not any(name.endswith(".safetensors") for name in names):
                typer.echo(f"{file}: note: {repo} has no safetensors; `pkt convert` makes a folder of them")
        if text != before:
            with written_whole(file) as temporary:
                temporary.write_bytes(text.encode())
    if missed:
        raise UserError(
            f"not pinned: {', '.join(dict.fromkeys(missed))}; see above for why, and run it again for these"
        )


def entries(file: Path) -> list[tuple[tuple[str, ...], str, str]]:
    """Of each repository in a file: the keys to it (none to a model, a data set's pool), its name and revision."""
    content = hub.read_pointer(file)
    if "repo" in content:
        model = hub.read_model_pointer(file)
        return [((), model.repo, model.revision)]
    return [((str(pool),), (rows := hub.read_data_pointer(file, pool)).repo, rows.revision) for pool in content]


def replaced(text: str, keys: Sequence[str], commit: str) -> str:
    """The YAML with another revision below the keys; every other character stays, comments among them.

    Raises:
        UserError: the revision does not stand there by itself (an anchor, an alias, a block of text).
    """
    wanted = entry = yaml.safe_load(text)
    node: Any = yaml.compose(text, yaml.SafeLoader)
    try:
        for key in keys:
            entry = entry[key]
        entry["revision"] = commit
        for key in (*keys, "revision"):
            node = {name.value: value for name, value in node.value}[key]
        text = f"{text[: node.start_mark.index]}'{commit}'{text[node.end_mark.index :]}"
        if yaml.safe_load(text) == wanted:
            return text
    except (KeyError, yaml.YAMLError):
        pass
    at = ".".join((*keys, "revision"))
    raise UserError(f"{at} cannot be replaced where it stands; write it as plain text, or put {commit} there")
