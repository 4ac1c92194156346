"""Params files for tests: this repository's own with changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pkt_stages.profile import GROUPS, UNIONS

PARAMS = Path(__file__).parents[1] / "params.yaml"


def write_params(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """`params.yaml` in a folder: the default profile's after an edit."""
    params = yaml.safe_load(PARAMS.read_text())
    edit(params)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def one_source(params: dict[str, Any]) -> None:
    """One source and a trained target, no oracle, nothing written anew or transported; nothing is analysed."""
    names = ["source-chat", "target-chat"]
    params |= {"source": ["source"], "target": "target-chat", "oracle": None, "models": names, "attributed": names}
    params |= {"reexpressed": {}, "seek_source": ["source"], "teacher": ["source"], "transport_source": []}
    params |= {"labelled_source": [], "selected": {"trained": ["source"], "with_base": []}}
    params["pairs"] = {"pair": {"first": "source-chat", "second": "target-chat"}}
    params["analysed"] = {"task": [], "source": [], "methods": [], "seeking": [], "target_methods": []}


def rows(params: dict[str, Any], **made_by: dict[str, Any]) -> None:
    """These rows and no others, by group; the unions that the graph takes from `made_by` follow."""
    groups = made_by | {group: {} for group in GROUPS if group not in made_by}
    every = [(group, name, entry) for group, part in groups.items() for name, entry in part.items()]
    unions = {
        union: {name: entry for group, name, entry in every if group in GROUPS and GROUPS[group].union == union}
        for union in UNIONS
    }
    params |= {"made_by": groups, "methods": {name: entry for _, name, entry in every}, **unions}


def add_row(params: dict[str, Any], group: str, name: str, entry: dict[str, Any]) -> None:
    """One row more."""
    rows(params, **(params["made_by"] | {group: params["made_by"][group] | {name: entry}}))
