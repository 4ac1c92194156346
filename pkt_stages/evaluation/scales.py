"""The factors of a row's changes as a file, between `pkt scale`, which chooses them, and who applies them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from pkt_stages.models.changes import Stored


def read_scales(path: Path, changes: Mapping[str, Stored]) -> dict[str, float]:
    """The factor of each change, by label.

    Raises:
        UserError: not such a file, or one for other changes.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        chosen = {label: (float(one["scale"]), str(one["change"])) for label, one in content["chosen"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path}: no readable factors ({why}); make them with `pkt scale`") from None
    for label, stored in changes.items():
        if label not in chosen or chosen[label][1] != stored.content_hash:
            raise UserError(f"{path}: has no factor for {stored.path} as it is; run `pkt scale` on it")
    return {label: chosen[label][0] for label in changes}
