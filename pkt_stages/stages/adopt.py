"""Take over an evaluation that another profile made of the same target, so that pairs share their baselines.

Metrics -> the same metrics, if they were made with this profile's evaluation settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.evaluation.sandbox.levels import LEVELS
from pkt_stages.examples import TASKS
from pkt_stages.options import Stopwatch
from pkt_stages.params import read_section


def run(metrics: Mapping[str, Any], task: str, section: Mapping[str, Any]) -> str | None:
    """What keeps these metrics from being this profile's, or None.

    Args:
        section: `evaluate` of the params file, for the task. `auto` leaves the dtype to the checkpoint.

    Raises:
        KeyError, TypeError, ValueError: these are no metrics of `pkt evaluate`.
    """
    if metrics["task"] != task:
        return f"is of task {metrics['task']!r}, not {task}"
    settings = dict(metrics["settings"])
    level, floor = settings.pop("sandbox", None), section.get("sandbox_floor")
    if level is not None and (floor is None or LEVELS.index(level) > LEVELS.index(floor)):
        return f"was made in a sandbox of level {level}, this profile's `evaluate` says sandbox_floor {floor}"
    for name, value in settings.items():
        if name not in section:
            return f"was made with {name} {value}, this profile's `evaluate` says nothing of it"
        if section[name] != value and (name, section[name]) != ("dtype", "auto"):
            return f"was made with {name} {value}, this profile's `evaluate` says {section[name]}"
    if section.get("limit") is not None and metrics["n"] != section["limit"]:
        return f"has {metrics['n']} examples, this profile's `evaluate` says limit {section['limit']}"
    return None


def adopt(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
    metrics_in: Annotated[Path, typer.Option(help="Metrics that another profile's `pkt evaluate` wrote (JSON).")],
    out: Annotated[Path, typer.Option(help="Where to write them.")],
    params: Annotated[Path, typer.Option(help="This profile's params file; its `evaluate` must agree.")],
) -> None:
    """Take over a shared model's evaluation from another profile, if it was made with the same settings."""
    watch = Stopwatch()
    try:
        metrics = json.loads(metrics_in.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{metrics_in}: no such metrics; run the profile that makes them") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{metrics_in}: not readable metrics ({error})") from None
    section = read_section(params, "evaluate", task)
    try:
        problem = run(metrics, task, section)
        what = f"{task} {metrics['score']:.1f} % of {metrics['model']['name']}"
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{metrics_in}: expected metrics that `pkt evaluate` wrote") from None
    if problem is not None:
        raise UserError(f"{metrics_in}: {problem}; use the same settings in both profiles")
    artifacts.write_json(out, metrics)
    watch.summary("adopt", what, out)
