"""Do two models compute alike? Linear CKA of every layer of one with every layer of the other, by site.

The paper's ethological similarity (section 5.3, figure 3; METHODS section 7), between the outputs of up_proj,
down_proj, v_proj and o_proj. One forward pass per model and minibatch; memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pkt_stages.core.similarity import CkaSums, centred_gram, minibatches
from pkt_stages.errors import UserError
from pkt_stages.models.batches import Batch
from pkt_stages.models.features import features
from pkt_stages.models.losses import home
from pkt_stages.models.sites import SITES
from pkt_stages.parallel import Group
from pkt_stages.progress import track


def cka(
    models: Sequence[Any],
    texts: Sequence[Batch],
    *,
    reduction: str,
    batch_size: int,
    micro_batch_size: int,
    group: Group | None = None,
) -> dict[str, Tensor]:
    """CKA by site, [first layer, second layer] float64.

    Args:
        models: two of them.
        texts: the same texts as either model reads them.
        reduction: samples are each text's `mean` token, its `last`, `all` tokens, or those of a text, which is a
            minibatch then (`per_sequence`).
        batch_size: texts per minibatch of HSIC.
        group: the processes that divide a minibatch's forward passes.

    Raises:
        UserError: too few samples, or a layer whose features do not vary.
    """
    group = group or Group()
    places = range(len(texts[0].ids))
    batches = [range(i, i + 1) for i in places] if reduction == "per_sequence" else minibatches(len(places), batch_size)
    tokens = "all" if reduction == "per_sequence" else reduction
    sums = {site: CkaSums() for site in SITES}
    for batch in track(batches, "minibatches"):
        try:
            first, second = (
                grams(model, own.some(batch), tokens, micro_batch_size, group)
                for model, own in zip(models, texts, strict=True)
            )
        except ValueError as error:
            raise UserError(f"text {batch[0] + 1}: {error}; use longer texts, or more per minibatch") from None
        for site in SITES:
            sums[site].add(first[site], second[site].to(first[site].device))
    similarity = {}
    for site in SITES:
        try:
            similarity[site] = sums[site].cka().cpu()
        except ValueError as error:
            todo = "use other texts, or leave out a model with layers that add nothing (filler of `pkt reexpress`)"
            raise UserError(f"{site}: {error}; {todo}") from None
    return similarity


def grams(model: Any, texts: Batch, tokens: str, micro_batch_size: int, group: Group) -> dict[str, Tensor]:
    """Centred Gram matrices of one minibatch by site, [layer, sample, sample] float64; one pass through the model.

    Samples are ordered by process; CKA does not depend on their order, if it is the same for either model.
    """
    mine = texts.some(group.share(range(len(texts.ids))))
    found = features(model, mine, tokens=tokens, micro_batch_size=micro_batch_size) if mine.ids else {}
    if group.size > 1:
        parts = [p for p in group.gather({s: [t.cpu() for t in layers] for s, layers in found.items()}) if p]
        found = {
            site: [torch.cat(layer).to(home(model)) for layer in zip(*(part[site] for part in parts), strict=True)]
            for site in parts[0]
        }
    return {
        site: torch.stack([centred_gram(layer).to(home(model)) for layer in outputs]) for site, outputs in found.items()
    }
