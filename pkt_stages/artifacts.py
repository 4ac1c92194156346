"""The only door to safetensors artifacts: every kind declares its tensors, and both directions check them.

All metadata is one safetensors key holding canonical JSON, because several keys are written in random order and equal
runs would then hash differently. It never holds a time, host, user or path. Files are written beside their
destination, flushed to disk and renamed, so a reader sees the old file, the new file, or none.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
METADATA_KEY = "pkt"
FLOATS = ("float32", "float16", "bfloat16", "float64")  # what weights are stored as


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's allowed dtypes and the names of its dimensions; equal names mean equal sizes within one file.

    `dims` is None where any shape will do.
    """

    dtypes: tuple[str, ...]
    dims: tuple[str, ...] | None


@dataclass(frozen=True)
class Kind:
    """A kind of artifact: what makes it, and its tensors by name; `{x}` in a name stands for any word.

    A placeholder used in a dimension's name, as in `union_{layer}`, ties that dimension to the word it matched. `{any}`
    stands for any name.

    The kinds are constants of this module and in no list: a new one changes the code of no stage but its own.
    """

    name: str
    made_by: str
    tensors: Mapping[str, TensorSpec]


def _spec(dtypes: str | tuple[str, ...], *dims: Any) -> TensorSpec:
    """The spec of a tensor; `...` for dimensions: any shape."""
    return TensorSpec((dtypes,) if isinstance(dtypes, str) else dtypes, None if dims == (...,) else dims)


# Scores and gains in nats; tokens and neurons as indices. One score tensor per variant of lens and coefficient.
ATTRIBUTION = Kind(
    "attribution",
    "pkt attribute",
    {
        "predicted_token": _spec("int64", "example"),
        "ffn_scores.{norm}": _spec("float32", "example", "layer", "ffn_neuron"),
        "attn_scores.{norm}.{coefficient}": _spec("float32", "example", "layer", "attn_neuron"),
        "ffn_gain.{norm}": _spec("float32", "example", "layer"),
        "attn_gain.{norm}": _spec("float32", "example", "layer"),
        "top_neurons.{sublayer}": _spec("int64", "example", "top", "layer_and_neuron"),
        "top_tokens.{sublayer}": _spec("int64", "example", "top", "lens_token"),
    },
)
# Which source neuron goes to which target neuron, for each variant of the selection; rank r maps to rank r. The random
# neurons serve a control; there may be none.
SELECTION = Kind(
    "selection",
    "pkt select",
    {
        f"{{variant}}.{sublayer}_{what}": _spec("int64", "example", f"{sublayer}_layer_pair", *rest)
        for sublayer in ("ffn", "attn")
        for what, rest in (
            ("layers", ("source_and_target",)),
            ("source_neurons", (f"{sublayer}_rank",)),
            ("target_neurons", (f"{sublayer}_rank",)),
        )
    }
    | {
        f"{sublayer}_random_neurons": _spec("int64", "source_layer", f"{sublayer}_random_rank")
        for sublayer in ("ffn", "attn")
    },
)
# The source's rows at the selected neurons, once per layer: row i belongs to neurons.{sublayer}.{layer}[i].
SOURCE_ROWS = Kind(
    "source_rows",
    "pkt select",
    {
        "neurons.{sublayer}.{layer}": _spec("int64", "union_{sublayer}_{layer}"),
        "ffn_up.{layer}": _spec(FLOATS, "union_ffn_{layer}", "d_source"),
        "ffn_down.{layer}": _spec(FLOATS, "union_ffn_{layer}", "d_source"),
        "attn_v.{layer}": _spec(FLOATS, "union_attn_{layer}", "d_source"),
        "attn_o.{layer}": _spec(FLOATS, "union_attn_{layer}", "d_source"),
    },
)
# Seeking's extraction: per target layer its source layer, and per weight the sub-matrix of the source's weight (as the
# checkpoint stores it, [out, in]) of the target's shape, with the row and column where it begins.
SUBMATRICES = Kind(
    "submatrices",
    "pkt seek",
    {
        "layers": _spec("int64", "target_layer"),
        "layer_sensitivity": _spec("float64", "source_layer"),
        "{weight}.corner": _spec("int64", "submatrices_{weight}", "row_and_column"),
        # Blocks are `submatrix`, the densest, and those of more_blocks.
        "{weight}.{block}.{layer}": _spec(FLOATS, "out_{weight}", "in_{weight}"),
    },
)
# Linear CKA between the outputs of a site's projection, every layer of one model with every layer of another.
CKA = Kind("cka", "pkt compare", {"cka.{site}": _spec("float64", "first_layer", "second_layer")})
# Cosine similarities of a LoRA update by layer: the mean over neuron rows, and of the flattened matrices.
SIMILARITY = Kind(
    "similarity", "pkt compare", {"{site}.{moment}.{against}": _spec("float64", "layer", "rows_and_flat")}
)
# Ranges of deltas; the metadata names weights and statistics. The histogram's first and last bin are open.
DELTA_RANGES = Kind(
    "delta_ranges",
    "pkt compare",
    {
        "edges": _spec("float64", "edge"),
        "statistics": _spec("float64", "weight", "statistic"),
        "counts": _spec("int64", "weight", "bin"),
    },
)
# What a pair of layers of two models computes on the same tokens, at the inputs of its projections: sums over tokens of
# products and of either side's values, and of either side's own products the diagonal and the heads' blocks.
CORRELATION = Kind(
    "correlation",
    "pkt correlate",
    {
        "{input}.cross": _spec(("float64", "float32"), "source_{input}", "target_{input}"),
        "{input}.{side}.sum": _spec("float64", "{side}_{input}"),
        "{input}.{side}.squares": _spec("float64", "{side}_{input}"),
        "{input}.{side}.heads": _spec("float64", "{side}_head", "{side}_d_head", "{side}_d_head"),
    },
)
FINAL_CORRELATION = Kind(
    "final_correlation",
    "pkt correlate",
    {name: spec for name, spec in CORRELATION.tensors.items() if not name.endswith("heads")},
)
# The same of the gradient of the answers' loss at the outputs of projections and of the norms in front of them.
GRADIENTS = Kind("gradients", "pkt gradients", FINAL_CORRELATION.tensors)
# All of either side's own sums of products, which whitening needs.
GRAMS = Kind(
    "grams", "pkt correlate", {"{input}.{side}": _spec(("float64", "float32"), "{side}_{input}", "{side}_{input}")}
)
# The weights of a mapping from source rows to target rows; their names and shapes are the mapping's own.
MAPPING = Kind("mapping", "pkt align", {"{any}": _spec("float32", ...)})
# Rows to add to the target's neurons; layers and neurons count in the target.
DELTA = Kind(
    "delta",
    "pkt inject",
    {
        "{site}.layers": _spec("int64", "layer_pair_{site}"),
        "{site}.neurons": _spec("int64", "layer_pair_{site}", "rank_{site}"),
        "{site}.rows": _spec("float32", "layer_pair_{site}", "rank_{site}", "d_target"),
    },
)
# What to add to whole weights, by their names in the model.
DENSE_DELTA = Kind("dense_delta", "pkt derive", {"{any}": _spec(("float32", "float16", "bfloat16"), ...)})


