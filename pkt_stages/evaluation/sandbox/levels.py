"""How strongly this host can confine a process, and starting one at a chosen level.

sandlock    Landlock + seccomp (package sandlock, Linux 6.12+): no files but the interpreter's, no writing at all, no
            sockets, no new processes, no signals to others, memory supervised.
namespaces  user, network, IPC and PID namespaces + rlimits: no network, nothing survives, others cannot be signalled;
            files are readable and writable as for the user.
rlimits     limits on memory, CPU time, files and output only. For code that you would run yourself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Level = Literal["sandlock", "namespaces", "rlimits"]
LEVELS: tuple[Level, ...] = ("sandlock", "namespaces", "rlimits")

# -I would ignore PYTHONHASHSEED, and sets of strings would come in another order in every run.
_FLAGS = ("-P", "-s", "-S", "-B")
# The same on every host. Each file that an interpreter need not look for (locales, its own home) saves time as well.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONHOME": sys.base_prefix,
    "HOME": os.sep,
    "LC_ALL": "C",
    "TZ": "UTC",
}
_MAX_OPEN_FILES = 64
_NEW_USER, _NEW_NET, _NEW_IPC, _NEW_PID = 0x10000000, 0x40000000, 0x08000000, 0x20000000
_SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 1, 38


@dataclass(frozen=True)
class Confined:
    """A confined process with its pipes (file descriptors).

    Attributes:
        pid: of the process itself.
        stop: kill it if it still runs, after a grace period in seconds, reap it, and say whether it had been killed
            before (for want of memory, that is).
    """

    pid: int
    stdin: int
    stdout: int
    stop: Callable[[float], bool]


def start(level: Level, source: str, *, memory_mb: int, cpu_seconds: int, num_processes: int) -> Confined:
    """Run Python source text, confined.

    Raises:
        OSError, RuntimeError: this host does not have the level.
    """
    command = [os.path.realpath(sys.executable), *_FLAGS, "-c", source]
    if level == "sandlock":
        return _start_sandlock(command, memory_mb, num_processes)
    forks = num_processes > 1
    return _start_plain(command, memory_mb, cpu_seconds, forks=forks, namespaces=level == "namespaces")


def strongest(*, memory_mb: int) -> Level | None:
    """The first of LEVELS at which a trial process runs here."""
    for level in LEVELS:
        try:
            confined = start(level, "print(6*7)", memory_mb=memory_mb, cpu_seconds=5, num_processes=1)
        except (OSError, RuntimeError, ImportError, ValueError, subprocess.SubprocessError):
            continue
        said = os.read(confined.stdout, 10)
        confined.stop(0)
        if said == b"42\n":
            return level
    return None


@functools.cache
def _readable() -> tuple[str, ...]:
    """What an interpreter without packages needs to start."""
    paths = sysconfig.get_paths()
    wanted = {os.path.realpath(sys.executable), paths["stdlib"], paths["platstdlib"], os.devnull}
    library = sysconfig.get_config_var("LDLIBRARY")
    if library:
        wanted.add(os.path.join(str(sysconfig.get_config_var("LIBDIR")), str(library)))
    root = Path(os.sep)
    wanted |= {str(folder) for name in ("lib", "lib64") for folder in (root / name, root / "usr" / name)}
    return tuple(sorted(path for path in wanted if os.path.exists(path)))


def _start_sandlock(command: list[str], memory_mb: int, num_processes: int) -> Confined:
    from sandlock import Sandbox, StdioMode
    from sandlock._sdk import ExitReason

    sandbox = Sandbox(
        fs_readable=_readable(),
        max_memory=memory_mb << 20,
        max_processes=num_processes,
        max_open_files=_MAX_OPEN_FILES,
        clean_env=True,
        env=_ENVIRONMENT,
        cwd=os.sep,
        no_coredump=True,
        extra_deny_syscalls=["memfd_create"],  # files in memory that would not be counted
    )
    process = sandbox.popen(command, stdin=StdioMode.PIPED, stdout=StdioMode.PIPED, stderr=StdioMode.NULL)

    pid = process.pid or -1

    def stop(grace: float) -> bool:
        ended = _ends_within(pid, grace)
        process.kill()
        reason = process.wait(10).reason
        process.stdin.close()
        process.stdout.close()
        return ended and reason in (ExitReason.KILLED, ExitReason.SIGNALED)

    return Confined(pid, process.stdin.fileno(), process.stdout.fileno(), stop)


def _ends_within(pid: int, seconds: float) -> bool:
    """Whether a child ends within this time; it stays unreaped."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)


def _start_plain(command: list[str], memory_mb: int, cpu_seconds: int, *, forks: bool, namespaces: bool) -> Confined:
    libc = ctypes.CDLL(None, use_errno=True)

    def confine() -> None:
        if namespaces:
            _enter_namespaces(libc)
        for limit, value in (
            (resource.RLIMIT_AS, memory_mb << 20),
            (resource.RLIMIT_CPU, cpu_seconds),
            (resource.RLIMIT_FSIZE, 1 << 20),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        ):
            resource.setrlimit(limit, (value, value))
        if not forks:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # the kernel does not hold root to it
        libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)

    process: subprocess.Popen[bytes] = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
        cwd=os.sep,
        bufsize=0,
        start_new_session=True,
        preexec_fn=confine,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pipes: tuple[Any, Any] = (process.stdin, process.stdout)

    def stop(grace: float) -> bool:
        ended = _ends_within(process.pid, grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in pipes:
            pipe.close()
        return ended and process.returncode < 0

    return Confined(process.pid, pipes[0].fileno(), pipes[1].fileno(), stop)


def _enter_namespaces(libc: ctypes.CDLL) -> None:
    """Become process 1 of a PID namespace without network; the process before waits for it and ends with it."""
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_PID) != 0:
        raise OSError(ctypes.get_errno(), "namespaces are not allowed here")
    child = os.fork()
    if child:
        os.closerange(0, 256)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status))
