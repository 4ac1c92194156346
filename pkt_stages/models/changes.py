"""The one door for what a method leaves behind: a row of the table, as changes of the target by label.

A row is a folder: `changes.json` says what made it and lists its changes (one per transfer example, seed, ...), each in
a file or folder beside it. A change is sparse (rows at some neurons), low-rank (a LoRA adapter, in PEFT's format) or
dense (whole weights), always relative to the target's ORIGINAL weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pkt_stages import artifacts, hub
from pkt_stages.errors import UserError, printable, shown
from pkt_stages.models import load
from pkt_stages.models.adapters import CONFIG, WEIGHTS, Adapter, base_of, is_adapter, load_adapter, save_adapter
from pkt_stages.models.inject import Delta, SparseDelta

LIST = "changes.json"
# What a row's metadata always has. `command` made it, for the `method` of the params (or None); `target` and `source`
# (or None) are `load.identity`; `params` are the settings in force.
META = {"command": str, "method": str | None, "target": dict | None, "source": dict | None, "params": dict}
ChangeKind = Literal["sparse", "low_rank", "dense"]


@dataclass(frozen=True)
class DenseDelta:
    """What to add to whole weights.

    Attributes:
        weights: by the weight's name in the model (`model.layers.0.mlp.up_proj.weight`), [out, in]; float32 as made.
    """

    weights: Mapping[str, Tensor]


Change = Delta | Adapter | DenseDelta


@dataclass(frozen=True)
class Stored:
    """A change on disk, read when asked for.

    Attributes:
        path: its file, or its folder if it is low-rank.
        facts: what was noted down about it, as JSON values.
    """

    label: str
    kind: ChangeKind
    path: Path
    facts: Mapping[str, Any]

    def load(self) -> Change:
        """The change; the weights of a dense one are read one by one when asked for.

        Raises:
            UserError: as `artifacts.load` and `load_adapter`.
        """
        if self.kind == "low_rank":
            return load_adapter(self.path)
        if self.kind == "dense":
            return DenseDelta(_Tensors(artifacts.load(self.path, artifacts.DENSE_DELTA)))
        tensors = artifacts.load(self.path, artifacts.DELTA).tensors()
        sites = sorted({name.partition(".")[0] for name in tensors})
        return {s: SparseDelta(*(tensors[f"{s}.{name}"] for name in ("layers", "neurons", "rows"))) for s in sites}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of all that decides what the change does, hexadecimal."""
        if self.kind != "low_rank":
            return artifacts.content_hash(self.path)
        both = "".join(artifacts.content_hash(self.path / name) for name in (CONFIG, WEIGHTS))
        return hashlib.sha256(both.encode()).hexdigest()


class _Tensors(Mapping[str, Tensor]):
    """An artifact's tensors, each read when asked for."""

    def __init__(self, artifact: artifacts.Artifact) -> None:
        self._artifact = artifact

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._artifact.shapes:
            raise KeyError(name)
        return self._artifact[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifact.shapes)

    def __len__(self) -> int:
        return len(self._artifact.shapes)


