"""Adding a change of any kind to a model's weights: for good, or for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.sites import as_rows, family, geometry

if TYPE_CHECKING:
    from torch.nn import Module

ROUNDING_WARN, ROUNDING_REFUSE = 0.01, 0.50


@dataclass(frozen=True)
class MergeReport:
    """What merging did, over all touched weights.

    Attributes:
        rounding_loss: ||round(W + D) - W - D|| / ||D||, the relative norm lost to the model's dtype.
        changed_weights: number of weight entries whose stored value changed.
        changed: names of the changed weight tensors.
    """

    rounding_loss: float
    changed_weights: int
    changed: tuple[str, ...]


@torch.no_grad()
def check(model: Module, change: Change) -> None:
    """Raise UserError unless the model, which may be on torch's device `meta`, has all weights of the change."""
    for part in _parts(model, change):
        part.sum()


@torch.no_grad()
def merge(model: Module, change: Change, *, scale: float = 1.0, allow_rounding_loss: bool = False) -> MergeReport:
    """Add `scale` times a change to the model's weights in place, in float32, rounding once to the model's dtype.

    Raises:
        UserError: the change does not fit the model; no weight would change; or more than half of the change's norm
            would be lost to rounding and `allow_rounding_loss` is not set. Then nothing is changed.
    """
    parts = list(_parts(model, change, scale))
    report = _report(parts, model, _kind(change), allow_rounding_loss)
    for part in parts:
        part.write(part.sum().after)
    return report


@contextmanager
def merged(
    model: Module, change: Change, *, scale: float = 1.0, allow_rounding_loss: bool = False
) -> Iterator[MergeReport]:
    """Within the context `scale` times the change is merged; on leaving the weights are bitwise what they were.

    Raises:
        UserError: as `merge`.
    """
    with torch.no_grad():
        parts = list(_parts(model, change, scale))
        report = _report(parts, model, _kind(change), allow_rounding_loss)
    taken: list[tuple[_Part, Tensor]] = []
    try:
        for part in parts:
            found = part.sum()
            taken.append((part, found.before))
            part.write(found.after)
        yield report
    finally:
        for part, before in reversed(taken):
            part.write(before)


@dataclass(frozen=True)
class _Sum:
    """Some rows of one weight: as they are, what is added in float32, and as they will be."""

    before: Tensor
    added: Tensor
    after: Tensor


@dataclass(frozen=True)
class _Part:
    """What is added to some rows of one weight, computed when asked for: all at once would fill the memory.

    Attributes:
        rows: a view of the weight as [weight row, width].
        index: which of them.
        added: [row, width] float32, to be multiplied by `scale`.
    """

    name: str
    rows: Tensor
    index: Tensor | slice
    added: Callable[[], Tensor]
    scale: float

    @torch.no_grad()
    def sum(self) -> _Sum:
        """Rounds once, to the weight's dtype."""
        added = self.added().to(self.rows.device, torch.float32) * self.scale
        before = self.rows[self.index].clone()
        return _Sum(before, added, (before.float() + added).to(self.rows.dtype))

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        self.rows[self.index] = values


def _parts(model: Module, change: Change, scale: float = 1.0) -> Iterator[_Part]:
    config: Any = model.config
    kind = family(config)
    embedding, head = kind.weight("embedding", 0), kind.weight("head", 0)
    tied = (embedding, head) if config.tie_word_embeddings else ()
    if isinstance(change, Adapter):
        for module in change.factors:
            if f"{module}.weight" in tied:
                raise UserError(
                    f"adapter: changes {module}, but embedding and head are one weight in the model, and an adapter's"
                    " update is for one of the two alone; train it without"
                )
            yield _whole(model, f"{module}.weight", "adapter", partial(change.delta, module), scale)
    elif isinstance(change, DenseDelta):
        for name in change.weights:
            if name == head and tied:
                raise UserError(f"delta: {name} is {embedding} in the model, one weight; name it so, once")
            yield _whole(model, name, "delta", partial(change.weights.__getitem__, name), scale)
    else:
        sizes = geometry(config)
        for site, sparse in change.items():
            sparse.check(site, sizes)
            for pair, layer in enumerate(sparse.layers.tolist()):
                name = kind.weight(site, layer)
                rows = as_rows(model.get_parameter(name).detach(), site)
                index, added = sparse.per_weight_row(pair, site, sizes, kind)
                yield _Part(name, rows, index.to(rows.device), added.float, scale)


def _whole(model: Module, name: str, what: str, added: Callable[[], Tensor], scale: float) -> _Part:
    """The part of one whole weight.

    Raises:
        UserError: the model has no such weight.
    """
    try:
        weight = model.get_parameter(name).detach()
    except AttributeError:
        raise UserError(f"{what}: the model has no weight {name}; it belongs to another target") from None

    def fitting() -> Tensor:
        found = added()
        if found.shape != weight.shape:
            raise UserError(f"{what}: {name} is {list(weight.shape)} in the model, {list(found.shape)} in the {what}")
        return found

    return _Part(name, weight, slice(None), fitting, scale)


def _kind(change: Change) -> str:
    return "adapter" if isinstance(change, Adapter) else "delta"


def _report(parts: list[_Part], model: Module, what: str, allow_rounding_loss: bool) -> MergeReport:
    lost = total = 0.0
    num_changed = {}
    for part in parts:
        found = part.sum()
        # In float64, because the difference of two float32 weights would hide what float32 itself rounds away.
        added = found.added.double()
        lost += float((found.after.double() - found.before.double() - added).square().sum())
        total += float(added.square().sum())
        num_changed[part.name] = int((found.after != found.before).sum())
    if not total < float("inf"):
        raise UserError(f"the {what} holds NaN or infinity; nothing was injected")
    loss = (lost / total) ** 0.5 if total else 0.0
    dtype = str(model.dtype).removeprefix("torch.")
    if not loss <= ROUNDING_REFUSE and not allow_rounding_loss:
        raise UserError(
            f"rounding to {dtype} would lose {loss:.0%} of the {what}'s norm (limit {ROUNDING_REFUSE:.0%});"
            " choose a wider dtype (--dtype float32); inject and export take --allow-rounding-loss, too"
        )
    if not any(num_changed.values()):
        why = f"all of it was lost to rounding to {dtype}" if total else "it is zero"
        raise UserError(f"injecting the {what} would change no weight: {why}")
    return MergeReport(loss, sum(num_changed.values()), tuple(sorted(n for n, count in num_changed.items() if count)))
