"""The README.md of an exported folder, as the hub shows it: what the weights are, of what they were made, how to load.

It holds no time, host or path: whoever exports the same again gets the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt_stages import hub
from pkt_stages.errors import UserError, printable
from pkt_stages.models.changes import META, Changes, Stored

CARD = "README.md"
KINDS = {
    "sparse": "rows added at some of its neurons",
    "low_rank": "a low-rank change, as a LoRA adapter has it",
    "dense": "a change of whole weights",
}


@dataclass(frozen=True)
class Score:
    """An evaluation of the exported change; points in percent, nats per token of the reference answers."""

    task: str
    metric: str
    n: int
    points: float | None
    nats: float


def read_scores(paths: Sequence[Path], row: Changes, stored: Stored, scale: float) -> list[Score]:
    """What `pkt evaluate` said of a change.

    Raises:
        UserError: no metrics, metrics of another row, or of the change with another factor.
    """
    found = []
    for path in paths:
        try:
            metrics = json.loads(path.read_text(encoding="utf-8-sig"))
            made, label = metrics["made"], stored.label
            runs = {run["label"]: run for run in metrics["runs"]}
            other = not isinstance(made, dict) or label not in runs or any(made.get(k) != row.meta.get(k) for k in META)
            factor = metrics.get("scales", {}).get(label, 1.0)
            if not other:
                run, what = runs[label], (str(metrics["task"]), str(metrics["metric"]), int(metrics["n"]))
                found.append(Score(*what, run.get("score"), float(run["nats"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path}: no metrics of `pkt evaluate` ({why}); give those of this row") from None
        if other:
            raise UserError(f"{path}: of another row or run than {row.path} ({label}); give its own metrics")
        if factor != scale:
            raise UserError(f"{path}: evaluated with the factor {factor}, exported with {scale}; give --scale {factor}")
    return found


def card(
    row: Changes,
    stored: Stored,
    base: Mapping[str, Any],
    *,
    facts: Mapping[str, str],
    scale: float,
    scores: Sequence[Score],
    adapter: bool,
) -> str:
    """The text.

    Args:
        base: the target's identity.
        facts: more lines for the table, by their names.
        adapter: whether an adapter was exported, not a whole model.
    """
    meta, name = row.meta, str(base["name"])
    known = "command" in meta  # a bare adapter has at most its base
    by = f"`pkt {meta['command']}`" if known else "unknown: a bare adapter says nothing of it"
    by += f", method `{meta['method']}`" if meta.get("method") else ""
    rows = {
        "base model": model(base),
        "source of the change": model(meta["source"]) if meta.get("source") else "none" if known else "unknown",
        "made by": by,
        "change": f"`{stored.label}`, {stored.kind.replace('_', '-')}: {KINDS[stored.kind]}",
        "factor": f"{scale:g}",
        **facts,
    }
    title = f"{meta.get('method') or meta.get('command') or stored.label} on {name.rpartition('/')[2]}"
    on_hub = [f"base_model: {base['name']}", f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    parts = [
        "\n".join(
            [
                "---",
                *(on_hub if hub.is_repo_name(name) else []),
                f"library_name: {'peft' if adapter else 'transformers'}",
                "pipeline_tag: text-generation",
                "tags: [pkt-stages]",
                "---",
            ]
        ),
        f"# {title}",
        (f"A LoRA adapter for `{name}`" if adapter else f"The model `{name}` with a change of its weights")
        + ", exported by pkt-stages (parametric knowledge transfer).",
        table(["", ""], rows.items()),
        *(["## Settings", f"```json\n{json.dumps(meta['params'], sort_keys=True, indent=2)}\n```"] if known else []),
        *(["## Scores", _scores(scores)] if scores else []),
        "## How to load it",
        f"```python\n{_loading(base, adapter)}\n```",
        "## Licence",
        "This card grants none. The weights are derived from the models above, so that their licences decide what may"
        " be done with them, and whether they may be passed on.",
    ]
    return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n")) + "\n"


def model(identity: Mapping[str, Any]) -> str:
    """A model so that a stranger finds it: the hub's name and commit, or a folder's name and its content's hash."""
    name, revision = str(identity["name"]), identity["revision"]
    if hub.is_repo_name(name):
        return f"[{name}](https://huggingface.co/{name}) at {revision or 'an unknown revision'}"
    return f"`{name}`, a local folder, {revision} (`pkt inspect FOLDER` shows a model's)"


def table(head: Sequence[str], rows: Any) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scores(scores: Sequence[Score]) -> str:
    head = ["task", "examples", "score", "log-likelihood of the reference answers, nats per token"]
    return table(
        head,
        (
            [s.task, str(s.n), "" if s.points is None else f"{s.points:.1f} % {s.metric}", f"{s.nats:.4f}"]
            for s in scores
        ),
    )


def _loading(base: Mapping[str, Any], adapter: bool) -> str:
    """Python that loads what was exported; the folder with it is called FOLDER."""
    name, revision = str(base["name"]), base["revision"]
    if not adapter:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
    on_hub = hub.is_repo_name(name)
    where = (
        f'"{name}", revision="{revision}"' if on_hub and revision else f'"{name if on_hub else "BASE MODEL FOLDER"}"'
    )
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({where})\n"
        'model = PeftModel.from_pretrained(base, "FOLDER")'
    )
