"""Reading single weights of a checkpoint from disk, one at a time, so that no model need ever be loaded."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.load import ModelRef
from pkt_stages.models.sites import Geometry, as_rows, weight_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """A model's safetensors files, on disk or in the hub's cache."""

    def __init__(self, ref: ModelRef) -> None:
        self._ref = ref
        index = self._file(INDEX)
        self._files: dict[str, str] | None = None
        if index is not None:
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def neuron_rows(self, sizes: Geometry, layer: int, site: str, neurons: Tensor) -> Tensor:
        """The rows `[neuron, d_model]` of these neurons at a site, in the checkpoint's dtype."""
        weight = self.weight(weight_name(layer, site))
        return as_rows(weight, site)[sizes.weight_index(site, neurons)].contiguous()

    def names(self) -> list[str]:
        """The weights that are there, in alphabetical order.

        Raises:
            UserError: the checkpoint is not readable safetensors.
        """
        from safetensors import SafetensorError, safe_open

        if self._files is not None:
            return sorted(self._files)
        path = self._single(SINGLE)
        try:
            with safe_open(path, framework="pt") as file:
                return sorted(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None

    def weight(self, name: str) -> Tensor:
        """One whole weight.

        Raises:
            UserError: the checkpoint has no such weight or is not readable safetensors.
        """
        from safetensors import SafetensorError, safe_open

        path = self._single(self._files.get(name, SINGLE) if self._files is not None else SINGLE)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: weight {name} cannot be read ({' '.join(str(error).split())})") from None
        return tensor

    def _single(self, name: str) -> Path:
        path = self._file(name)
        if path is None:
            raise UserError(f"{self._ref.location}: holds no safetensors weights; convert the checkpoint first")
        return path

    def _file(self, name: str) -> Path | None:
        if self._ref.is_local:
            path = Path(self._ref.location) / name
            return path if path.is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(
            self._ref.location,
            name,
            revision=self._ref.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return Path(found) if found is not None else None
