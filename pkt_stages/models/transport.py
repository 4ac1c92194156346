"""What training added to the source, carried over to the target's weights (METHODS 11).

Both models' norm gains are folded into the weights behind them, as weights of x / |x|: W * gain * sqrt(d). So an
orthogonal map of the residual stream commutes with the norms, whatever the widths, and the change that comes out is
divided by the target's own gain again, as it is by what stands behind weights that write to the stream (a multiplier, a
norm's gain). What a norm behind a block divides by is left out: it is the token's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from pkt_stages.core.transport import TOLERANCE, Polar, centred, polar, random_isometry, whitened
from pkt_stages.errors import UserError
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.correlation import FINAL, INPUTS, Correlation, Pair, PairSums
from pkt_stages.models.derivation import Derived, Inputs
from pkt_stages.models.folding import READS, Folded
from pkt_stages.models.load import ModelRef, identity, vocabulary_difference
from pkt_stages.models.sites import PROJECTIONS, Geometry, check_same_shape, module_name
from pkt_stages.params import option
from pkt_stages.progress import track

VOCABULARY = ("embedding", "head")


@dataclass(frozen=True)
class MapParams:
    """Settings that all transports share."""

    maps: Literal["fitted", "random"] = option("fitted", "Maps from the texts, or a control's random ones.")
    seeds: tuple[int, ...] = option((0,), "Of random maps: one change for each.")
    tolerance: float = option(TOLERANCE, "Singular values up to this share of the largest are rounding.", ge=0, lt=1)


@dataclass(frozen=True)
class PolarParams(MapParams):
    """Settings of transports by an orthogonal map at each projection's input and output."""

    whitening: float = option(0.0, "Exponent p of (A^T A)^-p and (B^T B)^-p in front of the maps.", ge=0, le=0.5)
    centred: bool = option(False, "Activations, or gradients, without their mean.")
    fold: bool = option(True, "Fold the norms' gains into the weights; false: as published, gains apart.")


class Units:
    """A map between units one by one: by target unit its source unit, -1 for none. Carries as a 0-1 matrix would."""

    def __init__(self, source_of: Tensor) -> None:
        self.source_of = source_of

    def rows(self, change: Tensor) -> Tensor:
        """T^T times a change [source unit, ...]: [target unit, ...]; zero where there is no source unit."""
        found = change[self.source_of.clamp(min=0)]
        found[self.source_of < 0] = 0
        return found


Map = Tensor | Units | None  # [source, target]; None: both are the same


@dataclass(frozen=True)
class Maps:
    """The maps of one pair of layers, by weight: at its output and at its input.

    Attributes:
        ranks: of maps that data determine, by what they map: (rank, full rank).
        gain: where gains go apart, that of the norm in front of a weight; by default as the weight's input.
    """

    output: Mapping[str, Map]
    input: Mapping[str, Map]
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    gain: Mapping[str, Map] = field(default_factory=dict)


def carried(change: Tensor, output: Map, input: Map) -> Tensor:
    """T_out^T dW T_in."""
    return _rows(_rows(change, output).mT, input).mT


def _rows(change: Tensor, map: Map) -> Tensor:
    if map is None:
        return change
    return map.rows(change) if isinstance(map, Units) else map.mT @ change


@dataclass(frozen=True)
class Models:
    """The target, and the source's trained and base model; see `opened`.

    Attributes:
        fold: whether changes are of folded weights; else of the weights as they are, gains apart.
    """

    target: Folded
    tuned: Folded
    base: Folded
    fold: bool = True

    def change(self, weight: str, layer: int = 0) -> Tensor:
        """What training added to a weight of the source, [out, in]; folded, as one of x / |x| where it reads."""
        if not self.fold:
            return self.tuned.stored(weight, layer) - self.base.stored(weight, layer)
        scale = self.base.sizes.d_model**0.5 if weight in READS else 1.0
        return (self.tuned.weight(weight, layer) - self.base.weight(weight, layer)) * scale

    def gain_change(self, weight: str, layer: int) -> Tensor:
        """The same of the gain [d_model] in front of a weight."""
        return self.tuned.gain(weight, layer) - self.base.gain(weight, layer)

    def bias_change(self, weight: str, layer: int) -> Tensor | None:
        """The same of a projection's bias [out]; None if either model has none."""
        found = [self.bias_of(model, weight, layer) for model in (self.tuned, self.base)]
        if found[0] is None or found[1] is None or self.target.stored_bias(weight, 0) is None:
            return None
        return found[0] - found[1]

    def bias_of(self, model: Folded, weight: str, layer: int) -> Tensor | None:
        """A projection's bias [out] of one of the models; folded, unless changes are of the weights as they are."""
        return model.bias(weight, layer) if self.fold else model.stored_bias(weight, layer)

    def as_stored(self, weight: str, layer: int, change: Tensor) -> Tensor:
        """A change of a folded weight [out, in] or bias [out] of the target as one of what it stores."""
        if not self.fold:
            return change
        written = self.target.written(weight, layer)
        change = change / (written[:, None] if written.ndim and change.ndim == 2 else written)
        if weight not in READS or change.ndim == 1:
            return change
        return change / (self.target.gain(weight, layer) * self.target.sizes.d_model**0.5)


