"""Attribution on a model: from what its layers computed to each neuron's score (METHODS section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pkt_stages.core import attribution as core
from pkt_stages.models.capture import Captured, Lens, lens, subvalues
from pkt_stages.models.sites import in_parallel

SUBLAYERS = ("ffn", "attn")
STREAM = ("layer_input", "attn_output", "ffn_output", "final")  # of `Captured`, what is added up in the stream
COEFFICIENTS = {"all_positions": "attn_coefficients", "last_position": "attn_coefficients_last"}


@dataclass(frozen=True)
class Examples:
    """Examples as the model saw them, for the logit lens with each norm; on one device.

    Attributes:
        model: that they ran through.
        captured: by example, vectors as they enter the lens.
        token: [example] the tokens that they should predict.
        norms: of the lens; they differ only in the divisor, so that they ride along as further examples.
        coefficients: kinds of attention coefficient, keys of `COEFFICIENTS`.
        lens: the model's.
        centred: [vocab, d_model] its unembedding, centred over the vocabulary.
        divisor: [norm * example] of the lens.
        fused: forms powers of directions on a GPU.
    """

    model: Any
    captured: Sequence[Captured]
    token: Tensor
    norms: Sequence[str]
    coefficients: Sequence[str]
    lens: Lens
    centred: Tensor
    divisor: Tensor
    fused: core.Powers | None

    def stacked(self, name: str, layer: int) -> Tensor:
        """What all examples have as this field of `Captured` at a layer: [example, ...]."""
        return torch.stack([getattr(c, name)[layer] for c in self.captured])

    def logits(self, residual: Tensor) -> Tensor:
        """Logits of the lens [stream, norm * example, vocab], not capped, for residuals [stream, example, d_model]."""
        divisor = self.divisor.unflatten(0, (len(self.norms), -1))
        # One product, however many norms see it.
        return core.logits(self.lens.unembedding, residual[:, None], divisor, self.lens.shift).flatten(1, 2)


def on_lens(
    model: Any,
    captured: Sequence[Mapping[str, Tensor]],
    predicted: Sequence[int],
    norms: Sequence[str],
    coefficients: Sequence[str],
) -> Examples:
    """The examples on the lens's device.

    Args:
        captured: the fields of `Captured`, by example.
        predicted: the token that each should predict.
    """
    found = lens(model)
    home = found.unembedding.device
    moved = [
        Captured(**{n: found.entering(t.to(home)) if n in STREAM else t.to(home) for n, t in fields.items()})
        for fields in captured
    ]
    final = torch.stack([c.final for c in moved])
    return Examples(
        model=model,
        captured=moved,
        token=torch.tensor(predicted, device=home),
        norms=norms,
        coefficients=coefficients,
        lens=found,
        centred=core.centred(found.unembedding),
        divisor=torch.cat([core.lens_divisor(final, found.eps, norm) for norm in norms]),
        fused=_fused(model, found),
    )


def _fused(model: Any, lens: Lens) -> core.Powers | None:
    if not lens.gamma.is_cuda:
        return None
    from pkt_stages.core.halves import HalvedPowers

    return HalvedPowers(model.get_output_embeddings().weight.to(lens.gamma.device), lens.gamma)


def score_layer(examples: Examples, layer: int, tolerance: float) -> dict[str, Tensor]:
    """One layer's scores in nats, on the CPU.

    Args:
        tolerance: largest error of a score by moments, nats; else the plain path.

    Returns:
        By sublayer: `ffn` and `attn` [variant, norm * example, neuron] (one variant per kind of coefficient),
        `{sublayer}_gain` [norm * example] and `{sublayer}_plain` [1], the pairs that took the plain path.
    """
    token = examples.token.repeat(len(examples.norms))
    before = examples.stacked("layer_input", layer)
    between = before + examples.stacked("attn_output", layer)
    # Where both blocks read the same stream, it is the base of the FFN's neurons, too.
    of_ffn = 0 if in_parallel(examples.model.config) else 1
    after = (before, between)[of_ffn] + examples.stacked("ffn_output", layer)
    softcap = examples.lens.softcap
    logits = examples.logits(torch.stack([before, between, after]))
    log_p = core.log_softmax(logits, softcap)
    made = {
        "attn_gain": core.block_gain(log_p[0], log_p[1], token),
        "ffn_gain": core.block_gain(log_p[of_ffn], log_p[2], token),
    }
    bases = core.bases(log_p[: of_ffn + 1], token, examples.centred) if softcap is None else []
    for sublayer, stream, names in (
        ("attn", 0, [COEFFICIENTS[kind] for kind in examples.coefficients]),
        ("ffn", of_ffn, ["ffn_coefficients"]),
    ):
        vectors = _subvalues(examples, layer, sublayer)
        scaled = [examples.stacked(n, layer).repeat(len(examples.norms), 1) / examples.divisor[:, None] for n in names]
        c = torch.stack(scaled)
        if softcap is not None:
            unembedding = examples.lens.unembedding
            found = core.capped_neuron_scores(vectors, unembedding, logits[stream], c, token, softcap)
        else:
            found = core.neuron_scores(
                vectors, examples.centred, bases[stream], c, tolerance=tolerance, fused=examples.fused
            )
        made[sublayer] = found.values
        made[f"{sublayer}_plain"] = torch.tensor([found.num_plain])
    return {name: tensor.cpu() for name, tensor in made.items()}


def collected(
    examples: Examples, layers: Sequence[Mapping[str, Tensor]], num_neurons: int, num_tokens: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of an `attribution` artifact, and the share of pairs that took the plain path, per sublayer.

    Args:
        layers: from `score_layer`.
        num_neurons, num_tokens: best neurons per example and sublayer, and tokens of each.
    """
    tensors = {"predicted_token": examples.token, **_by_variant(examples, layers)}
    norm, share = examples.norms[0], {}
    for sublayer, name in (("ffn", f"ffn_scores.{norm}"), ("attn", f"attn_scores.{norm}.{examples.coefficients[0]}")):
        where, tokens = _best_neurons(examples, sublayer, tensors[name], num_neurons, num_tokens)
        tensors |= {f"top_neurons.{sublayer}": where, f"top_tokens.{sublayer}": tokens}
        pairs = sum(layer[sublayer].numel() for layer in layers)
        share[sublayer] = sum(int(layer[f"{sublayer}_plain"]) for layer in layers) / pairs
    return tensors, share


