"""Training of a mapping from source rows to target rows, and what it left (LaTen, paper 4.3; METHODS section 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt_stages import artifacts, methods
from pkt_stages.artifacts import Artifact
from pkt_stages.core.losses import backward, value_range
from pkt_stages.core.schedule import draw_examples, scheduler
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.methods import Method
from pkt_stages.models.inject import injected
from pkt_stages.models.load import weights_hash
from pkt_stages.models.losses import example_losses, home, micro_batches
from pkt_stages.models.recipe import ALIGNMENT, AlignmentParams
from pkt_stages.models.selection import Selection
from pkt_stages.params import build
from pkt_stages.scratch import CHOSEN, checkpoint_name


@dataclass(frozen=True)
class Data:
    """Encoded examples: what training sees, and align examples with answer labels for the validation.

    Attributes:
        extract: by id, in the selection's order.
        align: by id, labelled for training.
        answers: the same align examples, labelled for the validation.
    """

    extract: dict[str, Encoded]
    align: dict[str, Encoded]
    answers: dict[str, Encoded]


def draw(ids: Sequence[str], settings: AlignmentParams) -> tuple[list[str], list[list[str]]]:
    """Ids of the held-out align examples, and those of each step; UserError if there are too few."""
    per_step = settings.batch_size - 1
    if len(ids) < settings.validation_size + per_step:
        raise UserError(
            f"{len(ids)} align examples are too few for {settings.validation_size} held out (validation_size) and"
            f" {per_step} in a step (batch_size - 1)"
        )
    held_out, steps = draw_examples(
        len(ids), num_held_out=settings.validation_size, per_step=per_step, steps=settings.steps, seed=settings.seed
    )
    return [ids[i] for i in held_out], [[ids[i] for i in step] for step in steps]


class Alignment:
    """The training: weights and optimizer that `step` moves; `state` and `restore` carry them over a restart.

    The target is frozen. A step's loss is that of the target with the step's rows injected, so that the gradient
    reaches the mapping through the delta alone.
    """

    def __init__(
        self,
        model: Any,
        selection: Selection,
        data: Data,
        settings: AlignmentParams,
        by: Method,
        *,
        micro_batch_size: int,
    ) -> None:
        self.model, self.selection, self.data, self.settings, self.by = model, selection, data, settings, by
        self.micro_batch_size = micro_batch_size
        self.device = home(model)
        self.validation_ids, self.step_ids = draw(list(data.align), settings)
        self.extract = list(selection.examples("extract").items())
        self.network: torch.nn.Module = by.code.mapping(
            by.settings,
            d_source=selection.width("source"),
            d_target=selection.width("target"),
            generator=torch.Generator().manual_seed(settings.seed),
        ).to(self.device)
        self.adam = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=1e-8,
            weight_decay=settings.weight_decay,
        )
        self.rates = scheduler(settings.schedule, self.adam, lr=settings.lr, total_steps=len(self.extract))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the mapping's weights."""
        return {name: weight.detach().clone() for name, weight in self.network.state_dict().items()}

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights(), "optimizer": self.adam.state_dict(), "rates": self.rates.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        self.adam.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])

    def step(self, index: int) -> dict[str, Any]:
        """Take step `index` (from 0) and describe it: losses before the update, validation and deltas after it.

        Raises:
            UserError: a loss or gradient that is not finite; the weights are then not moved.
        """
        settings, (extract_id, example) = self.settings, self.extract[index]
        batch = [self.data.align[id] for id in self.step_ids[index]] + [self.data.extract[extract_id]]

        def losses_of(part: list[Encoded]) -> Any:
            def losses(rows: Mapping[str, Tensor]) -> Tensor:
                with injected(self.model, self.by.code.place(self.selection, example, rows)):
                    return example_losses(self.model, part)

            return losses

        found = backward(
            self.network,
            self.rows_of(example),
            [losses_of(part) for part in micro_batches(batch, self.micro_batch_size)],
            penalty_weight=settings.penalty,
            reduction=settings.loss_reduction,
        )
        lm_loss = float(found.per_example.double().mean())
        finite = all(bool(w.grad.isfinite().all()) for w in self.network.parameters() if w.grad is not None)
        if not finite or not abs(found.objective) < float("inf"):
            raise UserError(f"step {index + 1}: loss {lm_loss} or its gradient is not finite; lower lr, or use float32")
        used = self.adam.param_groups[0]
        lr, beta1 = float(used["lr"]), float(used["betas"][0])
        self.adam.step()
        self.rates.step()
        validation, mapped = self.validate()
        if not all(value < float("inf") for value in validation.values()):
            raise UserError(f"step {index + 1}: validation loss {validation} is not finite; lower lr, or use float32")
        return {
            "step": index + 1,
            "extract_id": extract_id,
            "align_ids": self.step_ids[index],
            "lr": lr,
            "beta1": beta1,
            "loss": found.objective,
            "lm_loss": lm_loss,
            "penalty": settings.penalty * found.mean_square,
            "validation_loss": sum(validation.values()) / len(validation),
            "validation_loss_by_transfer_example": validation,
            "delta": {site: value_range(torch.stack(parts)) for site, parts in mapped.items()},
        }

    def rows_of(self, example: int) -> dict[str, Tensor]:
        """What the mapping receives for an example of the selection."""
        rows = self.by.code.source_rows(self.selection, example, self.by.settings, seed=self.settings.seed)
        return {site: part.to(self.device) for site, part in rows.items()}

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Mean answer loss (nats) with each transfer example's rows injected, by its id; and those rows by site."""
        losses: dict[str, float] = {}
        mapped: dict[str, list[Tensor]] = {}
        for id, example in self.selection.examples("transfer").items():
            rows = self.network(self.rows_of(example))
            with injected(self.model, self.by.code.place(self.selection, example, rows)):
                losses[id] = self.held_out_loss()
            for site, part in rows.items():
                mapped.setdefault(site, []).append(part)
        return losses, mapped

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean answer loss (nats) of the model as it is now on the held-out align examples."""
        held_out = [self.data.answers[id] for id in self.validation_ids]
        losses = [example_losses(self.model, part) for part in micro_batches(held_out, self.micro_batch_size)]
        return float(torch.cat(losses).double().mean())


def choose(steps: Sequence[Mapping[str, Any]]) -> int:
    """The step with the lowest validation loss; of equal ones the first."""
    best = min(steps, key=lambda step: (step["validation_loss"], step["step"]))
    return int(best["step"])


@dataclass(frozen=True)
class Trained:
    """What `pkt align` made.

    Attributes:
        mappings: by step, the chosen or the given one, or all.
        meta: of chosen.json: the models, the method, the settings in force.
        by: the method's code with the settings that it was trained with.
    """

    mappings: Mapping[int, Artifact]
    meta: Mapping[str, Any]
    by: Method


def open_trained(folder: Path, step: int | None, *, every_step: bool) -> Trained:
    """The mapping of the chosen (or the given) step, or those of all, with the code that they are of.

    Raises:
        UserError: files that are missing, malformed, or of different runs of `pkt align`; code that is gone.
    """
    path = folder / CHOSEN
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
        hashes = {int(number): str(value) for number, value in meta["weights_hash"].items()}
        wanted = int(meta["chosen_step"]) if step is None else step
        settings, name = dict(meta["params"]), str(meta["params"]["code"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder of `pkt align`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not written by `pkt align` ({type(error).__name__}: {error})") from None
    if wanted not in hashes:
        raise UserError(f"step {wanted} is not one of the {len(hashes)} steps in {folder}")
    code = methods.load(name, ALIGNMENT)
    own = {field.name: settings[field.name] for field in fields(code.Params) if field.name in settings}
    mappings = {}
    for number in sorted(hashes) if every_step else [wanted]:
        mappings[number] = artifacts.load(folder / checkpoint_name(number), artifacts.MAPPING)
        if weights_hash(mappings[number].tensors()) != hashes[number]:
            raise UserError(f"{mappings[number].path}: not of the same run of `pkt align` as {path}")
    return Trained(mappings, meta, Method(name, code, build(code.Params, own, f"{path}: params")))


def check_models(selection: Selection, trained: Trained, folder: Path) -> None:
    """Raise UserError unless the mapping was trained between the selection's source and target."""
    for side in ("source", "target"):
        if trained.meta.get(side) != selection.meta[side]:
            raise UserError(
                f"{folder}: trained for another {side} than the selection's,"
                f" {selection.meta[side]['model']['name']}; run `pkt align` again"
            )
