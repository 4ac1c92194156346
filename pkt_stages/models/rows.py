"""The one reader of a checkpoint: which files hold a model's weights, under which names, in which dtype.

Single weights are read from disk one at a time, so that no model need ever be loaded; `load.load_model` puts a whole
model together from the same weights, so that no stage can see others than the next one.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt_stages import hub
from pkt_stages.artifacts import DTYPES, FLOATS
from pkt_stages.errors import UserError, shown
from pkt_stages.models.load import ModelRef, load_config
from pkt_stages.models.sites import Geometry, as_rows, family


class Checkpoint:
    """The weights of a model of a supported architecture, by the names that the model itself has for them.

    Files may have them without the prefix `model.` (saved from the bare model), or with one more (from a wrapper), as
    transformers accepts it, and what transformers' class passes over is passed over. Embedding and head that are one
    weight are read by either name.

    Attributes:
        ref: which model.
        config: the model's; `family` its architecture.
        model_class: transformers' class for it.
        weights: what is stored, by name, not read yet: safetensors' slices, or tensors of a pickled checkpoint.
    """

    def __init__(self, ref: ModelRef, *, pickled: bool = False) -> None:
        """
        Args:
            pickled: read a pickled checkpoint instead, weights only (no code in it is run).

        Raises:
            UserError: as `load_config` and `weight_files`; files that are not readable, weights that are quantised, or
                not those of the config, in names or shapes.
        """
        self.ref, self.config = ref, load_config(ref)
        self.model_class, shapes = _described(ref, self.config)
        self.family, self.tied = family(self.config), bool(self.config.tie_word_embeddings)
        self._embedding, self._head = (self.family.weight(weight, 0) for weight in ("embedding", "head"))
        # Buffers of old checkpoints, which are computed nowadays.
        ignored = [r"\.inv_freq$", *(self.model_class._keys_to_ignore_on_load_unexpected or ())]
        self.weights: dict[str, Any] = {}
        self._files = weight_files(ref, pickled=pickled)
        self._renamed: list[str] = []
        for path in self._files:
            for stored, weight in (_unpickled(ref, path) if pickled else _slices(path)).items():
                plain = self._plain(stored)
                name = _model_name(plain, shapes, f"{self.family.base}.")
                if name not in shapes and any(re.search(pattern, name) for pattern in ignored):
                    continue
                if name in self.weights:
                    raise UserError(f"{path}: weight {stored} stands twice in the checkpoint")
                if _dtype(weight) not in FLOATS:
                    raise UserError(
                        f"{ref.location}: weight {stored} is stored as {_dtype(weight)}; expected one of"
                        f" {', '.join(FLOATS)}: quantised weights are not read, use the model that was quantised"
                    )
                self.weights[name] = weight
                if name != plain:
                    self._renamed.append(stored)
        if self.tied:
            self._join_tied(shapes)
        odd = [f"lacks {name}" for name in shapes if name not in self.weights]
        odd += [f"has {name} too many" for name in self.weights if name not in shapes]
        odd = odd or [
            f"has {name} of shape {list(_shape(weight))}, not {list(shapes[name])}"
            for name, weight in self.weights.items()
            if _shape(weight) != shapes[name]
        ]
        if odd:
            raise UserError(f"{ref.location}: not the weights that its config.json describes; it {min(odd)}")

    def _plain(self, stored: str) -> str:
        """A stored name as the model has it, where transformers calls weights otherwise on disk."""
        return next(
            (new + stored.removeprefix(old) for old, new in self.family.renamed.items() if stored.startswith(old)),
            stored,
        )

    def _join_tied(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Embedding and head are one: keep it by the embedding's name, whichever is stored."""
        del shapes[self._head]
        head = self.weights.pop(self._head, None)
        embedding = self.weights.get(self._embedding)
        if head is None:
            return
        if embedding is None:
            self.weights[self._embedding] = head
            self._renamed.append(self._head)
        elif _dtype(embedding) != _dtype(head) or not torch.equal(embedding[:], head[:]):
            raise UserError(
                f"{self.ref.location}: its config.json says that embedding and head are one weight"
                " (tie_word_embeddings), but both are stored and differ; set it to false if they are two"
            )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The stored weights' dtype; of several one that holds them all unrounded, with a warning."""
        found = sorted({_dtype(weight) for weight in self.weights.values()})
        widest = reduce(torch.promote_types, (getattr(torch, name) for name in found))
        if len(found) > 1:
            taken = f"dtype auto takes {str(widest).removeprefix('torch.')}, which rounds none of them"
            said = f"{self.ref.location}: weights are stored as {' and '.join(found)}; {taken}"
            print(f"pkt: warning: {said}", file=sys.stderr)
        return widest

    def oddity(self) -> str | None:
        """What a plainer reader, which takes every file in a folder and names as they are, would see in another way."""
        if self._renamed:
            return f"weight {self._renamed[0]} is not called so in the model"
        beside = sorted(set(self._files[0].parent.glob("*.safetensors")) - set(self._files))
        return f"holds {beside[0].name} beside its weights" if beside and len(self._files) == 1 else None

    def neuron_rows(self, sizes: Geometry, layer: int, site: str, neurons: Tensor) -> Tensor:
        """The rows `[neuron, d_model]` of these neurons at a site, in the checkpoint's dtype."""
        places = self.family.stored_index(site, sizes.weight_index(site, neurons), sizes)
        return as_rows(self.weight(self.family.weight(site, layer)), site)[places].contiguous()

    def names(self) -> list[str]:
        """The weights that are there, in alphabetical order."""
        return sorted(self.weights)

    def weight(self, name: str) -> Tensor:
        """One whole weight, as it is stored.

        Raises:
            UserError: the checkpoint has no such weight.
        """
        name = self._embedding if name == self._head and self.tied else name
        if name not in self.weights:
            raise UserError(f"{self.ref.location}: has no weight {name}")
        tensor: Tensor = self.weights[name][:]
        return tensor


