"""What names an unfinished run, and how often it is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages import scratch
from pkt_stages.errors import UserError
from pkt_stages.scratch import Batches, Seldom, Shards, Steps, fingerprint, read_value, write_value


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


# --- what is not as it was written --------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4] + bytes(len(content) - len(content) * 3 // 4))


DAMAGES: list[Callable[[Path], Any]] = [
    flip,
    cut,
    zero_the_end,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("hello"),
    lambda path: path.write_bytes(path.read_bytes() + b"!"),
]


def shards(folder: Path, run: str, name: str) -> tuple[Path, Callable[[], Any], Any]:
    """A file of scratch; how it is read, and what that gives."""
    kept = Shards(folder, run)
    kept[name] = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1])}

    def read() -> Any:
        found = kept.get(name)
        return found and {key: tensor.tolist() for key, tensor in found.items()}

    return folder / run / f"{name}.safetensors", read, {"a": [[0, 1, 2], [3, 4, 5]], "b": [1]}


def batches(folder: Path, run: str, name: str) -> tuple[Path, Callable[[], Any], Any]:
    kept = Batches(folder, run)
    kept.write(int(name), [[1, 2], [3]])
    return folder / run / f"batch_{int(name):05}.json", lambda: kept.read(int(name)), [[1, 2], [3]]


def states(folder: Path, run: str, name: str) -> tuple[Path, Callable[[], Any], Any]:
    kept = Steps(folder, run)
    kept.checkpoint(1).parent.mkdir(parents=True, exist_ok=True)
    kept.checkpoint(1).write_text("mapping")
    kept.save({"weights": {"w": torch.ones(300)}, "steps": [{"step": int(name)}]})
    return folder / run / "state.pt", lambda: (kept.last() or {}).get("steps"), [{"step": int(name)}]


def checkpoints(folder: Path, run: str, name: str) -> tuple[Path, Callable[[], Any], Any]:
    _, read, right = states(folder, run, name)
    return folder / run / "step_01.safetensors", read, right


def values(folder: Path, run: str, name: str) -> tuple[Path, Callable[[], Any], Any]:
    path = folder / run / f"{name}.json"
    write_value(path, {"loss": [0.1, 1e-300], "name": "é"})
    return path, lambda: read_value(path), {"loss": [0.1, 1e-300], "name": "é"}


KINDS = [shards, batches, states, checkpoints, values]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_set_aside(
    kind: Any, damage: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line; it is never used, and what is written anew is."""
    path, read, right = kind(tmp_path, "run", "1")
    assert read() == right
    damage(path)
    assert read() is None
    assert capsys.readouterr().err == f"pkt: warning: {path}: damaged, or of another run; set aside and made again\n"
    assert not path.exists() and path.with_name(f"damaged-{path.name}").exists()
    assert read() is None or kind is checkpoints  # whose state is left
    _, read, right = kind(tmp_path, "run", "1")
    assert read() == right


@pytest.mark.parametrize("kind", [shards, batches, states, values])
def test_every_bit_counts(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, read, _ = kind(tmp_path, "run", "1")
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert read() is None, place
    path.write_bytes(whole)
    assert read() is not None


@pytest.mark.parametrize("kind", [shards, batches, values])
def test_files_of_another_name_or_run_are_foreign(kind: Any, tmp_path: Path) -> None:
    mine, read, right = kind(tmp_path, "run", "1")
    for run, name in (("other", "1"), ("run", "2")):
        foreign = kind(tmp_path, run, name)[0]
        mine.write_bytes(foreign.read_bytes())
        assert read() is None
        assert foreign.exists()
        kind(tmp_path, "run", "1")
        assert read() == right


def test_a_checkpoint_that_goes_while_a_run_lasts(tmp_path: Path) -> None:
    for step in (1, 2):
        steps = Steps(tmp_path, f"run_{step}")
        steps.folder.mkdir()
        for made in (1, 2):
            steps.checkpoint(made).write_text(f"mapping {made}")
            steps.save({})
        steps.checkpoint(step).unlink()
        with pytest.raises(UserError) as caught:
            steps.publish(tmp_path / "out", chosen={})
        assert str(caught.value) == f"{steps.checkpoint(step)}: was removed or changed while this ran; run again"
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.new").exists()


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkt_stages import artifacts

    done: list[tuple[str, str]] = []
    real_sync, real_replace = artifacts.os.fsync, Path.replace

    def sync(number: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{number}").readlink().name.removesuffix(" (deleted)")))
        real_sync(number)

    def replace(self: Path, target: Path) -> Path:
        done.append(("name", self.name))
        return real_replace(self, target)

    monkeypatch.setattr(artifacts.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    steps = Steps(tmp_path, "run")
    steps.folder.mkdir()
    steps.checkpoint(1).write_text("mapping")
    steps.save({})
    steps.publish(tmp_path / "out", chosen={})
    Shards(tmp_path, "run")["x"] = {"a": torch.ones(1)}
    written = [name for act, name in done if act == "name"]
    assert len(written) == 4
    for name in written:
        inside = ["step_01.safetensors", "chosen.json"] if name == ".out.new" else [name]
        for one in inside:
            assert ("sync", one) in done[: done.index(("name", name))]
