"""dvc.lock as the quick writer leaves it, against DVC's own writer, byte by byte."""

from __future__ import annotations

import contextlib
import shutil
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.quick_dvc import modify_lock

ROOT = Path(__file__).parents[2]
LOCKS = [Path("dvc.lock"), *(p.relative_to(ROOT) for p in sorted(ROOT.glob("profiles/*/dvc.lock")))]
ENTRY = OrderedDict(
    [
        (
            "cmd",
            "pkt evaluate --params params.yaml --task gsm8k --model data/models/a --predictions artifacts/a/b/c.jsonl",
        ),
        ("deps", [OrderedDict([("path", "data/x: y"), ("hash", "md5"), ("md5", "1e10"), ("size", 5)])]),
        ("params", {"params.yaml": OrderedDict([("a.b", None), ("c", [1, 2.5e-5, "no", True, ""]), ("d", {})])}),
        ("outs", [OrderedDict([("path", "ärger"), ("md5", "0" * 32), ("size", 10**12)])]),
    ]
)


def changed(data: dict[str, Any]) -> None:
    names = list(data["stages"])
    data["stages"].update({name: deepcopy(ENTRY) for name in (names[0], names[-1], "new@stage-1")})
    data["stages"][names[1]]["cmd"] = "something else"


def emptied(data: dict[str, Any]) -> None:
    if not data:
        data.update({"schema": "2.0"})
    data["stages"] = data.get("stages", {})
    data["stages"].update({"first": ENTRY})


def written(modify: Callable[..., Any], path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    with modify(str(path)) as data:
        change(data)
    return path.read_bytes()


@pytest.mark.parametrize("lock", LOCKS, ids=str)
def test_bytes_are_those_of_dvc(lock: Path, tmp_path: Path) -> None:
    from dvc.utils.serialize import modify_yaml

    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / lock, tmp_path / name / "dvc.lock")
    ours = written(modify_lock, tmp_path / "ours/dvc.lock", changed)
    assert ours == written(modify_yaml, tmp_path / "theirs/dvc.lock", changed)
    assert ours != (ROOT / lock).read_bytes()


@pytest.mark.parametrize(
    "text", [None, "", "schema: '2.0'\nstages: {}\n", "# a note\nschema: '2.0'\nstages:\n  a:\n    cmd: x\n"]
)
def test_other_layouts_are_left_to_dvc(text: str | None, tmp_path: Path) -> None:
    from dvc.utils.serialize import modify_yaml

    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "dvc.lock").write_text(text)
    ours = written(modify_lock, tmp_path / "ours/dvc.lock", emptied)
    assert ours == written(modify_yaml, tmp_path / "theirs/dvc.lock", emptied)
    assert b"first:\n    cmd: pkt evaluate" in ours


def test_a_failure_within_leaves_the_file(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    shutil.copy(ROOT / "dvc.lock", lock)
    with contextlib.suppress(KeyError), modify_lock(str(lock)) as data:
        changed(data)
        raise KeyError
    assert lock.read_bytes() == (ROOT / "dvc.lock").read_bytes()
