"""What each site's projection puts out for each text, for comparing models (METHODS section 7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pkt_stages.models.batches import Batch, padded, padding_mask
from pkt_stages.models.losses import home
from pkt_stages.models.sites import SITES, family, geometry


def features(model: Any, texts: Batch, *, tokens: str, micro_batch_size: int) -> dict[str, list[Tensor]]:
    """Outputs of every layer's projection by site: one [sample, d_out] per layer, float32 on the layer's device.

    Texts are padded on the right, where a causal model's positions cannot see it; the padding is left out.

    Args:
        tokens: `mean` or `last` token of each text gives one sample, `all` one per token that is a sample, in order.
        micro_batch_size: texts per forward pass.
    """
    found: dict[str, list[list[Tensor]]] = {site: [] for site in SITES}
    for start in range(0, len(texts.ids), micro_batch_size):
        some = texts.some(range(start, min(start + micro_batch_size, len(texts.ids))))
        for site, outputs in _pass(model, some, tokens).items():
            found[site].append(outputs)
    return {site: [torch.cat(parts) for parts in zip(*batches, strict=True)] for site, batches in found.items()}


@torch.no_grad()
def _pass(model: Any, texts: Batch, tokens: str) -> dict[str, list[Tensor]]:
    ids, mask = padded(texts.ids, 0).to(home(model)), padding_mask(texts.ids).to(home(model))
    with _outputs(model, texts.samples() if tokens == "all" else mask.bool(), tokens) as kept:
        getattr(model, family(model.config).base)(input_ids=ids, attention_mask=mask, use_cache=False)
    return kept


@contextmanager
def _outputs(model: Any, mask: Tensor, tokens: str) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context each projection's output is reduced as soon as it is there, and only that is kept."""
    kept: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def reduce(output: Tensor) -> Tensor:
        inside = mask.to(output.device)
        if tokens == "all":
            return output[inside].float()
        if tokens == "last":
            return output[torch.arange(len(output), device=output.device), inside.sum(1) - 1].float()
        weights = inside / inside.sum(1, keepdim=True)
        return torch.einsum("btd,bt->bd", output.float(), weights)

    sizes, kind = geometry(model.config), family(model.config)

    def keep(site: str) -> Any:
        every = torch.arange(sizes.weight_shape(site)[0])
        own = kind.stored_index(site, every, sizes) if kind.fused is not None else slice(None)
        return lambda _module, _inputs, output: kept[site].append(reduce(output[..., own]))

    handles = [
        model.get_submodule(kind.module(site, layer)).register_forward_hook(keep(site))
        for layer in range(sizes.num_layers)
        for site in SITES
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
