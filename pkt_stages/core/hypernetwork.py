"""The mapping from source rows to rows of the target (LaTen, paper 4.3; METHODS section 4).

delta = W2 relu(W0 row)          one pair (W0, W2) per site, shared by all layers, no bias, float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Hypernetwork(nn.ModuleDict):
    """One two-layer network per site; its parameters are `{site}.0.weight` and `{site}.2.weight`, not set yet."""

    def __init__(self, sites: Sequence[str], *, d_source: int, d_hidden: int, d_target: int) -> None:
        super().__init__(
            {
                site: nn.Sequential(
                    skip_init(nn.Linear, d_source, d_hidden, bias=False),
                    nn.ReLU(),
                    skip_init(nn.Linear, d_hidden, d_target, bias=False),
                )
                for site in sites
            }
        )

    def forward(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the source's rows of each site, [..., d_source], to the target's width, [..., d_target]."""
        return {site: self[site](part) for site, part in rows.items()}


@torch.no_grad()
def draw_weights(network: nn.Module, *, std: float, generator: torch.Generator) -> None:
    """Normal weights of standard deviation `std`, drawn parameter by parameter in their order."""
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