def save(path: Path, kind: Kind, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write an artifact after checking it against its kind.

    Args:
        path: where; folders are made. Nothing is left there if writing fails.
        kind: a constant of this module.
        tensors: by name; made contiguous and moved to the CPU.
        meta: JSON values: models with revision, params, units. No time, host, user or path.

    Raises:
        UserError: a non-finite value, or the disk is full. AssertionError: tensors that do not fit the kind.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    problem = _mismatch(kind, described)
    assert problem is None, f"{kind.name}: {problem}"
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(f"{path}: tensor {name} holds NaN or infinity; not written (look at the inputs' weights)")
    header = {"kind": kind.name, "schema_version": SCHEMA_VERSION, **meta}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    with written_whole(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata={METADATA_KEY: text}))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def flush(path: Path) -> None:
    """Return when the file's content is on the disk: a name that it gets afterwards never stands for less."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> Exception:
    """What to raise in place of an error of writing; the error itself if it says nothing of the path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free space and run again (nothing was written)")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EFBIG):
        return UserError(f"{path}: cannot be written ({os.strerror(error.errno)})")
    return error


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left; one that lives keeps its own."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            continue  # not ours, or another user's


@contextmanager
def replaced_folder(out: Path, mark: str) -> Iterator[Path]:
    """A new folder that takes the place of `out` in the end; all that was put into it appears, or nothing.

    Args:
        mark: a file that each such folder holds, by which an earlier one is known; nothing else is replaced.

    Raises:
        UserError: `out` is a file or a folder of something else, or cannot be written.
    """
    check_replaceable(out, mark)
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        assert (beside / mark).is_file(), mark
        for path in beside.rglob("*"):
            if path.is_file():
                shutil.copymode(beside / mark, path)  # safetensors keeps what it writes for its owner alone
                flush(path)
        shutil.rmtree(out, ignore_errors=True)
        beside.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_replaceable(out: Path, mark: str) -> None:
    """Raise UserError if `replaced_folder` would refuse `out`; for a look before a long computation."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
    others = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if others and not (out / mark).is_file():
        raise UserError(f"{out}: holds {others[0]} and no {mark}, so it is not ours to replace; give a new folder")


def write_json(path: Path, value: Any) -> None:
    """Write canonical, readable JSON (sorted keys) whole."""
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which are NaN if any value is, in a tenth of the time that
    `isfinite` takes."""
    import torch

    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Metadata(dict[str, Any]):
    """An object of a file's metadata; to ask for a key that it lacks is a UserError, for the file is to blame.

    Attributes:
        lacks: the message, up to the key.
    """

    def __init__(self, lacks: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.lacks = lacks

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.lacks} {key!r}")


