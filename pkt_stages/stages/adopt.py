"""Take over an evaluation that another profile made of the same target, so that pairs share their baselines.

Metrics -> the same metrics, if they were made with this profile's evaluation settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.evaluation.sandbox.levels import LEVELS
from pkt_stages.evaluation.settings import EvaluateParams
from pkt_stages.options import Stopwatch, with_params


def run(metrics: Mapping[str, Any], task: str, params: EvaluateParams) -> str | None:
    """What keeps these metrics from being this profile's, or None.

    Args:
        params: this profile's settings for the task. A dtype of `auto` is whatever the checkpoint has.

    Raises:
        KeyError, TypeError, ValueError: these are no metrics of `pkt evaluate`.
    """
    if metrics["task"] != task:
        return f"is of task {metrics['task']!r}, not {task}"
    made, wanted = dict(metrics["settings"]), asdict(params)
    level = made.pop("sandbox", None)
    made.pop("template_date", None)  # the same for all
    if level is not None and LEVELS.index(level) > LEVELS.index(params.sandbox_floor):
        floor = params.sandbox_floor
        return f"was made in a sandbox of level {level}, this profile's `evaluate` says sandbox_floor {floor}"
    for name, value in made.items():
        if name not in wanted:
            return f"was made with {name} {value}, which is no setting of `evaluate` here"
        if wanted[name] != value and (name, wanted[name]) != ("dtype", "auto"):
            return f"was made with {name} {value}, this profile's `evaluate` says {wanted[name]}"
    if not params.nats_only and "score" not in metrics:
        return "has no score, this profile's `evaluate` does not say nats_only"
    if params.limit is not None and metrics["n"] != params.limit:
        return f"has {metrics['n']} examples, this profile's `evaluate` says limit {params.limit}"
    return None


@with_params("evaluate", EvaluateParams)
def adopt(
    params: EvaluateParams,
    task: Annotated[str, typer.Option(help="Task of the evaluation.")],
    metrics_in: Annotated[Path, typer.Option(help="Metrics that another profile's `pkt evaluate` wrote (JSON).")],
    out: Annotated[Path, typer.Option(help="Where to write them.")],
) -> None:
    """Take over a shared model's evaluation from another profile, if it was made with the same settings."""
    watch = Stopwatch()
    try:
        metrics = json.loads(metrics_in.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{metrics_in}: no such metrics; run the profile that makes them") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{metrics_in}: not readable metrics ({error})") from None
    try:
        problem = run(metrics, task, params)
        what = f"{task} {metrics['nats']:.4f} nats of {metrics['model']['name']}"
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{metrics_in}: expected metrics that `pkt evaluate` wrote") from None
    if problem is not None:
        raise UserError(f"{metrics_in}: {problem}; use the same settings in both profiles")
    artifacts.write_json(out, metrics)
    watch.summary("adopt", what, out)
