"""What two models compute on the same tokens, summed up: enough for every map between them (METHODS 11).

Five activations of a layer pair, each the input of a projection, which together with the weights give those at the
outputs as well: in front of q, k and v (`attn_in`), of o (`heads`), of gate and up (`ffn_in`), of down (`neurons`); and
once for the whole model in front of the head (`final`). Sums are float64, over streamed minibatches: memory depends on
the widths and on how many pairs are summed up at once, not on the texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.core.similarity import CkaSums, centred_gram
from pkt_stages.core.transport import correlation, procrustes_residual
from pkt_stages.errors import UserError
from pkt_stages.models.batches import Batch, padded, padding_mask
from pkt_stages.models.load import is_same
from pkt_stages.models.losses import home
from pkt_stages.models.sites import geometry, module_name
from pkt_stages.progress import track

LIST = "correlation.json"
# By activation the weight whose input it is.
INPUTS = {"attn_in": "attn_q", "heads": "attn_o", "ffn_in": "ffn_gate", "neurons": "ffn_down"}
FINAL = "final"
SIDES = ("source", "target")
Pair = tuple[int, int]  # (source layer, target layer)


@torch.no_grad()
def block_similarity(models: Sequence[Any], batches: Sequence[Sequence[Batch]]) -> Tensor:
    """Linear CKA [source layer, target layer] of what every layer adds to the residual stream, over all tokens.

    A layer that adds nothing has similarity 0.

    Raises:
        UserError: a minibatch of fewer than 4 tokens.
    """
    sums = CkaSums()
    for batch in track(batches, "minibatches for the layers' similarity"):
        grams = []
        for model, own in zip(models, batch, strict=True):
            with activations(model, _added_by_layers(model)) as kept:
                mask = forward(model, own)
            try:
                added = [centred_gram((after - before)[mask].float()) for before, after in kept.values()]
            except ValueError as error:
                raise UserError(f"{error}; use longer texts, or more of them") from None
            grams.append(torch.stack([gram.to(home(models[0])) for gram in added]))
        sums.add(grams[0], grams[1])
    return sums.cka(without=0.0).cpu()


@dataclass
class Sums:
    """Of one activation of a pair: over tokens, of source times target, and of either side."""

    cross: Tensor
    sums: tuple[Tensor, Tensor]
    grams: tuple[Tensor, Tensor] | None
    squares: tuple[Tensor, Tensor]
    heads: tuple[Tensor, Tensor] | None


@torch.no_grad()
def correlate(
    models: Sequence[Any],
    batches: Sequence[Sequence[Batch]],
    pairs: Sequence[Pair],
    *,
    grams: bool,
) -> dict[Pair | None, dict[str, Sums]]:
    """Sums over all samples by pair and activation, and under None those in front of the head.

    Args:
        models: source and target.
        batches: texts, some at a time, as either model reads them.
        grams: keep either side's own sums of products whole, too.
    """
    sizes = [geometry(model.config) for model in models]
    found: dict[Pair | None, dict[str, Sums]] = {}
    for batch in track(batches, "minibatches for the sums"):
        kept = []
        for side, model in enumerate(models):
            layers = sorted({pair[side] for pair in pairs})
            with activations(model, _inputs(model, layers)) as inputs:
                mask = forward(model, batch[side])
            kept.append({name: value[0][mask].double() for name, value in inputs.items()})
        for pair in (*pairs, None):
            for name in INPUTS if pair is not None else (FINAL,):
                keys = [(name, pair[side] if pair is not None else None) for side in range(2)]
                a, b = kept[0][keys[0]], kept[1][keys[1]].to(kept[0][keys[0]].device)
                heads = [s.d_head for s in sizes] if name == "heads" else None
                add(found.setdefault(pair, {}), name, a, b, heads, grams)
    return found


def add(into: dict[str, Sums], name: str, a: Tensor, b: Tensor, heads: list[int] | None, grams: bool) -> None:
    """Add what a minibatch has of an activation, [token, width] of source and target, to the sums of a pair.

    Args:
        heads: d_head of either side, for the products inside each head.
    """
    both = (a, b)
    new = Sums(
        cross=a.mT @ b,
        sums=(a.sum(0), b.sum(0)),
        grams=(a.mT @ a, b.mT @ b) if grams else None,
        squares=(a.square().sum(0), b.square().sum(0)),
        heads=None,
    )
    if heads is not None:
        split = [x.unflatten(1, (-1, d_head)).transpose(0, 1) for x, d_head in zip(both, heads, strict=True)]
        new.heads = (split[0].mT @ split[0], split[1].mT @ split[1])
    if name not in into:
        into[name] = new
        return
    old = into[name]
    old.cross += new.cross
    for field in ("sums", "squares", "grams", "heads"):
        for total, part in zip(getattr(old, field) or (), getattr(new, field) or (), strict=True):
            total += part


def forward(model: Any, batch: Batch) -> Tensor:
    """One forward pass, padded on the right; which places of the padded batch are samples, [text, token]."""
    ids, mask = padded(batch.ids, 0).to(home(model)), padding_mask(batch.ids).to(home(model))
    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return batch.samples().to(home(model))


Place = Any  # what an activation is kept under


def _inputs(model: Any, layers: Sequence[int]) -> Iterator[tuple[Place, Any, bool]]:
    for layer in layers:
        for name, weight in INPUTS.items():
            yield (name, layer), model.get_submodule(module_name(weight, layer)), False
    yield (FINAL, None), model.get_submodule("model.norm"), True


def _added_by_layers(model: Any) -> Iterator[tuple[Place, Any, bool]]:
    for number, layer in enumerate(model.model.layers):
        yield number, layer, False
        yield number, layer, True


@contextmanager
def activations(model: Any, places: Iterator[tuple[Place, Any, bool]]) -> Iterator[dict[Place, list[Tensor]]]:
    """Within the context the modules' inputs, or outputs where the flag says so, are kept in order by place.

    Args:
        places: what to keep an activation under, the module, and whether its output is meant.
    """
    kept: dict[Place, list[Tensor]] = {}

    def before(place: Place) -> Any:
        return lambda _module, inputs: kept.setdefault(place, []).append(inputs[0])

    def after(place: Place) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept.setdefault(place, []).append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [
        module.register_forward_hook(after(place)) if output else module.register_forward_pre_hook(before(place))
        for place, module, output in places
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def write_pair(
    folder: Path,
    pair: Pair | None,
    sums: Mapping[str, Sums],
    dtype: str,
    meta: Mapping[str, Any],
    of: artifacts.Kind = artifacts.CORRELATION,
) -> None:
    """Write what belongs to one pair of layers (None: in front of the head) into the folder of a correlation.

    Args:
        of: what the sums of a pair of layers are.
    """
    kind = getattr(torch, dtype)
    tensors, grams = {}, {}
    for name, found in sums.items():
        tensors[f"{name}.cross"] = found.cross.to(kind)
        for number, side in enumerate(SIDES):
            tensors[f"{name}.{side}.sum"] = found.sums[number]
            tensors[f"{name}.{side}.squares"] = found.squares[number]
            if found.heads is not None:
                tensors[f"{name}.{side}.heads"] = found.heads[number]
            if found.grams is not None:
                grams[f"{name}.{side}"] = found.grams[number].to(kind)
    artifacts.save(folder / _file(pair), of if pair else artifacts.FINAL_CORRELATION, tensors, meta)
    if grams:
        artifacts.save(folder / f"grams_{_file(pair)}", artifacts.GRAMS, grams, meta)


def _file(pair: Pair | None) -> str:
    return "final.safetensors" if pair is None else f"layer_{pair[1]:03d}.safetensors"


class Correlation:
    """What `pkt correlate` left: sums by pair of layers, each read when asked for.

    Attributes:
        kind: of a pair's file.
        mark: the file that says what the folder is.
        pairs: (source, target) layers.
        count: tokens.
        meta: as written: `source`, `target` (identities), `params`, `similarity`.
    """

    kind, mark = artifacts.CORRELATION, LIST

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: no such folder, or a damaged one.
        """
        self.path = folder
        path = folder / self.mark
        try:
            self.meta: Mapping[str, Any] = dict(json.loads(path.read_text(encoding="utf-8-sig")))
            self.pairs: list[Pair] = [(int(s), int(t)) for s, t in self.meta["pairs"]]
            self.count = int(self.meta["num_tokens"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"{path}: not readable ({why}); make it with `{self.kind.made_by}`") from None

    @property
    def has_grams(self) -> bool:
        """Whether either model's own sums of products were kept whole."""
        return bool(self.meta["params"]["grams"])

    def check(self, source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        """Raise UserError unless it is of these models (`load.identity`)."""
        for side, found in (("source", source), ("target", target)):
            made = self.meta[side]
            if not is_same(made, found):
                raise UserError(
                    f"{self.path}: of the {side} {made['name']} at {made['revision']}, found {found['name']} at"
                    f" {found['revision']}; run `{self.kind.made_by}` on these models"
                )

    def of(self, pair: Pair | None) -> PairSums:
        return PairSums(self, pair)


class PairSums:
    """The sums of one pair of layers, or in front of the head."""

    def __init__(self, whole: Correlation, pair: Pair | None) -> None:
        self._whole, self._pair = whole, pair
        self.count = whole.count

    @cached_property
    def _sums(self) -> artifacts.Artifact:
        kind = self._whole.kind if self._pair else artifacts.FINAL_CORRELATION
        return artifacts.load(self._whole.path / _file(self._pair), kind)

    @cached_property
    def _grams(self) -> artifacts.Artifact:
        return artifacts.load(self._whole.path / f"grams_{_file(self._pair)}", artifacts.GRAMS)

    def cross(self, name: str) -> Tensor:
        """Sums of products of an activation, [source, target] float64."""
        return self._sums[f"{name}.cross"].double()

    def sums(self, name: str) -> tuple[Tensor, Tensor]:
        return self._sums[f"{name}.source.sum"], self._sums[f"{name}.target.sum"]

    def squares(self, name: str) -> tuple[Tensor, Tensor]:
        return self._sums[f"{name}.source.squares"], self._sums[f"{name}.target.squares"]

    def heads(self) -> tuple[Tensor, Tensor]:
        """Either side's heads' own sums of products, [head, d_head, d_head]."""
        return self._sums["heads.source.heads"], self._sums["heads.target.heads"]

    def grams(self, name: str) -> tuple[Tensor, Tensor]:
        """Either side's own sums of products, if they were kept (`Correlation.has_grams`)."""
        return self._grams[f"{name}.source"].double(), self._grams[f"{name}.target"].double()


def diagnostics(found: Correlation, gains: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How alike two models are, from sums alone: before anything is carried over.

    Args:
        gains: of either side's norm in front of the head, which the states that it made are freed of.

    Returns:
        cka: of what paired layers add to the residual stream, mean over pairs. procrustes: `procrustes_residual` of the
        states in front of the head. neurons: of a target's FFN neuron the highest correlation with one of the paired
        layer of the source, mean over neurons and pairs.

    Raises:
        UserError: states that do not vary.
    """
    final = found.of(None)
    cross = final.cross(FINAL) / torch.outer(*gains)
    sums, squares = final.sums(FINAL), final.squares(FINAL)
    try:
        residual = procrustes_residual(
            cross,
            (sums[0] / gains[0], sums[1] / gains[1]),
            (squares[0] / gains[0] ** 2, squares[1] / gains[1] ** 2),
            found.count,
        )
    except ValueError as error:
        raise UserError(f"{found.path}: {error}; use other texts") from None
    best = [
        float(correlation(s.cross("neurons"), s.sums("neurons"), s.squares("neurons"), s.count).amax(0).mean())
        for s in map(found.of, found.pairs)
    ]
    alike = [found.meta["similarity"][s][t] for s, t in found.pairs]
    return {"cka": fmean(alike), "procrustes": residual, "neurons": fmean(best)}