def opened(target: ModelRef, tuned: ModelRef, base: ModelRef, *, fold: bool = True) -> Models:
    """The three models.

    Raises:
        UserError: the source's two models differ in shape, or as `Folded`.
    """
    models = Models(Folded(target), Folded(tuned), Folded(base), fold)
    check_same_shape(models.tuned.sizes, models.base.sizes, tuned.location, base.location)
    return models


def carries_vocabulary(models: Models) -> bool:
    """Whether embedding and head can be carried over, row by row: not between models with other tokens, which is said.

    Raises:
        UserError: the target's embedding and head are one weight.
    """
    have, want = models.base.sizes.vocab_size, models.target.sizes.vocab_size
    odd = f"the source's embedding has {have} rows, the target's {want}" if have != want else None
    if odd := odd or vocabulary_difference(models.base.ref, models.target.ref):
        said = f"vocabulary: embedding and head stay as they are, for moving them takes a common vocabulary: {odd}"
        print(f"pkt: warning: {said}", file=sys.stderr)
        return False
    if models.target.tied:
        raise UserError(
            f"{models.target.ref.location}: its head is its embedding, which get different changes; set"
            " vocabulary: false"
        )
    return True


Fit = Callable[["Models", Correlation], tuple[Polar | None, Callable[[Pair], Maps]]]
Draw = Callable[[tuple[Geometry, Geometry], Tensor, Generator], Maps]


def carry(
    inputs: Inputs,
    params: MapParams,
    *,
    vocabulary: bool,
    fit: Fit,
    draw: Draw,
    fold: bool = True,
    spare: Sequence[str] = ("texts",),
) -> Derived:
    """A row of a method that moves what training added to the source, by maps of its own.

    Args:
        spare: inputs that this does not need; one stage serves several methods.
        vocabulary: embedding and head, too, if both models have the same tokens.
        fit: from models and correlation to the map of the residual stream (None: not needed) and those of a pair.
        draw: random maps of a pair, of the control: from the sizes of source and target and the residual stream's.

    Raises:
        UserError: other inputs than --target, --source, --base and --correlation; models that are not those of the
            correlation or differ in shape; as `carries_vocabulary`; or as `fit`.
    """
    target, source, base, folder = inputs.only("target", "source", "base", "correlation", spare=spare)
    models, found = opened(target, source, base, fold=fold), Correlation(folder)
    of_target, of_source, of_base = (identity(model.ref) for model in (models.target, models.tuned, models.base))
    found.check(of_base, of_target)
    left_out = vocabulary and not carries_vocabulary(models)
    vocabulary = vocabulary and not left_out
    changes: dict[str, Change] = {}
    ranks: dict[str, list[int]] = {}
    if params.maps == "random":
        sizes = (models.base.sizes, models.target.sizes)
        for seed in params.seeds:
            generator = torch.Generator().manual_seed(seed)
            residual = random_isometry(sizes[0].d_model, sizes[1].d_model, generator)
            drawn = {pair: draw(sizes, residual, generator) for pair in found.pairs}
            label = "delta" if len(params.seeds) == 1 else f"seed_{seed}"
            changes[label], _ = transported(models, found.pairs, drawn.__getitem__, residual if vocabulary else None)
    else:
        whole, maps_of = fit(models, found)
        moved = whole.map if whole is not None and vocabulary else None
        changes["delta"], ranks = transported(models, found.pairs, maps_of, moved)
        if whole is not None:
            ranks["residual"] = [whole.rank, whole.full_rank]
    meta: dict[str, Any] = {"base": of_base, "pairs": [list(pair) for pair in found.pairs], "ranks": ranks}
    if left_out:
        meta["vocabulary"] = False
    return Derived(changes, of_target, of_source, meta=meta)


def transported(
    models: Models,
    pairs: list[Pair],
    maps_of: Callable[[Pair], Maps],
    residual: Map,
) -> tuple[DenseDelta, dict[str, list[int]]]:
    """What training added to the source's paired layers as a change of the target's, and the maps' ranks by name.

    Args:
        maps_of: the maps of a pair.
        residual: of the residual stream, for embedding and head; None: those stay as they are.
    """
    weights: dict[str, Tensor] = {}
    ranks: dict[str, list[int]] = {}
    for pair in track(pairs, "layer pairs"):
        maps = maps_of(pair)
        ranks |= {f"layer_{pair[1]}.{name}": list(found) for name, found in maps.ranks.items()}
        for weight in PROJECTIONS:
            output, into = maps.output[weight], maps.input[weight]
            change = carried(models.change(weight, pair[0]), output, into)
            module = module_name(weight, pair[1])
            weights[f"{module}.weight"] = models.as_stored(weight, pair[1], change).float()
            if (bias := models.bias_change(weight, pair[0])) is not None:
                moved = _rows(bias[:, None], output)[:, 0]
                weights[f"{module}.bias"] = models.as_stored(weight, pair[1], moved).float()
        if not models.fold:
            for weight in ("attn_q", "ffn_gate"):
                map = maps.gain.get(weight, maps.input[weight])
                gain = _rows(models.gain_change(weight, pair[0])[:, None], map)[:, 0]
                weights[f"{models.target.norm(weight, pair[1])}.weight"] = gain.float()
    if residual is not None:
        for weight in VOCABULARY:
            change = carried(models.change(weight), None, residual)
            weights[f"{module_name(weight, 0)}.weight"] = models.as_stored(weight, 0, change).float()
        if not models.fold:
            gain = _rows(models.gain_change("head", 0)[:, None], residual)[:, 0]
            weights[f"{models.target.norm('head', 0)}.weight"] = gain.float()
    return DenseDelta(weights), ranks


