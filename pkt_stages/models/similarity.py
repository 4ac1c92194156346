"""What does an adapter resemble? Cosine similarity to the target's weights and the source's (METHODS section 7).

Per site and layer the cosine between the LoRA update (alpha / r) B A and the target's weight W, the base that it was
trained on (W minus the first update), and, for Seeking, the source's sub-matrix; at the start and after training. The
paper's parametric similarity (section 5.3, figures 4 and 6). Weights are read one at a time; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pkt_stages.core.similarity import cosine
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.sites import SITES, as_rows, module_name
from pkt_stages.progress import track


def halves(adapter: Adapter, rank: int) -> tuple[Adapter, Adapter | None]:
    """A stored adapter taken apart: what training ended with, and what had been subtracted from the base at its start.

    The second is None where nothing was. The inverse of `Adapter.minus`.

    Args:
        rank: of the adapter in training.

    Raises:
        UserError: the stored rank is neither this one nor twice it.
    """
    if adapter.rank == rank:
        return adapter, None
    if adapter.rank != 2 * rank:
        raise UserError(f"the adapter has rank {adapter.rank}; expected {rank}, or {2 * rank} with its start")
    ended = {module: (a[:rank], b[:, :rank]) for module, (a, b) in adapter.factors.items()}
    began = {module: (a[rank:], -b[:, rank:]) for module, (a, b) in adapter.factors.items()}
    return Adapter(ended, adapter.alpha / 2), Adapter(began, adapter.alpha / 2)


def similarities(
    weight: Callable[[str], Tensor],
    adapter: Adapter,
    submatrices: Mapping[str, Tensor],
    *,
    rank: int,
    num_layers: int,
) -> dict[str, Tensor]:
    """Cosine similarities `{site}.{moment}.{against}`, float64 [layer, 2]: mean over neuron rows, and flattened.

    Args:
        weight: the target's original weight by name.
        adapter: relative to the original weights, as stored.
        submatrices: the source's, by module; empty if the adapter did not start from them.
        rank: of the adapter in training.

    Raises:
        UserError: the adapter lacks a site or has another rank, or a comparison is undefined because a matrix is zero.
    """
    ended, began = halves(adapter, rank)
    found: dict[str, list[tuple[float, float]]] = {}
    for layer in track(range(num_layers), "layers"):
        for site in SITES:
            module = module_name(site, layer)
            if module not in adapter.factors:
                raise UserError(f"the adapter has nothing at {module}; expected all of {', '.join(SITES)}")
            own = weight(f"{module}.weight").float()
            updates = {"trained": ended.delta(module)} | ({"initial": began.delta(module)} if began else {})
            against = {"weight": own, "reduced_base": own - updates["initial"] if began else own}
            if submatrices:
                against["submatrix"] = submatrices[module].float()
            for moment, update in updates.items():
                for name, other in against.items():
                    try:
                        pair = cosine(as_rows(update, site), as_rows(other, site))
                    except ValueError as error:
                        raise UserError(f"{module}, {moment} update against {name}: {error}") from None
                    found.setdefault(f"{site}.{moment}.{name}", []).append(pair)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
