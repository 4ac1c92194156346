"""Asking a backend in batches, each of which is kept, so that an interrupted call goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pkt_stages.evaluation.backends import Backend
from pkt_stages.progress import track
from pkt_stages.scratch import Batches, fingerprint

T = TypeVar("T")


def in_batches(
    backend: Backend,
    items: Sequence[T],
    lengths: Sequence[int],
    ask: Callable[[list[T]], list[Any]],
    facts: Any,
    scratch: Path | None,
    used: list[Batches],
) -> list[Any]:
    """One result per item, in order.

    Batches are of similar length, longest first (so that memory runs out at once or never).

    Args:
        facts: what determines the results besides the backend, as JSON values.
        scratch: a folder for finished batches; without one nothing is kept.
        used: what is kept is added, for the caller to remove when it is done.
    """
    size = backend.batch_size
    order = sorted(range(len(items)), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    how = [backend.name, backend.dtype, backend.identity, size]
    kept = Batches(scratch, f"evaluate-{fingerprint([how, facts], [])}") if scratch else None
    used += [kept] if kept else []
    results: list[Any] = [None] * len(items)
    for number, batch in enumerate(track(batches, "asking the model")):
        found = kept.read(number) if kept else None
        if found is None:
            found = ask([items[i] for i in batch])
            if kept:
                kept.write(number, found)
        for i, result in zip(batch, found, strict=True):
            results[i] = result
    return results
