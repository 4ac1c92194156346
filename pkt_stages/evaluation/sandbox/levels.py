"""How strongly this host can confine generated code, and starting a sandbox at a chosen level.

A sandbox is a process (server.py) that forks one process per sample. What surrounds it is made here, before its
interpreter starts: namespaces with a root of their own, Landlock, no capabilities; server.py adds the limits of a
sample and the filter of seccomp.py. Running as root changes nothing: nothing here needs it, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import math
import os
import signal
import socket
import stat
import struct
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pkt_stages.evaluation.sandbox.seccomp import filter_program, library
from pkt_stages.evaluation.sandbox.server import SET_DUMPABLE

T = TypeVar("T")
Level = Literal["sandlock", "namespaces", "landlock", "rlimits"]
LEVELS: tuple[Level, ...] = ("sandlock", "namespaces", "landlock", "rlimits")
_NAMESPACES: tuple[Level, ...] = ("sandlock", "namespaces")
_LANDLOCK: tuple[Level, ...] = ("sandlock", "landlock")

_CALLS = "new processes, programs, network, signals to others, limits and scheduling of others, by a list of calls"
_MEMORY = "memory and CPU time beyond the limit"
# What each level stops, for the metrics.
STOPS: dict[Level, str] = {
    "sandlock": f"{_CALLS}, by namespaces and by Landlock; all files but the interpreter's, all writing; {_MEMORY}",
    "namespaces": f"{_CALLS} and by namespaces; all files but the interpreter's, all writing; {_MEMORY}",
    "landlock": f"{_CALLS}; all files' contents but the interpreter's, all writing; {_MEMORY}",
    "rlimits": f"{_MEMORY}; where libseccomp is installed: {_CALLS}, but not reading or writing the user's files",
}

_INTERPRETER = os.path.realpath(sys.executable)
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
_PROGRAM_FD, _MAX_FD = 3, 1 << 20
_BOOT = f"import marshal, os\nexec(marshal.loads(os.pread({_PROGRAM_FD}, 1 << 24, 0)))"
_NEW_MOUNT, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NOBODY = 65534  # who the process is inside
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x40000, 2
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY, _NO_SUID = 442, 0x8000, 1, 2  # one number on all architectures
_SET_PDEATHSIG, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 24, 38


# What may be otherwise the next moment, unlike what a kernel lacks.
_PASSING = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.EIO, errno.ETXTBSY)
_NO_MORE = (errno.ENOSPC, errno.EUSERS)  # as many namespaces as a user may have
_PAUSES = (0.2, 1.0)  # seconds before another try


class Unavailable(Exception):
    """This host does not have the level; the message says what is missing."""


class Failed(Exception):
    """This host may have the level, but it could not be had now, several times; the message says why."""


class Server:
    """A running sandbox.

    Attributes:
        pid: of the process that the worker started; in a PID namespace the sandbox's first process is a child of it.
        control: readable when a sample has ended, or the sandbox.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control

    def run(self, role: str, fds: Sequence[int], memory_mb: int, seconds: float) -> None:
        """Begin a sample with these file descriptors, which are closed on this side, and these limits."""
        request = {"role": role, "memory_mb": memory_mb, "cpu_seconds": math.ceil(seconds)}
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def ended(self) -> tuple[int, float]:
        """How the sample ended, to be asked when the control socket is readable: its wait status, seconds of CPU.

        Raises:
            EOFError: the sandbox itself has ended.
        """
        try:
            body = self.control.recv(1 << 10)
        except ConnectionError:
            body = b""
        if not body:
            raise EOFError
        status, used = json.loads(body)
        return int(status), float(used)

    def kill(self) -> None:
        """End it with all that is in it."""
        self.control.close()
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def start(level: Level, program: bytes) -> Server:
    """Start a sandbox; what fails in passing is tried again.

    Args:
        program: what runs in it (marshalled code), ending in `server.serve`.

    Raises:
        Unavailable: this host does not have the level.
        Failed: it could not be started now.
    """
    return again(lambda: _start(level, program))


def again(act: Callable[[], T]) -> T:
    """The result of an act; what fails in passing is tried again, and is an error the third time.

    Raises:
        Failed: it failed each time.
    """
    for pause in _PAUSES:
        with contextlib.suppress(Failed):
            return act()
        time.sleep(pause)
    return act()


def _start(level: Level, program: bytes) -> Server:
    if level in _LANDLOCK:
        _sandlock()  # imported before the fork
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        code = os.memfd_create("program", os.MFD_CLOEXEC)
        os.write(code, program)
        failed, failing = os.pipe()
        pid = os.fork()
    except OSError as error:
        raise _told(error.errno, str(error)) from None
    if pid == 0:
        failing = _above(failing)
        try:
            _become(level, theirs.fileno(), code, failing)
        except BaseException as error:
            told = _told(error.errno, str(error)) if isinstance(error, OSError) else error
            os.write(failing, f"{type(told).__name__}: {told}".encode()[:1000])
        finally:
            os._exit(127)
    for fd in (failing, code):
        os.close(fd)
    theirs.close()
    with os.fdopen(failed, "rb") as report:
        reason = report.read().decode("utf-8", "replace")
    server = Server(pid, ours)
    if reason:
        server.kill()
        if reason.startswith("Failed: "):
            raise Failed(reason.removeprefix("Failed: "))
        raise Unavailable(reason.removeprefix("Unavailable: "))
    return server


