"""Random sparse deltas and what they mean, for tests of hooks and of merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkt_stages.models.inject import SparseDelta
from pkt_stages.models.sites import SITES, geometry, weight_name

IDS = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])


def random_delta(model: Any, *, k: int, scale: float, seed: int = 0) -> dict[str, SparseDelta]:
    sizes, generator = geometry(model.config), torch.Generator().manual_seed(seed)
    layers = torch.tensor([0, sizes.num_layers - 1])
    return {
        site: SparseDelta(
            layers,
            torch.stack([torch.randperm(sizes.num_neurons(site), generator=generator)[:k] for _ in layers]),
            torch.randn(len(layers), k, sizes.d_model, generator=generator) * scale,
        )
        for site in SITES
    }


def oracle(model: Any, delta: dict[str, SparseDelta]) -> dict[str, Tensor]:
    """The oracle: one dense matrix per weight, filled entry by entry from the definition of the sites."""
    config = model.config
    d_head = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    found = {}
    for site, part in delta.items():
        for layer, neurons, rows in zip(part.layers.tolist(), part.neurons.tolist(), part.rows, strict=True):
            name = weight_name(layer, site)
            matrix = torch.zeros_like(model.get_parameter(name), dtype=torch.float64)
            for neuron, row in zip(neurons, rows.double(), strict=True):
                if site == "attn_v":
                    head, place = divmod(neuron, d_head)
                    matrix[head // group * d_head + place] += row
                elif site == "ffn_up":
                    matrix[neuron] += row
                else:
                    matrix[:, neuron] += row
            found[name] = matrix
    return found


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found
