"""Reading what the report needs: the lists of the params file, and folders of metrics that must match them exactly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pkt_stages.errors import UserError

METHODS = ("pair_methods", "grid_methods", "target_methods", "adopted_target_methods")
LISTS = (
    *METHODS,
    "aligned_methods",
    "reselected_methods",
    "curve_methods",
    "models",
    "adopted_models",
    "sft",
    "analysed_task",
    "analysed_pair_methods",
    "analysed_seeking_methods",
    "analysed_target_methods",
)


class Folder:
    """A folder of metrics that knows which of its files were asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[Path] = set()

    def read(self, *below: str) -> dict[str, Any]:
        """The metrics at `below`, the last part without `.json`; UserError if there are none."""
        path = self.path.joinpath(*below[:-1], f"{below[-1]}.json")
        self.listed.add(path)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path}: no such metrics; the params list this row, run `dvc repro`") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable metrics ({' '.join(str(error).split())})") from None

    def by_task(self, tasks: Iterable[str], *below: str) -> dict[str, dict[str, Any]]:
        """The metrics in the folder `below`, one file per task."""
        return {task: self.read(*below, task) for task in tasks}

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


def read_settings(path: Path) -> dict[str, Any]:
    """The params file, with every list that the report needs.

    Raises:
        UserError: it is missing or malformed, or a method is in two lists.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of params, found {content!r}")
    for name in ("source", "target", "task"):
        if not _is_names(content.get(name)) or not content[name]:
            raise UserError(f"{path}: {name}: expected a list with at least one name, found {content.get(name)!r}")
    seen: dict[str, str] = {}
    # A list that is left out is empty: the metrics of its rows would be an error.
    for name in LISTS:
        content.setdefault(name, [])
        if not _is_names(content[name]):
            raise UserError(f"{path}: {name}: expected a list of names, found {content[name]!r}")
        for method in content[name] if name in METHODS else ():
            if method in seen:
                raise UserError(f"{path}: {name}: {method} is in {seen[method]}, too; list it once")
            seen[method] = name
    return content


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
