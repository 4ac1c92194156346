from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

Run = Callable[..., tuple[int, str, str]]
OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What the hub is asked; it is stood in for."""
    found: list[tuple[str, str, str]] = []

    def repo_info(self: HfApi, repo: str, *, revision: str, repo_type: str) -> SimpleNamespace:
        found.append((repo, revision, repo_type))
        return SimpleNamespace(sha=NEW, siblings=[SimpleNamespace(rfilename="pytorch_model.bin")])

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return found


def test_commits_are_written_down(pkt: Run, tmp_path: Path, asked: list[tuple[str, str, str]]) -> None:
    model, data, pinned = (tmp_path / name / "hub.yaml" for name in ("a_model", "b_data", "c_pinned"))
    for file in (model, data, pinned):
        file.parent.mkdir()
    model.write_text("repo: o/m\nrevision: main\nsizes: {num_layers: 2}\n")
    data.write_text("train: {repo: o/d, config: c, split: train, revision: v1}\n")
    pinned.write_text(f"repo: o/p\nrevision: '{OLD}'\n")
    status, printed, err = pkt("pin", tmp_path)
    assert status == 0, err
    assert asked == [("o/m", "main", "model"), ("o/d", "v1", "dataset")]
    assert f"{model}: o/m main -> {NEW}\n" in printed
    assert f"{model}: note: o/m has no safetensors; `pkt convert` makes a folder of them\n" in printed
    assert f"{pinned}: o/p stays at {OLD}\n" in printed
    assert model.read_text() == f"repo: o/m\nrevision: '{NEW}'\nsizes:\n  num_layers: 2\n"
    assert data.read_text() == f"train:\n  repo: o/d\n  config: c\n  split: train\n  revision: '{NEW}'\n"

    asked.clear()
    assert pkt("pin", pinned, "--update")[0] == 0
    assert asked == [("o/p", "main", "model")]
    assert pinned.read_text() == f"repo: o/p\nrevision: '{NEW}'\n"


def test_bad_files(pkt: Run, tmp_path: Path) -> None:
    status, _, err = pkt("pin", tmp_path)
    assert (status, err) == (2, f"pkt: error: {tmp_path}: no hub.yaml there; give such files, or a folder with some\n")
    file = tmp_path / "hub.yaml"
    file.write_text("repo: 3\nrevision: main\n")
    status, _, err = pkt("pin", file)
    assert (status, err) == (
        2,
        f"pkt: error: {file}: expected the keys repo and revision with a text each, found"
        " {'repo': 3, 'revision': 'main'}\n",
    )


def test_no_network(pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def repo_info(self: HfApi, repo: str, **_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    file = tmp_path / "hub.yaml"
    file.write_text("repo: o/m\nrevision: main\n")
    status, _, err = pkt("pin", file)
    assert (status, err) == (
        2,
        "pkt: error: o/m at revision main: the hub cannot be reached and the files are not in the local cache; connect,"
        " or put a folder with the files in place of the name\n",
    )
    assert file.read_text() == "repo: o/m\nrevision: main\n"
