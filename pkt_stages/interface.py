"""The public Python interface: a row's changes, a model with one of them, scores and predictions (docs/using.md).

Each is imported from the package itself, `from pkt_stages import load_delta`. What is wrong with an input is a
`pkt_stages.UserError`, whose text is one line that says what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages.errors import UserError, shown

if TYPE_CHECKING:
    from pkt_stages.models.changes import Change, Changes

STEPS = "steps"  # evaluations after every step of an alignment, which are rows of no table


@dataclass(frozen=True)
class LoadedDelta(Mapping[str, "Change"]):
    """What a method made of a target, by label (a transfer example, a seed, ...); each is read when asked for.

    A value is one of three, always relative to the target's original weights:

    - sparse: by site (ffn_up, ffn_down, attn_v, attn_o) an object with `layers` [layer_pair], `neurons`
      [layer_pair, k] and `rows` [layer_pair, k, d_target] float32;
    - low-rank: an object with `factors`, by module A [r, in] and B [out, r], and `alpha`; the change is alpha / r B A;
    - dense: an object with `weights`, by name [out, in] float32.

    Attributes:
        path: where it lies.
    """

    path: Path

    @cached_property
    def changes(self) -> Changes:
        from pkt_stages.models.changes import read_changes

        return read_changes(self.path)

    @property
    def meta(self) -> Mapping[str, Any]:
        """What made it: `command`, `method`, `target`, `source` (name and revision), `params`; empty if unknown."""
        return self.changes.meta

    @property
    def kinds(self) -> dict[str, str]:
        """By label: sparse, low_rank or dense."""
        return {label: stored.kind for label, stored in self.changes.items.items()}

    @property
    def facts(self) -> dict[str, Mapping[str, Any]]:
        """By label what was noted down of a change: its step, seed, ranges, ..."""
        return {label: stored.facts for label, stored in self.changes.items.items()}

    def __getitem__(self, label: str) -> Change:
        return self.changes.items[label].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes.items)

    def __len__(self) -> int:
        return len(self.changes.items)


def load_delta(path: str | Path) -> LoadedDelta:
    """Open a row's folder (`transfer/...`), a single delta (.safetensors) or a PEFT adapter's folder.

    Raises:
        UserError: it is none of these, or damaged.
    """
    found = LoadedDelta(Path(path))
    len(found)  # which opens it
    return found


def merge(
    model: Any,
    delta: LoadedDelta | str | Path,
    scale: float = 1.0,
    *,
    run: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    allow_rounding_loss: bool = False,
) -> Any:
    """A transformers model with a change added to its weights, in float32 and rounded once.

    Args:
        model: a model's folder or hub name (`owner/name@revision`); or a transformers model, which stays as it is and
            is taken for what it was loaded from.
        delta: from `load_delta`, or its path.
        scale: what the change is multiplied by.
        run: its label (or number from 0), where there are several.
        dtype, device: of a model that is loaded here; auto: as it is stored.
        allow_rounding_loss: go on where rounding loses over half of the change's norm.

    Raises:
        UserError: the change was made for other weights, does not fit, or would change nothing; or a model that does
            not say from which folder or repository it is.
    """
    from pkt_stages.models.load import identity, load_model, resolve
    from pkt_stages.models.merge import merge as add

    opened = delta if isinstance(delta, LoadedDelta) else load_delta(delta)
    is_place = isinstance(model, (str, Path))
    ref = resolve(str(model) if is_place else _origin(model))
    stored = opened.changes.one(run)
    opened.changes.check_target(identity(ref))
    merged = load_model(ref, dtype=dtype, device=device) if is_place else copy.deepcopy(model)
    add(merged, stored.load(), scale=scale, allow_rounding_loss=allow_rounding_loss)
    return merged


def _origin(model: Any) -> str:
    """Where a transformers model says that it is from, a folder or `owner/name@commit`."""
    config = getattr(model, "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not name:
        raise UserError(
            f"{type(model).__name__}: does not say where it was loaded from, so that nobody can tell whether the change"
            " is for it; give the folder or hub name in place of the model"
        )
    return f"{name}@{commit}" if commit and not Path(name).is_dir() else str(name)


def read_scores(where: str | Path) -> list[dict[str, Any]]:
    """Every evaluation of a profile as a row, for `pandas.DataFrame`.

    Args:
        where: a profile's params file or folder, or the folder of its results.

    Returns:
        by name and task: `row` (a model or a method), `source` (None where there is none), `task`, `n` examples,
        `runs`, `metric`, `points` and `points_stderr` (percent; None where nothing was generated), `nats` and
        `nats_stderr` (log-likelihood of the reference answers per token), `model` and `revision`, and `command`, that
        made the change (None: the model itself). Means over runs; errors are over examples.

    Raises:
        UserError: there are no results, or they are damaged.
    """
    from pkt_stages.reporting.reading import Folder

    folder = Folder(_results(Path(where)) / "evaluate")
    paths = sorted(path.relative_to(folder.path) for path in folder.path.rglob("*.json"))
    rows = []
    for path in paths:
        *above, task = path.with_suffix("").parts
        if not above or above[0] == STEPS:
            continue
        keys = ("n", "runs", "metric", "nats", "nats_stderr", "model", "made")
        found = folder.by_task([task], *above, keys=keys)[task]
        made = found["made"] if isinstance(found["made"], dict) else {}
        rows.append(
            {
                "row": above[0],
                "source": "/".join(above[1:]) or None,
                "task": task,
                "n": found["n"],
                "runs": len(found["runs"]),
                "metric": found["metric"],
                "points": found.get("score"),
                "points_stderr": found.get("stderr"),
                "nats": found["nats"],
                "nats_stderr": found["nats_stderr"],
                "model": found["model"]["name"],
                "revision": found["model"]["revision"],
                "command": made.get("command"),
            }
        )
    if not rows:
        raise UserError(f"{folder.path}: holds no metrics; `dvc repro` makes a profile's, or give another folder")
    return rows


def _results(where: Path) -> Path:
    """The folder of results that a path stands for."""
    from pkt_stages.params import read_params

    if (where / "evaluate").is_dir():
        return where
    params = where / "params.yaml" if where.is_dir() else where
    if not params.is_file():
        raise UserError(f"{where}: no results (a folder with `evaluate`), no params file and no folder with one")
    content = read_params(params)
    root, told = content.get("root"), content.get("told")
    if not isinstance(root, str) or not isinstance(told, str):
        raise UserError(f"{params}: expected `root` and `told`, paths, as a profile has them; found {shown(told)}")
    return params.parent / root / told


def read_predictions(path: str | Path) -> Iterator[dict[str, Any]]:
    """What a model answered, an example at a time, from a file of `pkt evaluate --predictions`.

    Returns:
        `run`, `id`, `log_likelihood` and, but for `nats_only`, `prompt`, `correct`, `text`, `extracted`, `message` or
        `log_probabilities`; several samples of one example as `samples`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    from pkt_stages.examples import read_jsonl

    rows = read_jsonl(Path(path))
    for number, row in rows:
        if missing := [key for key in ("run", "id", "log_likelihood") if key not in row]:
            raise UserError(f"{path}, line {number}: no prediction of `pkt evaluate`, it lacks {missing[0]!r}")
    return (row for _, row in rows)
