"""Adding a sparse delta to a model: differentiably through hooks, or merged into the weights for good.

A delta is, per site, a `SparseDelta`: the rows to add at the target's neurons of some layers. Under GQA several
attention neurons share one v_proj row; what is meant for a shared row is summed, as the neurons' contributions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.sites import SITES, Geometry, as_rows, feature_of, geometry, projection_name, weight_name

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class SparseDelta:
    """Rows to add at one site.

    Attributes:
        layers: [layer_pair] target layers, each at most once.
        neurons: [layer_pair, k] target neurons, each at most once a layer.
        rows: [layer_pair, k, d_target] float32.
    """

    layers: Tensor
    neurons: Tensor
    rows: Tensor

    def check(self, site: str, sizes: Geometry) -> None:
        """Raise UserError unless every layer and neuron exists in a model of this sizes."""
        if self.rows.shape[-1] != sizes.d_model:
            raise UserError(f"delta at {site}: rows of width {self.rows.shape[-1]}, the model's is {sizes.d_model}")
        for what, found, size in (
            ("layer", self.layers, sizes.num_layers),
            ("neuron", self.neurons, sizes.num_neurons(site)),
        ):
            if found.numel() and not (0 <= int(found.min()) and int(found.max()) < size):
                raise UserError(f"delta at {site}: {what} {int(found.max())} in a model with {size}")


Delta = Mapping[str, SparseDelta]


@contextmanager
def injected(model: Module, delta: Delta) -> Iterator[None]:
    """Within the context the model computes with W + delta; gradients flow to the rows, never to W.

    Equal to the merged model up to rounding: a row adds x . delta to its output feature, a column adds its input
    feature times delta. Hooks are removed on leaving, so the model is bitwise what it was.
    """
    sizes = geometry(model.config)
    handles = []
    try:
        for site, part in delta.items():
            part.check(site, sizes)
            for pair, layer in enumerate(part.layers.tolist()):
                index = sizes.weight_index(site, part.neurons[pair])
                hook = _output_hook if feature_of(site) == "output" else _input_hook
                module = model.get_submodule(projection_name(layer, site))
                handles.append(module.register_forward_hook(hook(index, part.rows[pair])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(index: Tensor, rows: Tensor) -> Any:
    def hook(_module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        here = index.to(output.device)
        added = inputs[0] @ rows.to(output.device, output.dtype).mT
        return output.index_add(-1, here, added)

    return hook


def _input_hook(index: Tensor, rows: Tensor) -> Any:
    def hook(_module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        taken = inputs[0].index_select(-1, index.to(output.device))
        return output + taken @ rows.to(output.device, output.dtype)

    return hook


@dataclass(frozen=True)
class MergeReport:
    """What merging did, over all touched weights.

    Attributes:
        rounding_loss: ||round(W + D) - W - D|| / ||D||, the relative norm lost to the output dtype.
        changed_weights: number of weight entries whose stored value changed.
        changed: names of the changed weight tensors.
    """

    rounding_loss: float
    changed_weights: int
    changed: tuple[str, ...]


ROUNDING_WARN, ROUNDING_REFUSE = 0.01, 0.50


@torch.no_grad()
def merge(model: Module, delta: Delta, *, allow_rounding_loss: bool = False) -> MergeReport:
    """Add a delta to the model's weights in place, in float32, rounding once to the model's dtype.

    Raises:
        UserError: the delta does not fit the model; no weight changed; or more than half of the delta's norm would be
            lost to rounding and `allow_rounding_loss` is not set (then nothing is changed).
    """
    sizes = geometry(model.config)
    lost = total = 0.0
    changed_weights = 0
    merged: dict[str, Tensor] = {}
    for site in SITES:
        if site not in delta:
            continue
        part = delta[site]
        part.check(site, sizes)
        for pair, layer in enumerate(part.layers.tolist()):
            name = weight_name(layer, site)
            rows = as_rows(model.get_parameter(name), site)
            index = sizes.weight_index(site, part.neurons[pair]).to(rows.device)
            # Sum what is meant for one weight row first, so that each row is read and rounded once.
            unique, inverse = index.unique(return_inverse=True)
            exact = torch.zeros(len(unique), sizes.d_model, device=rows.device)
            exact.index_add_(0, inverse, part.rows[pair].to(rows.device, torch.float32))
            before = rows[unique].float()
            after = (before + exact).to(rows.dtype)
            # In float64, because the difference of two float32 weights would hide what float32 itself rounds away.
            lost += float((after.double() - before.double() - exact.double()).square().sum())
            total += float(exact.double().square().sum())
            changed_weights += int((after != rows[unique]).sum())
            fresh = rows.clone()
            fresh[unique] = after
            merged[name] = as_rows(fresh, site)  # back to the stored orientation
    loss = (lost / total) ** 0.5 if total else 0.0
    if loss > ROUNDING_REFUSE and not allow_rounding_loss:
        raise UserError(
            f"rounding to {model.dtype} would lose {loss:.0%} of the delta's norm (limit {ROUNDING_REFUSE:.0%});"
            " merge into a wider dtype, or pass --allow-rounding-loss"
        )
    changed = []
    for name, weight in merged.items():
        parameter = model.get_parameter(name)
        if not torch.equal(parameter, weight):
            changed.append(name)
            parameter.copy_(weight)
    if not changed:
        raise UserError("injecting the delta changed no weight: it is zero or was lost to rounding")
    return MergeReport(loss, changed_weights, tuple(sorted(changed)))