@dataclass(frozen=True)
class Changes:
    """A row, or a single change that somebody gives.

    Attributes:
        path: where it lies.
        meta: what made it (`META`, and more); empty if that is unknown.
        items: the changes by label, in order.
    """

    path: Path
    meta: Mapping[str, Any]
    items: Mapping[str, Stored]

    def one(self, wanted: str | None) -> Stored:
        """A change by its label, or by its number from 0; the only one if nothing is wanted.

        Raises:
            UserError: there is none, or there are several.
        """
        labels = list(self.items)
        if wanted is None and len(labels) > 1:
            raise UserError(f"{self.path}: holds {len(labels)} runs; choose one with --run: {', '.join(labels)}")
        if wanted in self.items:
            return self.items[str(wanted)]
        number = 0 if wanted is None else int(wanted) if wanted.isdecimal() else len(labels)
        if number >= len(labels):
            raise UserError(f"{self.path}: has no run {wanted!r}; found {', '.join(labels)}")
        return self.items[labels[number]]

    def check_target(self, found: Mapping[str, Any], *, any_base: bool = False) -> None:
        """That these are changes of the weights `found` (see `load.identity`); one line on stderr if nobody can tell.

        Weights are compared by content, or by the hub's commit; where a stranger's adapter has nothing but its base
        model's name, the last part of the name.

        Args:
            any_base: other weights are warned of only.

        Raises:
            UserError: they were made for others.
        """
        made_for = self.meta.get("target")
        if not isinstance(made_for, dict):
            print(f"pkt: warning: {self.path}: says nothing of the model that it was made for", file=sys.stderr)
            return
        expected = _looked_up(made_for)
        if load.is_same(expected, found) or (expected.get("revision") is None and _alike(expected, found)):
            return
        revision = expected.get("revision") or "an unknown revision"
        said = f"{self.path}: made for the target {expected.get('name')} at {revision}, found {found['name']} at"
        if not any_base:
            raise UserError(f"{said} {found['revision']}; give its own target, or insist with --any-base")
        print(f"pkt: warning: {printable(said)} {found['revision']} (--any-base)", file=sys.stderr)

    def made(self) -> dict[str, Any]:
        """What made it, with the `facts` of each change by label, as JSON values."""
        return {**self.meta, "facts": {label: dict(stored.facts) for label, stored in self.items.items()}}


