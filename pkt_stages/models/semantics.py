"""SemAlign v1 (arXiv 2510.24208): the layers of the target that it trains, and what the source's states ask of them.

What the paper says: a source layer's importance is gradient times activation of the supervised loss, summed over tokens
and channels (4.1); pairs go by depth (`core.semantics.layer_pairs`); a state is a sublayer's output before it is added
to the stream; only the paired layer's parameters move, by LoRA of rank 16 on up, down, v and o (A.2), so that
1 - cos(state, recomposed source state) + 1 - cos(logits, label) falls, each the mean over supervised positions (4.3).

What it leaves open, and is decided here: the sublayer is the FFN, the last to write in a layer. The gain of the final
norm is folded into the head, since a state of the stream is read through it. An example's importance counts by its
absolute value, and the mean is taken over the examples that are trained on, so that no further ones are needed. The
number of layers is a setting (its figure and formulas have one); several layers' terms are averaged. A supervised
position is one that predicts a supervised token. The source's vectors are made once, before training.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pkt_stages.core.losses import token_mean_loss
from pkt_stages.core.semantics import away_from, away_from_label, basis_map, layer_pairs
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models import train_set
from pkt_stages.models.batches import padded, padding_mask
from pkt_stages.models.distillation import check_vocabularies
from pkt_stages.models.folding import Folded
from pkt_stages.models.load import ModelRef, load_model, load_tokenizer
from pkt_stages.models.losses import home, micro_batches
from pkt_stages.models.sites import family
from pkt_stages.progress import track

OutputLoss = Literal["cross_entropy", "cosine"]
LayerLoss = Literal["none", "source", "permuted"]
Pairing = Literal["depth", "important"]


@dataclass(frozen=True)
class Supervision:
    """What the source says about a training of the target.

    Attributes:
        pairs: layers (of the source, of the target), from 0; the latter are trained.
        wanted: per example the directions of the target layers' FFN outputs, float32 [supervised position, pair,
            d_target]; None if the source chooses layers alone.
        facts: what it was made of, as JSON values.
    """

    pairs: list[tuple[int, int]]
    wanted: list[Tensor] | None
    facts: Mapping[str, Any]


def supervise(
    source: ModelRef,
    target: ModelRef,
    examples: Sequence[Encoded],
    *,
    num_paired: int,
    pairing: Pairing,
    layer_loss: LayerLoss,
    dtype: str,
    device: str,
    micro_batch_size: int,
) -> Supervision:
    """Choose the layers, and make what they are trained towards; the source is in memory for that time alone.

    Args:
        examples: encoded for the target, those that it is trained on.
        num_paired: how many of the source's layers lead to a layer of the target.
        pairing: with what such a layer is paired: the source's layer at its `depth`, or the `important` one that led to
            it.
        layer_loss: `permuted` shuffles which token each of the source's directions means (one permutation, drawn with
            seed 0 whatever the training's seeds): a control without the source's meaning.

    Raises:
        UserError: other tokens than the source's, more layers than it has, a head that gives a token no direction, or a
            source layer that adds nothing.
    """
    num_tokens = check_vocabularies(load_tokenizer(source), load_tokenizer(target))
    heads = {side: Folded(ref) for side, ref in (("source", source), ("target", target))}
    num_source, num_target = (heads[side].sizes.num_layers for side in ("source", "target"))
    if num_paired > num_source:
        raise UserError(f"num_paired {num_paired}: the source has {num_source} layers; choose at most that many")
    model = load_model(source, dtype=dtype, device=device)
    batches = micro_batches(examples, micro_batch_size)
    scores = layer_scores(model, batches)
    pairs = layer_pairs(scores, num_target, num_paired, by_depth=pairing == "depth")
    facts: dict[str, Any] = {"layer_pairs": pairs, "source_layer_scores": scores}
    wanted = None
    if layer_loss != "none":
        through, facts["head_rank"] = _map(heads, num_tokens, permuted=layer_loss == "permuted")
        wanted = _recomposed(model, batches, [layer for layer, _ in pairs], through)
    del model
    gc.collect()
    return Supervision(pairs, wanted, facts)


def layer_scores(model: Any, batches: Sequence[Sequence[Encoded]]) -> list[float]:
    """Importance of each layer's FFN output: mean over examples of |sum over tokens and channels of gradient times it|.

    The gradient is that of the example's mean loss over its supervised tokens, so a score is in nats: what the loss
    would change, to first order, without that output.

    Raises:
        UserError: a score that is not finite.
    """
    found = []
    for batch in track(batches, "importance of the source's layers"):
        ids, mask, labels = _tensors(model, batch)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with ffn_outputs(model, range(model.config.num_hidden_layers)) as outputs:
            logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        total = token_mean_loss(logits, labels.to(logits.device)).sum()
        gradients = torch.autograd.grad(total, outputs)
        pairs = zip(gradients, outputs, strict=True)
        found.append(torch.stack([(g.double() * o.detach().double()).sum((1, 2)).cpu() for g, o in pairs]))
    scores = torch.cat(found, dim=1).abs().mean(1)
    if not bool(scores.isfinite().all()):
        raise UserError("the importance of the source's layers is not finite; use dtype float32 or bfloat16")
    return [float(score) for score in scores]


def _map(heads: Mapping[str, Folded], num_tokens: int, *, permuted: bool) -> tuple[Tensor, dict[str, int]]:
    """The map [d_target, d_source] between the semantic bases, float32, and the rank of each side's head."""
    weights = {side: folded.weight("head") for side, folded in heads.items()}
    for side, weight in weights.items():
        if len(weight) < num_tokens:
            raise UserError(f"the {side}'s head has {len(weight)} rows, its tokenizer {num_tokens} tokens")
    source, target = (weights[side][:num_tokens] for side in ("source", "target"))
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)) if permuted else None
    try:
        found, ranks = basis_map(source, target, order)
    except ValueError as error:
        raise UserError(f"{error}; use another model") from None
    return found.float(), ranks


