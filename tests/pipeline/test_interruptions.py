"""A run that is killed, interrupted or out of space goes on to the same bytes; damaged files are not used.

The short form of `make soak` (tests/soak), with LaTen's stages up to the alignment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.repository import LATEN, dvc, make_repository, ran, run, shrink
from tests.profiles import rows
from tests.soak.interruptions import Fault, Write, contents, disturbed, leftovers, one_line, repro, undisturbed

Run = Callable[..., tuple[int, str, str]]
OF = "source-gsm8k"
ALIGN, SELECT, SOURCE = f"align@laten-{OF}", f"select@{OF}", "attribute@source-chat-gsm8k"
SELECTED = "artifacts/tiny/select/source/gsm8k"
ROWS = f"{SELECTED}/rows.safetensors"


def choose(params: dict[str, Any]) -> None:
    shrink(params)
    rows(params, align=LATEN)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_repository(tmp_path_factory.mktemp("repositories") / "fresh", choose)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "nothing has run")
    return folder


@pytest.fixture(scope="module")
def calm(fresh: Path) -> tuple[Path, list[Write]]:
    """A run that nothing disturbed, and what it wrote."""
    folder = Path(shutil.copytree(fresh, fresh.parent / "calm"))
    return folder, undisturbed(folder, fresh.parent / "none", ALIGN)


def test_results_do_not_depend_on_what_broke_a_run(fresh: Path, calm: tuple[Path, list[Write]]) -> None:
    rough = Path(shutil.copytree(fresh, fresh.parent / "rough"))
    folder, writes = calm
    renamed = {
        stage: [w.number for w in writes if w.stage == stage and w.event == "os.rename"] for stage in (SELECT, ALIGN)
    }
    plan = [
        Fault(SOURCE, 0, "fill disk"),
        Fault(SELECT, renamed[SELECT][-1], "kill stage"),
        # After the first step: its state is kept, so that fewer writes are left.
        Fault(ALIGN, renamed[ALIGN][2], "kill all"),
        Fault(ALIGN, "compute", "interrupt"),
    ]
    said = disturbed(rough, fresh.parent / "faults", plan, ALIGN)
    assert contents(rough) == contents(folder)
    assert leftovers(rough) == []
    told = "pkt: error: no space to write a file; free some and run again, it goes on where it was"
    assert one_line(said[plan[0]]) == told
    assert one_line(said[plan[3]]) == "pkt: interrupted; run again to go on"


def damage(path: Path, how: str) -> None:
    """As a bad disk or copy does: permissions stay."""
    mode, content = path.stat().st_mode, bytearray(path.read_bytes())
    content[-100] ^= 64
    path.chmod(0o644)
    path.write_bytes(content if how == "flipped" else content[:-100])
    path.chmod(mode)


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_output_is_brought_back(calm: tuple[Path, list[Write]], how: str) -> None:
    folder, _ = calm
    before = contents(folder)
    damage(folder / ROWS, how)
    assert contents(folder) != before
    assert ran(dvc(folder, "repro", ALIGN)) == set()  # from the cache
    assert contents(folder) == before


def test_a_damaged_cache_is_not_used_and_made_anew(
    calm: tuple[Path, list[Write]], pkt: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """DVC does not look into read-only objects. Stages do; `pkt doctor --cache` says what brings all back."""
    folder, _ = calm
    before = contents(folder)
    recorded = json.loads(dvc(folder, "ls", ".", ROWS, "--dvc-only", "--json", "--show-hash"))[0]["md5"]
    (out,) = yaml.safe_load((folder / "dvc.lock").read_text())["stages"][SELECT]["outs"]
    broken = folder / ".dvc/cache/files/md5" / recorded[:2] / recorded[2:]
    monkeypatch.chdir(folder)
    assert "are what their names say" in pkt("doctor", "--cache")[1]
    damage(broken, "flipped")
    (folder / ROWS).unlink()
    assert ran(dvc(folder, "repro", ALIGN)) == set()
    assert contents(folder) != before, "DVC has become careful: are our own checks still needed?"
    refused = repro(folder, tmp_path, "--single-item", "--force", ALIGN)
    assert refused.returncode != 0
    assert one_line(refused.stderr).startswith(
        f"pkt: error: {SELECTED}: not what its stage has made (MD5 {out['md5']} in"
    )
    status, printed, err = pkt("doctor", "--cache")
    assert (status, err.splitlines()[-1]) == (2, "pkt: error: DVC cache content: see above")
    advice = printed.splitlines()[-1].strip()
    assert advice.startswith(f"rm -f {broken}; rm -r artifacts; then `dvc repro`")
    run(folder, "sh", "-c", advice.split("; then")[0])
    # `prepare` writes a plain file of git, too, so that DVC's cache of runs is not for it.
    assert ran(dvc(folder, "repro", ALIGN)) == {SELECT, "prepare@gsm8k"}
    assert contents(folder) == before
