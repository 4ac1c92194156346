"""A trusted process beside the sandboxes: gives them samples, keeps the clock, and passes verdicts on.

`python -m pkt_stages.evaluation.sandbox.worker` reads one JSON job a line on stdin and answers with one verdict a
line. A sample is first run as the benchmark runs it, beside its tests. What fails there has failed. What passes is
tested once more from another sandbox, which it can neither see nor change: only then is it passed, else disputed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import marshal
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pkt_stages.evaluation.sandbox.levels import (
    LEVELS,
    Failed,
    Level,
    Server,
    Unavailable,
    again,
    seccomp_filter,
    start,
)
from pkt_stages.evaluation.sandbox.plain import framed, unframed
from pkt_stages.evaluation.sandbox.server import SET_DUMPABLE

_SET_CHILD_SUBREAPER = 36
_CHECKER_MEMORY_MB = 2048
_WALL = 3  # times its limit of CPU time a sample may take: on a busy machine it has to wait for a core
# Apart from its tests a sample may take more than its limits, which hold beside them: each value has to be carried.
_APART = 3  # times as much CPU time
_CARRYING_MB = 1024
_MAX_VERDICT = 1 << 16  # bytes
_TICK = 0.1  # seconds
_GRACE = 1.0  # seconds in which a process ends that has nothing left to do
_VERDICTS = ("passed", "failed", "error", "memory")


class TimeUp(Exception):
    """The sample's time is used up."""


class Clock:
    """Wall-clock time as this process lives through it: while it is stopped, or its machine is, nothing passes.

    A sample that computes meanwhile has its limit of CPU time.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._seen = time.monotonic()

    def tick(self) -> None:
        """Raise TimeUp when nothing is left."""
        now = time.monotonic()
        self._left -= min(now - self._seen, 2 * _TICK)
        self._seen = now
        if self._left <= 0:
            raise TimeUp


class Worker:
    """Judges samples one at a time, each in processes of its own."""

    def __init__(self, level: Level, seconds: float, memory_mb: int) -> None:
        self._level: Level = level
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._program = _program(seccomp_filter(level))
        self._servers: dict[str, Server] = {}

    def judge(self, job: dict[str, Any]) -> dict[str, str]:
        """The verdict on a sample: passed, failed, error, memory, timeout or disputed, and a message."""
        beside = self._run("plain", job)
        if beside["verdict"] != "passed":
            return beside
        apart = self._run("check", job)
        if apart["verdict"] == "passed":
            return apart
        told = f"passes beside its tests, not apart from them ({apart['verdict']}: {apart['message']})"
        return {"verdict": "disputed", "message": told[:300]}

    def close(self) -> None:
        """End the sandboxes; the next sample gets fresh ones."""
        for server in self._servers.values():
            server.kill()
        self._servers.clear()
        self._end_strays()

    def _run(self, role: str, job: dict[str, Any]) -> dict[str, str]:
        clock = Clock(_WALL * self._seconds)
        seconds, memory_mb = self._seconds, self._memory_mb
        given, giving = os.pipe()
        telling, told = os.pipe()
        try:
            judge = candidates = self._server("candidates")
            if role == "plain":
                candidates.run(role, [given, told], memory_mb, seconds)
            else:
                (asked, asking), (answering, answered) = os.pipe(), os.pipe()
                seconds, memory_mb = _APART * seconds, memory_mb + _CARRYING_MB
                candidates.run("candidate", [asked, answered], memory_mb, seconds)
                judge = self._server("checkers")
                judge.run(role, [given, told, asking, answering], _CHECKER_MEMORY_MB, seconds)
            verdict = _exchange(giving, framed(json.dumps(job).encode()), telling, clock)
            ended = [self._end(server) for server in dict.fromkeys((judge, candidates))]
        except TimeUp:
            self.close()
            return {"verdict": "timeout", "message": f"more than {_WALL * self._seconds:g} s"}
        finally:
            os.close(giving)
            os.close(telling)
            self._end_strays()
        return verdict or _without_verdict(*ended[0], seconds=seconds, memory_mb=memory_mb)

    def _server(self, name: str) -> Server:
        server = self._servers.get(name)
        if server is not None and select.select([server.control], [], [], 0)[0]:  # it speaks unasked: it has ended
            server.kill()
            server = None
        if server is None:
            server = self._servers[name] = start(self._level, self._program)
        return server

    def _end(self, server: Server) -> tuple[int, float]:
        """How a sample's process ended; if it does not end by itself now, its sandbox does."""
        clock = Clock(_GRACE)
        with contextlib.suppress(TimeUp, EOFError):
            while not select.select([server.control], [], [], _TICK)[0]:
                clock.tick()
            return server.ended()
        server.kill()
        self._servers = {name: other for name, other in self._servers.items() if other is not server}
        return 0, 0.0

    def _end_strays(self) -> None:
        """Kill what outlived its sample: as the subreaper, this process has inherited it."""
        keep = {server.pid for server in self._servers.values()}
        while strays := _children() - keep:
            for pid in strays:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _exchange(giving: int, body: bytes, telling: int, clock: Clock) -> dict[str, str] | None:
    """Write a job to one pipe and read a verdict from the other; None if its writer ends without one.

    Raises:
        TimeUp: before that.
    """
    os.set_blocking(giving, False)
    left, told = memoryview(body), b""
    while True:
        # What is there already counts, however late it is seen.
        ready, writable, _ = select.select([telling], [giving] if left else [], [], _TICK)
        if ready:
            part = os.read(telling, 1 << 16)
            told += part
            if not part or len(told) > _MAX_VERDICT:
                return None
            if (verdict := _verdict(told)) is not None:
                return verdict
        if writable:
            try:
                left = left[os.write(giving, left) :]
            except BrokenPipeError:
                left = left[:0]
        clock.tick()


