"""The first process of a sandbox, trusted: forks one process per sample, which is confined further and then runs it.

The fork starts from an interpreter that has run nothing but this, so each sample finds a fresh one, at a tenth of the
price of starting it. levels.py made what surrounds this process; here are the limits of a single sample.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import resource
import signal
import site
import socket
import struct
import sys
from collections.abc import Callable

from pkt_stages.evaluation.sandbox.candidate import run_candidate
from pkt_stages.evaluation.sandbox.checker import run_checker, run_plain

ROLES: dict[str, Callable[..., None]] = {"plain": run_plain, "candidate": run_candidate, "check": run_checker}
OWN_PID = 0x5ECC09D5  # in the filter's program in place of the process's own number
MAX_OPEN_FILES = 64
SET_DUMPABLE = 4
_M_ARENA_MAX, _SET_SECCOMP, _MODE_FILTER = -8, 22, 2


def serve(filter_program: bytes) -> None:
    """Run samples, one at a time, until the worker closes the control socket, which is stdin.

    A request is {"role", "memory_mb", "cpu_seconds"} with the role's file descriptors; the answer is [wait status,
    seconds of CPU], when the process has ended.

    Args:
        filter_program: of seccomp, as it is in memory; empty for none.
    """
    control = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a PID namespace's first process ignores what it does not handle
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)  # its memory is nobody's, although its samples are of the same user
    site.setquit()
    libc.mallopt(_M_ARENA_MAX, 1)  # an arena per thread would take 64 MB of address space each
    gc.freeze()
    while True:
        body, fds, _, _ = socket.recv_fds(control, 1 << 12, 4)
        if not body:
            os._exit(0)
        request = json.loads(body)
        pid = os.fork()
        if pid == 0:
            try:
                control.close()
                _close_all_but(fds)
                _limit(request["memory_mb"], request["cpu_seconds"], forks=not filter_program)
                random.seed(0)
                if filter_program:
                    _filter(libc, filter_program)
                ROLES[request["role"]](*fds)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)
        _, status, used = os.wait4(pid, 0)
        control.send(json.dumps([status, used.ru_utime + used.ru_stime]).encode())


def _close_all_but(fds: list[int]) -> None:
    first = 3
    for fd in [*sorted(fds), 1 << 20]:
        os.closerange(first, fd)
        first = fd + 1


def _limit(memory_mb: int, cpu_seconds: int, *, forks: bool) -> None:
    for limit, soft, hard in (
        (resource.RLIMIT_AS, memory_mb << 20, memory_mb << 20),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, 1 << 20, 1 << 20),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES),
    ):
        resource.setrlimit(limit, (soft, hard))
    if forks:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # the kernel does not hold root to it


def _filter(libc: ctypes.CDLL, program: bytes) -> None:
    program = program.replace(struct.pack("I", OWN_PID), struct.pack("I", os.getpid()))
    held = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(held)))
    if libc.prctl(_SET_SECCOMP, _MODE_FILTER, described, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refused the system-call filter")
