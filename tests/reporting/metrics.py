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
    nothing: dict[str, Any] = {key: [] for key in ("task", "source", "methods", "seeking", "target_methods")}
    found: dict[str, Any] = {
        "profile": "p",
        "source": ["s"],
        "target": "t",
        "oracle": None,
        "models": ["s-chat", "t"],
        "attributed": ["s-chat", "t"],
        "reexpressed": {},
        "task": {"gsm8k": {}},
        "no_change": {},
        "seek_source": ["s"],
        "teacher": ["s"],
        "transport_source": [],
        "labelled_source": [],
        "selected": {"trained": changes.get("source", ["s"]), "with_base": []},
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
    *runs: list[float],
    ids: str = "abcd",
    made: dict[str, Any] | None = None,
    nats: list[list[float]] | None = None,
    answered: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """
    Args:
        runs: per example whether the answer is right.
        nats: as many log-likelihoods; by default -1 where the answer is right and -2 where it is wrong.
        answered: whether answers were asked for; without them there is no score.
    """
    likelihoods = nats or [[right - 2 for right in run] for run in runs]
    found = []
    for i, (right, likely) in enumerate(zip(runs, likelihoods, strict=True)):
        run = {"label": f"seed_{i}", "nats": sum(likely) / len(likely), "nats_stderr": 0.0, "log_likelihoods": likely}
        if answered:
            run |= {"score": 100 * sum(right) / len(right), "stderr": 0.0, "correct": right}
        found.append(run)
    means = ("score", "stderr", "nats", "nats_stderr")
    return {
        "task": "gsm8k",
        "model": {"name": "m", "revision": None},
        **{key: sum(run[key] for run in found) / len(found) for key in means if key in found[0]},
        "ids": list(ids),
        "runs": found,
        "settings": {"backend": "hf", "template": "chat", **settings},
        "made": made,
    }
