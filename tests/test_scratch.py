"""What names an unfinished run, and how often it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkt_stages import scratch
from pkt_stages.scratch import Seldom, fingerprint


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place for the package's modules."""
    for name in ("core/a.py", "stages/b.py", "evaluation/tasks/t.yaml", "models/m.py", "encoding.py", "artifacts.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(scratch, "__file__", str(tmp_path / "scratch.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("core/a.py", False),
        ("models/m.py", False),
        ("evaluation/tasks/t.yaml", False),
        ("encoding.py", False),
        ("artifacts.py", True),
    ],
)
def test_other_code_is_another_run(package: Path, changed: str, same: bool) -> None:
    """A stage that runs again because its code was mended must not publish what the old code has left."""
    found = []
    for text in ("", "mended"):
        (package / changed).write_text(text)
        scratch._computing.cache_clear()
        found.append(fingerprint([1, "x"], []))
    scratch._computing.cache_clear()
    assert (found[0] == found[1]) is same


def test_another_library_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint([], [])
    scratch._computing.cache_clear()
    monkeypatch.setattr(scratch, "version", lambda name: "99")
    assert fingerprint([], []) != before
    scratch._computing.cache_clear()


def test_a_large_state_is_not_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a second to write is first written after ten; what then takes two, twenty seconds later."""
    clock = [0.0]
    saved = []
    monkeypatch.setattr(scratch.time, "perf_counter", lambda: clock[0])
    seldom = Seldom(10**9)

    def save() -> None:
        saved.append(clock[0])
        clock[0] += 2

    for second in (0, 5, 10, 20, 31, 32, 33):
        clock[0] = second
        seldom(save)
    assert saved == [10, 32]
