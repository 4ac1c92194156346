"""Reading what the report needs: folders of metrics that must match the params file's lists exactly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pkt_stages.errors import UserError


class Folder:
    """A folder of metrics that knows which of its files were asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[Path] = set()

    def read(self, *below: str, keys: Iterable[str] = ()) -> dict[str, Any]:
        """The metrics at `below`, the last part without `.json`; UserError if there are none, or without these keys."""
        path = self.path.joinpath(*below[:-1], f"{below[-1]}.json")
        self.listed.add(path)
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            raise UserError(f"{path}: no such metrics; the params list this row, run `dvc repro`") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable metrics ({' '.join(str(error).split())})") from None
        if missing := [key for key in keys if key not in found]:
            raise UserError(f"{path}: not the metrics of this version, {missing[0]!r} is missing; run `dvc repro`")
        return found

    def by_task(self, tasks: Iterable[str], *below: str, keys: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """The metrics in the folder `below`, one file per task."""
        return {task: self.read(*below, task, keys=keys) for task in tasks}

    def check_nothing_else(self, params: Path) -> None:
        """Raise UserError if there are files that were not asked for, with the command that deletes them."""
        needed = {parent for path in self.listed for parent in (path, *path.parents)}
        extra = set()
        for path in self.path.rglob("*.json"):
            if path not in needed:
                # The whole folder where none of it is listed.
                extra.add(next(p for p in (*reversed(path.parents), path) if p not in needed))
        if extra:
            names = shlex.join(str(path) for path in sorted(extra))
            raise UserError(
                f"{self.path}: holds metrics that {params} does not list; list their rows (again) or delete them:"
                f" rm -r {names}"
            )