def _verdict(told: bytes) -> dict[str, str] | None:
    """The verdict, when all of it has arrived. It may be the candidate's word, so it may be anything."""
    body = unframed(told)
    if body is None:
        return None
    try:
        found = json.loads(body)
        verdict, message = found["verdict"], found["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return {"verdict": verdict, "message": str(message)[:200]} if verdict in _VERDICTS else None


def _without_verdict(status: int, used: float, *, seconds: float, memory_mb: int) -> dict[str, str]:
    """What became of a process that ended without a verdict."""
    if not os.WIFSIGNALED(status):
        return {"verdict": "error", "message": "the process ended during the tests"}
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU or (number == signal.SIGKILL and used >= seconds):
        return {"verdict": "timeout", "message": f"more than {seconds:g} s of CPU"}
    if number == signal.SIGKILL:
        return {"verdict": "memory", "message": f"killed, most likely beyond {memory_mb} MB"}
    return {"verdict": "error", "message": f"the process was ended by {signal.Signals(number).name}"}


def _children() -> set[int]:
    """The processes that any thread of this one has as children."""
    while True:
        try:
            tasks = Path("/proc/self/task").iterdir()
            return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread ended between the two looks; its children are another's now


_IN_SANDBOX = ("plain", "candidate", "checker", "server")


@functools.cache
def _program(filter_program: bytes) -> bytes:
    """What runs in a sandbox, as one program, since it can read none of this package's files; compiled already."""
    folder = Path(__file__).parent
    lines = ["from __future__ import annotations"]
    for name in _IN_SANDBOX:
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if not line.startswith(("from __future__", "from pkt_stages"))]
    lines.append(f"serve({filter_program!r})")
    return marshal.dumps(compile("\n".join(lines), "<sandbox>", "exec", dont_inherit=True))


def probe(memory_mb: int, levels: Sequence[Level] = LEVELS) -> Iterator[tuple[Level, str]]:
    """Each level with what this host lacks for it, down to the first that judges a sample here: with nothing.

    Raises:
        Failed: the host has the level, but a sample fails there, several times.
    """
    for level in levels:
        try:
            again(lambda level=level: _trial(level, memory_mb))  # type: ignore[misc]
        except Unavailable as error:
            yield level, str(error)
        except Failed as error:
            raise Failed(f"{level}: {error}") from None
        else:
            yield level, ""
            return


def _trial(level: Level, memory_mb: int) -> None:
    """Judge a sample that passes.

    Raises:
        Unavailable: this host does not have the level.
        Failed: it does not pass.
    """
    job = {"code": "def f(x):\n    return [x]\n", "prefix": "", "entry": "f", "setup": "", "call": ""}
    worker = Worker(level, 20.0, memory_mb)
    try:
        verdict = worker.judge({**job, "tests": "assert f(42) == [42]"})
    except OSError as error:
        raise Failed(str(error)) from None
    finally:
        worker.close()
    if verdict["verdict"] != "passed":
        raise Failed("a trial sample: {verdict}, {message}".format(**verdict))


def main() -> None:
    settings = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)
    if "level" not in settings:
        found: dict[str, str] = {}
        try:
            found.update(probe(settings["memory_mb"], settings.get("levels", LEVELS)))
        except Failed as error:
            found["failed"] = str(error)
        print(json.dumps(found))
        return
    os.sched_setaffinity(0, {settings["core"]})  # the processes of a sample wait for each other: one core is enough
    worker = Worker(settings["level"], settings["seconds"], settings["memory_mb"])
    try:
        for line in sys.stdin:
            try:
                answer = worker.judge(json.loads(line))
            except (Failed, Unavailable) as error:
                answer = {"failed": str(error)}
            print(json.dumps(answer), flush=True)
    except KeyboardInterrupt:  # the terminal interrupts whoever asked as well, and that one says so
        sys.exit(128 + signal.SIGINT)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
