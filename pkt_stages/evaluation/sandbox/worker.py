"""A trusted process between a candidate and its checker: starts both, carries their messages, keeps the clock.

`python -m pkt_stages.evaluation.sandbox.worker` reads one JSON job a line on stdin and answers with one verdict a
line. The verdict is the checker's, or this process's own (timeout, memory, error); the candidate has no say in it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import marshal
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pkt_stages.evaluation.sandbox.levels import Confined, Level, start
from pkt_stages.evaluation.sandbox.plain import HEADER_SIZE

MAX_MESSAGE = 8 << 20  # bytes
_SET_CHILD_SUBREAPER = 36
_CHECKER_MEMORY_MB = 1024


class TimeUp(Exception):
    """The sample's time is used up."""


class Ended(Exception):
    """A confined process has closed its pipe."""


class TooMuch(Exception):
    """A message longer than MAX_MESSAGE."""


class Channel:
    """Messages to and from a confined process, never blocking beyond a deadline."""

    def __init__(self, process: Confined) -> None:
        self.process = process
        os.set_blocking(process.stdin, False)

    def send(self, body: bytes, deadline: float) -> None:
        view = memoryview(len(body).to_bytes(HEADER_SIZE, "big") + body)
        while view:
            self._wait(deadline, write=True)
            try:
                view = view[os.write(self.process.stdin, view[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended from None

    def receive(self, deadline: float) -> bytes:
        size = int.from_bytes(self._read(HEADER_SIZE, deadline), "big")
        if size > MAX_MESSAGE:
            raise TooMuch(f"a value of {size >> 20} MB; at most {MAX_MESSAGE >> 20} MB")
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            self._wait(deadline, write=False)
            part = os.read(self.process.stdout, min(size, 1 << 16))
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, deadline: float, *, write: bool) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeUp
        pipes = ([], [self.process.stdin]) if write else ([self.process.stdout], [])
        if not any(select.select(*pipes, [], left)):
            raise TimeUp


class Worker:
    """Judges candidates one at a time; every candidate gets a fresh sandbox, the checker's lives on."""

    def __init__(self, level: Level, seconds: float, memory_mb: int) -> None:
        self._level: Level = level
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._checker: Channel | None = None

    def judge(self, job: dict[str, Any]) -> dict[str, str]:
        deadline = time.monotonic() + self._seconds
        checker = self._running_checker()
        candidate = Channel(self._start("candidate", self._memory_mb, 1))
        kept, grace = False, 0.0
        try:
            verdict = self._relay(job, checker, candidate, deadline)
            kept = True
        except TimeUp:
            verdict = {"verdict": "timeout", "message": f"more than {self._seconds:g} s"}
        except TooMuch as error:
            verdict = {"verdict": "error", "message": str(error)[:200]}
        except Ended:
            grace = 0.2  # its pipe closes a little before it has ended
            verdict = {"verdict": "error", "message": "the candidate's process ended during the tests"}
        finally:
            if not kept:
                self.close()
            killed = candidate.process.stop(grace)
            self._end_strays()
        if killed and verdict["verdict"] == "error":
            verdict = {"verdict": "memory", "message": f"killed, most likely beyond {self._memory_mb} MB"}
        return verdict

    def close(self) -> None:
        """End the checker; the next candidate gets a fresh one."""
        if self._checker is not None:
            self._checker.process.stop(0)
            self._checker = None

    def _end_strays(self) -> None:
        """Kill what outlived its sample: as the subreaper, this process has inherited it."""
        keep = self._checker.process.pid if self._checker else -1
        while strays := _children() - {keep}:
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _relay(self, job: dict[str, Any], checker: Channel, candidate: Channel, deadline: float) -> dict[str, str]:
        checker.send(json.dumps(job).encode(), deadline)
        while True:
            message = checker.receive(deadline)
            if message.startswith(b'{"verdict"'):  # its requests begin otherwise, see plain.encode
                return dict(json.loads(message))
            candidate.send(message, deadline)
            checker.send(candidate.receive(deadline), deadline)

    def _running_checker(self) -> Channel:
        if self._checker is None:
            self._checker = Channel(self._start("checker", _CHECKER_MEMORY_MB, 2))
        return self._checker

    def _start(self, role: str, memory_mb: int, num_processes: int) -> Confined:
        return start(
            self._level,
            _source(role),
            memory_mb=memory_mb,
            cpu_seconds=int(self._seconds) + 1,
            num_processes=num_processes,
        )


def _children() -> set[int]:
    """The processes that any thread of this one has as children."""
    while True:
        try:
            tasks = Path("/proc/self/task").iterdir()
            return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread (sandlock has some) ended between the two looks; its children are another's now


@functools.cache
def _source(role: str) -> str:
    """The program of a role as one text, since a sandbox can read none of this package's files; compiled already."""
    folder = Path(__file__).parent
    lines = (folder / f"{role}.py").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("from __future__", "from pkt_stages"))]
    program = "\n".join([(folder / "plain.py").read_text(encoding="utf-8"), *kept, "serve()"])
    compiled = marshal.dumps(compile(program, f"<{role}>", "exec"))
    return f"import marshal\nexec(marshal.loads(bytes.fromhex({compiled.hex()!r})))"


def main() -> None:
    settings = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # sandlock answers many of a candidate's system calls from here: on the same core that costs half as much.
    os.sched_setaffinity(0, {settings["core"]})
    worker = Worker(settings["level"], settings["seconds"], settings["memory_mb"])
    try:
        for line in sys.stdin:
            print(json.dumps(worker.judge(json.loads(line))), flush=True)
    except KeyboardInterrupt:  # the terminal interrupts whoever asked as well, and that one says so
        sys.exit(128 + signal.SIGINT)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
