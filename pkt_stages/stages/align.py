"""How do source rows become rows of the target? Train the mapping on a few align examples (paper 4.3; METHODS 4).

selection + source rows + examples -> one `hypernetwork` per step, and metrics with the step that did best on align
examples held out from training: mean answer loss with the rows of the final (transfer) examples injected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages.encoding import Encoded, Labels, Template
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pkt_stages.core.hypernetwork import MicroBatchLoss
    from pkt_stages.models.transfer import Transfer


@dataclass(frozen=True)
class AlignParams:
    """Settings of the alignment."""

    given: Literal["selected", "shuffled", "random_neurons", "random"] = option(
        "selected",
        "Rows that the mapping receives: selected (LaTen), or a control's: shuffled, random_neurons, random.",
    )
    rate: float = option(0.1, "Share of the target's neurons that receive a delta, 0..max_rate of the selection.")
    steps: int = option(4, "Optimizer steps, each with the rows of one extract example.")
    batch_size: int = option(16, "Examples per step: the extract example and align examples.")
    lr: float = option(3e-5, "Learning rate of AdamW (peak of onecycle).")
    schedule: Literal["constant", "onecycle"] = option(
        "constant", "Learning rate over steps: constant, or onecycle over the extract examples (authors' code)."
    )
    penalty: float = option(1000.0, "Weight lambda of the sum over sites of mean(delta^2).")
    init_std: float = option(1e-5, "Standard deviation of the mapping's initial weights.")
    d_hidden: int | None = option(None, "Width of the mapping's hidden layer; None: the source's d_model.")
    loss_reduction: Literal["mean", "sum"] = option("mean", "Over a step's examples; sum is the authors' code.")
    labels: Labels = option("answer", "Tokens that training supervises: answer, all or reference_code.")
    validation_size: int = option(16, "Align examples held out to choose the step.")
    weight_decay: float = option(0.05, "Weight decay of AdamW.")
    beta1: float = option(0.9, "AdamW's beta1 (onecycle cycles its own).")
    beta2: float = option(0.95, "AdamW's beta2.")
    max_length: int = option(1024, "Longest example, tokens; a longer one is an error.")
    template: Template = option("chat", "Prompt format: chat (the tokenizer's own), tulu, llama2 or none.")
    seed: int = option(0, "Seed of the initial weights and of the drawn examples.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("float32", "The target's dtype in training.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validation_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.d_hidden is not None and self.d_hidden < 1:
            raise ValueError(f"d_hidden must be at least 1, found {self.d_hidden}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, found {self.rate}")
        for name in ("lr", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("penalty", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")


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


def draw(ids: Sequence[str], params: AlignParams) -> tuple[list[str], list[list[str]]]:
    """Ids of the held-out align examples, and those of each step; UserError if there are too few."""
    from pkt_stages.core.schedule import draw_examples

    per_step = params.batch_size - 1
    if len(ids) < params.validation_size + per_step:
        raise UserError(
            f"{len(ids)} align examples are too few for {params.validation_size} held out (validation_size) and"
            f" {per_step} in a step (batch_size - 1)"
        )
    held_out, steps = draw_examples(
        len(ids), num_held_out=params.validation_size, per_step=per_step, steps=params.steps, seed=params.seed
    )
    return [ids[i] for i in held_out], [[ids[i] for i in step] for step in steps]


class Alignment:
    """The training: weights and optimizer that `step` moves; `state` and `restore` carry them over a restart."""

    def __init__(
        self, model: Any, transfer: Transfer, data: Data, params: AlignParams, *, micro_batch_size: int
    ) -> None:
        import torch

        from pkt_stages.core import hypernetwork as core
        from pkt_stages.models.losses import home
        from pkt_stages.models.sites import SITES

        self.model, self.transfer, self.data, self.params = model, transfer, data, params
        self.micro_batch_size = micro_batch_size
        self.device = home(model)
        self.validation_ids, self.step_ids = draw(list(data.align), params)
        self.extract = list(transfer.examples("extract").items())
        initial = core.init_weights(
            SITES,
            d_source=transfer.width("source"),
            d_hidden=params.d_hidden or transfer.width("source"),
            d_target=transfer.width("target"),
            std=params.init_std,
            generator=torch.Generator().manual_seed(params.seed),
        )
        self.weights = {name: weight.to(self.device).requires_grad_() for name, weight in initial.items()}
        self.adam = core.optimizer(self.weights, weight_decay=params.weight_decay, beta2=params.beta2)

    def state(self) -> dict[str, Any]:
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.data.copy_(state["weights"][name])
        self.adam.load_state_dict(state["optimizer"])

    def step(self, index: int) -> dict[str, Any]:
        """Take step `index` (from 0) and describe it: losses before the update, validation and deltas after it.

        Raises:
            UserError: a loss or gradient that is not finite; the weights are then not moved.
        """
        import torch

        from pkt_stages.core import hypernetwork as core
        from pkt_stages.core.schedule import rates
        from pkt_stages.models.inject import injected
        from pkt_stages.models.losses import example_losses, micro_batches

        params, (extract_id, example) = self.params, self.extract[index]
        batch = [self.data.align[id] for id in self.step_ids[index]] + [self.data.extract[extract_id]]

        def losses_of(part: list[Encoded]) -> MicroBatchLoss:
            def losses(rows: Any) -> Tensor:
                with injected(self.model, self.transfer.delta(example, rows)):
                    return example_losses(self.model, part)

            return losses

        rows = self.transfer.source_rows(example, self.device)
        found = core.backward(
            self.weights,
            rows,
            [losses_of(part) for part in micro_batches(batch, self.micro_batch_size)],
            penalty_weight=params.penalty,
            reduction=params.loss_reduction,
        )
        lm_loss = float(found.per_example.double().mean())
        finite = all(bool(weight.grad.isfinite().all()) for weight in self.weights.values() if weight.grad is not None)
        if not finite or not abs(found.objective) < float("inf"):
            raise UserError(f"step {index + 1}: loss {lm_loss} or its gradient is not finite; lower lr, or use float32")
        used = rates(params.schedule, index, lr=params.lr, beta1=params.beta1, total_steps=len(self.extract))
        core.set_rates(self.adam, lr=used.lr, beta1=used.beta1)
        self.adam.step()
        validation, mapped = self.validate()
        if not all(value < float("inf") for value in validation.values()):
            raise UserError(f"step {index + 1}: validation loss {validation} is not finite; lower lr, or use float32")
        return {
            "step": index + 1,
            "extract_id": extract_id,
            "align_ids": self.step_ids[index],
            "lr": used.lr,
            "beta1": used.beta1,
            "loss": found.objective,
            "lm_loss": lm_loss,
            "penalty": params.penalty * found.mean_square,
            "validation_loss": sum(validation.values()) / len(validation),
            "validation_loss_by_transfer_example": validation,
            "delta": {site: core.value_range(torch.stack(parts)) for site, parts in mapped.items()},
        }

    def validate(self) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        """Mean answer loss (nats) with each transfer example's rows injected, by its id; and those rows by site."""
        import torch

        from pkt_stages.core.hypernetwork import forward
        from pkt_stages.models.inject import injected

        losses: dict[str, float] = {}
        mapped: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for id, example in self.transfer.examples("transfer").items():
                rows = forward(self.weights, self.transfer.source_rows(example, self.device))
                with injected(self.model, self.transfer.delta(example, rows)):
                    losses[id] = self.held_out_loss()
                for site, part in rows.items():
                    mapped.setdefault(site, []).append(part)
        return losses, mapped

    def held_out_loss(self) -> float:
        """Mean answer loss (nats) of the model as it is now on the held-out align examples."""
        import torch

        from pkt_stages.models.losses import example_losses, micro_batches

        held_out = [self.data.answers[id] for id in self.validation_ids]
        with torch.no_grad():
            losses = [example_losses(self.model, part) for part in micro_batches(held_out, self.micro_batch_size)]
        return float(torch.cat(losses).double().mean())


