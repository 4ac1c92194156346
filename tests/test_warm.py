from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PKT = f"{sys.executable} -m pkt_stages"


def warm(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A shell script under `python -m pkt_stages.warm`, in another folder."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "pkt_stages.warm", "bash", "-c", script]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_stages_do_what_they_do_alone(target_folder: Path, tmp_path: Path) -> None:
    attribute = f"{PKT} attribute --model {target_folder} --extract e.jsonl --out"
    (tmp_path / "e.jsonl").write_text(
        '{"dataset": "d", "id": "a", "messages": [{"role": "user", "content": "1 + 1?"},'
        ' {"role": "assistant", "content": "It is 2."}]}\n'
    )
    script = f"{attribute} warm.safetensors && env -u PKT_WARM {attribute} alone.safetensors"
    script += f"; {PKT} attribute --model no; echo $?"
    done = warm(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attribute: 480 neurons on 1 examples") == 2
    assert done.stdout.endswith("\n2\n")
    assert "Missing option" in done.stderr
    assert (tmp_path / "warm.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_a_client_that_is_killed_takes_its_child_with_it(tmp_path: Path) -> None:
    """The child waits on a pipe that nobody writes to; it must be gone before the whole ends."""
    script = f"""
        mkfifo pipe.jsonl
        {PKT} attribute --model x/y --extract pipe.jsonl --out o &
        client=$!
        sleep 0.2
        until pgrep -P $PPID | grep -qv $$; do sleep 0.1; done
        sleep 1; kill -9 $client; wait $client; sleep 0.5
        pgrep -P $PPID | grep -v $$ || echo nobody
    """
    started = time.monotonic()
    done = warm(tmp_path, script)
    assert done.stdout == "nobody\n", done.stdout + done.stderr
    assert time.monotonic() - started < 200


def test_the_status_of_the_command_and_of_a_server_that_is_gone(tmp_path: Path) -> None:
    assert warm(tmp_path, "exit 7").returncode == 7
    done = warm(tmp_path, f"PKT_WARM=/nowhere {PKT} --help | head -3")
    assert "Usage" in done.stdout
