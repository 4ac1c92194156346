"""What names an unfinished run, and how often it is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkt_stages import scratch
from pkt_stages.errors import UserError
from pkt_stages.scratch import Seldom, Steps, fingerprint


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """No test sees what another one has read of the code."""
    scratch._computing.cache_clear()
    yield
    scratch._computing.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place for the package's modules."""
    for name in (
        "core/a.py",
        "stages/b.py",
        "tasks/t/task.yaml",
        "methods/m.py",
        "models/m.py",
        "encoding.py",
        "templates.py",
        "artifacts.py",
    ):
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
        ("methods/m.py", False),
        ("tasks/t/task.yaml", False),
        ("encoding.py", False),
        ("templates.py", False),
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
    assert (found[0] == found[1]) is same


def test_another_library_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint([], [])
    scratch._computing.cache_clear()
    monkeypatch.setattr(scratch, "version", lambda name: "99")
    assert fingerprint([], []) != before


def test_another_file_or_value_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    found = []
    for text in ("one", "two"):
        file.write_text(text)
        found.append(fingerprint([1, "x"], [file]))
    assert len({*found, fingerprint([1, "x"], []), fingerprint([2, "x"], [])}) == 4


def test_steps_are_published_with_what_was_chosen(tmp_path: Path) -> None:
    steps, out = Steps(tmp_path / "scratch", "run"), tmp_path / "out"
    steps.folder.mkdir(parents=True)
    for number in (2, 3):  # the second time in place of the first one's
        for step in range(1 if number == 2 else 3, number + 1):
            steps.checkpoint(step).write_text(f"mapping {step}")
            steps.save({"steps": step})
        steps.publish(out, chosen={"step": number})
        names = [f"step_{step:02}.safetensors" for step in range(1, number + 1)]
        assert sorted(path.name for path in out.iterdir()) == ["chosen.json", *names]
        assert [(out / name).read_text() for name in names] == [f"mapping {step}" for step in range(1, number + 1)]
        assert json.loads((out / "chosen.json").read_text()) == {"step": number}
    steps.remove()
    assert not steps.folder.exists() and steps.last() is None


def test_steps_take_the_place_of_nothing_else(tmp_path: Path) -> None:
    steps, out = Steps(tmp_path / "scratch", "run"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError) as caught:
        steps.publish(out, chosen={})
    assert str(caught.value) == (
        f"{out}: holds thesis.tex and no chosen.json, so it is not ours to replace; give a new folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
