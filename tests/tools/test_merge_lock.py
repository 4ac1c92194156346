from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkt_stages.quiet import quiet_dvc

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


def lock(**stages: str) -> str:
    """A lock whose stages have these hashes."""
    text = "schema: '2.0'\nstages:\n"
    for stage, md5 in stages.items():
        text += (
            f"  {stage}:\n    cmd: run {stage}\n    outs:\n    - path: {stage}.txt\n      hash: md5\n      md5: {md5}\n"
        )
    return text


def as_dvc_writes_it(text: str) -> str:
    with quiet_dvc():
        from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    return str(dumps_yaml(parse_yaml_for_update(text, "dvc.lock")))


@pytest.fixture
def merge(pkt: Run, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Merge three texts: exit status, the file afterwards, stderr."""

    def run(*texts: str) -> tuple[int, str, str]:
        files = [tmp_path / name for name in ("base", "ours", "theirs")]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        status, _, err = pkt("merge-lock", *files, "profiles/p/dvc.lock")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "ours", "theirs"]
        return status, files[1].read_text(), err

    return run


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "merged"),
    [
        ({"a": "1"}, {"a": "1", "b": "2"}, {"a": "1", "c": "3"}, {"a": "1", "b": "2", "c": "3"}),
        ({"a": "1", "b": "2"}, {"a": "9", "b": "2"}, {"a": "1", "b": "8"}, {"a": "9", "b": "8"}),
        ({"a": "1"}, {"a": "9", "b": "2"}, {"b": "2", "a": "9"}, {"a": "9", "b": "2"}),
        ({"a": "1", "b": "2"}, {"b": "2"}, {"a": "1", "b": "3"}, {"b": "3"}),
        ({"a": "1"}, {"a": "1"}, {}, {}),
    ],
    ids=["both append", "each changes one", "both alike", "one removes", "all removed"],
)
def test_what_one_side_did_is_taken(
    merge: Run, base: dict[str, str], ours: dict[str, str], theirs: dict[str, str], merged: dict[str, str]
) -> None:
    if not theirs:
        merged = theirs = {"kept": "0"}
        base, ours = base | theirs, theirs | ours
    status, text, err = merge(lock(**base), lock(**ours), lock(**theirs))
    assert (status, text, err) == (0, lock(**merged), "")
    assert as_dvc_writes_it(text) == text


def test_both_sides_changed_a_stage_differently(merge: Run) -> None:
    status, text, err = merge(lock(a="1", b="1"), lock(a="2", b="1"), lock(a="3", b="5", c="4"))
    assert (status, text) == (1, lock(a="2", b="5", c="4"))
    assert err == (
        "profiles/p/dvc.lock: stage a: both sides changed it; ours is kept. When params and code are merged:"
        " dvc repro --pull --allow-missing profiles/p/dvc.yaml:a, then: git add profiles/p/dvc.lock\n"
    )


def test_both_branches_add_the_file(merge: Run) -> None:
    assert merge("", lock(a="1"), lock(b="2")) == (0, lock(a="1", b="2"), "")


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("<<<<<<< ours\n" + lock(a="1"), "found no YAML (line 2)"),
        (lock(a="1") + "  a:\n    cmd: twice\n", "found another layout"),
        ("schema: '2.0'\nstages: {a: {cmd: x}}\n", "found another layout"),
        ("[]\n", "found another layout"),
    ],
)
def test_no_lock_at_all(merge: Run, broken: str, found: str) -> None:
    status, text, err = merge(lock(a="1"), lock(a="1", b="2"), broken)
    # Ours is untouched, and git takes the exit status for a conflict.
    assert (status, text) == (2, lock(a="1", b="2"))
    assert err.startswith("pkt: error: profiles/p/dvc.lock (") and found in err and err.count("\n") == 1
    assert err.endswith("; take one side: git checkout --ours profiles/p/dvc.lock\n")


def test_the_projects_own_lock_survives(merge: Run) -> None:
    """Stages taken out of the lock on either side come together again, byte for byte what DVC wrote."""
    text = (ROOT / "dvc.lock").read_text()
    head, *stages = re.split(r"^(?=  \S)", text, flags=re.MULTILINE)
    third = len(stages) // 3
    base, ours, theirs = stages[:third], stages[: 2 * third], stages[:third] + stages[2 * third :]
    assert merge(*("".join([head, *part]) for part in (base, ours, theirs))) == (0, text, "")


GRAPH = """\
stages:
  make:
    matrix: {task: [one, two, three]}
    cmd: cp ${item.task}.in ${item.task}.out
    deps: ["${item.task}.in"]
    outs: ["${item.task}.out"]
"""


@pytest.fixture
def team(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Commands in a DVC repository where branches `main` and `other` ran different tasks: exit status and output."""
    folder = tmp_path / "team"
    folder.mkdir()

    def run(*command: str) -> tuple[int, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    def succeed(*command: str) -> None:
        status, output = run(*command)
        assert status == 0, output

    (folder / "dvc.yaml").write_text(GRAPH)
    for task in ("one", "two", "three"):
        (folder / f"{task}.in").write_text(task)
    (folder / ".gitignore").write_text("*.out\n")
    shutil.copy(ROOT / ".gitattributes", folder)
    succeed("git", "init", "-q", "-b", "main")
    succeed("git", "config", "user.email", "someone@example.com")
    succeed("git", "config", "user.name", "someone")
    succeed("dvc", "init", "-q")
    succeed("dvc", "repro", "-q", "make@one")
    succeed("git", "add", "-A")
    succeed("git", "commit", "-q", "-m", "one")
    for branch, task in (("other", "three"), ("main", "two")):
        if branch == "other":
            succeed("git", "checkout", "-q", "-b", branch)
        else:
            succeed("git", "checkout", "-q", branch)
        (folder / "one.in").write_text(f"one, as {branch} has it")
        succeed("dvc", "repro", "-q", "make@one", f"make@{task}")
        succeed("git", "commit", "-q", "-a", "-m", task)
        # What is in conflict is only the lock.
        succeed("git", "checkout", "-q", "main~1" if branch == "main" else "main", "--", "one.in")
        succeed("git", "commit", "-q", "-a", "-m", f"{task} with the first input")
    return run


def test_git_merges_two_tasks_with_the_driver(team: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    file = tmp_path / "team" / "dvc.lock"
    team("git", "checkout", "-q", "-b", "here", "main")
    # Without the driver's configuration git merges as text: it finds a conflict and leaves markers, no lock.
    status, output = team("git", "merge", "other")
    assert status == 1 and "Merge conflict in dvc.lock" in output
    assert "<<<<<<<" in file.read_text()
    assert "is invalid (possible merge conflicts)" in team("dvc", "status")[1]
    team("git", "merge", "--abort")

    team("git", "config", "merge.pkt-lock.name", "dvc.lock by stage")
    team("git", "config", "merge.pkt-lock.driver", f"{sys.executable} -m pkt_stages merge-lock %O %A %B %P")
    # `make@one` was run with two inputs: one line says so, the others are merged.
    status, output = team("git", "merge", "other")
    assert status == 1
    assert "dvc.lock: stage make@one: both sides changed it; ours is kept. " in output
    assert re.findall(r"^  (\S+):$", file.read_text(), re.MULTILINE) == ["make@one", "make@two", "make@three"]
    assert as_dvc_writes_it(file.read_text()) == file.read_text()
    # What the line says to do: the first input's result comes from the cache of runs.
    status, output = team("dvc", "repro", "--allow-missing", "make@one")
    assert status == 0 and "is cached - skipping run, checking out outputs" in output
    team("git", "add", "dvc.lock")
    assert team("git", "commit", "-q", "-m", "merged") == (0, "")
    # DVC takes the merged lock: nothing is left to run.
    status, output = team("dvc", "repro", "--dry", "--allow-missing")
    assert status == 0 and "Running stage" not in output and output.count("didn't change, skipping") == 3
    assert team("dvc", "checkout", "-q") == (0, "")
    assert team("dvc", "status")[1] == "Data and pipelines are up to date.\n"
