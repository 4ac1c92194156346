"""Ariadne (merge-and-rebase): not the change is carried over but what it does to the residual stream (METHODS 11.5).

For every pair of layers, Q brings the source's block outputs nearest to the target's; what training changed about the
source's, turned by Q, is what the target's block output should change by; and the change of its down_proj is the ridge
regression of that on the layer's own coefficients in the untouched target. Exact where training changed the last
down_proj alone. Delicate: what a block's output changes by holds all layers before it, so that the sum over layers
overshoots; `incremental` takes the difference to the pair before. `maps: random` is the control: random isometries Q.

Cost at 13B -> 7B: three forward passes over the texts for every `pairs_at_once` pairs. Memory beside the models:
1.8 GiB a pair in float64, the coefficients' products [11008, 11008] and those with the stream [11008, 5120], twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.core.transport import centred, polar, random_isometry, ridge
from pkt_stages.errors import UserError
from pkt_stages.models.batches import Batch
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.correlation import Correlation, Pair, activations, forward
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.load import identity, load_config, load_model
from pkt_stages.models.sites import family, module_name, setting
from pkt_stages.models.texts import paired_minibatches
from pkt_stages.models.transport import MapParams
from pkt_stages.options import DType
from pkt_stages.params import option
from pkt_stages.progress import track


@dataclass(frozen=True)
class Params(MapParams):
    """Settings of the method."""

    incremental: bool = option(False, "What each layer adds to the change, not the change so far.")
    penalty: float = option(0.01, "Ridge penalty, in mean squares of the coefficients.", gt=0)
    num_texts: int = option(200, "The first so many texts.", ge=1)
    max_tokens: int = option(512, "Longer texts are cut, tokens.", ge=4)
    batch_size: int = option(8, "Texts per minibatch.", ge=1)
    pairs_at_once: int = option(8, "Pairs of layers whose sums are held at a time.", ge=1)
    dtype: DType = option("float32", "Dtype of the models as they run; auto: stored.")


@dataclass
class Sums:
    """Of one pair over tokens: stream of the source's base model and of the target, and the target's coefficients.

    Attributes:
        cross: [d_s, d_t] of the streams' products; `source`, `target`: [d] of each stream.
        gram: [d_ff, d_ff] of the coefficients' products.
        moved: [d_ff, d_s] of coefficients times what training changed about the source's stream.
        before: the same with the stream behind the pair before; None for the first pair.
    """

    cross: Tensor
    source: Tensor
    target: Tensor
    gram: Tensor
    moved: Tensor
    before: Tensor | None


def derive(inputs: Inputs, params: Params) -> Derived:
    """A change of down_proj in every layer that has a partner.

    Raises:
        UserError: other inputs than --target, --source, --base, --correlation and --texts; models that are not those
            of the correlation, a target with norms behind its blocks, or tokenizers whose tokens cannot be paired.
    """
    target, source, base, folder, texts = inputs.only("target", "source", "base", "correlation", "texts")
    found, named = Correlation(folder), [identity(ref) for ref in (base, source, target)]
    found.check(named[0], named[2])
    config = load_config(target)
    kind = family(config)
    if kind.after:
        raise UserError(
            f"{target.location}: a norm behind each block keeps what down_proj adds from being linear in it; take"
            " another target, or another transport"
        )
    how = params.num_texts, params.max_tokens, params.batch_size
    batches = paired_minibatches([base, source, target], texts, *how)
    num_tokens = sum(int(batch[0].samples().sum()) for batch in batches)
    models = [load_model(ref, dtype=params.dtype, device=inputs.device) for ref in (base, source, target)]
    generators = [torch.Generator().manual_seed(seed) for seed in (params.seeds if params.maps == "random" else [0])]
    changes: list[dict[str, Tensor]] = [{} for _ in generators]
    last: list[Tensor | None] = [None for _ in generators]
    ranks = {}
    for start in range(0, len(found.pairs), params.pairs_at_once):
        some = found.pairs[start : start + params.pairs_at_once]
        for pair, sums in summed(models, batches, some, found.pairs).items():
            fitted = polar(centred(sums.cross, sums.source, sums.target, num_tokens), params.tolerance)
            if params.maps == "fitted":
                ranks[f"layer_{pair[1]}.stream"] = [fitted.rank, fitted.full_rank]
            for n, generator in enumerate(generators):
                sizes = sums.cross.shape[0], sums.cross.shape[1]
                turn = fitted.map if params.maps == "fitted" else random_isometry(*sizes, generator)
                turn, before = turn.to(sums.moved), last[n]
                wanted = sums.moved @ turn
                if params.incremental and sums.before is not None and before is not None:
                    wanted = wanted - sums.before @ before
                weight = ridge(sums.gram, wanted / setting(config, kind.multiplier), params.penalty).mT
                changes[n][f"{module_name('ffn_down', pair[1])}.weight"] = weight.float().cpu()
                last[n] = turn
    labels = ["delta"] if len(changes) == 1 else [f"seed_{seed}" for seed in params.seeds]
    made: dict[str, Change] = {label: DenseDelta(weights) for label, weights in zip(labels, changes, strict=True)}
    meta = {"base": named[0], "pairs": [list(pair) for pair in found.pairs], "ranks": ranks}
    return Derived(made, named[2], named[1], meta=meta)


@torch.no_grad()
def summed(
    models: Sequence[Any], batches: Sequence[Sequence[Batch]], some: Sequence[Pair], every: Sequence[Pair]
) -> dict[Pair, Sums]:
    """The sums of some pairs over all texts, float64.

    Args:
        models: the source's base and trained model, and the target; so are the minibatches.
        every: all pairs, in order.
    """
    previous = {pair: every[n - 1][0] for n, pair in enumerate(every) if n > 0}
    layers = sorted({pair[0] for pair in some} | {previous[pair] for pair in some if pair in previous})
    found: dict[Pair, Sums] = {}
    for batch in track(batches, "minibatches"):
        streams = []
        for model, own in zip(models[:2], batch[:2], strict=True):
            with activations(model, ((layer, model.model.layers[layer], True) for layer in layers)) as outputs:
                mask = forward(model, own)
            streams.append({layer: outputs[layer][0][mask].double() for layer in layers})
        target = models[2]
        places = [(("out", t), target.model.layers[t], True) for _, t in some]
        places += [(("ffn", t), target.get_submodule(module_name("ffn_down", t)), False) for _, t in some]
        with activations(target, iter(places)) as outputs:
            mask = forward(target, batch[2])
        for pair in some:
            t0, h = (outputs[(name, pair[1])][0][mask].double() for name in ("out", "ffn"))
            s0, s1 = (stream[pair[0]].to(t0.device) for stream in streams)
            before = None
            if pair in previous:
                b0, b1 = (stream[previous[pair]].to(t0.device) for stream in streams)
                before = h.mT @ (b1 - b0)
            new = Sums(s0.mT @ t0, s0.sum(0), t0.sum(0), h.mT @ h, h.mT @ (s1 - s0), before)
            if pair in found:
                for name, total in vars(found[pair]).items():
                    if total is not None:
                        total += getattr(new, name)
            else:
                found[pair] = new
    return found