def _by_variant(examples: Examples, layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The layers' scores [example, layer, neuron] and gains [example, layer] for each norm and coefficient."""

    def by_norm(found: Tensor, dim: int) -> Tensor:
        return found.unflatten(dim, (len(examples.norms), -1))

    tensors = {}
    for sublayer in SUBLAYERS:
        scores = by_norm(torch.stack([layer[sublayer] for layer in layers], dim=2), 1)
        gains = by_norm(torch.stack([layer[f"{sublayer}_gain"] for layer in layers], dim=1), 0)
        for n, norm in enumerate(examples.norms):
            tensors[f"{sublayer}_gain.{norm}"] = gains[n]
            if sublayer == "ffn":
                tensors[f"ffn_scores.{norm}"] = scores[0, n]
                continue
            for variant, coefficient in enumerate(examples.coefficients):
                tensors[f"attn_scores.{norm}.{coefficient}"] = scores[variant, n]
    return tensors


def _best_neurons(
    examples: Examples, sublayer: str, scores: Tensor, num_neurons: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Each example's best neurons, and the tokens that they raise most through the lens.

    Args:
        scores: [example, layer, neuron], those of the first kind of coefficient.

    Returns:
        Layers and neurons [example, top, 2]; tokens [example, top, lens_token].
    """
    name = "ffn_coefficients" if sublayer == "ffn" else COEFFICIENTS[examples.coefficients[0]]
    best = _first(scores.flatten(1).to(examples.centred.device), min(num_neurons, scores[0].numel()))
    where = torch.stack([best // scores.shape[-1], best % scores.shape[-1]], dim=-1)
    # Which tokens a neuron raises depends on the sign of its coefficient alone: once for all examples that share it.
    coefficients = torch.stack([getattr(captured, name).flatten() for captured in examples.captured])
    signs = coefficients.gather(1, best).sign().long()
    distinct, own = torch.cat([where, signs[..., None]], dim=-1).flatten(0, 1).unique(dim=0, return_inverse=True)
    vectors = []
    for layer in distinct[:, 0].unique().tolist():
        neurons, sign = distinct[distinct[:, 0] == layer, 1:].T
        vectors.append(_subvalues(examples, layer, sublayer, neurons) * sign[:, None])
    tokens = core.lens_tokens(torch.cat(vectors), examples.centred, min(num_tokens, len(examples.centred)))
    return where.cpu(), tokens[own].unflatten(0, best.shape)


def _first(scores: Tensor, count: int) -> Tensor:
    """Where the largest of each row stand, [row, count], best first; ties go by index."""
    least = scores.topk(count).values[:, -1:]
    found = []
    for row, below in zip(scores, scores < least, strict=True):
        near = (~below).nonzero()[:, 0]  # few; a stable sort of all is slow
        found.append(near[row[near].sort(descending=True, stable=True).indices[:count]])
    return torch.stack(found)


def _subvalues(examples: Examples, layer: int, sublayer: str, neurons: Any = slice(None)) -> Tensor:
    """[neuron, d_model] as they enter the lens, on its device."""
    found = subvalues(examples.model, layer, sublayer, neurons).to(examples.lens.gamma.device)
    return examples.lens.entering(found).contiguous()
