"""`pkt sweep` on a DVC repository of five shell stages: a and b, then c from both; d from b, then e from d."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from pkt_stages.errors import UserError
from pkt_stages.tools.graph import Graph, open_repo
from pkt_stages.tools.sweep import environments, read_times

ROOT = Path(__file__).parents[2]
PKT = (sys.executable, "-m", "pkt_stages")
UPSTREAM = {"a": ["in"], "b": ["in"], "c": ["a", "b"], "d": ["b"], "e": ["d"]}
# A stage says when it started and on what, waits while there is a file hold.NAME, and fails if FAIL names it; if
# STUBBORN names it, it ignores SIGTERM.
SCRIPT = """#!/bin/sh
name=$1; shift
[ "$STUBBORN" = $name ] && trap '' TERM
echo "$name start $CUDA_VISIBLE_DEVICES" >> events
while [ -e hold.$name ]; do sleep 0.05; done
[ "$FAIL" = $name ] && { echo "$name breaks"; exit 3; }
cat "$@" > $name.txt && echo $name >> $name.txt
echo "$name end" >> events
"""


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def run(folder: Path, *command: str, status: int = 0, **variables: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**variables))
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def sweep(folder: Path, *arguments: str, status: int = 0, **variables: str) -> str:
    return run(folder, *PKT, "sweep", *arguments, status=status, **variables)


def begin(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A sweep to be watched; its lines come from `stderr`."""
    return subprocess.Popen(
        [*PKT, "sweep", *arguments],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_starts(folder: Path, count: int, driver: subprocess.Popen[str]) -> None:
    path = folder / "events"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert driver.poll() is None
        time.sleep(0.05)


def finish(driver: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, stdout, and what is left of stderr."""
    assert driver.stdout is not None and driver.stderr is not None
    err, out = driver.stderr.read(), driver.stdout.read()
    return driver.wait(), out, err


def read_until(lines: IO[str] | None, *wanted: str) -> None:
    """Read until there was a line that begins with each of the texts."""
    assert lines is not None
    left = set(wanted)
    seen = []
    for line in lines:
        seen.append(line)
        left -= {text for text in left if line.startswith(text)}
        if not left:
            return
    pytest.fail(f"{left} not in {seen}")


def events(folder: Path) -> list[str]:
    """What happened since the last call."""
    path = folder / "events"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.strip() for line in lines]


def started(folder: Path) -> list[str]:
    return [line.split()[0] for line in events(folder) if "start" in line]


def entries(folder: Path) -> dict[str, Any]:
    return dict(sorted(yaml.safe_load((folder / "dvc.lock").read_text())["stages"].items()))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    stages = {
        name: {
            "cmd": f"./stage {name} {' '.join(f'{u}.txt' for u in upstream)}",
            "deps": [f"{u}.txt" for u in upstream],
            "outs": [f"{name}.txt"],
        }
        for name, upstream in UPSTREAM.items()
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "stage").write_text(SCRIPT)
    (folder / "stage").chmod(0o755)
    (folder / "in.txt").write_text("one\n")
    (folder / ".gitignore").write_text(
        "".join(f"/{name}.txt\n" for name in UPSTREAM) + "/events\n/hold.*\n/.scratch/\n"
    )
    (folder / ".dvcignore").write_text("/.scratch\n")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "git", "config", "user.email", "someone@example.com")
    run(folder, "git", "config", "user.name", "someone")
    dvc(folder, "init", "-q")
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "stages")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "project")


def test_it_does_what_repro_does_with_two_at_a_time(project: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(project, tmp_path / "plain")
    dvc(plain, "repro")
    (project / "hold.a").touch()
    (project / "hold.b").touch()
    driver = begin(project, "--gpus", "0+1,3")
    wait_for_starts(project, 2, driver)
    (project / "hold.a").unlink()
    (project / "hold.b").unlink()
    status, out, err = finish(driver)
    assert status == 0, out + err

    happened = events(project)
    # Both are running before one ends, each on GPUs of its own; every other stage starts after those it needs.
    assert sorted(line.split()[0] for line in happened[:2]) == ["a", "b"]
    assert sorted(line.split()[2] for line in happened[:2]) == ["0,1", "3"]
    begun = {line.split()[0]: at for at, line in enumerate(happened) if "start" in line}
    ended = {line.split()[0]: at for at, line in enumerate(happened) if line.endswith("end")}
    assert set(begun) == set(ended) == set(UPSTREAM)
    assert all(ended[u] < begun[name] for name, needed in UPSTREAM.items() for u in needed if u in ended)
    assert out.startswith("sweep: 5 stages: 5 ran (2 at a time, ")
    assert "(5 of 5 finished)" in err

    assert entries(project) == entries(plain)
    assert all((project / f"{n}.txt").read_bytes() == (plain / f"{n}.txt").read_bytes() for n in UPSTREAM)
    assert not any(json.loads((project / ".dvc/tmp/rwlock").read_text()).values())
    assert set(read_times(project / ".scratch")) == set(UPSTREAM)
    assert "Running stage 'a'" in (project / ".scratch/sweep/a.log").read_text()

    before = (project / "dvc.lock").read_bytes()
    assert "sweep: 5 stages: 5 up to date (1 at a time" in sweep(project)
    assert started(project) == []
    assert (project / "dvc.lock").read_bytes() == before
    assert "up to date" in dvc(project, "status")

    # Only what a change reaches is run, and only what was asked for.
    (project / "b.txt").unlink()
    with (project / "dvc.yaml").open("a") as file:
        file.write("# a comment changes nothing\n")
    assert "sweep: 3 stages: 1 ran, 2 up to date" in sweep(project, "d", "a")
    assert started(project) == []  # from the run cache


def test_a_failure_lets_the_running_finish_and_starts_nothing(project: Path) -> None:
    (project / "hold.b").touch()
    driver = begin(project, "--workers", "2", FAIL="a")
    read_until(driver.stderr, "failed     a")
    (project / "hold.b").unlink()
    status, out, err = finish(driver)
    assert status == 1
    assert "    a breaks" in err
    assert out.startswith("sweep: 5 stages: 1 ran, 1 failed, 3 not run")
    assert sorted(started(project)) == ["a", "b"]
    assert set(entries(project)) == {"b"}

    assert "sweep: 5 stages: 2 ran, 1 up to date, 1 failed, 1 not run" in sweep(
        project, "--keep-going", status=1, FAIL="a"
    )
    assert sorted(started(project)) == ["a", "d", "e"]
    assert "sweep: 5 stages: 2 ran, 3 up to date" in sweep(project)
    assert sorted(started(project)) == ["a", "c"]


@pytest.mark.parametrize("stubborn", [False, True])
def test_one_driver_at_a_time_and_an_interrupt_that_leaves_dvc_in_order(project: Path, stubborn: bool) -> None:
    (project / "hold.b").touch()
    driver = begin(project, "--workers", "2", STUBBORN="b" if stubborn else "")
    read_until(driver.stderr, "ran        a")
    message = sweep(project, status=2)
    assert message.startswith(f"pkt: error: another sweep runs on this repository (process {driver.pid} on ")
    assert message.count("\n") == 1

    driver.send_signal(signal.SIGINT)
    read_until(driver.stderr, "stopping")
    if stubborn:  # the second one kills
        driver.send_signal(signal.SIGINT)
    status, out, err = finish(driver)
    assert status == 130
    assert "stopped    b" in err
    assert out.startswith("sweep: 5 stages: 1 ran, 1 stopped, 3 not run")
    assert set(entries(project)) == {"a"}
    assert not any(json.loads((project / ".dvc/tmp/rwlock").read_text()).values())
    (project / "hold.b").unlink()
    assert "sweep: 5 stages: 4 ran, 1 up to date" in sweep(project)


def test_a_killed_driver_holds_the_repository_until_its_stages_have_ended(project: Path) -> None:
    (project / "hold.a").touch()
    driver = begin(project, "a")
    wait_for_starts(project, 1, driver)
    driver.kill()
    driver.wait()
    assert "if it was killed, its last stages are still running" in sweep(project, "a", status=2)
    (project / "hold.a").unlink()
    while "another sweep" in (said := run_any(project)):
        pass
    assert "sweep: 1 stages: 1 up to date" in said
    assert started(project) == ["a"]


def run_any(folder: Path) -> str:
    done = subprocess.run([*PKT, "sweep", "a"], cwd=folder, capture_output=True, text=True, env=environment())
    return done.stdout + done.stderr


def test_new_outputs_that_only_the_remote_has_are_fetched(project: Path, tmp_path: Path) -> None:
    """A colleague ran a and b anew; here c, d and e are still those of the old ones, and no data is on disk."""
    dvc(project, "remote", "add", "-q", "-d", "team", str(tmp_path / "remote"))
    dvc(project, "repro")
    (project / "in.txt").write_text("two\n")
    dvc(project, "repro", "a", "b")
    dvc(project, "push", "-q")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-q", "-m", "a and b")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(project), str(clone))

    said = sweep(clone, "--pull", "--allow-missing")
    assert "sweep: 5 stages: 3 ran, 2 up to date" in said
    assert started(clone) == ["c", "d", "e"]
    assert (clone / "c.txt").read_text() == "two\na\ntwo\nb\nc\n"
    assert "sweep: 5 stages: 5 up to date" in sweep(clone, "--allow-missing")


def test_two_stages_at_once_share_the_imports(template: Path, tmp_path: Path) -> None:
    project = shutil.copytree(template, tmp_path / "project")
    (project / "data").mkdir()
    for split in ("train", "test"):
        rows = (f'{{"question": "{split} {i}?", "answer": "One.\\n#### {i}"}}\n' for i in range(6))
        (project / f"data/{split}.jsonl").write_text("".join(rows).replace("\n####", "\\n####"))
    command = (
        'test -n "$PKT_WARM" && pkt prepare --task gsm8k --data data --out ${item} --extract 1 --align 2 --train 2'
    )
    stage = {"cmd": f"{command} --transfer 1", "deps": ["data"], "outs": ["${item}"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"p": {"foreach": ["x", "y"], "do": stage}}}))
    warm = (sys.executable, "-m", "pkt_stages.warm")
    assert "sweep: 2 stages: 2 ran" in run(project, *warm, *PKT, "sweep", "--workers", "2")
    assert entries(project)["p@x"]["outs"][0]["md5"] == entries(project)["p@y"]["outs"][0]["md5"]


def test_bad_input_is_one_line(project: Path, tmp_path: Path) -> None:
    said = sweep(project, "nothing", status=2)
    assert said.startswith("pkt: error: ") and "'nothing'" in said and said.count("\n") == 1
    said = sweep(tmp_path, status=2)
    assert said.startswith("pkt: error: you are not inside of a DVC repository") and said.count("\n") == 1


def test_its_answers_are_those_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Graph.changed` does by itself, without DVC's locks, what `Stage.changed` does."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    params = {"lr": 1, "sizes": {"small": 2, "large": 3}, "names": {"a": {}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "in.txt").write_text("in")
    stages: dict[str, Any] = {
        "whole": {"cmd": "true", "params": [{"params.yaml": None}], "outs": ["whole.txt"]},
        "some": {"cmd": "true", "params": ["lr", "sizes.small", "names.a"], "deps": ["in.txt"], "outs": ["some.txt"]},
        "after": {"cmd": "true", "deps": ["some.txt"], "metrics": [{"after.json": {"cache": False}}]},
        "frozen": {"cmd": "true", "deps": ["in.txt"], "outs": ["frozen.txt"], "frozen": True},
        "always": {"cmd": "true", "deps": ["in.txt"], "outs": ["always.txt"], "always_changed": True},
        "new": {"cmd": "true", "deps": ["in.txt"], "outs": ["new.txt"]},
    }
    for name in ("whole.txt", "some.txt", "after.json", "frozen.txt", "always.txt"):
        (tmp_path / name).write_text(name)
    new = {"new": stages.pop("new")}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    monkeypatch.chdir(tmp_path)
    with open_repo() as repo:
        repo.commit(force=True)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages | new}))

    def stale(allow_missing: bool) -> set[str]:
        with open_repo() as repo:
            graph = Graph(repo, [], glob=False, allow_missing=allow_missing)
            with graph.locked() as locked:
                assert locked
                ours = {stage.name: graph.changed(stage) for stage in graph.stages}
                # Not read once by us, but as DVC does.
                for dependency in (d for stage in graph.stages for d in stage.deps):
                    vars(dependency).pop("read_params", None)
                theirs = {s.name: bool(s.changed(allow_missing, graph.upstream[s])) for s in graph.stages}
        assert ours == theirs
        return {name for name, changed in ours.items() if changed}

    unchanged = {"always", "new"}
    assert stale(False) == unchanged
    for text, found in (
        (yaml.safe_dump(params | {"lr": 2}), {"whole", "some"}),
        (yaml.safe_dump(params | {"sizes": {"small": 2, "large": 4}}), {"whole"}),
        (yaml.safe_dump(params | {"names": {"b": {}}}), {"whole", "some"}),
        (None, {"whole", "some"}),
    ):
        (tmp_path / "params.yaml").unlink() if text is None else (tmp_path / "params.yaml").write_text(text)
        assert stale(False) == unchanged | found, text
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    for name, found in (
        ("in.txt", {"some", "new"}),
        ("some.txt", {"some", "after"}),
        ("after.json", {"after"}),
        ("frozen.txt", {"frozen"}),
    ):
        (tmp_path / name).rename(tmp_path / "away")
        assert stale(False) == unchanged | found, name
        assert stale(True) - {"new"} == {"always"}, name
        (tmp_path / name).write_text("other")
        assert stale(True) - {"new"} == {"always"} | found - {"new"}, name
        (tmp_path / "away").rename(tmp_path / name)


def test_environments_of_the_slots() -> None:
    assert environments(None, None) == [{}]
    assert environments(2, None) == [{}, {}]
    assert environments(2, "0, 0") == [{"CUDA_VISIBLE_DEVICES": "0"}] * 2
    assert environments(None, "0+1,2+3") == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    with pytest.raises(UserError, match=r"^--gpus 0,1: 2 for 3 workers; name one per worker \(0,0 shares one\)$"):
        environments(3, "0,1")
    for gpus in ("", "0,", "0++1"):
        with pytest.raises(UserError, match="an empty name; expected one GPU per worker"):
            environments(None, gpus)