def _become(level: Level, control: int, program: int, failing: int) -> None:
    """Turn a forked process into a sandbox: does not return.

    Args:
        failing: a pipe that is closed when the sandbox runs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.setsid()
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    control, program, null = (_above(fd) for fd in (control, program, os.open(os.devnull, os.O_RDWR)))
    for fd, wanted in ((control, 0), (null, 1), (null, 2), (program, _PROGRAM_FD)):
        os.dup2(fd, wanted)
    os.closerange(_PROGRAM_FD + 1, failing)
    os.closerange(failing + 1, _MAX_FD)
    if level in _NAMESPACES:
        _enter_namespaces(libc)
        _new_root(libc)
    else:
        os.chdir(os.sep)
    for capability in range(64):
        libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)  # a user has none, and may drop none
    _check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "dropping all capabilities")
    _check(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if level in _LANDLOCK:
        confine, policy = _sandlock()
        try:
            confine(policy(fs_readable=_readable()))
        except Exception as error:
            raise _told(getattr(error, "errno", None), f"Landlock: {error}") from None
    os.execve(_INTERPRETER, [_INTERPRETER, *_FLAGS, "-c", _BOOT], _ENVIRONMENT)


def _above(fd: int) -> int:
    """A copy of a file descriptor, out of the way of those that the sandbox has."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise _told(number, f"{what}: {os.strerror(number)}")


def _told(number: int | None, reason: str) -> Exception:
    """What an error number means: that the host lacks something, or that it failed now."""
    passing = number in _PASSING or (number in _NO_MORE and _may_have_namespaces())
    return Failed(reason) if passing else Unavailable(reason)


def _may_have_namespaces() -> bool:
    """Whether this host's users may have user namespaces at all."""
    limit = Path("/proc/sys/user/max_user_namespaces")
    return limit.is_file() and limit.read_text().strip() != "0"


def _sandlock() -> tuple[Any, Any]:
    try:
        from sandlock import Sandbox, confine
    except (ImportError, OSError) as error:
        raise Unavailable(f"the package sandlock: {error}") from None
    return confine, Sandbox


def _enter_namespaces(libc: ctypes.CDLL) -> None:
    """Become the first process of new namespaces; the process before waits for it and ends with it."""
    user, group = os.geteuid(), os.getegid()
    flags = _NEW_USER | _NEW_MOUNT | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_CGROUP
    _check(libc.unshare(flags), "user namespaces")
    libc.prctl(SET_DUMPABLE, 1, 0, 0, 0)  # else these files are not its own
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {user} 1"),
        ("gid_map", f"{_NOBODY} {group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(line)
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    child = os.fork()
    if child:
        os.closerange(0, _MAX_FD)
        os.waitpid(child, 0)
        os._exit(0)
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _new_root(libc: ctypes.CDLL) -> None:
    """Replace the file system by a read-only one of what an interpreter needs."""
    pivot_root = ctypes.c_long(library().seccomp_syscall_resolve_name(b"pivot_root"))
    root = "/proc"  # there everywhere, and nothing in it is needed any more
    _check(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "private mounts")
    _check(libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, b"size=64k,mode=755"), "a root of its own")
    for path in _readable():
        there = Path(root + path)
        if stat.S_ISDIR(os.stat(path).st_mode):
            there.mkdir(parents=True, exist_ok=True)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.touch()
        done = libc.mount(path.encode(), bytes(there), None, _BIND | _RECURSIVE, None)
        _check(done, f"mounting {path}")
    os.chdir(root)
    _check(libc.syscall(pivot_root, b".", b"."), "changing the root")
    _check(libc.umount2(b".", _DETACH), "leaving the old root")
    os.chdir(os.sep)
    attributes = struct.pack("QQQQ", _READ_ONLY | _NO_SUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    done = libc.syscall(ctypes.c_long(_MOUNT_SETATTR), -1, b"/", _AT_RECURSIVE, attributes, size)
    _check(done, "a read-only root")


@functools.cache
def _readable() -> tuple[str, ...]:
    """What an interpreter without packages needs to start and to import its library, folders before what is in them."""
    paths = sysconfig.get_paths()
    root = Path(os.sep)
    wanted = {
        _INTERPRETER,
        paths["stdlib"],
        paths["platstdlib"],
        os.path.join(sys.base_prefix, "lib"),
        os.devnull,
        str(root / "etc" / "ld.so.cache"),
        str(root / "usr" / "share" / "zoneinfo"),
        *(str(folder) for name in ("lib", "lib64") for folder in (root / name, root / "usr" / name)),
    }
    there = sorted(path for path in wanted if os.path.exists(path))
    return tuple(path for path in there if not any(path.startswith(f"{other}{os.sep}") for other in there))


def seccomp_filter(level: Level) -> bytes:
    """The filter for a level; at the weakest none is needed, where libseccomp is not installed.

    Raises:
        Unavailable: it is needed and cannot be had.
    """
    try:
        return filter_program()
    except OSError as error:
        if level == "rlimits":
            return b""
        raise Unavailable(str(error)) from None
