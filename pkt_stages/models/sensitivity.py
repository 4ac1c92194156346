"""How much each parameter matters: |theta dL/dtheta|, summed over examples (eq. 14; METHODS section 5)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.losses import example_losses
from pkt_stages.parallel import Group
from pkt_stages.progress import track
from pkt_stages.scratch import Seldom, Shards

_LAYER = re.compile(r"\w+\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Sensitivity:
    """Sums over the examples, in nats.

    Attributes:
        weights: by parameter name, float32 in the parameter's shape, of the parameters that were asked for.
        layers: [layer] float64, over all parameters of a layer: its seven projections (with biases) and norms.
    """

    weights: dict[str, Tensor]
    layers: Tensor


@dataclass(frozen=True)
class Partial:
    """The sums after so many examples of a process's share."""

    done: int
    sums: Sensitivity


def resumed(
    model: Any, examples: Sequence[tuple[str, Encoded]], wanted: Set[str], shards: Shards, group: Group
) -> Sensitivity:
    """As `sensitivities`, going on from the sums in `shards`, which are saved so seldom that it costs a tenth."""
    name = f"sums_{group.rank}"
    seldom: Seldom | None = None

    def keep(partial: Partial) -> None:
        nonlocal seldom
        counts = {"done": torch.tensor([partial.done]), "layers": partial.sums.layers}
        seldom = seldom or Seldom(sum(sums.nbytes for sums in partial.sums.weights.values()))
        seldom(lambda: shards.__setitem__(name, partial.sums.weights | counts))

    saved, begun = shards.get(name), None
    if saved is not None:
        done, layers = int(saved.pop("done")), saved.pop("layers")
        begun = Partial(done, Sensitivity(saved, layers))
    return sensitivities(model, examples, wanted, begun=begun, keep=keep, group=group)


def sensitivities(
    model: Any,
    examples: Sequence[tuple[str, Encoded]],
    wanted: Set[str],
    *,
    begun: Partial | None = None,
    keep: Callable[[Partial], None] | None = None,
    group: Group | None = None,
) -> Sensitivity:
    """Sum the sensitivity over examples, one at a time; the loss is the mean over an example's supervised tokens.

    A gradient is folded into the sums and freed as soon as it exists, so beside the weights only the sums of the
    wanted parameters are held.

    Args:
        model: its parameters get no gradient in the end, and do not change.
        examples: with their ids.
        wanted: names of the parameters whose sums to keep.
        begun: where an interrupted run was; it goes on from there and ends in the same numbers.
        keep: is given the sums so far after every example, which change afterwards.
        group: the processes that divide the examples; every one gets all sums, added up in the order of ranks.

    Raises:
        UserError: a loss or a gradient that is not finite, naming example and parameter.
    """
    group = group or Group()
    parameters = dict(model.named_parameters())
    if begun is None:
        zeros = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in sorted(wanted)}
        layers = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
        begun = Partial(0, Sensitivity(zeros, layers))
    sums = {name: tensor.to(parameters[name].device) for name, tensor in begun.sums.weights.items()}
    per_layer = begun.sums.layers.tolist()
    broken: list[str] = []

    def folding(name: str) -> Any:
        layer = _LAYER.match(name)

        def fold(parameter: Tensor) -> None:
            assert parameter.grad is not None
            value = (parameter.detach().float() * parameter.grad.float()).abs()
            parameter.grad = None
            total = float(value.sum(dtype=torch.float64))
            if not total < float("inf"):
                broken.append(name)
                return
            if layer is not None:
                per_layer[int(layer[1])] += total
            if name in sums:
                sums[name] += value

        return fold

    mine = group.share(examples)
    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(folding(name)))
        for done, (id, example) in enumerate(track(mine[begun.done :], "examples"), start=begun.done + 1):
            loss = example_losses(model, [example]).sum()
            if not bool(loss.isfinite()):
                raise UserError(f"example {id}: its loss is {float(loss.detach())}; use a wider dtype")
            loss.backward()
            if broken:
                raise UserError(f"example {id}: the gradient of {broken[0]} is not finite; use a wider dtype")
            if keep is not None:
                keep(Partial(done, Sensitivity(sums, torch.tensor(per_layer, dtype=torch.float64))))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    layers = group.add_up(torch.tensor(per_layer, dtype=torch.float64))
    if group.size > 1:
        sums = {name: group.add_up(tensor) for name, tensor in sums.items()}
    return Sensitivity(sums, layers)
