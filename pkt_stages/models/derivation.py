"""What a method without training works from, and what it leaves; the two ends of a `derive` in pkt_stages/methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkt_stages.errors import UserError
from pkt_stages.models.changes import Change, Changes
from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class Inputs:
    """What `pkt derive` was given; a method takes what it needs with `only`.

    Attributes:
        base: what the source's training began with.
        submatrices: file of `pkt seek`.
        correlation: folder of `pkt correlate`; gradients: of `pkt gradients`.
        delta: another row.
        examples: folder of examples, <task>/align.jsonl.
        texts: from `pkt texts`.
        device: what models run on, if the method runs any.
    """

    target: ModelRef | None = None
    source: ModelRef | None = None
    base: ModelRef | None = None
    submatrices: Path | None = None
    correlation: Path | None = None
    gradients: Path | None = None
    delta: Changes | None = None
    examples: Path | None = None
    texts: Path | None = None
    device: str = "cpu"

    def only(self, *names: str, spare: Sequence[str] = ()) -> tuple[Any, ...]:
        """These inputs in this order.

        Args:
            spare: what may be given and is not needed.

        Raises:
            UserError: one is missing, or there is another.
        """
        given = [name for name, value in vars(self).items() if name not in ("device", *spare) and value is not None]
        if set(given) != set(names):
            wanted, found = (" and ".join(f"--{name}" for name in some) for some in (names, given))
            raise UserError(f"the method takes {wanted}, nothing else; found {found or 'none'}")
        return tuple(getattr(self, name) for name in names)


@dataclass(frozen=True)
class Derived:
    """A row as a method makes it.

    Attributes:
        changes: of the target, by label; `delta` if there is one for all examples.
        target, source: identities (`load.identity`); None where it is unknown, or there is no source.
        meta: to note down about the row, as JSON values.
    """

    changes: Mapping[str, Change]
    target: Mapping[str, Any] | None
    source: Mapping[str, Any] | None
    meta: Mapping[str, Any] = field(default_factory=dict)
