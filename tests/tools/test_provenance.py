"""Which stage made a file, and inputs that are not what their stage has made (pkt_stages.tools.provenance)."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.errors import UserError
from pkt_stages.tools.provenance import check_inputs, md5, origin

ROWS, ADAPTER = "artifacts/tiny/rows.safetensors", "artifacts/tiny/adapter"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the default profile, and a folder of another one that uses it."""
    (tmp_path / ADAPTER).mkdir(parents=True)
    (tmp_path / ROWS).write_bytes(b"rows")
    (tmp_path / ADAPTER / "adapter_config.json").write_text("{}")
    for name in (".dvc", "profiles/other"):
        (tmp_path / name).mkdir(parents=True)
    lock(tmp_path / "dvc.lock", {"select@a": {"cmd": "pkt select", "outs": [recorded(tmp_path, ROWS)]}})
    user = {"cmd": "pkt seek", "deps": [recorded(tmp_path, ROWS)], "outs": [recorded(tmp_path, ADAPTER)]}
    lock(tmp_path / "profiles/other/dvc.lock", {"seek": user})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "profiles/other/dvc.yaml:align")
    return tmp_path


def recorded(root: Path, path: str) -> dict[str, Any]:
    return {"path": path, "hash": "md5", "md5": md5(root / path)}


def lock(path: Path, stages: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def test_whole_inputs_pass(root: Path) -> None:
    check_inputs(["--rows", ROWS, "--adapter", ADAPTER, "--out", "artifacts/tiny/new", "--rate", "0.1", ".."])


@pytest.mark.parametrize(
    ("word", "damaged", "stage"),
    [
        (ROWS, ROWS, "select@a"),
        (ADAPTER, f"{ADAPTER}/adapter_config.json", "profiles/other/dvc.yaml:seek"),
        (f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_config.json", "profiles/other/dvc.yaml:seek"),
    ],
)
def test_damaged_inputs_are_named(root: Path, word: str, damaged: str, stage: str) -> None:
    content = bytearray((root / damaged).read_bytes())
    content[-1] ^= 1
    (root / damaged).write_bytes(content)
    part = ROWS if word == ROWS else ADAPTER
    with pytest.raises(UserError, match=rf"^{part}: not what its stage has made .*`dvc commit {re.escape(stage)}`"):
        check_inputs(["--x", word])


def test_an_output_that_is_not_here_is_not_current(root: Path) -> None:
    for path in (ROWS, ADAPTER):
        made = origin(root / path)
        (root / path).rename(root / f"{path}.away")
        gone = origin(root / path)
        assert made is not None and made.is_current and gone == dataclasses.replace(made, is_current=False)


def test_without_dvc_nothing_is_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ROWS).write_bytes(b"mine")
    monkeypatch.delenv("DVC_STAGE")
    check_inputs(["--rows", ROWS])


def test_files_of_no_stage_and_a_lock_in_a_merge_pass(root: Path) -> None:
    Path("artifacts/mine").write_text("x")
    Path("dvc.lock").write_text(f"<<<<<<< ours\n    - path: {ROWS}\n")
    (root / ROWS).write_bytes(b"changed")
    check_inputs(["--rows", ROWS, "--mine", "artifacts/mine", os.sep])


def test_inputs_are_named_without_hashes_of_code(root: Path) -> None:
    folder = "artifacts/tiny/code"
    (root / folder).mkdir()
    (root / folder / "select").write_text("hash")
    entry = {"cmd": "pkt select", "deps": [recorded(root, ADAPTER), recorded(root, f"{folder}/select")]}
    code = {"cmd": "pkt code --out artifacts/tiny/code", "outs": [recorded(root, folder)]}
    lock(root / "dvc.lock", {"select@a": entry | {"outs": [recorded(root, ROWS)]}, "code": code})
    made = origin(root / ROWS)
    assert made is not None and made.inputs == {ADAPTER: md5(root / ADAPTER)}


def test_what_the_stage_itself_once_made_is_no_input(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC removes a stage's files before it runs; of a folder that other files take the place of, the folder stays."""
    for file in (root / ADAPTER).iterdir():
        file.unlink()
    with pytest.raises(UserError, match="not what its stage has made"):
        check_inputs(["--out", ADAPTER])
    monkeypatch.setenv("DVC_STAGE", "profiles/other/dvc.yaml:seek")
    check_inputs(["--out", ADAPTER])
