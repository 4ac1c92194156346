"""Finished batches on disk, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pkt_stages.artifacts import write_json


class Scratch:
    """A folder of batch results, named by a fingerprint of everything that determines them."""

    def __init__(self, root: Path, facts: Any) -> None:
        """
        Args:
            root: where such folders lie; it may be shared between evaluations.
            facts: JSON: weights, prompts, decoding, backend, dtype, batch size.
        """
        text = json.dumps(facts, sort_keys=True)
        self._folder = root / f"evaluate-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def read(self, batch: int) -> Any:
        """A batch's result, or None if it is not there or was cut off."""
        try:
            return json.loads(self._path(batch).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, batch: int, result: Any) -> None:
        write_json(self._path(batch), result)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self._folder / f"batch_{batch:05}.json"
