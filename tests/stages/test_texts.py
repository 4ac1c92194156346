from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pkt_stages.examples import write_jsonl
from pkt_stages.stages.texts import run

Run = Callable[..., tuple[int, str, str]]


def test_headings_and_blanks_are_no_texts() -> None:
    assert run([" = Robert Boulter = \n", "", " \n", " = = Career = = \n", " a = b \n", "x"]) == [" a = b \n", "x"]
    many = "= " * 20_000 + "x"  # must not take forever
    assert run([many]) == [many]


def test_the_command(pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "own/texts.jsonl", [{"text": "One."}, {"text": " = Two = "}, {"text": "Three."}])
    status, printed, err = pkt("texts", "--data", tmp_path / "own", "--out", tmp_path / "o.jsonl")
    assert status == 0, err
    assert printed.startswith("texts: 2 texts of 3 rows ->")
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").open()] == [{"text": "One."}, {"text": "Three."}]

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: [{"text": "Hub."}, {"txt": "?"}])
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/hub.yaml").write_text(f"texts: {{repo: o/wiki, split: test, revision: '{'0' * 40}'}}\n")
    status, _, err = pkt("texts", "--data", tmp_path / "hub", "--out", tmp_path / "h.jsonl")
    assert (status, err) == (
        2,
        "pkt: error: o/wiki, row 2: expected a key `text` with a text, found ['txt']\n",
    )
    assert not (tmp_path / "h.jsonl").exists()