def choose(steps: Sequence[dict[str, Any]]) -> int:
    """The step with the lowest validation loss; of equal ones the first."""
    best = min(steps, key=lambda step: (step["validation_loss"], step["step"]))
    return int(best["step"])


@with_params("align", AlignParams)
def align(
    params: AlignParams,
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    selection: Annotated[Path, typer.Option(help="Layer pairs and neurons, from `pkt select`.")],
    rows: Annotated[Path, typer.Option(help="The source's rows, from `pkt select`.")],
    extract: Annotated[Path, typer.Option(help="The extract examples that were attributed (.jsonl).")],
    align: Annotated[Path, typer.Option(help="The align examples (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Folder for one mapping per step (step_01.safetensors, ...).")],
    metrics: Annotated[Path, typer.Option(help="Where to write losses, delta ranges and the chosen step (JSON).")],
    task: Annotated[str | None, typer.Option(help="Part of the params section to use.")] = None,
    method: Annotated[str | None, typer.Option(help="Entry of `methods` in the params to use.")] = None,
    curves: Annotated[Path | None, typer.Option(help="Folder for dvclive's curves of the same numbers.")] = None,
    scratch: Annotated[
        Path, typer.Option(help="Folder for the state of unfinished runs.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Examples at a time; changes memory, not results.", envvar="PKT_MICRO_BATCH")
    ] = 4,
) -> None:
    """Train the mapping from source rows to target rows; one checkpoint per step, chosen on held-out examples."""
    from pkt_stages import artifacts
    from pkt_stages.curves import curve_writer
    from pkt_stages.models import load
    from pkt_stages.models.transfer import check_target, open_transfer
    from pkt_stages.progress import track
    from pkt_stages.scratch import CHECKPOINTS, Steps, check_out, fingerprint

    watch = Stopwatch()
    load.check_device(device)
    transfer = open_transfer(selection, rows, rate=params.rate, given=params.given, seed=params.seed)
    ref = load.resolve(target, revision)
    identity = load.identity(ref)
    check_target(transfer, identity, target)
    data = read_data(load.load_tokenizer(ref), transfer, extract, align, params, selection)
    draw(list(data.align), params)  # complain before a large model is loaded
    check_out(out, *CHECKPOINTS)
    meta = {side: transfer.meta[side] for side in ("source", "target")} | {"params": asdict(params)}
    kept = Steps(scratch, fingerprint([meta, asdict(data), device, micro_batch_size], [selection, rows]))
    model = load.load_model(ref, dtype=params.dtype, device=device)
    run = Alignment(model, transfer, data, params, micro_batch_size=micro_batch_size)

    state = kept.last()
    if state is None:
        without, steps = run.held_out_loss(), []
    else:
        run.restore(state)
        without, steps = state["validation_loss_without_delta"], state["steps"]
        typer.echo(f"align: going on after step {len(steps)}", err=True)
    with curve_writer(curves) as log:
        for record in steps:
            log(record)
        for index in track(range(len(steps), params.steps), "alignment steps"):
            try:
                record = run.step(index)
            except UserError as error:
                raise UserError(f"{error}; {kept.describe()}") from None
            weights = {name: weight.detach() for name, weight in run.weights.items()}
            record["weights_hash"] = load.weights_hash(weights)
            steps = [*steps, record]
            artifacts.save(kept.checkpoint(index + 1), "hypernetwork", weights, {**meta, "step": index + 1})
            kept.save({**run.state(), "validation_loss_without_delta": without, "steps": steps})
            log(record)
    chosen = choose(steps)
    kept.publish(out, params.steps)
    artifacts.write_json(
        metrics,
        {
            "chosen_step": chosen,
            "validation_loss_without_delta": without,
            "steps": steps,
            "validation_ids": run.validation_ids,
            "transfer_ids": list(transfer.examples("transfer")),
            "units": {"loss": "nats per token"},
            **meta,
        },
    )
    kept.remove()
    after = steps[chosen - 1]["validation_loss"]
    watch.summary("align", f"step {chosen} of {params.steps}, held-out loss {without:.4f} -> {after:.4f}", out)


