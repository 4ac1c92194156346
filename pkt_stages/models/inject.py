"""Adding a sparse delta to a model through hooks, differentiably.

A delta is, per site, a `SparseDelta`: the rows to add at the target's neurons of some layers. Under grouped-query
attention several attention neurons share one v_proj row; what is meant for a shared row is summed, as the neurons'
contributions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.sites import SITES, Family, Geometry, family, feature_of, geometry

if TYPE_CHECKING:
    from torch.nn import Module


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

    def per_weight_row(self, pair: int, site: str, sizes: Geometry, kind: Family) -> tuple[Tensor, Tensor]:
        """Rows of one layer's stored matrix (columns of one that has neurons as such), each once, and what to add."""
        index = kind.stored_index(site, sizes.weight_index(site, self.neurons[pair].cpu()), sizes)
        rows = self.rows[pair].float()
        unique, inverse = index.unique(return_inverse=True)
        if len(unique) == len(index):
            return index, rows
        # A product with zeros and ones sums in a fixed order; scattered additions on a GPU do not.
        belongs = torch.nn.functional.one_hot(inverse, len(unique)).mT.to(rows.device, rows.dtype)
        return unique, belongs @ rows


Delta = Mapping[str, SparseDelta]


@contextmanager
def injected(model: Module, delta: Delta) -> Iterator[None]:
    """Within the context the model computes with W + delta; gradients flow to the rows, never to W.

    Equal to the merged model up to rounding: a row adds x . delta to its output feature, a column adds its input
    feature times delta, in float32. Hooks are removed on leaving, so the model is bitwise what it was.

    Raises:
        UserError: the delta does not fit the model.
    """
    sizes, kind = geometry(model.config), family(model.config)
    for site, part in delta.items():
        part.check(site, sizes)
    handles = []
    try:
        for site, part in delta.items():
            hook = _output_hook if feature_of(site) == "output" else _input_hook
            for pair, layer in enumerate(part.layers.tolist()):
                module = model.get_submodule(kind.module(site, layer))
                handles.append(module.register_forward_hook(hook(*part.per_weight_row(pair, site, sizes, kind))))
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