def at_input(models: Models, sums: PairSums, name: str, pair: Pair, *, grams: bool = False) -> Sides:
    """What a correlation says of an activation, without the gain of the norm that made it if `models.fold`.

    Args:
        grams: either side's own sums of products, too, which the correlation must have.
    """
    weight = "head" if name == FINAL else INPUTS[name]
    cross, totals = sums.cross(name), sums.sums(name)
    own = sums.grams(name) if grams else None
    if weight in READS and models.fold:
        gains = [model.gain(weight, layer) for model, layer in zip((models.base, models.target), pair, strict=True)]
        cross = cross / torch.outer(*gains)
        totals = (totals[0] / gains[0], totals[1] / gains[1])
        if own is not None:
            own = (own[0] / torch.outer(gains[0], gains[0]), own[1] / torch.outer(gains[1], gains[1]))
    return Sides(cross, totals, own, sums.count)


def at_output(models: Models, inputs: Sides, weight: str, pair: Pair) -> Sides:
    """The same of a projection's output: it is linear in its input."""
    both = list(zip((models.base, models.target), pair, strict=True))
    first, second = (m.weight(weight, n) if models.fold else m.stored(weight, n) for m, n in both)
    biases = [models.bias_of(m, weight, n) for m, n in both]
    b, c = (x if x is not None else torch.zeros(len(w)).double() for x, w in zip(biases, (first, second), strict=True))
    n, (s, t) = inputs.count, inputs.sums
    grams = None
    if inputs.grams is not None:
        grams = (
            _affine(inputs.grams[0], first, first, b, b, s, s, n),
            _affine(inputs.grams[1], second, second, c, c, t, t, n),
        )
    cross = _affine(inputs.cross, first, second, b, c, s, t, n)
    return Sides(cross, (first @ s + n * b, second @ t + n * c), grams, n)


def _affine(products: Tensor, w: Tensor, v: Tensor, b: Tensor, c: Tensor, s: Tensor, t: Tensor, count: int) -> Tensor:
    """Sums of (W x + b)(V y + c)^T from those of x y^T, x and y."""
    crossed = torch.outer(w @ s, c) + torch.outer(b, v @ t)
    return w @ products @ v.mT + crossed + count * torch.outer(b, c)


@dataclass(frozen=True)
class Sides:
    """Of one activation on `count` tokens: sums of source times target, of either side, of either side's products."""

    cross: Tensor
    sums: tuple[Tensor, Tensor]
    grams: tuple[Tensor, Tensor] | None
    count: int


def through(models: Models, outputs: Sides, weight: str, pair: Pair) -> Sides:
    """What is known of a gradient at a projection's output, at its input: dL/dx = W^T dL/dy, W folded or not."""
    both = zip((models.base, models.target), pair, strict=True)
    first, second = (m.weight(weight, n) if models.fold else m.stored(weight, n) for m, n in both)
    s, t = outputs.sums
    own = outputs.grams
    grams = (first.mT @ own[0] @ first, second.mT @ own[1] @ second) if own is not None else None
    return Sides(first.mT @ outputs.cross @ second, (first.mT @ s, second.mT @ t), grams, outputs.count)


def fitted(sides: Sides, params: PolarParams, *, relative: bool = False) -> Polar:
    """The orthogonal map of an activation or a gradient, whitened and centred as the settings say.

    Args:
        relative: see `core.transport.whitened`.
    """
    cross, grams = sides.cross, sides.grams
    if params.centred:
        cross = centred(cross, *sides.sums, sides.count)
        if grams is not None:
            own = [centred(g, s, s, sides.count) for g, s in zip(grams, sides.sums, strict=True)]
            grams = (own[0], own[1])
    if grams is not None:
        cross = whitened(cross, *grams, params.whitening, relative=relative)
    return polar(cross, params.tolerance)


def check_grams(found: Correlation) -> None:
    """Raise UserError unless either model's own sums of products were kept, which whitening needs."""
    if not found.has_grams:
        raise UserError(
            f"{found.path}: whitening needs either model's own sums, too; run `{found.kind.made_by}` with grams: true"
        )


def check_texts(correlation: Correlation, found: Polar, what: str) -> None:
    """Raise UserError if a map is short of full rank for want of tokens."""
    if found.rank < found.full_rank and correlation.count < 2 * found.full_rank:
        raise UserError(
            f"{correlation.path}: {correlation.count} tokens give the map of {what} rank {found.rank} of"
            f" {found.full_rank}; run `pkt correlate` on more texts"
        )
