"""Adding a sparse delta to a model, differentiably through hooks; merging a delta or an adapter into the weights.

A delta is, per site, a `SparseDelta`: the rows to add at the target's neurons of some layers. Under grouped-query
attention several attention neurons share one v_proj row; what is meant for a shared row is summed, as the neurons'
contributions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.sites import SITES, Geometry, as_rows, feature_of, geometry, projection_name, weight_name

if TYPE_CHECKING:
    from torch.nn import Module

ROUNDING_WARN, ROUNDING_REFUSE = 0.01, 0.50


@dataclass(frozen=True)
class SparseDelta:
    """Rows to add at one site.

    Attributes:
        layers: [layer_pair] target layers, each at most once.
        neurons: [layer_pair, k] target neurons.
        rows: [layer_pair, k, d_target] float32.
    """

    layers: Tensor
    neurons: Tensor
    rows: Tensor

    def check(self, site: str, sizes: Geometry) -> None:
        """Raise UserError unless every layer and neuron exists in a model of these sizes."""
        if site not in SITES:
            raise UserError(f"delta: unknown site {site!r}; expected one of {', '.join(SITES)}")
        if self.rows.shape[-1] != sizes.d_model:
            raise UserError(f"delta at {site}: rows of width {self.rows.shape[-1]}, the model's is {sizes.d_model}")
        for what, found, size in (
            ("layer", self.layers, sizes.num_layers),
            ("neuron", self.neurons, sizes.num_neurons(site)),
        ):
            outside = found[(found < 0) | (found >= size)]
            if len(outside):
                raise UserError(f"delta at {site}: {what} {int(outside[0])} in a model with {size}")
        if len(self.layers.unique()) < len(self.layers):
            raise UserError(f"delta at {site}: a layer stands twice in {self.layers.tolist()}")

    def per_weight_row(self, pair: int, site: str, sizes: Geometry) -> tuple[Tensor, Tensor]:
        """Row indices of one layer's weight, each once, and the float32 rows to add there."""
        index = sizes.weight_index(site, self.neurons[pair].cpu())
        rows = self.rows[pair].float()
        unique, inverse = index.unique(return_inverse=True)
        if len(unique) == len(index):
            return index, rows
        # A product with zeros and ones sums in a fixed order; scattered additions on a GPU do not.
        belongs = torch.nn.functional.one_hot(inverse, len(unique)).mT.to(rows.device, rows.dtype)
        return unique, belongs @ rows


Delta = Mapping[str, SparseDelta]


