"""How many trivial samples of generated code are judged a second? `python -m benchmarks.sandbox [count]`."""

from __future__ import annotations

import os
import sys
import time

from pkt_stages.evaluation.sandbox.pool import Job, Limits, choose_level, judge


def main(count: int = 256) -> None:
    limits = Limits()
    level = choose_level("rlimits", limits)
    tests = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
    job = Job("def f(x):\n    return x * x\n", "def f(x):\n", "f", "", tests, "check")
    judge([job] * 4, level, limits)
    before = os.times()
    start = time.perf_counter()
    verdicts = judge([job] * count, level, limits)
    seconds = time.perf_counter() - start
    after = os.times()
    assert all(v.outcome == "passed" for v in verdicts)
    cpu = sum(after[:4]) - sum(before[:4])
    cores = len(os.sched_getaffinity(0))
    print(f"{level}: {count / seconds:.0f} samples/s on {cores} cores, {1000 * cpu / count:.1f} ms of CPU a sample")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
