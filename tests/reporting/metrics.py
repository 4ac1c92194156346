"""Metrics as `pkt evaluate` writes them, and params files, as far as the report reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pkt_stages.profile import Profile, read_profile
from tests.profiles import rows

TASKS = {"gsm8k": "GSM8K"}


def params(**changes: Any) -> dict[str, Any]:
    """One task, one source, no method."""
    nothing: dict[str, Any] = {key: [] for key in ("task", "methods", "seeking", "target_methods")}
    found: dict[str, Any] = {
        "profile": "p",
        "source": ["s"],
        "target": "t",
        "models": ["s", "t"],
        "task": {"gsm8k": {}},
        "no_change": {},
        "seek_source": ["s"],
        "every_step": [],
        "adopted": [],
        "pairs": {},
        "analysed": nothing | changes.pop("analysed", {}),
        **changes,
    }
    rows(found, **found.get("made_by", {}))
    return found


def profile(folder: Path, **changes: Any) -> Profile:
    (folder / "params.yaml").write_text(yaml.safe_dump(params(**changes), sort_keys=False))
    return read_profile(folder / "params.yaml")


def metrics(
    *runs: list[float], ids: str = "abcd", made: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "model": {"name": "m", "revision": None},
        "ids": list(ids),
        "runs": [
            {"label": f"seed_{i}", "score": 100 * sum(r) / len(r), "stderr": 0.0, "correct": r}
            for i, r in enumerate(runs)
        ],
        "settings": {"backend": "hf", "template": "chat", **settings},
        "made": made,
    }