@dataclass(frozen=True)
class Artifact:
    """An open artifact: metadata at hand, tensors read from disk when asked for."""

    path: Path
    meta: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise UserError(f"{self.path}: has no tensor {name}; found {', '.join(sorted(self.shapes)) or 'none'}")
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self.shapes}


def load(path: Path, kind: Kind) -> Artifact:
    """Open an artifact and check it against its kind; tensors are read lazily.

    Raises:
        UserError: naming path, what was expected, what was found, and the command that makes such a file.
    """
    from safetensors import SafetensorError, safe_open

    made_by = kind.made_by
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a {kind.name} artifact, made by `{made_by}`")
    try:
        file = safe_open(path, framework="pt")
        raw = (file.metadata() or {}).get(METADATA_KEY)
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        described = {n: (DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a readable safetensors file ({reason}); expected a {kind.name} artifact,"
            f" make it again with `{made_by}`"
        ) from None
    try:
        lacks = f"{path}: make it again with `{made_by}`; its metadata lack"
        meta = json.loads(raw, object_hook=partial(Metadata, lacks)) if raw is not None else None
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or "kind" not in meta:
        raise UserError(f"{path}: a safetensors file without this project's metadata; expected a {kind.name} artifact")
    if meta["kind"] != kind.name:
        raise UserError(f"{path}: expected a {kind.name} artifact (made by `{made_by}`), found {meta['kind']}")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {meta.get('schema_version')};"
            f" make it again with `{made_by}`"
        )
    problem = _mismatch(kind, described)
    if problem is not None:
        raise UserError(f"{path}: {problem}; make it again with `{made_by}`")
    return Artifact(path, meta, {name: shape for name, (_, shape) in described.items()}, file)


def kind_of(path: Path, among: Sequence[Kind]) -> Kind:
    """The kind that a file says it is.

    Raises:
        UserError: missing, not readable, or no artifact of one of these kinds.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an artifact (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None
    kind = meta.get("kind") if isinstance(meta, dict) else None
    known = {value.name: value for value in among}
    if not isinstance(kind, str) or kind not in known:
        found = f"kind {kind!r}" if kind is not None else "no metadata of this project"
        raise UserError(f"{path}: expected an artifact of a kind among {', '.join(known)}; found {found}")
    return known[kind]


# safetensors' names.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32"}


def _mismatch(kind: Kind, described: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """What is wrong with these tensors (name -> dtype, shape) as an artifact of this kind; None if nothing is."""
    patterns = {name: re.compile(_pattern(name)) for name in kind.tensors}
    sizes: dict[str, tuple[int, str]] = {}
    used: set[str] = set()
    for name, (dtype, shape) in sorted(described.items()):
        found = [(p, m) for p, regex in patterns.items() if (m := regex.fullmatch(name))]
        # A literal name wins over a pattern that happens to match it.
        found.sort(key=lambda pair: "{" in pair[0])
        if not found:
            return f"unexpected tensor {name} in a {kind.name} artifact"
        pattern, match = found[0]
        used.add(pattern)
        spec = kind.tensors[pattern]
        if dtype not in spec.dtypes:
            return f"tensor {name}: expected {' or '.join(spec.dtypes)}, found {dtype}"
        if spec.dims is None:
            continue
        if len(shape) != len(spec.dims):
            return f"tensor {name}: expected dimensions [{', '.join(spec.dims)}], found shape {list(shape)}"
        for dim, size in zip(spec.dims, shape, strict=True):
            dim = dim.format(**match.groupdict())
            known, where = sizes.setdefault(dim, (size, name))
            if known != size:
                return f"tensor {name}: {dim} is {size}, but {known} in {where}"
    missing = set(patterns) - used
    if missing:
        return f"tensor {min(missing)} is missing from a {kind.name} artifact"
    return None


def _pattern(name: str) -> str:
    if name == "{any}":
        return ".+"
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(name))
