"""Judging many samples of generated code, in parallel over cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Literal, get_args

from pkt_stages.errors import UserError, printable
from pkt_stages.evaluation.sandbox.levels import LEVELS, STOPS, Level
from pkt_stages.progress import track

_WORKER = (sys.executable, "-m", "pkt_stages.evaluation.sandbox.worker")

Outcome = Literal["passed", "failed", "error", "timeout", "memory", "disputed"]


@dataclass(frozen=True)
class Job:
    """A sample and what it is tested with.

    Attributes:
        code: the generated program, whole. Not trusted.
        prefix: the benchmark's own code at its beginning; its imports and helper functions are the tests' as well.
        entry: the function under test, or "".
        setup, tests: the benchmark's code; they pass if no exception leaves them.
        call: a function of `tests` to call with the function under test (HumanEval's `check`), or "".
    """

    code: str
    prefix: str
    entry: str
    setup: str
    tests: str
    call: str


@dataclass(frozen=True)
class Verdict:
    """What became of a sample.

    Attributes:
        outcome: passed; failed (an assertion), error (an exception, or the process ended), timeout, memory; or
            disputed: it passes in one process with its tests, as the benchmark runs it, but not apart from them.
        message: one printable line; the sample may have had a say in it.
    """

    outcome: Outcome
    message: str


@dataclass(frozen=True)
class Limits:
    """Per sample.

    Attributes:
        seconds: of CPU, for defining and all tests; three times that of wall-clock time, pauses not counted.
        memory_mb: address space of the process that runs the sample, in MiB. It can start no other.
    """

    seconds: float = 10.0
    memory_mb: int = 512


def choose_level(floor: Level = "sandlock", limits: Limits | None = None, named: Level | None = None) -> Level:
    """The strongest level of this host; a line on stderr says why it is not the first one.

    A level is passed over only if the host lacks something for it: one that is there and fails is an error, for nothing
    may run in a weaker sandbox than the rest unseen.

    Args:
        named: the level to take, instead of the strongest.

    Raises:
        UserError: it is below `floor`, the host lacks it, or it fails, several times.
    """
    for given in (floor, named or floor):
        if given not in LEVELS:
            raise UserError(f"unknown sandbox level {given!r}; expected one of {', '.join(LEVELS)}")
    if named is not None and LEVELS.index(named) > LEVELS.index(floor):
        raise UserError(
            f"generated code: sandbox {named!r} is below the floor {floor!r}; accept it with --sandbox-floor"
        )
    level, why = strongest(memory_mb=(limits or Limits()).memory_mb, levels=LEVELS if named is None else (named,))
    if level is None and named is not None:
        raise UserError(f"generated code: this host has no sandbox {named!r} ({why}); name another one, or none")
    if level is None or LEVELS.index(level) > LEVELS.index(floor):
        raise UserError(
            f"generated code: the strongest sandbox here is {level or 'none'}, below the floor {floor!r} ({why});"
            f" mend that, or accept it with --sandbox-floor {level or LEVELS[-1]}"
        )
    if why:
        print(f"generated code: the sandbox is {level} ({printable(why)})", file=sys.stderr)
    return level


def strongest(*, memory_mb: int, levels: Sequence[Level] = LEVELS) -> tuple[Level | None, str]:
    """The first of these levels that this host has, and what it lacks for those before.

    Raises:
        UserError: the host has a level, but a trial sample fails there, several times.
    """
    command = [*_WORKER, json.dumps({"memory_mb": memory_mb, "levels": levels})]
    tried = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if tried.returncode != 0:
        raise RuntimeError(f"a sandbox worker broke: {tried.stderr.strip()[-500:]}")
    found: dict[str, str] = json.loads(tried.stdout)
    if "failed" in found:
        raise UserError(
            f"generated code: this host has a sandbox that fails now ({printable(found['failed'])}); run again, and if"
            " it stays so name a weaker level for all evaluations with PKT_SANDBOX"
        )
    level = next((level for level in levels if found.get(level) == ""), None)
    return level, "; ".join(f"{level}: {reason}" for level, reason in found.items() if reason)


def described(level: Level) -> dict[str, str]:
    """A level with what it stops, for the metrics."""
    return {"level": level, "stops": STOPS[level]}


def judge(jobs: Sequence[Job], level: Level, limits: Limits, num_workers: int | None = None) -> list[Verdict]:
    """One verdict per job, in order.

    Args:
        num_workers: samples at a time; by default the number of cores this process may use, one sample on each.

    Raises:
        UserError: a sandbox could not be started, several times.
        RuntimeError: a worker, which is trusted code, broke.
    """
    if not jobs:
        return []
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid()  # several evaluations at once had better not all begin on the same core
    count = min(num_workers or len(cores), len(jobs))
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    workers = [_start_worker(level, limits, cores[(first + i) % len(cores)]) for i in range(count)]
    for worker in workers:
        idle.put(worker)

    def judge_one(job: Job) -> Verdict:
        worker = idle.get()
        try:
            return _ask(worker, job)
        finally:
            idle.put(worker)

    executor = ThreadPoolExecutor(count)
    try:
        verdicts: Iterable[Verdict] = executor.map(judge_one, jobs)
        return list(track(verdicts, "running generated code", total=len(jobs)))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            _stop_worker(worker)


def _start_worker(level: Level, limits: Limits, core: int) -> subprocess.Popen[str]:
    settings = json.dumps({"level": level, "core": core, **asdict(limits)})
    return subprocess.Popen(
        [*_WORKER, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def _stop_worker(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()  # it ends by itself, and ends its checker
    try:
        worker.wait(5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    worker.stdout.close()


def _ask(worker: subprocess.Popen[str], job: Job) -> Verdict:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(asdict(job)) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"a sandbox worker broke ({error}); its message stands above") from None
    if "failed" in answer:
        raise UserError(f"generated code: no sandbox could be started ({printable(answer['failed'])}); run again")
    assert answer["verdict"] in get_args(Outcome)
    return Verdict(answer["verdict"], printable(answer["message"]))