def file_of(ref: ModelRef, name: str) -> Path | None:
    """A file of a model: in its folder, or in the hub's cache, where it is fetched to. None if there is none.

    Offline, what is not in the cache counts as not there.
    """
    if ref.is_local:
        path = Path(ref.location) / name
        return path if path.is_file() else None
    from huggingface_hub import is_offline_mode, try_to_load_from_cache
    from transformers.utils.hub import cached_file

    def fetch() -> Any:
        if is_offline_mode():
            return try_to_load_from_cache(ref.location, name, revision=ref.revision)
        return cached_file(ref.location, name, revision=ref.revision, _raise_exceptions_for_missing_entries=False)

    found = hub.explained(ref.location, ref.revision, fetch)
    return Path(found) if isinstance(found, str) else None


def weight_files(ref: ModelRef, *, pickled: bool = False) -> list[Path]:
    """The files that hold a model's weights, by name: one, or those that an index names. No other is ever read.

    Raises:
        UserError: there are none, the index is malformed or names files that are elsewhere or missing, or there are
            both a whole checkpoint and an index of another one.
    """
    suffix = ".bin" if pickled else ".safetensors"
    whole = f"pytorch_model{suffix}" if pickled else f"model{suffix}"
    single, index = file_of(ref, whole), file_of(ref, f"{whole}.index.json")
    if index is None:
        if single is not None:
            return [single]
        missing = f"{ref.location}: holds no {suffix[1:]} weights ({whole}, or {whole}.index.json)"
        if not ref.is_local:
            raise UserError(f"{missing}, or they are not in the local cache; `hf download {ref.location}` fetches them")
        raise UserError(missing if pickled else f"{missing}; `pkt convert` makes some of a pickled checkpoint")
    names = _indexed(index, suffix)
    if single is not None and names != [whole]:
        raise UserError(f"{ref.location}: holds {whole} and an index of other files; remove the one that is not meant")
    files = {name: file_of(ref, name) for name in names}
    for name, path in files.items():
        if path is None:
            raise UserError(f"{index}: names {name}, which is not there; fetch the model again")
    return [path for path in files.values() if path is not None]


def _indexed(index: Path, suffix: str) -> list[str]:
    """The files that the index of a split checkpoint names, all of them beside it, by name."""
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: not the index of a checkpoint; expected a mapping `weight_map` of weights to files")
    for name in named.values():
        if not isinstance(name, str) or not name.endswith(suffix) or Path(name).name != name:
            raise UserError(f"{index}: names {shown(name)}; expected {suffix[1:]} files in the same folder")
    return sorted(set(named.values()))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        UserError: it is not readable, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())[:300]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {shown(content)}")
    return content


def _described(ref: ModelRef, config: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """transformers' class for a config, and the shapes of its model's weights by name; takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = hub.explained(ref.location, ref.revision, lambda: AutoModelForCausalLM.from_config(config))
    return type(model), {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _model_name(stored: str, shapes: Mapping[str, Any], prefix: str) -> str:
    """The model's name of what a file calls so: as it is, with the prefix (`model.`) before it, or with one less."""
    shorter = stored.removeprefix(prefix)
    return next((name for name in (stored, prefix + stored, shorter) if name in shapes), stored)


def _slices(path: Path) -> dict[str, Any]:
    """What a safetensors file holds by name, not read yet."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())[:300]})") from None


def _unpickled(ref: ModelRef, path: Path) -> dict[str, Any]:
    """What a pickled file holds by name: tensors and nothing else, memory-mapped where its format allows it."""

    def load() -> dict[str, Any]:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"{path.name} holds something else than tensors by name")
        return found

    return hub.explained(ref.location, ref.revision, load)


def _dtype(weight: Any) -> str:
    """torch's name of a dtype, or the file's if it is none that a weight may have."""
    if isinstance(weight, Tensor):
        return str(weight.dtype).removeprefix("torch.")
    return DTYPES.get(weight.get_dtype(), str(weight.get_dtype()))


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape if isinstance(weight, Tensor) else weight.get_shape())