def delta_tensors(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a `delta` artifact, none of which share memory."""
    return {
        f"{site}.{name}": tensor.clone()
        for site, part in delta.items()
        for name, tensor in (("layers", part.layers), ("neurons", part.neurons), ("rows", part.rows))
    }


def load_delta(path: Path) -> dict[str, SparseDelta]:
    """Read a `delta` artifact.

    Raises:
        UserError: as `artifacts.load`.
    """
    tensors = artifacts.load(path, "delta").tensors()
    sites = sorted({name.partition(".")[0] for name in tensors})
    return {site: SparseDelta(*(tensors[f"{site}.{name}"] for name in ("layers", "neurons", "rows"))) for site in sites}


@contextmanager
def injected(model: Module, delta: Delta) -> Iterator[None]:
    """Within the context the model computes with W + delta; gradients flow to the rows, never to W.

    Equal to the merged model up to rounding: a row adds x . delta to its output feature, a column adds its input
    feature times delta, in float32. Hooks are removed on leaving, so the model is bitwise what it was.

    Raises:
        UserError: the delta does not fit the model.
    """
    sizes = geometry(model.config)
    for site, part in delta.items():
        part.check(site, sizes)
    handles = []
    try:
        for site, part in delta.items():
            hook = _output_hook if feature_of(site) == "output" else _input_hook
            for pair, layer in enumerate(part.layers.tolist()):
                module = model.get_submodule(projection_name(layer, site))
                handles.append(module.register_forward_hook(hook(*part.per_weight_row(pair, site, sizes))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(index: Tensor, rows: Tensor) -> Any:
    def hook(_module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In float32, because half precision would round a young delta of 1e-9 to zero before it met its input.
        added = inputs[0].float() @ rows.to(output.device).mT
        return output.float().index_add(-1, index.to(output.device), added).to(output.dtype)

    return hook


def _input_hook(index: Tensor, rows: Tensor) -> Any:
    def hook(_module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        taken = inputs[0].index_select(-1, index.to(output.device)).float()
        return (output.float() + taken @ rows.to(output.device)).to(output.dtype)

    return hook


@dataclass(frozen=True)
class MergeReport:
    """What merging did, over all touched weights.

    Attributes:
        rounding_loss: ||round(W + D) - W - D|| / ||D||, the relative norm lost to the model's dtype.
        changed_weights: number of weight entries whose stored value changed.
        changed: names of the changed weight tensors.
    """

    rounding_loss: float
    changed_weights: int
    changed: tuple[str, ...]


@torch.no_grad()
def merge(model: Module, delta: Delta | Adapter, *, allow_rounding_loss: bool = False) -> MergeReport:
    """Add a delta or an adapter to the model's weights in place, in float32, rounding once to the model's dtype.

    Raises:
        UserError: the delta does not fit the model; no weight would change; or more than half of the delta's norm
            would be lost to rounding and `allow_rounding_loss` is not set. Then nothing is changed.
    """
    plan = _plan(model, delta)
    report = _report(plan, model, allow_rounding_loss)
    for change in plan:
        change.write(change.after)
    return report


@contextmanager
def merged(model: Module, delta: Delta | Adapter, *, allow_rounding_loss: bool = False) -> Iterator[MergeReport]:
    """Within the context the delta is merged into the weights; on leaving they are bitwise what they were.

    Raises:
        UserError: as `merge`.
    """
    with torch.no_grad():
        plan = _plan(model, delta)
    report = _report(plan, model, allow_rounding_loss)
    try:
        for change in plan:
            change.write(change.after)
        yield report
    finally:
        for change in plan:
            change.write(change.before)


@dataclass(frozen=True)
class _Change:
    """New values of some rows of one weight; `rows` is a view of the weight as [weight row, width]."""

    name: str
    rows: Tensor
    index: Tensor | slice
    before: Tensor
    after: Tensor
    exact: Tensor

    def write(self, values: Tensor) -> None:
        with torch.no_grad():
            self.rows[self.index] = values


def _plan(model: Module, delta: Delta | Adapter) -> list[_Change]:
    if isinstance(delta, Adapter):
        return [_adapter_change(model, delta, module) for module in delta.factors]
    sizes = geometry(model.config)
    plan = []
    for site, part in delta.items():
        part.check(site, sizes)
        for pair, layer in enumerate(part.layers.tolist()):
            name = weight_name(layer, site)
            rows = as_rows(model.get_parameter(name).detach(), site)
            plan.append(_change(name, rows, *part.per_weight_row(pair, site, sizes)))
    return plan


def _adapter_change(model: Module, adapter: Adapter, module: str) -> _Change:
    """The change of one whole weight.

    Raises:
        UserError: the model has no such weight, or one of another shape.
    """
    name = f"{module}.weight"
    try:
        weight = model.get_parameter(name).detach()
    except AttributeError:
        raise UserError(f"adapter: the model has no weight {name}; it belongs to another target") from None
    exact = adapter.delta(module)
    if exact.shape != weight.shape:
        raise UserError(f"adapter: {name} is {list(weight.shape)} in the model, {list(exact.shape)} in the adapter")
    return _change(name, weight, slice(None), exact)


def _change(name: str, rows: Tensor, index: Tensor | slice, exact: Tensor) -> _Change:
    """Rounds once, to the weight's dtype."""
    index, exact = index if isinstance(index, slice) else index.to(rows.device), exact.to(rows.device)
    before = rows[index].clone()
    return _Change(name, rows, index, before, (before.float() + exact).to(rows.dtype), exact)


def _report(plan: list[_Change], model: Module, allow_rounding_loss: bool) -> MergeReport:
    lost = total = 0.0
    num_changed = {}
    for change in plan:
        # In float64, because the difference of two float32 weights would hide what float32 itself rounds away.
        exact = change.exact.double()
        lost += float((change.after.double() - change.before.double() - exact).square().sum())
        total += float(exact.square().sum())
        num_changed[change.name] = int((change.after != change.before).sum())
    if not total < float("inf"):
        raise UserError("the delta holds NaN or infinity; nothing was injected")
    loss = (lost / total) ** 0.5 if total else 0.0
    dtype = str(model.dtype).removeprefix("torch.")
    if not loss <= ROUNDING_REFUSE and not allow_rounding_loss:
        raise UserError(
            f"rounding to {dtype} would lose {loss:.0%} of the delta's norm (limit {ROUNDING_REFUSE:.0%});"
            " choose a wider dtype (--dtype float32), or pass --allow-rounding-loss"
        )
    if not any(num_changed.values()):
        why = f"all of it was lost to rounding to {dtype}" if total else "it is zero"
        raise UserError(f"injecting the delta would change no weight: {why}")
    return MergeReport(loss, sum(num_changed.values()), tuple(sorted(n for n, count in num_changed.items() if count)))
