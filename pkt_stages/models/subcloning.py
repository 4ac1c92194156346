"""Weight subcloning (Samragh et al., 2312.09299): a smaller model's weights from a larger one's most active neurons.

In the paper: neurons are ranked by the mean absolute value of their output over tokens, heads by the mean over theirs;
neurons that residual connections tie together by one ranking, the sum over layers. Weights are reordered by rank, the
first rows and columns kept, and multiplied by sqrt(d / d'), d and d' being the numbers of inputs, so that outputs keep
their standard deviation. Blocks are taken out of the middle. All of the smaller model then trains, from nothing else.

Here it is one of the parts of the source's weights that Seeking's place can hold (METHODS 5 and 11.10): it starts a
LoRA on a target that is trained already, or is added to it as it is. What follows from that, or from the models: only
the weights that `pkt seek` extracts are taken, no gain and no bias; d is the number of inputs of each weight (the paper
writes the embedding's size, which comes to the same where all widths shrink alike); a neuron of a gated FFN is ranked
by what enters down; with grouped queries heads stay in their groups, which are ranked as wholes; heads keep their
width, which must be equal. The texts are the extract examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.batches import Batch
from pkt_stages.models.correlation import Place, activations, forward
from pkt_stages.models.sites import Geometry, geometry, module_name
from pkt_stages.progress import track


@dataclass(frozen=True)
class Importance:
    """Mean absolute activations over tokens, float64.

    Attributes:
        stream: [d_model], the sum over the stream in front of the first layer and behind every one.
        ffn: [layer, d_ff], of what enters down.
        heads: [layer, head], the mean over the head's outputs.
    """

    stream: Tensor
    ffn: Tensor
    heads: Tensor


@torch.no_grad()
def importance(model: Any, examples: Sequence[Encoded]) -> Importance:
    """How active each neuron, head and place of the residual stream is, one example at a time."""
    sizes = geometry(model.config)
    sums: dict[Place, Tensor] = {}
    for example in track(examples, "activations"):
        with activations(model, _places(model)) as kept:
            forward(model, Batch([example.ids]))
        for place, values in kept.items():
            total = values[0][0].double().abs().sum(0).cpu()
            sums[place] = sums[place] + total if place in sums else total
    count = sum(len(example.ids) for example in examples)
    means = {place: total / count for place, total in sums.items()}
    layers = range(sizes.num_layers)
    return Importance(
        stream=torch.stack([means["stream", layer] for layer in range(-1, sizes.num_layers)]).sum(0),
        ffn=torch.stack([means["ffn", layer] for layer in layers]),
        heads=torch.stack([means["heads", layer].unflatten(0, (sizes.num_heads, -1)).mean(1) for layer in layers]),
    )


def _places(model: Any) -> Iterator[tuple[Place, Any, bool]]:
    yield ("stream", -1), model.model.layers[0], False
    for number, layer in enumerate(model.model.layers):
        yield ("stream", number), layer, True
        yield ("ffn", number), model.get_submodule(module_name("ffn_down", number)), False
        yield ("heads", number), model.get_submodule(module_name("attn_o", number)), False


def check_heads(source: Geometry, target: Geometry) -> None:
    """Raise UserError unless the target's heads can be some of the source's, in as many groups or fewer."""
    groups = [sizes.num_heads // sizes.num_kv_heads for sizes in (source, target)]
    for what, have, want, fits in (
        ("head width", source.d_head, target.d_head, source.d_head == target.d_head),
        ("key/value heads", source.num_kv_heads, target.num_kv_heads, source.num_kv_heads >= target.num_kv_heads),
        ("query heads a key/value head", *groups, groups[0] >= groups[1]),
    ):
        if not fits:
            raise UserError(
                f"subclone: {what} {have} in the source, {want} in the target; subcloning keeps whole heads, so leave"
                " it out of more_blocks for these two"
            )


def kept_layers(count: int, among: int) -> list[int]:
    """The first and the last layers, as many; the middle is taken out (of an odd number the first half is larger)."""
    return [*range((count + 1) // 2), *range(among - count // 2, among)]


def subclone(weight: Tensor, name: str, layer: int, found: Importance, source: Geometry, target: Geometry) -> Tensor:
    """What the target takes of a source's weight [out, in], in the weight's dtype.

    Args:
        name: of the weight, of a site or another (`sites.OTHER_WEIGHTS`).
        layer: of the source.
    """
    stream = _first(found.stream, target.d_model)
    if name in ("embedding", "head"):
        rows, columns = torch.arange(len(weight)), stream
    elif name.startswith("ffn"):
        rows, columns = _first(found.ffn[layer], target.d_ff), stream
    else:
        heads = found.heads[layer].unflatten(0, (source.num_kv_heads, -1))
        groups = _first(heads.sum(1), target.num_kv_heads)
        if name in ("attn_k", "attn_v"):
            kept = groups
        else:
            size = target.num_heads // target.num_kv_heads
            inside = torch.stack([_first(heads[group], size) for group in groups])
            kept = (groups[:, None] * heads.shape[1] + inside).flatten()
        rows, columns = (kept[:, None] * source.d_head + torch.arange(source.d_head)).flatten(), stream
    if name in ("ffn_down", "attn_o"):
        rows, columns = columns, rows
    # An embedding is looked up, not summed.
    scale = 1.0 if name == "embedding" else (weight.shape[1] / len(columns)) ** 0.5
    return (weight[rows][:, columns].double() * scale).to(weight.dtype)


def _first(scores: Tensor, count: int) -> Tensor:
    """The highest-scored, in order; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count]
