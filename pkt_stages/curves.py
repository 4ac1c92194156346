"""The only door to dvclive: curves of numbers over steps, which `dvc plots` and the VS Code extension show."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from pkt_stages.quiet import quiet_dvc

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def curve_writer(folder: Path | None) -> Iterator[Log]:
    """A function that logs a record's numbers at its `step`; nested mappings become nested names.

    Without a folder nothing is written, nor in a git repository that has no commit yet: dvclive asks for one.
    """
    if folder is None:
        yield lambda record: None
        return
    with quiet_dvc():
        from dvclive.live import Live
        from scmrepo.exceptions import SCMError

    try:
        # dvcyaml and save_dvc_exp off: their defaults rewrite dvc.yaml and make commits.
        live = Live(dir=str(folder), dvcyaml=None, save_dvc_exp=False, report=None)
    except SCMError as error:
        typer.echo(f"warning: no curves in {folder}: dvclive needs a commit ({error})", err=True)
        yield lambda record: None
        return

    def log(record: Mapping[str, Any]) -> None:
        live.step = record["step"]
        # A record that comes back from JSON has another order, and dvclive writes names as they first came.
        for name, value in sorted(numbers(record).items()):
            if name != "step":
                live.log_metric(name, value)
        live.make_summary()

    try:
        yield log
    finally:
        live.end()


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record by path, `a/b/c`; lists and texts are left out."""
    found: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{_file_name(key)}"
        if isinstance(value, Mapping):
            found |= numbers(value, f"{name}/")
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def _file_name(key: str) -> str:
    """A key as a file's name, for dvclive makes one of it; ids of examples are keys, too."""
    name = quote(key, safe=" ")
    if len(name) > 100:
        return f"{name[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return name.replace(".", "%2E") if not name.strip(". ") else name
