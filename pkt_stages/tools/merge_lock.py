"""A git merge driver for dvc.lock: two branches that ran different stages merge, stage by stage.

Git's textual merge puts entries that both sides appended at the same place into one conflict, or interleaves them. Here
an entry is one unit, taken as text: what DVC wrote stays as DVC wrote it. Whether entries that came from two sides fit
together is DVC's to judge, for it compares every hash in them (docs/team.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from pkt_stages.artifacts import written_whole
from pkt_stages.errors import UserError
from pkt_stages.params import parse_yaml

# A top-level key and, below `stages`, the name of a stage; the top-level line itself has no stage.
Key = tuple[str, str | None]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def merge_lock(
    base: Annotated[Path, typer.Argument(help="The lock of the common ancestor (git's %O).")],
    ours: Annotated[Path, typer.Argument(help="The lock of this branch, replaced by the merged one (git's %A).")],
    theirs: Annotated[Path, typer.Argument(help="The lock of the branch that is merged (git's %B).")],
    path: Annotated[str, typer.Argument(help="What to call it in messages (git's %P).")] = "dvc.lock",
) -> None:
    """Merge two versions of dvc.lock stage by stage, as a git merge driver; exit 1 if a stage changed on both sides."""
    merged, conflicts = merge(*(entries(file, path) for file in (base, ours, theirs)))
    with written_whole(ours) as temporary:
        temporary.write_text("".join(merged.values()), encoding="utf-8")
    for conflict in conflicts:
        typer.echo(explain(conflict, path), err=True)
    if conflicts:
        raise typer.Exit(1)


def entries(file: Path, path: str) -> dict[Key, str]:
    """A lock's text in pieces, in order: its top-level lines and each stage's entry.

    Raises:
        UserError: it is no lock as DVC writes it, for instance one with conflict markers.
    """
    expected = f"{path} ({file}): expected a lock file as DVC writes it"
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = parse_yaml(text, LOADER)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        at = f" (line {mark.line + 1})" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"{expected}; found no YAML{at}; take one side: git checkout --ours {path}") from None
    found: dict[Key, str] = {}
    key: Key | None = None
    heads: list[Key] = []
    for line in text.splitlines(keepends=True):
        if not line.startswith(" ") and ":" in line and not line.startswith(("-", "#")):
            heads.append(key := (line.split(":")[0], None))
        elif key and key[0] == "stages" and line.startswith("  ") and line[2:3] not in (" ", "-", "#"):
            heads.append(key := ("stages", line.strip().removesuffix(":")))
        if key is not None:
            found[key] = found.get(key, "") + line
    if content is None and not text.strip():
        return {}  # added on both branches: git gives an empty ancestor
    stages = content.get("stages") if isinstance(content, dict) else None
    regular = isinstance(stages, dict) and [*stages] == [stage for _, stage in heads if stage] and text.endswith("\n")
    if not regular or len(heads) != len(found):
        raise UserError(f"{expected}; found another layout; take one side: git checkout --ours {path}")
    return found


def merge(
    base: Mapping[Key, str], ours: Mapping[Key, str], theirs: Mapping[Key, str]
) -> tuple[dict[Key, str], list[Key]]:
    """The merged entries, in our order with new ones of theirs behind, and the keys in conflict, where ours is kept."""
    merged: dict[Key, str] = {}
    conflicts = []
    # The pieces of one top-level key stay together.
    heads = dict.fromkeys(head for head, _ in (*ours, *theirs))
    for key in (key for head in heads for key in dict.fromkeys((*ours, *theirs)) if key[0] == head):
        was, mine, other = base.get(key), ours.get(key), theirs.get(key)
        if mine not in (was, other) and other != was:
            conflicts.append(key)
        taken = other if mine == was else mine
        if taken is not None:
            merged[key] = taken
    return merged, conflicts


def explain(key: Key, path: str) -> str:
    """One line: what is in conflict and what to do."""
    head, stage = key
    if stage is None:
        return f"{path}: {head}: both sides changed it; ours is kept. Compare with theirs, then: git add {path}"
    folder = path.rpartition("/")[0]
    address = f"{folder}/dvc.yaml:{stage}" if folder else stage
    return (
        f"{path}: stage {stage}: both sides changed it; ours is kept."
        f" When params and code are merged: dvc repro --pull --allow-missing {address}, then: git add {path}"
    )
