"""Runs a repository's pipeline with faults (hook/sitecustomize.py) until none is left and all stages are done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml

from pkt_stages.artifacts import content_hash
from tests.pipeline.repository import environment

COMMAND = [sys.executable, "-m", "pkt_stages.warm", sys.executable, "-m", "dvc", "repro"]
BATCHES = {"PKT_EVALUATE_BATCH_SIZE": "2"}
Act = Literal["kill all", "kill stage", "interrupt", "fill disk"]


@dataclass(frozen=True)
class Fault:
    """When to break which stage (its name in DVC), and how: see hook/sitecustomize.py."""

    stage: str
    at: int | Literal["compute"]
    act: Act


@dataclass(frozen=True)
class Write:
    """A file or folder that a stage opened for writing, or renamed."""

    stage: str
    number: int
    event: Literal["open", "os.rename"]
    path: Path


def repro(folder: Path, faults: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """`dvc repro` in a process group of its own, with warm stages; two requests are a batch of the evaluation."""
    paths = os.pathsep.join([str(Path(__file__).parent / "hook"), str(folder)])
    settings = {"PYTHONPATH": paths, "PKT_FAULTS": str(faults)}
    return subprocess.run(
        [*COMMAND, *targets],
        cwd=folder,
        env=environment(folder) | BATCHES | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=1200,
    )


def killed_after(folder: Path, seconds: float) -> str | None:
    """The same without faults; what it said, or None if it was not done then and was killed with all it had started."""
    process = subprocess.Popen(
        COMMAND,
        cwd=folder,
        env=environment(folder) | BATCHES,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    assert process.returncode == 0, said
    return said


def undisturbed(folder: Path, faults: Path, *targets: str) -> list[Write]:
    """Run to the end; what was written, in order."""
    faults.mkdir()
    done = repro(folder, faults, *targets)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(maxsplit=3) for line in (faults / "writes").read_text().splitlines()]
    return [Write(stage, int(number), event, Path(path)) for stage, number, event, path in lines]  # type: ignore[arg-type]


def until_gone(folder: Path) -> None:
    """Wait until the processes that DVC's rwlock names have ended, and remove it then, as DVC's own message advises.

    DVC takes a killed process that nobody has waited for (a zombie) for alive, and would refuse to touch its files.
    """
    lock = folder / ".dvc/tmp/rwlock"
    named = re.findall(r'"pid": (\d+)', lock.read_text()) if lock.exists() else []
    end = time.monotonic() + 10
    while any(_runs(pid) for pid in named):
        assert time.monotonic() < end, f"still running: {named}"
        time.sleep(0.1)
    lock.unlink(missing_ok=True)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def disturbed(folder: Path, faults: Path, plan: Sequence[Fault], *targets: str) -> dict[Fault, str]:
    """Run again and again until all is done; what each broken run printed. Every fault strikes, one a run."""
    (faults / "fired").mkdir(parents=True)
    (faults / "plan.json").write_text(json.dumps([asdict(fault) for fault in plan]))
    said: dict[Fault, str] = {}
    struck: set[str] = set()
    while True:
        done = repro(folder, faults, *targets)
        until_gone(folder)
        new = {path.name for path in (faults / "fired").iterdir()} - struck
        if done.returncode == 0:
            assert not new, "a stage that was broken has succeeded"
            break
        assert len(new) == 1, done.stdout + done.stderr
        struck |= new
        said[plan[int(new.pop())]] = done.stdout + done.stderr
    missed = [fault for number, fault in enumerate(plan) if str(number) not in struck]
    assert not missed, f"never struck: {missed}"
    return said


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all outputs that a run leaves, and DVC's record of each stage.

    The order of the records is left out: it is that of the runs, and DVC takes independent stages in the order of a
    Python set, which changes with the process.
    """
    files = [path for part in ("artifacts", "results") for path in (folder / part).rglob("*") if path.is_file()]
    records = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {str(path.relative_to(folder)): content_hash(path) for path in files} | {
        name: json.dumps(record, sort_keys=True) for name, record in records.items()
    }


def leftovers(folder: Path) -> list[Path]:
    """Half-written files and folders beside the outputs: their names begin with a dot."""
    return [path for part in ("artifacts", "results") for path in (folder / part).rglob(".*")]


def one_line(said: str) -> str:
    """The one line that a stage says when it ends badly; no traceback, neither Python's nor a library's."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("pkt: ")]
    assert len(lines) == 1, said
    return lines[0]
