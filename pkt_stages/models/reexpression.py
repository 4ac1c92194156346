"""A model written again in another shape, with the same logits: a source whose right maps to the target are known.

Every step leaves the function as it is, and can be left out but for those that the shape asks for:

1. The gain of every norm is folded into the maps that read it, and multipliers into those that write.
2. Residual basis: x' = x E, E the first d rows of a random orthogonal matrix [d', d']. What reads becomes W E, what
   writes E^T W. As |x'| = |x| but the mean square is over d' numbers, every norm gets the gain sqrt(d / d') and
   d / d' times its eps. Norms of q and k (Qwen3) share that eps, which changes them by less than eps / 2 over the mean
   square of a head's q or k: nothing at 1e-6. (q and k themselves stay: the changes in them must have their size.)
3. FFN neurons go to random places among d_ff'. The others are filler: zero subvalue, so that they add nothing.
4. Heads go to random places, each query head beside its own key/value head; inside a head v is turned by a random
   orthogonal matrix and o back (q and k may not be: RoPE). Filler heads have zero o.
5. Layers keep their order at random places. The others have zero o and down, and add nothing.

Base and trained model of one seed get the same random choices, filler included.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pkt_stages.core.transport import random_isometry
from pkt_stages.errors import UserError
from pkt_stages.models.folding import READS, WRITES, Folded
from pkt_stages.models.sites import PROJECTIONS, SHAPE, Geometry, family, module_name

Filler = Literal["zero", "random"]


@dataclass(frozen=True)
class Group:
    """A key/value head in its new place, with its query heads.

    Attributes:
        place: among the new key/value heads.
        origin: the old key/value head.
        heads: the old query heads, and their places among the new ones.
        turn: [d_head, d_head] orthogonal, float64, applied to v from the left; None: as it is.
    """

    place: int
    origin: int
    heads: tuple[tuple[int, int], ...]
    turn: Tensor | None


@dataclass(frozen=True)
class Reexpression:
    """How a model is written again.

    Attributes:
        old, new: sizes.
        basis: E [d, d'] float64; None: the residual stream stays, and gains stay where they are.
        layers: the new place of each old layer.
        neurons: by old layer the new place of each FFN neuron.
        groups: by old layer.
        filler: what reads in filler.
    """

    old: Geometry
    new: Geometry
    basis: Tensor | None
    layers: tuple[int, ...]
    neurons: tuple[Tensor, ...]
    groups: tuple[tuple[Group, ...], ...]
    filler: Filler
    seed: int


def reexpression(
    old: Geometry, new: Geometry, *, permute: bool = True, rotate: bool = True, filler: Filler = "random", seed: int = 0
) -> Reexpression:
    """Draw the random choices.

    Args:
        permute: neurons, heads and layers go to random places; else they stay in front.
        rotate: random bases of the residual stream and inside heads; else the old ones, padded with zeros.

    Raises:
        UserError: the new shape is smaller somewhere, or has another d_head or vocabulary.
    """
    check_shapes(old, new)

    def places(count: int, among: int, *what: object) -> Tensor:
        order = torch.randperm(among, generator=_generator(seed, *what)) if permute else torch.arange(among)
        return order[:count]

    basis = None
    if rotate or new.d_model > old.d_model:
        whole = (
            random_isometry(new.d_model, new.d_model, _generator(seed, "residual"))
            if rotate
            else torch.eye(new.d_model).double()
        )
        basis = whole[: old.d_model]
    layers = places(old.num_layers, new.num_layers, "layers").sort().values.tolist()
    return Reexpression(
        old=old,
        new=new,
        basis=basis,
        layers=tuple(layers),
        neurons=tuple(places(old.d_ff, new.d_ff, "neurons", layer) for layer in range(old.num_layers)),
        groups=tuple(_groups(old, new, layer, permute, rotate, seed) for layer in range(old.num_layers)),
        filler=filler,
        seed=seed,
    )


def check_family(config: Any) -> None:
    """Raise UserError for a family whose models cannot be written in another basis."""
    kind = family(config)
    if kind.after:
        why = "a norm behind each block has gains, which no other basis of the residual stream keeps"
    elif kind.gain_offset:
        why = "what its embeddings are multiplied by depends on d_model"
    else:
        return
    raise UserError(f"architecture {config.model_type!r} cannot be written again: {why}; use a model of another one")


def check_shapes(old: Geometry, new: Geometry) -> None:
    """Raise UserError unless a model can be written again in a new shape."""
    for name in SHAPE:
        if getattr(new, name) < getattr(old, name):
            raise UserError(
                f"{name} {getattr(new, name)} is smaller than the model's {getattr(old, name)}; a model can be written"
                " again in a shape that is as large or larger everywhere"
            )
    for name in ("d_head", "vocab_size"):
        if getattr(new, name) != getattr(old, name):
            why = "RoPE ties the entries of a head together" if name == "d_head" else "tokens have no filler"
            raise UserError(f"{name} {getattr(new, name)} is not the model's {getattr(old, name)}; {why}")
    if new.num_heads % new.num_kv_heads:
        raise UserError(f"{new.num_heads} heads cannot share {new.num_kv_heads} key/value heads evenly")
    if (needed := len(_chunks(old, new))) > new.num_kv_heads:
        raise UserError(
            f"{new.num_heads} heads on {new.num_kv_heads} key/value heads: the model's {old.num_heads} on"
            f" {old.num_kv_heads} need {needed} of these"
        )


def _chunks(old: Geometry, new: Geometry) -> list[tuple[int, list[int]]]:
    """Each old key/value head with its query heads, divided (and then doubled) where the new groups are smaller."""
    size, room = old.num_heads // old.num_kv_heads, new.num_heads // new.num_kv_heads
    every = [(kv, list(range(kv * size, (kv + 1) * size))) for kv in range(old.num_kv_heads)]
    return [(kv, heads[start : start + room]) for kv, heads in every for start in range(0, size, room)]


def _groups(old: Geometry, new: Geometry, layer: int, permute: bool, rotate: bool, seed: int) -> tuple[Group, ...]:
    chunks, room = _chunks(old, new), new.num_heads // new.num_kv_heads
    generator = _generator(seed, "heads", layer)
    made = []
    order = torch.randperm(new.num_kv_heads, generator=generator).tolist() if permute else list(range(len(chunks)))
    for (origin, heads), place in zip(chunks, order, strict=False):
        slots = torch.randperm(room, generator=generator).tolist() if permute else list(range(room))
        turn = random_isometry(old.d_head, old.d_head, generator) if rotate else None
        placed = tuple((head, place * room + slot) for head, slot in zip(heads, slots, strict=False))
        made.append(Group(place, origin, placed, turn))
    return tuple(made)


def weights(model: Folded, how: Reexpression) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model written again, by name, in the order of layers; float64."""
    basis, old, new = how.basis, how.old, how.new
    as_it_is = (lambda w: model.stored(w)) if basis is None else (lambda w: model.weight(w) @ basis)
    yield "model.embed_tokens.weight", as_it_is("embedding")
    placed = dict(zip(how.layers, range(old.num_layers), strict=True))
    for place in range(new.num_layers):
        layer = placed.get(place)
        yield from _layer(model, how, place, layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{{}}.{norm}.weight"
            yield name.format(place), _gain(model, how, name.format(layer) if layer is not None else None)
        for norm in ("q_norm", "k_norm"):  # Qwen3: one for all heads
            name = f"model.layers.{{}}.self_attn.{norm}.weight"
            if name.format(0) in model.names:
                stored = model.checkpoint.weight(name.format(layer or 0)).double()
                yield name.format(place), stored if layer is not None else torch.ones_like(stored)
    yield "model.norm.weight", _gain(model, how, "model.norm.weight")
    if basis is not None or not model.tied:
        yield "lm_head.weight", as_it_is("head")


def _layer(model: Folded, how: Reexpression, place: int, layer: int | None) -> Iterator[tuple[str, Tensor]]:
    """The projections of one new layer, with their biases; of filler if there is no old one."""
    for weight in PROJECTIONS:
        filler = _filler(how, place, weight)
        bias = torch.zeros(how.new.weight_shape(weight)[0], dtype=torch.float64)
        if layer is None:
            found = filler
        else:
            stored = model.stored(weight, layer) if how.basis is None else model.weight(weight, layer)
            own = model.stored_bias(weight, layer) if how.basis is None else model.bias(weight, layer)
            if weight in READS:
                found = _rows(how, layer, weight, stored if how.basis is None else stored @ how.basis, filler)
                if own is not None:
                    bias = _rows(how, layer, weight, own[:, None], bias[:, None])[:, 0]
            else:
                written = stored if how.basis is None else how.basis.mT @ stored
                found = _columns(how, layer, weight, written, filler)
                if own is not None:
                    bias = own if how.basis is None else own @ how.basis
        yield f"{module_name(weight, place)}.weight", found
        if f"{module_name(weight, 0)}.bias" in model.names:
            yield f"{module_name(weight, place)}.bias", bias


def _rows(how: Reexpression, layer: int, weight: str, stored: Tensor, filler: Tensor) -> Tensor:
    """What reads the residual stream, a row per neuron or entry of a head, with its rows in their new places."""
    found = filler.clone()
    if weight in ("ffn_gate", "ffn_up"):
        found[how.neurons[layer]] = stored
        return found
    d_head = how.old.d_head
    into, source = found.view(-1, d_head, found.shape[-1]), stored.reshape(-1, d_head, stored.shape[-1])
    for group in how.groups[layer]:
        if weight == "attn_q":
            for head, place in group.heads:
                into[place] = source[head]
        elif weight == "attn_v" and group.turn is not None:
            into[group.place] = group.turn @ source[group.origin]
        else:
            into[group.place] = source[group.origin]
    return found


def _columns(how: Reexpression, layer: int, weight: str, stored: Tensor, filler: Tensor) -> Tensor:
    """What writes to the residual stream, a column per neuron or entry of a head, with its columns in their places."""
    found = filler.clone()
    if weight == "ffn_down":
        found[:, how.neurons[layer]] = stored
        return found
    d_head = how.old.d_head
    into, source = found.view(len(found), -1, d_head), stored.reshape(len(stored), -1, d_head)
    for group in how.groups[layer]:
        for head, place in group.heads:
            into[:, place] = source[:, head] if group.turn is None else source[:, head] @ group.turn.mT
    return found


def _filler(how: Reexpression, place: int, weight: str) -> Tensor:
    """A whole new projection of filler: what writes is zero; what reads is zero, or of unit size for a normed input."""
    shape = how.new.weight_shape(weight)
    if how.filler == "zero" or weight in WRITES:
        return torch.zeros(shape, dtype=torch.float64)
    drawn = torch.randn(shape, generator=_generator(how.seed, "filler", place, weight), dtype=torch.float64)
    return drawn / how.new.d_model**0.5


def _gain(model: Folded, how: Reexpression, name: str | None) -> Tensor:
    """A new norm's gain: of the old norm `name` if nothing was folded."""
    if how.basis is None:
        return torch.ones(how.new.d_model).double() if name is None else model.checkpoint.weight(name).double()
    return torch.full((how.new.d_model,), (how.old.d_model / how.new.d_model) ** 0.5, dtype=torch.float64)


def new_config(config: Any, how: Reexpression, tied: bool) -> Any:
    """The config of the model written again.

    Raises:
        UserError: transformers has no model of this architecture in such a shape.
    """
    from huggingface_hub.errors import StrictDataclassError

    made, new = copy.deepcopy(config), how.new
    if config.model_type == "qwen2" and new.num_heads * new.d_head != new.d_model:
        raise UserError(
            f"qwen2 with {new.num_heads} heads of {new.d_head} at d_model {new.d_model}: vLLM takes d_model / num_heads"
            f" for the head width of this architecture; choose d_model {new.num_heads * new.d_head}"
        )
    made.hidden_size, made.intermediate_size, made.num_hidden_layers = new.d_model, new.d_ff, new.num_layers
    made.num_attention_heads, made.num_key_value_heads, made.head_dim = new.num_heads, new.num_kv_heads, new.d_head
    if how.basis is not None:
        made.rms_norm_eps = config.rms_norm_eps * how.old.d_model / new.d_model
        kind = family(config)
        for name in filter(None, (kind.multiplier, kind.logits_scaling, kind.embedding_scale)):
            setattr(made, name, 1.0)  # they are in the weights now
    made.tie_word_embeddings = tied and how.basis is None
    for name, filler in (("layer_types", "full_attention"), ("no_rope_layers", 1)):  # what a config says layer by layer
        if getattr(config, name, None) is not None:
            values = [filler] * new.num_layers
            for place, value in zip(how.layers, getattr(config, name), strict=True):
                values[place] = value
            setattr(made, name, values)
    try:
        made.validate()
    except StrictDataclassError as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{config.model_type} in this shape: {why}; choose another") from None
    return made


def _generator(seed: int, *what: object) -> torch.Generator:
    """Random numbers of their own for each purpose, so that leaving one step out changes no other."""
    digest = hashlib.sha256("|".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