def _looked_up(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """An identity that is a path of this machine and no more, by the content of what lies there."""
    name = identity.get("name")
    if identity.get("revision") is None and isinstance(name, str) and (Path(name) / "config.json").is_file():
        try:
            return load.identity(load.resolve(name))
        except UserError:  # no model any more
            return identity
    return identity


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two names may be one model's: two on the hub are equal, else their last parts are."""
    names = [str(identity.get("name")).rstrip("/").casefold() for identity in (one, other)]
    return (
        names[0] == names[1] if all(map(hub.is_repo_name, names)) else len({n.rpartition("/")[2] for n in names}) == 1
    )


def write_changes(
    out: Path,
    changes: Mapping[str, Change],
    meta: Mapping[str, Any],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a row; the folder `out` appears whole or not at all, in place of an earlier row.

    Args:
        changes: by label, in order.
        meta: JSON values; has at least `META`.
        facts: of changes, by label, JSON values.

    Raises:
        UserError: `out` holds something else or cannot be written, or a tensor holds NaN or infinity.
    """
    facts = facts or {}
    assert changes and set(META) <= set(meta) and set(facts) <= set(changes)
    entries = []
    with artifacts.replaced_folder(out, LIST) as folder:
        for place, (label, change) in enumerate(changes.items()):
            about = dict(facts.get(label, {}))
            assert not {"label", "kind", "file"} & (set(about) | set(meta))
            # A file says itself what it is, since it is handed on alone, too.
            whole = {**meta, **about, "label": label}
            if isinstance(change, Adapter):
                # Labels are ids from anywhere; those of adapters are mostly names like seed_0.
                kind, file = "low_rank", label if re.fullmatch(r"\w[\w-]*", label, re.ASCII) else f"adapter_{place}"
                assert not (folder / file).exists(), file
                save_adapter(folder / file, change, str(meta["target"]["name"]), meta["target"])
            elif isinstance(change, DenseDelta):
                kind, file = "dense", f"delta_{place}.safetensors"
                artifacts.save(folder / file, artifacts.DENSE_DELTA, change.weights, whole)
            else:
                kind, file = "sparse", f"delta_{place}.safetensors"
                artifacts.save(folder / file, artifacts.DELTA, _tensors(change), whole)
            entries.append({**about, "label": label, "kind": kind, "file": file})
        artifacts.write_json(folder / LIST, {**meta, "changes": entries})


def rounded(change: DenseDelta, dtype: str) -> tuple[DenseDelta, float]:
    """Whole weights in a dtype of torch's, and ||rounded - exact|| / ||exact|| over all of them (0 for no change)."""
    lost = total = 0.0
    made = {}
    for name, exact in change.weights.items():
        made[name] = exact.to(getattr(torch, dtype))
        lost += float((made[name].double() - exact.double()).square().sum())
        total += float(exact.double().square().sum())
    return DenseDelta(made), (lost / total) ** 0.5 if total else 0.0


def _tensors(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a `delta` artifact, none of which share memory."""
    return {
        f"{site}.{name}": tensor.clone()
        for site, part in delta.items()
        for name, tensor in (("layers", part.layers), ("neurons", part.neurons), ("rows", part.rows))
    }


def read_changes(path: Path) -> Changes:
    """Open a row, or a bare change: a PEFT adapter's folder, or the file of a delta; called like the folder or file.

    Raises:
        UserError: nothing of the kind, a damaged list of changes, one that names files which are missing or elsewhere.
    """
    if (path / LIST).is_file():
        return _listed(path)
    if is_adapter(path):
        base = base_of(path)
        meta = {"target": base} if base is not None else {}
        return Changes(path, meta, {path.name: Stored(path.name, "low_rank", path, {})})
    if path.is_dir():
        raise UserError(
            f"{path}: a folder without {LIST} and no PEFT adapter; expected what a method of the table made"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; expected a row's folder, a PEFT adapter or a delta")
    kind = artifacts.kind_of(path, (artifacts.DELTA, artifacts.DENSE_DELTA))
    dense, said = kind is artifacts.DENSE_DELTA, artifacts.load(path, kind).meta
    meta = {key: said[key] for key in META if key in said}
    _check_meta(path, meta)
    facts = {key: value for key, value in said.items() if key not in (*META, "kind", "schema_version", "label")}
    return Changes(path, meta, {path.stem: Stored(path.stem, "dense" if dense else "sparse", path, facts)})


def changes_of(path: Path, target: Mapping[str, Any], *, any_base: bool = False) -> Changes:
    """Open changes that are to be applied to a model: the door of every command that does so.

    Args:
        target: the model's identity.
        any_base: insist on changes that were made for another one.

    Raises:
        UserError: as `read_changes`, and `Changes.check_target`.
    """
    found = read_changes(path)
    found.check_target(target, any_base=any_base)
    return found


def _listed(folder: Path) -> Changes:
    """The row whose list of changes lies in this folder."""
    path = folder / LIST
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())}); make the row again") from None
    if not isinstance(found, dict) or (missing := [key for key in (*META, "changes") if key not in found]):
        lacks = f"it lacks {missing[0]!r}" if isinstance(found, dict) else f"it is a {type(found).__name__}"
        raise UserError(f"{path}: no list of changes ({lacks}); make the row again")
    _check_meta(path, found)
    entries = found.pop("changes")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: `changes`: expected a list with at least one change; make the row again")
    items: dict[str, Stored] = {}
    for place, entry in enumerate(entries):
        stored = _entry(path, place, entry)
        if stored.label in items:
            raise UserError(f"{path}: two changes are called {stored.label!r}; make the row again")
        items[stored.label] = stored
    return Changes(folder, found, items)


def _check_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise UserError unless what is said of a row has the types that `META` gives."""
    for key, kind in META.items():
        if key in meta and not isinstance(meta[key], kind):
            raise UserError(f"{path}: `{key}`: found {shown(meta[key])}; make the row again")


def _entry(path: Path, place: int, entry: Any) -> Stored:
    facts = dict(entry) if isinstance(entry, dict) else {}
    label, kind, file = (facts.pop(key, None) for key in ("label", "kind", "file"))
    if not isinstance(label, str) or not isinstance(file, str):
        raise UserError(f"{path}: change {place}: expected texts `label`, `kind` and `file`; make the row again")
    if kind not in get_args(ChangeKind):
        known = ", ".join(get_args(ChangeKind))
        raise UserError(f"{path}: change {label!r}: unknown kind {kind!r}; expected one of {known}")
    if file in ("", "..") or Path(file).name != file:
        raise UserError(f"{path}: change {label!r}: names {file!r}; expected a file or folder beside it")
    there = path.parent / file
    if not (is_adapter(there) if kind == "low_rank" else there.is_file()):
        raise UserError(f"{there}: not there, or no {kind} change, but {path} names it; fetch or make the row again")
    return Stored(label, kind, there, facts)
