"""State of an unfinished run, so that a killed one goes on where it was and ends in the same bytes.

A run's folder is named after a fingerprint of everything that determines its result, the code and the libraries that
compute it included; any difference starts anew. Every file carries a checksum over its content, its name and its run. A
damaged file, or one of another run, is set aside with a warning and never used; what it held is computed again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pkt_stages.artifacts import content_hash, replaced_folder, write_json, written_whole
from pkt_stages.errors import UserError

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


DIGEST = 32  # bytes
CHECKSUM = "checksum"  # key of a shard's metadata


def write_checked(path: Path, content: bytes | memoryview) -> None:
    """Write a file of scratch whole, behind a checksum that holds for this name in this folder.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(_digest(path, content))
        file.write(content)


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote there, or None if there is no such file; anything else is set aside."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    content = found[DIGEST:]
    if found[:DIGEST] == _digest(path, content):
        return content
    set_aside(path)
    return None


def _digest(path: Path, content: bytes | memoryview) -> bytes:
    total = hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode())
    total.update(content)
    return total.digest()


def set_aside(path: Path) -> None:
    """Rename a file or folder that is not what it should be, and say so."""
    aside = path.with_name(f"damaged-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    try:
        path.replace(aside)
    except FileNotFoundError:
        return  # another process of this run was faster
    print(f"pkt: warning: {path}: damaged, or of another run; set aside and made again", file=sys.stderr)


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
        """The unit's tensors on the CPU, or None if it is not there or not as it was written."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())  # of no dict
                tensors = {key: file.get_tensor(key) for key in keys}
                checksum = (file.metadata() or {}).get(CHECKSUM)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            checksum = None
        if checksum is not None and checksum == self._checksum(path, tensors):
            return tensors
        set_aside(path)
        return None

    def __setitem__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        path = self._path(name)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with written_whole(path) as temporary:  # not as `write_checked` does: what `seek` keeps is as large as a model
            save_file(tensors, temporary, metadata={CHECKSUM: self._checksum(path, tensors)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _checksum(self, path: Path, tensors: Mapping[str, Tensor]) -> str:
        from pkt_stages.models.load import weights_hash

        return _digest(path, weights_hash(dict(tensors)).encode()).hex()


def write_value(path: Path, value: Any) -> None:
    """Write JSON values as `write_checked` writes bytes."""
    write_checked(path, json.dumps(value, allow_nan=False).encode())


def read_value(path: Path) -> Any:
    """What `write_value` wrote there, or None."""
    content = read_checked(path)
    return None if content is None else json.loads(content)


class Batches(_Folder):
    """Finished batches of one run as JSON, by number."""

    def read(self, batch: int) -> Any:
        """A batch's result, or None if it is not there or not as it was written."""
        return read_value(self._path(batch))

    def write(self, batch: int, result: Any) -> None:
        write_value(self._path(batch), result)

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
        self._hashes: list[str] = []  # of the checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.folder / checkpoint_name(step)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state after one more step; a kill leaves the old one or the new one."""
        import torch

        self._hashes.append(self._unchanged(self.checkpoint(len(self._hashes) + 1), None))
        content = io.BytesIO()  # torch's own errors of a full disk say nothing of a disk
        torch.save({**state, "checkpoints": self._hashes}, content)
        write_checked(self._state, content.getbuffer())

    def last(self) -> dict[str, Any] | None:
        """The state of an unfinished run, or None; also where one of its checkpoints is not as it was written."""
        import torch

        content = read_checked(self._state)
        if content is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        hashes = state.pop("checkpoints")
        for step, expected in enumerate(hashes, start=1):
            path = self.checkpoint(step)
            if not path.is_file() or content_hash(path) != expected:
                set_aside(path if path.exists() else self._state)
                return None
        self._hashes = hashes
        return state

    def describe(self) -> str:
        """Where the last checkpoint lies, for an error's message."""
        found = sorted(self.folder.glob("step_*.safetensors"))
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def publish(self, out: Path, chosen: Mapping[str, Any]) -> None:
        """Put the checkpoints of all steps into `out`, in place of an earlier run's; all or none appear.

        Args:
            chosen: what to write beside them, as JSON: which of them to use.

        Raises:
            UserError: `out` holds something else, or a checkpoint has been removed or changed meanwhile.
        """
        with replaced_folder(out, CHOSEN) as folder:
            for step, expected in enumerate(self._hashes, start=1):
                path = self.checkpoint(step)
                self._unchanged(path, expected)
                shutil.copyfile(path, folder / path.name)
            write_json(folder / CHOSEN, chosen)

    def _unchanged(self, path: Path, expected: str | None) -> str:
        """The hash of a file, which is as expected if that is given; else UserError."""
        found = content_hash(path) if path.is_file() else ""
        if not found or found != (expected or found):
            raise UserError(f"{path}: was removed or changed while this ran; run again")
        return found


def checkpoint_name(step: int) -> str:
    """File name of the mapping after a step (from 1)."""
    return f"step_{step:02d}.safetensors"
