from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pkt_stages import artifacts

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"cka.ffn_up": torch.tensor([[0.25, 0.5]], dtype=torch.float64)}
    path = tmp_path / "c.safetensors"
    artifacts.save(path, "cka", tensors, {"first": {"name": "s", "revision": "abc"}, "params": {"num_texts": 8}})
    return path


def test_what_an_artifact_is(pkt: Run, file: Path) -> None:
    status, printed, err = pkt("inspect", file)
    assert status == 0, err
    assert printed.splitlines()[0] == "c.safetensors: cka artifact (schema 1), made by `pkt cka`"
    assert '  first: {"name": "s", "revision": "abc"}\n  params: {"num_texts": 8}\n' in printed
    assert "    cka.ffn_up  float64 [1, 2]  0.25 .. 0.5\n" in printed
    assert printed.endswith("  content: as its kind declares, all values finite\n")
    found = json.loads(pkt("inspect", file, "--json")[1])
    assert found["sha256"] == artifacts.content_hash(file)
    assert found["tensors"]["cka.ffn_up"]["max"] == 0.5


def test_values_that_are_not_finite(pkt: Run, file: Path) -> None:
    meta = json.dumps({"kind": "cka", "schema_version": 1})
    save_file({"cka.x": torch.tensor([[float("nan")]], dtype=torch.float64)}, file, metadata={"pkt": meta})
    status, printed, err = pkt("inspect", file)
    assert (status, err) == (2, f"pkt: error: {file}: tensor cka.x holds NaN or infinity; make the file again\n")
    assert "NOT FINITE" in printed


@pytest.mark.parametrize(
    ("meta", "found"),
    [
        ({}, "no metadata of this project"),
        ({"pkt": "7"}, "no metadata of this project"),
        ({"pkt": '{"kind": "x"}'}, "kind 'x'"),
    ],
)
def test_other_files(pkt: Run, tmp_path: Path, meta: dict[str, str], found: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=meta)
    status, _, err = pkt("inspect", path)
    kinds = ", ".join(artifacts.KINDS)
    assert (status, err) == (2, f"pkt: error: {path}: expected an artifact of a kind among {kinds}; found {found}\n")


def test_broken_files(pkt: Run, file: Path) -> None:
    whole = file.read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 64, b'{"a":1}'):
        file.write_bytes(content)
        status, printed, err = pkt("inspect", file)
        assert (status, printed) == (2, "")
        assert err.startswith(f"pkt: error: {file}: not a readable safetensors file (") and err.count("\n") == 1
    file.unlink()
    assert pkt("inspect", file)[2] == f"pkt: error: {file}: no such file; expected an artifact (.safetensors)\n"
