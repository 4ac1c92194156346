"""Which stage made a file? dvc.lock knows, also of files that cannot say it (adapters, predictions, pages)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Origin:
    """The stage whose output a path is, or lies in.

    Attributes:
        stage: its address for DVC, as in `dvc pull STAGE`.
        command: what it ran, `pkt` and its first word.
        params: its params as the lock has them, by section.
        inputs: MD5 of each input that is no code, by path; a folder's ends in `.dir`.
        is_current: the output on disk is the one that the lock names.
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
    for lock in sorted((*root.glob("dvc.lock"), *root.glob("*/*/dvc.lock"))):
        try:
            stages = yaml.load(lock.read_text(encoding="utf-8"), LOADER)["stages"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            continue  # in a merge, say; `dvc status` complains about it
        for name, entry in stages.items():
            for out in entry.get("outs", ()):
                if wanted.is_relative_to(out["path"]):
                    folder = lock.parent.relative_to(root)
                    return Origin(
                        stage=name if lock.parent == root else f"{(folder / 'dvc.yaml').as_posix()}:{name}",
                        command=" ".join(str(entry["cmd"]).split()[:2]),
                        params={k: v for section in entry.get("params", {}).values() for k, v in section.items()},
                        inputs={d["path"]: d["md5"] for d in entry.get("deps", ()) if not is_code(d["path"])},
                        is_current=md5(root / out["path"]) == out.get("md5"),
                    )
    return None


def is_code(path: str) -> bool:
    return Path(path).parts[0] == __package__.split(".")[0]


def md5(path: Path) -> str:
    """DVC's hash of a file, or of a folder: that of the list of its files."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    listing = [{"md5": md5(file), "relpath": name} for name, file in sorted(files.items())]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"
