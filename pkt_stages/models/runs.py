"""What a method leaves behind, one per run: sparse deltas (LaTen's unseen examples) or adapters (seeds)."""

from __future__ import annotations

import re
from pathlib import Path

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter, is_adapter, load_adapter
from pkt_stages.models.inject import SparseDelta, load_delta


def load_run(path: Path) -> Adapter | dict[str, SparseDelta]:
    """A delta file, or the folder of a PEFT adapter."""
    return load_adapter(path) if path.is_dir() else load_delta(path)


def labelled(paths: list[Path]) -> dict[str, Path]:
    """The runs in files and folders: deltas by the id of the example that each was made from, else by file stem.

    Adapters go by folder name. Those of a folder come in the order of their numbers; those
    of its folders step_01, step_02, ... (`pkt inject --every-step`) have their step in front, as in `step_01/example`.

    Raises:
        UserError: a folder without deltas and adapters, a file that is no delta, or two with one label.
    """
    found: dict[str, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir() and not is_adapter(path):
            deltas = [*path.glob("delta_*.safetensors"), *path.glob("step_*/delta_*.safetensors")]
            inside = [*deltas, *filter(is_adapter, path.iterdir())]
        if not inside:
            raise UserError(f"{path}: a folder without delta_*.safetensors or PEFT adapters")
        for one in sorted(inside, key=lambda one: [_number(part) for part in (one.parent, one)]):
            label = one.stem
            if not one.is_dir():
                example = artifacts.load(one, "delta").meta.get("example")
                label = str(example["id"]) if isinstance(example, dict) and "id" in example else label
                label = f"{one.parent.name}/{label}" if one.parent.name.startswith("step_") else label
            if label in found:
                raise UserError(f"{one}: called {label!r} as {found[label]}; evaluate them one by one")
            found[label] = one
    return found


def _number(path: Path) -> tuple[int, str]:
    digits = re.search(r"(\d+)$", path.stem)
    return (int(digits.group()) if digits else -1, path.name)
