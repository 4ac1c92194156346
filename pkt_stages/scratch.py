"""State of an unfinished run, so that a killed one goes on where it was and ends in the same bytes.

A run's folder is named after a fingerprint of everything that determines its result; any difference starts anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages.artifacts import write_json, written_whole
from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(values: Any, files: Sequence[Path]) -> str:
    """32 hexadecimal digits over JSON values and the files' contents."""
    total = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]


class _Folder:
    """What one run leaves, until it is whole."""

    def __init__(self, parent: Path, run: str) -> None:
        self.folder = parent / run

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


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
    """Saves a growing state so seldom that saving takes at most a tenth of the time; the first call always saves."""

    def __init__(self) -> None:
        self._saved, self._cost = 0.0, 0.0

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

    def publish(self, out: Path, steps: int) -> None:
        """Put the checkpoints of all steps into `out`, in place of those of an earlier run; all or none appear.

        Raises:
            UserError: `out` holds something else.
        """
        check_out(out)
        beside = out.with_name(f".{out.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for step in range(1, steps + 1):
            shutil.copyfile(self.checkpoint(step), beside / checkpoint_name(step))
        shutil.rmtree(out, ignore_errors=True)
        beside.replace(out)


def checkpoint_name(step: int) -> str:
    """File name of the mapping after a step (from 1)."""
    return f"step_{step:02d}.safetensors"


def check_out(out: Path) -> None:
    """Raise UserError if `out` holds anything but checkpoints, because publishing replaces the folder."""
    others = [p.name for p in out.iterdir() if not p.match("step_*.safetensors")] if out.is_dir() else []
    if others:
        raise UserError(f"{out}: holds {others[0]}, which is no checkpoint; give a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
