from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
        "BAD   DVC: no dvc.yaml here\n        run this in the project's root\n"
    )


def test_a_missing_and_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=99", "no-such-package", "typer>=0.1", "vllm; extra == 'vllm'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    first = next(iter(doctor.packages()))
    assert first.state == "bad"
    assert first.found.startswith("numpy>=99 wanted, ") and first.found.endswith("; no-such-package is missing")