@torch.no_grad()
def _recomposed(
    model: Any, batches: Sequence[Sequence[Encoded]], layers: Sequence[int], through: Tensor
) -> list[Tensor]:
    """Per example the source's FFN outputs at its supervised positions, recomposed, as unit vectors on the CPU."""
    found = []
    for batch in track(batches, "the source's states"):
        ids, mask, labels = _tensors(model, batch)
        with ffn_outputs(model, layers) as outputs:
            getattr(model, family(model.config).base)(input_ids=ids, attention_mask=mask, use_cache=False)
        for place, _ in enumerate(batch):
            at = (labels[place, 1:] != -100).nonzero()[:, 0].cpu()
            states = torch.stack([output[place].float().cpu()[at] for output in outputs], dim=1)
            wanted = torch.nn.functional.normalize(states, dim=-1) @ through.mT
            lengths = wanted.norm(dim=-1)
            if not bool((lengths > 0).all()):
                layer = layers[int((~(lengths > 0)).nonzero()[0, 1])]
                raise UserError(
                    f"the source's FFN of layer {layer} adds nothing that its head can read, so that there is no"
                    " direction to train towards; choose another num_paired, or pairing important"
                )
            found.append(wanted / lengths[..., None])
    return found


def _tensors(model: Any, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of some examples, padded on the right, on the model's first device."""
    ids = [example.ids for example in batch]
    labels = padded([example.labels for example in batch], -100)
    return tuple(tensor.to(home(model)) for tensor in (padded(ids, 0), padding_mask(ids), labels))  # type: ignore[return-value]


@contextmanager
def ffn_outputs(model: Any, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """What the FFNs of these layers add to the stream in a forward pass, [example, token, d_model] each, by layer.

    Where a norm stands behind the FFN, what comes out of that; up to the family's multiplier, which is one number.
    """
    kind = family(model.config)
    kept: list[Tensor] = []
    modules = [model.get_submodule(kind.norm_behind("ffn", layer) or kind.block("ffn", layer)) for layer in layers]
    handles = [m.register_forward_hook(lambda _module, _inputs, output: kept.append(output)) for m in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class SemanticTrainer(Trainer):
    """transformers' Trainer with the loss of SemAlign, or one of its parts: the mean over a batch's supervised tokens.

    Args:
        model: the target with its adapter (PEFT).
        arguments: values for TrainingArguments.
        output_loss: of the logits.
        supervision: the layers, and what is wanted of them, if anything.
    """

    def __init__(
        self,
        model: Any,
        arguments: dict[str, Any],
        examples: Sequence[Encoded],
        output_loss: OutputLoss,
        supervision: Supervision,
    ) -> None:
        wanted = supervision.wanted
        self._target = model.get_base_model()
        self._layers = [layer for _, layer in supervision.pairs]
        self._output_loss = output_loss
        self._wanted: Tensor | None = None  # of the batch that is being computed, as are the states
        self._states: list[Tensor] = []

        def collate(some: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            batch = train_set.collate(some)
            return batch if wanted is None else batch | {"wanted": torch.cat([wanted[row["place"]] for row in some])}

        data: Any = [{**row, "place": place} for place, row in enumerate(train_set.rows(examples))]
        super().__init__(
            model,
            TrainingArguments(**arguments),
            data_collator=collate,
            train_dataset=data,
            compute_loss_func=self._losses,
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        """As Trainer's, which calls `_losses` and divides by the batch's tokens, however it is split."""
        self._wanted = inputs.pop("wanted", None)
        with ffn_outputs(self._target, self._layers) as self._states:
            return super().compute_loss(model, inputs, *given, **named)

    def _losses(self, outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        at = labels[:, 1:] != -100
        logits, predicted = outputs.logits[:, :-1][at].float(), labels[:, 1:][at]
        if self._output_loss == "cosine":
            losses = away_from_label(logits, predicted)
        else:
            losses = torch.nn.functional.cross_entropy(logits, predicted, reduction="none")
        if self._wanted is not None:
            terms = [
                away_from(states[:, :-1][at].float(), self._wanted[:, pair]) for pair, states in enumerate(self._states)
            ]
            losses = losses + torch.stack(terms).mean(0)
        return losses.sum() / num_items_in_batch
