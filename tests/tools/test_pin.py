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
        if repo == "o/gone":
            raise ConnectionError("no route")
        return SimpleNamespace(sha=NEW, siblings=[SimpleNamespace(rfilename="pytorch_model.bin")])

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return found


def version(file: Path) -> tuple[int, int]:
    """Another one where the file was written anew."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def test_commits_are_written_down(pkt: Run, tmp_path: Path, asked: list[tuple[str, str, str]]) -> None:
    """In their places: comments, order, quotes and flow style stay, and a pinned file is not touched."""
    model, data, pinned = (tmp_path / name / "hub.yaml" for name in ("a_model", "b_data", "c_pinned"))
    texts = {
        model: "# Ours.\nrepo:   o/m\nrevision: main  # as of May\r\n",
        data: 'train: {repo: o/d, revision: v1, config: "c", split: train}\ntest:\n  repo: o/d\n'
        "  revision: main\n\n  split: test # all\n",
        pinned: f"{{repo:  o/p, revision: '{OLD}'}}  # no news",
    }
    for file, text in texts.items():
        file.parent.mkdir()
        file.write_bytes(text.encode())
    whole = version(pinned)
    status, printed, err = pkt("pin", tmp_path)
    assert status == 0, err
    assert asked == [("o/m", "main", "model"), ("o/d", "v1", "dataset"), ("o/d", "main", "dataset")]
    assert f"{model}: o/m main -> {NEW}\n" in printed
    assert f"{model}: note: o/m has no safetensors; `pkt convert` makes a folder of them\n" in printed
    assert f"{pinned}: o/p stays at {OLD}\n" in printed
    assert model.read_bytes().decode() == texts[model].replace("main", f"'{NEW}'")
    expected = texts[data].replace("v1", f"'{NEW}'").replace("main", f"'{NEW}'")
    assert data.read_bytes().decode() == expected
    assert pinned.read_bytes().decode() == texts[pinned] and version(pinned) == whole

    asked.clear()
    assert pkt("pin", pinned, "--update") == (
        0,
        f"{pinned}: o/p {OLD} -> {NEW}\n{pinned}: note: o/p has no safetensors; `pkt convert` makes a folder of them\n",
        "",
    )
    assert asked == [("o/p", "main", "model")]
    assert pinned.read_bytes().decode() == texts[pinned].replace(OLD, NEW)
    pinned.write_text(texts[pinned].replace(f"'{OLD}'", f'"{NEW}"'))
    whole = version(pinned)
    assert pkt("pin", pinned, "--update")[1].startswith(f"{pinned}: o/p stays at {NEW}\n")
    assert version(pinned) == whole


def test_what_cannot_be_pinned_keeps_nothing_else_from_it(
    pkt: Run, tmp_path: Path, asked: list[tuple[str, str, str]]
) -> None:
    gone, data, last = (tmp_path / name / "hub.yaml" for name in ("a_gone", "b_data", "c_last"))
    for file in (gone, data, last):
        file.parent.mkdir()
    gone.write_text("repo: o/gone\nrevision: main\n")
    # An anchored revision is that of two pools, which may want different commits.
    pools = (
        "train: {repo: o/d, split: train, revision: main}\n"
        "texts: {repo: o/gone, split: train, revision: main}\n"
        "test: {repo: o/anchor, split: test, revision: &r main}\n"
        "more: {repo: o/d, split: more, revision: *r}\n"
    )
    data.write_text(pools)
    last.write_text("repo: o/m\nrevision: main\n")
    why = (
        "o/gone at revision main: the hub cannot be reached and the files are not in the local cache; connect, or put a"
        " folder with the files in place of the name"
    )
    where = f"revision cannot be replaced where it stands; write it as plain text, or put {NEW} there"
    assert pkt("pin", tmp_path) == (
        2,
        f"{gone}: {why}\n{data}: o/d main -> {NEW}\n{data}: {why}\n{data}: test.{where}\n{data}: more.{where}\n"
        f"{last}: o/m main -> {NEW}\n"
        f"{last}: note: o/m has no safetensors; `pkt convert` makes a folder of them\n",
        "pkt: error: not pinned: o/gone, o/anchor, o/d; see above for why, and run it again for these\n",
    )
    assert gone.read_text() == "repo: o/gone\nrevision: main\n"
    assert data.read_text() == pools.replace("main", f"'{NEW}'", 1)
    assert last.read_text() == f"repo: o/m\nrevision: '{NEW}'\n"


def test_bad_files(pkt: Run, tmp_path: Path) -> None:
    status, _, err = pkt("pin", tmp_path)
    assert (status, err) == (2, f"pkt: error: {tmp_path}: no hub.yaml there; give such files, or a folder with some\n")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/hub.yaml").write_text(f"repo: o/m\nrevision: '{OLD}'\n")
    status, _, err = pkt("pin", tmp_path / "m", tmp_path / "gone")
    told = f"pkt: error: {tmp_path / 'gone'}: no hub.yaml there; give such files, or a folder with some\n"
    assert (status, err) == (2, told)
    file = tmp_path / "hub.yaml"
    file.write_text("repo: 3\nrevision: main\n")
    status, _, err = pkt("pin", file)
    assert (status, err) == (
        2,
        f"pkt: error: {file}: expected the keys repo and revision with a text each, found"
        " {'repo': 3, 'revision': 'main'}\n",
    )


def test_a_bad_file_is_found_before_any_is_written(pkt: Run, tmp_path: Path, asked: list[tuple[str, str, str]]) -> None:
    for name, revision in (("a", "main"), ("b", "3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hub.yaml").write_text(f"train: {{repo: o/d, split: train, revision: {revision}}}\n")
    message = f"pkt: error: {tmp_path}/b/hub.yaml: train: revision: expected str, found 3\n"
    assert pkt("pin", tmp_path) == (2, "", message)
    assert asked == []
