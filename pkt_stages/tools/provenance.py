"""Which stage made a file, and is it still that file? dvc.lock knows, also of files that cannot say it (adapters)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pkt_stages.errors import UserError
from pkt_stages.params import parse_yaml
from pkt_stages.progress import track

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
OUTPUTS = ("artifacts", "results")  # where stages write


@dataclass(frozen=True)
class Origin:
    """The stage whose output a path is, or lies in.

    Attributes:
        stage: its address for DVC, as in `dvc pull STAGE`.
        command: what it ran, `pkt` and its first word.
        params: its params as the lock has them, by section.
        inputs: MD5 of each input that is no code, by path; a folder's ends in `.dir`.
        is_current: the output is on disk, and the one that the lock names.
    """

    stage: str
    command: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    is_current: bool


def origin(path: Path) -> Origin | None:
    """Look a file or folder up in the dvc.lock files of the project around it; None if no stage has made it."""
    absolute = Path(os.path.abspath(path))  # links stay: a file may be a link into DVC's cache
    root = next((folder for folder in absolute.parents if (folder / ".dvc").is_dir()), None)
    if root is None:
        return None
    wanted = absolute.relative_to(root)
    for lock in locks(root):
        entries = stages(text_of(lock))
        for name, entry in entries.items():
            for out in entry.get("outs", ()):
                if wanted.is_relative_to(out["path"]):
                    output = root / out["path"]
                    return Origin(
                        stage=address(root, lock, name),
                        command=" ".join(str(entry["cmd"]).split()[:2]),
                        params={k: v for section in entry.get("params", {}).values() for k, v in section.items()},
                        inputs={d["path"]: d["md5"] for d in entry.get("deps", ()) if not is_code(d["path"], entries)},
                        is_current=output.exists() and md5(output) == out.get("md5"),
                    )
    return None


def check_inputs(words: Sequence[str]) -> None:
    """Under DVC: refuse a stage's inputs whose content is not what dvc.lock says that their own stages have made.

    DVC itself goes by times and permissions, so that a bit that flipped in its cache would be used unseen.

    Args:
        words: the stage's command line; its paths are those of inputs, as DVC has removed the old outputs.

    Raises:
        UserError: naming the first such file or folder, its stage, and what to do.
    """
    if not {"DVC_ROOT", "DVC_STAGE"} <= set(os.environ):
        return
    root = Path(os.environ["DVC_ROOT"])
    paths = {Path(os.path.relpath(word, root)) for word in words if os.path.exists(word)}
    wanted = {path for path in paths if path.parts and path.parts[0] in OUTPUTS}
    found: dict[str, tuple[str, str]] = {}  # the output, its stage and MD5
    # The stage's own lock file first: large ones take a while to read, and mostly no other is needed.
    own = root / (os.environ["DVC_STAGE"].rpartition(":")[0] or "dvc.yaml")
    for lock in sorted(locks(root), key=lambda lock: lock.parent != own.parent):
        text = text_of(lock)
        if not any(f"path: {part.as_posix()}\n" in text for path in wanted for part in (path, *path.parents)):
            continue
        for name, entry in stages(text).items():
            # What the stage itself once made is no input: DVC has removed it, but for the folders around it.
            for out in entry.get("outs", ()) if address(root, lock, name) != os.environ["DVC_STAGE"] else ():
                if "md5" in out and (inside := {path for path in wanted if path.is_relative_to(out["path"])}):
                    found[out["path"]] = address(root, lock, name), out["md5"]
                    wanted -= inside
    for path in track(sorted(found), "check inputs"):
        stage, recorded = found[path]
        if (now := md5(root / path)) != recorded:
            raise UserError(
                f"{path}: not what its stage has made (MD5 {recorded} in dvc.lock, {now} on disk); if it is damaged,"
                f" `pkt doctor --cache` says what to do; if you have changed it, `dvc commit {stage}` records that"
            )


def locks(root: Path) -> list[Path]:
    return sorted((*root.glob("dvc.lock"), *root.glob("*/*/dvc.lock")))


def address(root: Path, lock: Path, name: str) -> str:
    """A stage as DVC's commands take it in the project's root."""
    folder = lock.parent.relative_to(root)
    return name if lock.parent == root else f"{(folder / 'dvc.yaml').as_posix()}:{name}"


def text_of(lock: Path) -> str:
    """A dvc.lock's text; nothing if it is unreadable, which `dvc status` complains about."""
    try:
        return lock.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return ""


def stages(text: str) -> dict[str, Any]:
    """The records in a dvc.lock's text; none if that is no lock (in a merge, say)."""
    try:
        return dict(parse_yaml(text, LOADER)["stages"])
    except (ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return {}


def is_code(path: str, entries: Mapping[str, Any]) -> bool:
    """Whether a path is a hash of code: lies in what `pkt code` has written, by these records."""
    coded = [entry for entry in entries.values() if str(entry.get("cmd")).startswith("pkt code ")]
    return any(Path(path).is_relative_to(out["path"]) for entry in coded for out in entry.get("outs", ()))


def md5(path: Path) -> str:
    """DVC's hash of a file, or of a folder: that of the list of its files."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    listing = [{"md5": md5(file), "relpath": name} for name, file in sorted(files.items())]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"
