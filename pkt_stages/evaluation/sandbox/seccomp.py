"""The system calls that a sample may make: a filter for the kernel, written by libseccomp.

A list of what is allowed, so that a call that is new in a kernel is refused. Refused are all that reach beyond the
process: new processes and programs, files' names and attributes, sockets but for a pair of one's own, signals to
others, limits and scheduling of others, memory that no limit counts, mounts, keys, the kernel's interfaces.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from pkt_stages.evaluation.sandbox.server import OWN_PID

_ALLOWED = """
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 close close_range lseek _llseek
open openat openat2 stat stat64 fstat fstat64 lstat lstat64 newfstatat fstatat64 statx statfs statfs64 fstatfs fstatfs64
access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir umask
dup dup2 dup3 pipe pipe2 select _newselect pselect6 pselect6_time64 poll ppoll ppoll_time64
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2
sendto recvfrom send recv shutdown getsockname getpeername getsockopt
brk mmap mmap2 munmap mprotect mremap madvise mincore msync membarrier rseq
futex futex_time64 futex_wait futex_wake futex_waitv futex_requeue get_robust_list set_robust_list set_tid_address
rt_sigaction rt_sigprocmask rt_sigpending rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 sigaltstack
sigreturn restart_syscall pause alarm getitimer setitimer
timer_create timer_settime timer_settime64 timer_gettime timer_gettime64 timer_getoverrun timer_delete
timerfd_create timerfd_settime timerfd_settime64 timerfd_gettime timerfd_gettime64 nanosleep
time gettimeofday times clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep
clock_nanosleep_time64
exit exit_group wait4 waitid waitpid
getpid getppid gettid getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32
getresgid getresgid32 getgroups getgroups32 getpgrp
getrlimit ugetrlimit getrusage setrlimit getcpu sysinfo uname getrandom
sched_yield sched_get_priority_max sched_get_priority_min
"""
_OF_A_PROCESS = (
    "getpgid",
    "getsid",
    "sched_getaffinity",
    "sched_getscheduler",
    "sched_getparam",
    "sched_rr_get_interval",
)
_THREAD = 0x00010000 | 0x00000100  # CLONE_THREAD, CLONE_VM
_NEW_NAMESPACES = 0x7E020080
_EQUAL, _MASKED = 4, 7
_ANY = 0xFFFFFFFF
# Allowed with these arguments only: (name, [(index, mask, value), ...]).
_SOME: list[tuple[str, list[tuple[int, int, int]]]] = [
    ("clone", [(0, _THREAD | _NEW_NAMESPACES, _THREAD)]),
    ("kill", [(0, _ANY, OWN_PID)]),
    ("tgkill", [(0, _ANY, OWN_PID)]),
    ("prlimit64", [(0, _ANY, 0)]),
    ("getpriority", [(1, _ANY, 0)]),
    *((name, [(0, _ANY, pid)]) for name in _OF_A_PROCESS for pid in (0, OWN_PID)),
    ("socketpair", [(0, _ANY, 1), (1, 0xF, 1)]),  # AF_UNIX, SOCK_STREAM: asyncio has one to wake itself
    ("prctl", [(0, _ANY, 15)]),  # PR_SET_NAME, of a thread
    *(("ioctl", [(1, _ANY, request)]) for request in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # is it a tty?
    *(("fcntl", [(1, _ANY, command)]) for command in (0, 1, 2, 3, 4, 1030)),  # but for the size of a pipe
    *(("fcntl64", [(1, _ANY, command)]) for command in (0, 1, 2, 3, 4, 1030)),
]
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def library() -> ctypes.CDLL:
    """libseccomp.

    Raises:
        OSError: it is not installed.
    """
    try:
        found = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise OSError("libseccomp is not installed (Debian: apt install libseccomp2)") from None
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare)
    )  # fmt: skip
    found.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    found.seccomp_release.argtypes = (ctypes.c_void_p,)
    found.seccomp_release.restype = None
    return found


def filter_program() -> bytes:
    """The filter as the kernel takes it, with OWN_PID where the process's own number belongs.

    Raises:
        OSError: libseccomp is not installed, or refuses.
    """
    seccomp = library()
    context = seccomp.seccomp_init(_ERRNO | _EPERM)
    if not context:
        raise OSError("libseccomp made no filter")
    try:
        for name in _ALLOWED.split():
            _add(seccomp, context, _ALLOW, name, [])
        for name, arguments in _SOME:
            _add(seccomp, context, _ALLOW, name, arguments)
        # glibc then falls back to clone, whose flags a filter can see.
        _add(seccomp, context, _ERRNO | _ENOSYS, "clone3", [])
        fd = os.memfd_create("filter", os.MFD_CLOEXEC)
        try:
            if seccomp.seccomp_export_bpf(context, fd) != 0:
                raise OSError("libseccomp did not write its filter")
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)
    finally:
        seccomp.seccomp_release(context)


def _add(seccomp: ctypes.CDLL, context: int, action: int, name: str, arguments: Sequence[tuple[int, int, int]]) -> None:
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # this architecture, or this libseccomp, does not have it; so it stays refused
        return
    compared = (_Compare * len(arguments))(*(_Compare(index, _MASKED, mask, value) for index, mask, value in arguments))
    if (code := seccomp.seccomp_rule_add_array(context, action, number, len(arguments), compared)) != 0:
        raise OSError(-code, f"libseccomp refused the rule for {name}")
