"""GradFix (2510.09658): of another row's change only what goes downhill on the align examples (METHODS 11.8).

Kept are the entries whose sign is that of minus the gradient of the target's answer loss on all tasks' align sets. The
mask alone carries that gradient, so its control is the same mask on a random change of equal norm. Takes whole weights,
so a transport's row. Delicate: signs of gradients near rounding decide by noise; `majority` lets examples vote.

Cost: one forward and backward pass for each align example. Memory: the target and a gradient of its moved weights, in
`dtype` and float32, 13 + 24 GiB for a 7B model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pkt_stages.core.transport import masked
from pkt_stages.encoding import Encoded, EncodingParams, encode
from pkt_stages.errors import UserError
from pkt_stages.examples import align_files, read_examples
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity, load_model, load_tokenizer
from pkt_stages.models.losses import example_losses
from pkt_stages.params import option
from pkt_stages.progress import track
from pkt_stages.templates import dated


@dataclass(frozen=True)
class Params(EncodingParams):
    """Settings of the filter."""

    mode: Literal["keep", "force"] = option("keep", "Drop entries that go uphill, or turn them.")
    signs: Literal["mean", "majority"] = option("mean", "Of the mean gradient, or of most examples' gradients.")
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = option("float32", "Dtype of the target as it runs.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """For each of the row's changes one under the same label.

    Raises:
        UserError: other inputs than --target, --delta and --examples; a change that is not of whole weights, or of
            weights that this target lacks; no align examples.
    """
    target, row, folder = inputs.only("target", "delta", "examples")
    named = identity(target)
    changes = {label: stored.load() for label, stored in row.items.items()}
    for label, change in changes.items():
        if not isinstance(change, DenseDelta):
            raise UserError(f"{row.path}: its change {label!r} is not of whole weights; give a transport's row")
    tokenizer = load_tokenizer(target)
    tasks = encoded_tasks(tokenizer, folder, params)
    wanted = sorted({name for change in changes.values() for name in change.weights})
    model = load_model(target, dtype=params.dtype, device=inputs.device)
    if odd := sorted(set(wanted) - {name for name, _ in model.named_parameters()}):
        raise UserError(f"{row.path}: changes {odd[0]}, which {target.location} does not have; give its own target")
    descent = descent_signs(model, tasks, wanted, params.signs)
    made = {
        label: DenseDelta({name: masked(weight, descent[name], params.mode) for name, weight in change.weights.items()})
        for label, change in changes.items()
    }
    kept = {label: share_of_norm(made[label].weights, changes[label].weights) for label in made}
    meta: dict[str, Any] = {
        "of": dict(row.meta),
        "examples": {task: len(rows) for task, rows in tasks.items()},
        "kept": kept,
    }
    meta |= dated(tokenizer, params.template)
    return Derived(made, named, row.meta.get("source"), meta=meta)


def encoded_tasks(tokenizer: Any, folder: Path, params: Params) -> dict[str, list[Encoded]]:
    """The align examples of every task below a folder, as ids with their answers as labels.

    Raises:
        UserError: there are none, or as `read_examples`.
    """
    return {
        task: [
            encode(tokenizer, example, template=params.template, max_length=params.max_length)
            for example in read_examples(path)
        ]
        for task, path in align_files(folder).items()
    }


def descent_signs(
    model: Any, tasks: Mapping[str, Sequence[Encoded]], wanted: Sequence[str], rule: str
) -> dict[str, Tensor]:
    """Signs of minus the gradient of the answer loss, by weight, float32.

    Args:
        rule: `mean` of the gradients, every task with the same weight; `majority` of all examples' signs, 0 for a tie.
    """
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in wanted}
    for name in wanted:
        parameters[name].requires_grad_(True)
    for task, examples in tasks.items():
        for example in track(examples, f"gradients on {task}"):
            (example_losses(model, [example]).sum() / (len(tasks) * len(examples))).backward()
            for name in wanted:
                gradient = parameters[name].grad
                assert gradient is not None, name
                sums[name] -= gradient.sign() if rule == "majority" else gradient
                parameters[name].grad = None
    for name in wanted:
        parameters[name].requires_grad_(False)
    return {name: total.sign().cpu() for name, total in sums.items()}


def share_of_norm(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> float:
    """Share of the squared norm that is left, over all weights."""
    left, all_of = (sum(float(w.double().square().sum()) for w in some.values()) for some in (part, whole))
    return left / all_of if all_of else 0.0
