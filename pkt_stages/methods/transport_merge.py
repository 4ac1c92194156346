"""Transport & Merge (2602.05495): the source's attention weights, carried over by optimal transport and mixed in.

Q, K, V and O of every target layer move towards a mixture of the source's: W_hot = sum_m P[l, m] (n_out Q_out) W_m
(m_in Q_in)^T with soft correspondences Q between units, from the correlation of text-mean activations in front of and
behind each projection, and P between layers (core/optimal_transport.py). The row is W_hot - W, so that its factor is
the paper's alpha. It moves the trained source itself, no difference of two models. Corrected, which is the default: all
layers, plans converged and scaled so that each unit is a weighted mean. `published` repeats the authors' code, whose
plans have mass 1, so that W_hot is about a thousandth of W and mixing only shrinks W; and only the first layers of
either model enter. `plans: none` is that control: W_hot = 0. Exact where the target's units are copies of the source's.
Delicate: q and k are mixed in spite of RoPE and heads; a unit that is anti-correlated with its partner keeps its sign.

Cost at 13B -> 7B: 1280 layer pairs times 6 plans of [4096, 5120], some hundred rounds each. Memory: a few such plans in
float64 (168 MB each), and all activations [text, width].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pkt_stages.core.optimal_transport import layer_plan, layer_weights, sinkhorn, unit_costs
from pkt_stages.models.batches import Batch
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.correlation import activations, forward
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.folding import Folded
from pkt_stages.models.load import identity, load_model
from pkt_stages.models.sites import module_name
from pkt_stages.models.texts import encode_texts, read_texts
from pkt_stages.options import DType
from pkt_stages.params import option
from pkt_stages.progress import track

# By projection the activation at its input; q, k and v share theirs.
INPUT_OF = {"attn_q": "attn_in", "attn_k": "attn_in", "attn_v": "attn_in", "attn_o": "heads"}
READ_BY = {"attn_in": "attn_q", "heads": "attn_o"}
# Rounds and tolerance of a plan.
CONVERGED = (100_000, 1e-12)
PUBLISHED_UNITS, PUBLISHED_LAYERS = (200, 0.0), (1000, 1e-7)


@dataclass(frozen=True)
class Plans:
    """Of one activation.

    Attributes:
        units: [target layer][source layer] plans [n_t, n_s].
        layers: [target layer, source layer].
    """

    units: list[list[Tensor]]
    layers: Tensor


@dataclass(frozen=True)
class Params:
    """Settings of the method."""

    published: bool = option(False, "As the authors' code computes it: see the file's first lines.")
    plans: Literal["fitted", "none"] = option("fitted", "From the texts; none: the control that only shrinks.")
    penalty: float = option(0.1, "Of the plans' negative entropy.", gt=0)
    num_texts: int = option(200, "The first so many texts.", ge=2)
    max_tokens: int = option(512, "Longer texts are cut, tokens.", ge=4)
    batch_size: int = option(8, "Texts per minibatch.", ge=1)
    dtype: DType = option("float32", "Dtype of the models as they run; auto: stored.")


def derive(inputs: Inputs, params: Params) -> Derived:
    """A change of q, k, v and o in every layer.

    Raises:
        UserError: other inputs than --target, --source and --texts (and --base and --correlation, which are not
            needed).
    """
    target, source, texts = inputs.only("target", "source", "texts", spare=["base", "correlation"])
    models = [Folded(target), Folded(source)]
    plans: dict[str, Plans] = {}
    if params.plans == "fitted":
        raw, means = read_texts(texts, params.num_texts), []
        for ref in (target, source):
            read = encode_texts(ref, raw, texts, params.max_tokens)
            model = load_model(ref, dtype=params.dtype, device=inputs.device)
            starts = range(0, len(read), params.batch_size)
            means.append(text_means(model, [Batch(read[start : start + params.batch_size]) for start in starts]))
        plans = {name: fitted(means[0][name], means[1][name], params) for name in track(list(means[0]), "plans")}
    changes: dict[str, Tensor] = {}
    for layer in track(range(models[0].sizes.num_layers), "layers"):
        for weight in INPUT_OF:
            module = module_name(weight, layer)
            mixed = mixture(models, plans, weight, layer, params.published)
            for part, value in (
                ("weight", models[0].stored(weight, layer)),
                ("bias", models[0].stored_bias(weight, layer)),
            ):
                if value is not None:
                    changes[f"{module}.{part}"] = (mixed.get(part, torch.zeros_like(value)) - value).float()
    meta = {name: {"layers": plan.layers.tolist()} for name, plan in plans.items()}
    return Derived({"delta": DenseDelta(changes)}, identity(target), identity(source), meta={"plans": meta})


@torch.no_grad()
def text_means(model: Any, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """Means over each text's tokens by activation and layer, [text, width] float64: at both ends of q, k, v and o."""
    layers = range(model.config.num_hidden_layers)
    places = {(weight, layer): (module_name(weight, layer), True) for weight in INPUT_OF for layer in layers}
    places |= {
        (name, layer): (module_name(weight, layer), False) for name, weight in READ_BY.items() for layer in layers
    }
    found: dict[Any, list[Tensor]] = {place: [] for place in places}
    for batch in track(batches, "minibatches"):
        wanted = ((place, model.get_submodule(module), output) for place, (module, output) in places.items())
        with activations(model, wanted) as kept:
            mask = forward(model, batch)
        weights = (mask / mask.sum(1, keepdim=True)).double()
        for place, values in kept.items():
            found[place].append(torch.einsum("btd,bt->bd", values[0].double(), weights.to(values[0].device)).cpu())
    return {name: [torch.cat(found[(name, layer)]) for layer in layers] for name in (*INPUT_OF, *READ_BY)}


