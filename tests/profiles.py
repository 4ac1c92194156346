"""Params files for tests: this repository's own with changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pkt_stages.profile import GROUPS

PARAMS = Path(__file__).parents[1] / "params.yaml"


def write_params(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """`params.yaml` in a folder: the default profile's after an edit."""
    params = yaml.safe_load(PARAMS.read_text())
    edit(params)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def rows(params: dict[str, Any], **made_by: dict[str, Any]) -> None:
    """These rows and no others, by group; the unions that the graph takes from `made_by` follow."""
    groups = made_by | {group: {} for group in GROUPS if group not in made_by}
    without = ("grid", "finetune")
    by_source = {name: entry for group, part in groups.items() if group not in without for name, entry in part.items()}
    methods = by_source | groups["grid"] | groups["finetune"]
    params |= {"made_by": groups, "by_source": by_source, "methods": methods}


def add_row(params: dict[str, Any], group: str, name: str, entry: dict[str, Any]) -> None:
    """One row more."""
    rows(params, **(params["made_by"] | {group: params["made_by"][group] | {name: entry}}))
