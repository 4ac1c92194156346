"""Reading what the report needs: folders of metrics that must match the params file's lists exactly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pkt_stages.errors import UserError


class Folder:
    """A folder of metrics that knows which of its files were asked for.

    Attributes:
        partial: whether a file that is not there yet is left out instead of an error.
        listed: the files that were asked for; `missing`: those of them that are not there.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path = path
        self.partial = partial
        self.listed: set[Path] = set()
        self.missing: set[Path] = set()

    def read(self, *below: str, keys: Iterable[str] = ()) -> dict[str, Any] | None:
        """The metrics at `below`, the last part without `.json`; None if there are none yet and the look is partial.

        Raises:
            UserError: there are none, they are not readable, or lack one of these keys.
        """
        path = self.path.joinpath(*below[:-1], f"{below[-1]}.json")
        self.listed.add(path)
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            if self.partial:
                self.missing.add(path)
                return None
            raise UserError(
                f"{path}: no such metrics; the params list this row, run `dvc repro` (or look at what there is with"
                " `pkt report --partial`)"
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable metrics ({' '.join(str(error).split())})") from None
        if missing := [key for key in keys if key not in found]:
            raise UserError(f"{path}: not the metrics of this version, {missing[0]!r} is missing; run `dvc repro`")
        return found

    def by_task(self, tasks: Iterable[str], *below: str, keys: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """The metrics in the folder `below`, one file per task; of a partial look those that are there."""
        read = {task: self.read(*below, task, keys=keys) for task in tasks}
        return {task: found for task, found in read.items() if found is not None}

    def others(self) -> set[Path]:
        """Files that were not asked for; a whole folder where none of it was."""
        needed = {parent for path in self.listed for parent in (path, *path.parents)}
        return {
            next(p for p in (*reversed(path.parents), path) if p not in needed)
            for path in self.path.rglob("*.json")
            if path not in needed
        }


def check_nothing_else(folders: Sequence[Folder], params: Path) -> None:
    """Raise UserError if there are files that were not asked for, with the one command that deletes them all."""
    if extra := sorted(path for folder in folders for path in folder.others()):
        raise UserError(
            f"{extra[0]}{f' and {len(extra) - 1} more' if extra[1:] else ''}: metrics that {params} does not list; list"
            f" their rows (again) or delete them: rm -r {shlex.join(map(str, extra))}"
        )
