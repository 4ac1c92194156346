"""State of an unfinished run, so that a killed one goes on where it was and ends in the same bytes.

A run's folder is named after a fingerprint of everything that determines its result, the code and the libraries that
compute it included; any difference starts anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pkt_stages.artifacts import content_hash, replaced_folder, write_json, written_whole

if TYPE_CHECKING:
    from torch import Tensor


# What can change a result; the rest of the package is plumbing.
CODE = ("core", "models", "methods", "evaluation", "tasks", "stages", "encoding.py", "templates.py")
LIBRARIES = ("torch", "transformers", "peft", "trl")
CHOSEN = "chosen.json"  # what a folder of published steps holds beside them


def fingerprint(values: Any, files: Sequence[Path]) -> str:
    """32 hexadecimal digits over JSON values, the files' contents, and what computes with them."""
    total = hashlib.sha256(json.dumps([values, _computing()], sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]


@functools.cache
def _computing() -> dict[str, str]:
    """Versions of the libraries, and a hash of each module and task file of the package's science."""
    root = Path(__file__).parent
    found = [path for name in CODE for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    code = {str(p.relative_to(root)): content_hash(p) for p in found if p.suffix in (".py", ".yaml")}
    return code | {name: version(name) for name in LIBRARIES}


class _Folder:
    """What one run leaves, until it is whole."""

    def __init__(self, parent: Path, run: str) -> None:
        self.folder = parent / run

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Units(Protocol):
    """Finished parts of the work by name, each some tensors: a dict, or `Shards`."""

    def get(self, name: str) -> dict[str, Tensor] | None: ...

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None: ...


class Shards(_Folder):
    """Finished units of one run as files of tensors, by name; processes that share the folder see each other's."""

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The unit's tensors on the CPU, or None if it is not there or not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self._path(name).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def __setitem__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with written_whole(self._path(name)) as temporary:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


class Batches(_Folder):
    """Finished batches of one run as JSON, by number."""

    def read(self, batch: int) -> Any:
        """A batch's result, or None if it is not there or was cut off."""
        try:
            return json.loads(self._path(batch).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, batch: int, result: Any) -> None:
        write_json(self._path(batch), result)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:05}.json"


class Seldom:
    """Saves a state so seldom that saving takes about a tenth of the time; before the first time a GB counts as 1 s."""

    def __init__(self, num_bytes: int) -> None:
        self._saved, self._cost = time.perf_counter(), num_bytes / 1e9

    def __call__(self, save: Callable[[], None]) -> None:
        start = time.perf_counter()
        if start - self._saved < 10 * self._cost:
            return
        save()
        self._saved = time.perf_counter()
        self._cost = self._saved - start


class Steps(_Folder):
    """A checkpoint of one run per step, and the state after the last one."""

    def __init__(self, parent: Path, run: str) -> None:
        super().__init__(parent, run)
        self._state = self.folder / "state.pt"

    def checkpoint(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state; a kill leaves the old one or the new one."""
        import torch

        with written_whole(self._state) as temporary:
            torch.save(dict(state), temporary)

    def last(self) -> dict[str, Any] | None:
        """The state of an unfinished run, or None."""
        import torch

        if not self._state.is_file():
            return None
        state: dict[str, Any] = torch.load(self._state, map_location="cpu", weights_only=True)
        return state

    def describe(self) -> str:
        """Where the last checkpoint lies, for an error's message."""
        found = sorted(self.folder.glob("step_*.safetensors"))
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def publish(self, out: Path, steps: int, chosen: Mapping[str, Any]) -> None:
        """Put the checkpoints of all steps into `out`, in place of an earlier run's; all or none appear.

        Args:
            chosen: what to write beside them, as JSON: which of them to use.

        Raises:
            UserError: `out` holds something else.
        """
        with replaced_folder(out, CHOSEN) as folder:
            for step in range(1, steps + 1):
                shutil.copyfile(self.checkpoint(step), folder / checkpoint_name(step))
            write_json(folder / CHOSEN, chosen)


def checkpoint_name(step: int) -> str:
    """File name of the mapping after a step (from 1)."""
    return f"step_{step:02d}.safetensors"