def fitted(target: Sequence[Tensor], source: Sequence[Tensor], params: Params) -> Plans:
    """Plans between the units of each pair of layers, and between layers, of one activation."""
    if params.published:
        target, source = target[: len(source)], source[: len(target)]
    of_units, of_layers = (PUBLISHED_UNITS, PUBLISHED_LAYERS) if params.published else (CONVERGED, CONVERGED)
    units: list[list[Tensor]] = []
    costs = torch.zeros(len(target), len(source), dtype=torch.float64)
    for i, ours in enumerate(target):
        units.append([])
        for j, theirs in enumerate(source):
            cost = unit_costs(ours, theirs)
            plan = sinkhorn(cost, params.penalty, rounds=of_units[0], tolerance=of_units[1])
            costs[i, j] = (cost * plan).sum()
            units[i].append(plan)
    return Plans(units, layer_plan(costs, params.penalty, rounds=of_layers[0], tolerance=of_layers[1]))


def mixture(
    models: Sequence[Folded], plans: Mapping[str, Plans], weight: str, layer: int, published: bool
) -> dict[str, Tensor]:
    """W_hot [out, in] of a layer's projection, and its bias, from all of the source's layers; empty if nothing enters.

    Args:
        models: target and source.
    """
    if not plans or layer >= len(plans[weight].units):
        return {}
    output, into = plans[weight], plans[INPUT_OF[weight]]
    if published:
        shares = (output.layers * into.layers).sqrt() * len(output.layers)
    else:
        shares = layer_weights(output.layers, into.layers)
    made: dict[str, Tensor] = {}
    for j, share in enumerate(shares[layer].tolist()):
        q_out, q_in = output.units[layer][j], into.units[layer][j]
        if not published:
            q_out, q_in = q_out * len(q_out), q_in * q_in.shape[1]
        parts = {"weight": q_out @ models[1].stored(weight, j) @ q_in.mT}
        if (bias := models[1].stored_bias(weight, j)) is not None:
            parts["bias"] = q_out @ bias
        for part, value in parts.items():
            made[part] = made.get(part, torch.zeros_like(value)) + share * value
    return made
