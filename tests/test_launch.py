from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[1]
# Says what it was given and what is left of the variables, and does as srun does: runs the rest.
LAUNCHER = """#!/bin/sh
echo "$0 $*" >> record
env | grep '^PKT_LAUNCH' >> record
shift
exec "$@"
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    path = tmp_path / "fake srun"
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    return path


def run(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
    """Exit status and stderr of a `pkt`, and what its launcher recorded."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "pkt_stages", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    record = folder / "record"
    return done.returncode, done.stderr, record.read_text().splitlines() if record.exists() else []


def test_a_stage_runs_behind_its_launcher_once(tmp_path: Path, launcher: Path) -> None:
    words = ("prepare", "--task", "chess", "--data", "no where", "--out", "o")
    status, err, record = run(tmp_path, *words, PKT_LAUNCH=f"'{launcher}' --gres=gpu:1", PKT_LAUNCH_ATTRIBUTE="true")
    assert record == [f"{launcher} --gres=gpu:1 pkt {' '.join(words)}"]
    # What ran behind it is the same command: its message and its status.
    known = "expected one of gsm8k, humaneval, mbpp, mmlu, or tasks/chess/task.yaml here"
    assert (status, err) == (2, f"pkt: error: unknown task 'chess'; {known}\n")


@pytest.mark.parametrize("own", ["", "nice -n 1"])
def test_the_launcher_of_one_command_goes_before_that_of_all(tmp_path: Path, launcher: Path, own: str) -> None:
    words = ("prepare", "--task", "chess", "--data", "d", "--out", "o")
    status, err, record = run(tmp_path, *words, PKT_LAUNCH=f"'{launcher}' x", PKT_LAUNCH_PREPARE=own)
    assert (status, record) == (2, [])
    assert "unknown task" in err


def test_tools_and_help_have_no_launcher(tmp_path: Path, launcher: Path) -> None:
    for words in (("inspect", "nothing"), ("attribute", "--help"), ("--help",), ()):
        assert run(tmp_path, *words, PKT_LAUNCH=f"'{launcher}' x")[2] == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PKT_LAUNCH_ATTRIBUT", "true", "PKT_LAUNCH_ATTRIBUT: no such stage; expected PKT_LAUNCH, or one of "),
        ("PKT_LAUNCH_SWEEP", "true", "PKT_LAUNCH_SWEEP: no such stage; expected PKT_LAUNCH, or one of "),
        (
            "PKT_LAUNCH",
            "no-such-srun -n 1",
            "PKT_LAUNCH: no program 'no-such-srun' on this machine; install it, or unset PKT_LAUNCH\n",
        ),
        ("PKT_LAUNCH_SEEK", "srun 'x", "PKT_LAUNCH_SEEK: not a command line (No closing quotation): srun 'x\n"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "sweep"])
def test_a_wrong_variable_stops_every_command(
    pkt: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str, command: str
) -> None:
    monkeypatch.setenv(name, value)
    status, out, err = pkt(command)
    assert (status, out) == (2, "")
    assert err.startswith(f"pkt: error: {message}")
    assert err.count("\n") == 1


def test_the_command_line_starts_without_torch() -> None:
    """Each stage's `pkt` would take seconds more, also where a warm process does the work."""
    heavy = "{'torch', 'transformers', 'dvc', 'datasets', 'jinja2'}"
    code = "import sys; from pkt_stages.__main__ import application; application(); "
    code += f"sys.exit(str(sorted({heavy} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