def read_data(
    tokenizer: Any, transfer: Transfer, extract: Path, align: Path, params: AlignParams, selection: Path
) -> Data:
    """Read and encode the examples, and check that the extract examples are those of the selection.

    Raises:
        UserError: malformed or too long examples, other ids than the selection's, too few for the steps.
    """
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples

    chosen = transfer.examples("extract")
    found = read_examples(extract)
    if [e.id for e in found] != list(chosen):
        missing = sorted(set(chosen) ^ {e.id for e in found}) or ["their order"]
        raise UserError(
            f"{extract}: not the extract examples of {selection} ({len(found)} here, {len(chosen)} there;"
            f" {missing[0]} differs)"
        )
    if params.steps > len(chosen):
        raise UserError(f"{params.steps} steps need as many extract examples, {selection} has {len(chosen)}")
    if not transfer.examples("transfer"):
        raise UserError(f"{selection}: names no transfer example; attribute transfer.jsonl, too")
    aligned = read_examples(align)
    ids = [e.id for e in aligned]
    if len(set(ids)) < len(ids):
        raise UserError(f"{align}: id {next(i for i in ids if ids.count(i) > 1)} stands twice; ids must differ")

    def encoded(examples: Any, labels: Labels) -> dict[str, Encoded]:
        return {
            e.id: encode(tokenizer, e, template=params.template, max_length=params.max_length, labels=labels)
            for e in examples
        }

    return Data(encoded(found, params.labels), encoded(aligned, params.labels), encoded(aligned, "answer"))
