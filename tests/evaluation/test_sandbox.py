# ruff: noqa: E501 (programs and messages read better on one line)
"""Generated code does no harm, cannot forge a verdict, and is judged as plain Python would judge it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.evaluation.sandbox import levels, pool, seccomp, worker
from pkt_stages.evaluation.sandbox.candidate import Candidate
from pkt_stages.evaluation.sandbox.checker import Checker
from pkt_stages.evaluation.sandbox.plain import NotPlain, _Packer, _Unpacker
from pkt_stages.evaluation.sandbox.pool import Job, Limits, Verdict, choose_level, judge
from tests.evaluation import programs

CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
GOOD = "def f(x):\n    return x * x\n"
LIMITS = Limits(seconds=1.0, memory_mb=256)
ROOMY = Limits(seconds=20.0, memory_mb=1024)


def job(code: str, tests: str = CHECK, *, prefix: str = "def f(x):\n", setup: str = "", call: str = "check") -> Job:
    return Job(code, prefix, "f", setup, tests, call)


@pytest.fixture(scope="module")
def level() -> levels.Level:
    found = choose_level("rlimits", LIMITS)
    assert found == "sandlock", "these tests are about the strongest level"
    return found


def test_honest_programs_are_judged_as_python_judges_them(level: levels.Level) -> None:
    jobs = programs.generated() | programs.references(programs.TINY[1:])
    expected = programs.python_passes(jobs)
    found = dict(zip(jobs, judge(list(jobs.values()), level, ROOMY), strict=True))
    assert len(jobs) > 500 and 0.6 < sum(expected.values()) / len(jobs) < 0.95
    assert {name: str(v) for name, v in found.items() if (v.outcome == "passed") != expected[name]} == {}


@pytest.mark.parametrize("weaker", ["namespaces", "landlock", "rlimits"])
def test_every_level_judges_the_same(weaker: levels.Level) -> None:
    jobs = {
        name: Job(code, prefix, "f", setup, tests, "") for name, (prefix, code, setup, tests) in programs.OTHERS.items()
    }
    expected = programs.python_passes(jobs)
    found = dict(zip(jobs, judge(list(jobs.values()), weaker, ROOMY), strict=True))
    assert {name: str(v) for name, v in found.items() if (v.outcome == "passed") != expected[name]} == {}


@pytest.mark.parametrize("where", ["sandlock", "rlimits"])
def test_nothing_forges_a_verdict(where: levels.Level) -> None:
    """Nor moves the verdict of a good one after it. That something passes beside its tests is seen, and disputed."""
    hostile = programs.forging()
    verdicts = judge([j for one in hostile.values() for j in (one, job(GOOD))], where, LIMITS, 2)
    found = dict(zip(hostile, verdicts[::2], strict=True))
    assert [name for name, v in found.items() if v.outcome == "passed"] == []
    assert set(verdicts[1::2]) == {Verdict("passed", "")}
    outcomes = {
        "wrong": "failed",
        "equals everything": "disputed",
        "endswith": "disputed",
        "pushes answers ahead": "disputed",
        "writes a verdict and leaves": "disputed",
    }
    outcomes |= {
        "replaces a module": "disputed",
        "crashes": "error",
        "leaves while called": "error",
        "sys.exit": "error",
        "a memory bomb": "memory",
    }
    outcomes |= {name: "timeout" for name in found if name.startswith("an endless loop")} | {
        "endless output": "timeout",
        "an endless sleep": "timeout",
        "stops itself": "timeout",
    }
    assert {name: found[name].outcome for name in outcomes} == outcomes
    assert all(v.message.isprintable() for v in verdicts)
    assert _strays() == []


@pytest.mark.parametrize(
    ("where", "can"),
    [("sandlock", set()), ("namespaces", set()), ("landlock", {"sees that a file exists"})],
)
def test_nothing_reaches_out_of_its_sandbox(where: levels.Level, can: set[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "600"]) as bystander:
        hostile = programs.reaching(programs.places(tmp_path, server.getsockname()[1], bystander.pid))
        before = {path: (path.lstat(), path.read_bytes()) for path in tmp_path.iterdir()}
        verdicts = judge([j for one in hostile.values() for j in (one, job(GOOD))], where, LIMITS, 2)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert bystander.poll() is None
        bystander.kill()
    assert {name for name, v in zip(hostile, verdicts[::2], strict=True) if v.outcome == "passed"} == can
    assert set(verdicts[1::2]) == {Verdict("passed", "")}
    after = {path: (path.lstat(), path.read_bytes()) for path in tmp_path.iterdir()}
    assert {p: (_fixed(s), b) for p, (s, b) in after.items()} == {p: (_fixed(s), b) for p, (s, b) in before.items()}
    assert not Path("/dev/shm/pkt-test").exists()
    assert _strays() == []


def _fixed(stat: os.stat_result) -> tuple[float, ...]:
    return stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_size, stat.st_mtime


def test_what_the_hostile_samples_try_is_possible_without_a_sandbox(tmp_path: Path) -> None:
    """Else their verdicts would say nothing. Only what harms nothing but a folder of this test's own is tried."""
    names = ("reads a system file", "reads a secret", "reads a secret through a link", "sees that a file exists")
    names += (
        "appends to a file",
        "truncates a file",
        "changes a mode",
        "changes times",
        "makes a hard link",
        "a file in memory",
    )
    names += (
        "TCP",
        "TCP Fast Open",
        "a socket that listens",
        "a bound socket",
        "runs a program",
        "reads its parent's limits",
    )
    names += ("sees another process", "shared memory by mmap", "a larger pipe", "100 open files", "removes a file")
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in names:
            values = programs.places(tmp_path, server.getsockname()[1], os.getpid())
            sample = programs.reaching(values)[name]
            subprocess.run([sys.executable, "-c", f"{sample.code}\n{sample.tests}"], check=True)
            for path in tmp_path.iterdir():
                path.unlink()


def test_a_sample_spoils_nothing_for_the_next(level: levels.Level) -> None:
    """Neither the limits nor the descriptors, the modules or the memory of the processes that go on."""
    spoil = (
        "import resource, os, sys, builtins, math\nfor pid in (0, os.getppid(), 1, 2):\n    for limit in (resource.RLIMIT_STACK, resource.RLIMIT_NOFILE, resource.RLIMIT_AS):\n"
        "        try:\n            resource.prlimit(pid, limit, (0, 0))\n        except (OSError, ValueError):\n            pass\nsys.modules.clear()\nmath.sqrt = builtins.len = None\ndel builtins.print\n"
    )
    good = job("import math\ndef f(x):\n    print(len('a'))\n    return int(math.sqrt(x ** 4))\n")
    found = judge([j for _ in range(5) for j in (job(spoil), good)], level, LIMITS, 1)
    assert {v.outcome for v in found[::2]} == {"error"}
    assert set(found[1::2]) == {Verdict("passed", "")}


def test_a_pause_of_the_machine_is_nobodys_time(level: levels.Level) -> None:
    """All processes of an evaluation are stopped for longer than the limit; an endless one is still ended."""
    slow = job("import time\ndef f(x):\n    time.sleep(0.05)\n    return x * x\n")
    endless = job("def f(x):\n    while True:\n        pass\n")
    done = threading.Event()

    def pause() -> None:
        time.sleep(1.0)
        paused = _descendants(os.getpid()) - {os.getpid()}
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for pid in paused:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
            if sent == signal.SIGSTOP:
                time.sleep(3 * LIMITS.seconds + 1.5)
        done.set()

    thread = threading.Thread(target=pause)
    thread.start()
    found = judge([slow] * 24 + [endless], level, LIMITS, 2)
    thread.join()
    assert done.is_set()
    assert [v.outcome for v in found] == ["passed"] * 24 + ["timeout"]


def test_a_clock_counts_what_its_process_lives_through(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    clock = worker.Clock(1.0)
    now[0] += 3600
    clock.tick()
    for _ in range(7):
        now[0] += 0.1
        clock.tick()
    now[0] += 0.2
    with pytest.raises(worker.TimeUp):
        clock.tick()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_the_end_of_an_evaluation(sent: signal.Signals) -> None:
    """An interrupt is the asking process's to report; a kill cannot be answered, yet the sandboxes end."""
    program = (
        "from pkt_stages.evaluation.sandbox.pool import *\n"
        "endless = Job('def f(x):\\n    while True: pass\\n', '', 'f', '', 'assert f(1)', '')\n"
        "try:\n    judge([endless] * 4, 'sandlock', Limits(2.0, 256), 2)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    command = [sys.executable, "-c", program]
    asking = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    family: set[int] = set()
    deadline = time.monotonic() + 60
    while len(family) < 9 and time.monotonic() < deadline:  # two workers; before, in and below a PID namespace
        family = _descendants(asking.pid)
        time.sleep(0.02)
    assert len(family) >= 9
    os.killpg(asking.pid, sent)
    printed, _ = asking.communicate(timeout=60)
    assert printed == ("interrupted\n" if sent == signal.SIGINT else "")
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text()[:80] for pid in family]
        time.sleep(0.05)


def _descendants(pid: int) -> set[int]:
    """The process and all below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def _strays() -> list[str]:
    """Sandboxed processes without a worker; those of tests that run beside this one have theirs."""
    commands = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            commands[folder.name] = ((folder / "cmdline").read_text(), parent)
    sandboxed = {pid: parent for pid, (command, parent) in commands.items() if levels._BOOT in command}
    return [
        pid
        for pid, parent in sandboxed.items()
        if parent not in sandboxed and "sandbox.worker" not in commands.get(parent, ("sandbox.worker", ""))[0]
    ]


def test_environment_is_not_the_hosts(level: levels.Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os\ndef f(x):\n    return sorted(os.environ), os.getuid(), os.listdir('/'), os.getcwd()\n"
    names = ["HOME", "LC_ALL", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONUTF8", "TZ"]
    seen = f"def check(candidate):\n    assert candidate(1)[:2] == ({names}, 65534), candidate(1)\n"
    found = judge([job(code.replace(", os.listdir('/'), os.getcwd()", ""), seen)], level, LIMITS)
    assert found == [Verdict("passed", "")]


def test_helpers_of_the_prompt_cannot_be_replaced(level: levels.Level) -> None:
    prefix = 'import math\n\ndef error(a, b):\n    return math.fabs(a - b)\n\ndef f(x):\n    """Square."""\n'
    tests = "def check(candidate):\n    assert error(candidate(3), 9) < 1e-6\n"
    honest = prefix + "    return x ** 2\n"
    lying = prefix + "    return 0\n\ndef error(a, b):\n    return 0\n"
    found = judge([job(honest, tests, prefix=prefix), job(lying, tests, prefix=prefix)], level, LIMITS)
    assert found[0] == Verdict("passed", "")
    assert found[1] == Verdict("disputed", "passes beside its tests, not apart from them (failed: AssertionError)")


def test_all_assertions_count(level: levels.Level) -> None:
    tests = "assert f(2) == 4\nassert f(-2) == 5, 'negative'"
    assert judge([Job(GOOD, "", "f", "", tests, "")], level, LIMITS) == [Verdict("failed", "AssertionError: negative")]


def test_without_libseccomp_there_is_the_weakest_level_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise OSError("not found")

    monkeypatch.setattr(seccomp.ctypes, "CDLL", missing)
    assert levels.seccomp_filter("rlimits") == b""
    with pytest.raises(levels.Unavailable) as caught:
        levels.seccomp_filter("namespaces")
    assert str(caught.value) == "libseccomp is not installed (Debian: apt install libseccomp2)"


def test_what_a_sample_leaves_behind_is_ended_where_nothing_forbids_it() -> None:
    """The weakest level without libseccomp, where root may start processes."""
    code = (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(987)\n        os._exit(0)\n    return x * x\n"
    )
    told = {"code": code, "prefix": "", "entry": "f", "setup": "", "tests": "assert f(2) == 4", "call": ""}
    program = (
        "import ctypes, json, sys\nctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\nfrom pkt_stages.evaluation.sandbox import worker\n"
        f"worker.seccomp_filter = lambda level: b''\nit = worker.Worker('rlimits', 4.0, 256)\nprint(it.judge({told!r})['verdict'])\n"
        "children = worker._children()\nassert len(children) <= 2, children\nit.close()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("passed\n" if os.geteuid() == 0 else "error\n", "")
    assert _strays() == []


def test_where_the_kernel_has_no_user_namespaces_the_level_says_so() -> None:
    """In a user namespace of this test's own that may have none below it."""
    command = [sys.executable, "-m", "pkt_stages.evaluation.sandbox.worker", '{"memory_mb": 256}']
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", shell, "sh", *command], capture_output=True, text=True
    )
    reason = "user namespaces: No space left on device"
    assert json.loads(ran.stdout) == {"sandlock": reason, "namespaces": reason, "landlock": ""}, ran.stderr


def test_a_sandbox_shares_no_ipc_objects_with_the_machine(level: levels.Level) -> None:
    """So none can be lost, and no level with it."""
    objects = [Path(f"/proc/sysvipc/{kind}") for kind in ("shm", "sem", "msg")]
    before = [path.read_text().split() for path in objects]
    assert judge([job(GOOD)], level, LIMITS) == [Verdict("passed", "")]
    assert [path.read_text().split() for path in objects] == before


def test_a_floor_above_what_the_host_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pool, "strongest", lambda **_: ("rlimits", "namespaces: user namespaces: not permitted"))
    assert choose_level("rlimits") == "rlimits"
    why = "namespaces: user namespaces: not permitted"
    assert capsys.readouterr().err == f"generated code: the sandbox is rlimits ({why})\n"
    with pytest.raises(UserError) as caught:
        choose_level("namespaces")
    assert str(caught.value) == (
        f"generated code: the strongest sandbox here is rlimits, below the floor 'namespaces' ({why});"
        " mend that, or accept it with --sandbox-floor rlimits"
    )


def probed(code: str) -> dict[str, str]:
    """What a worker finds out about this host, after some lines of Python."""
    program = (
        "import json, sys\nfrom pkt_stages.evaluation.sandbox import levels, worker\n"
        f"levels._PAUSES = (0.0, 0.0)\ntried = []\n{code}\n"
        'sys.argv = ["worker", json.dumps({"memory_mb": 256, "levels": levels.LEVELS})]\nworker.main()\n'
        "print(len(tried), file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    return {**json.loads(ran.stdout), "tries": ran.stderr.strip()}


TRIAL = """
judge = worker.Worker.judge
def judged(self, job):
    tried.append(self._level)
    return {"verdict": "timeout", "message": "slow"} if len(tried) <= FAILS else judge(self, job)
worker.Worker.judge = judged
"""
STARTED = """
begin = levels._start
def started(level, program):
    tried.append(level)
    if len(tried) <= FAILS:
        raise levels._told(NUMBER, "user namespaces")
    return begin(level, program)
levels._start = started
"""


def test_a_trial_that_fails_in_passing_does_not_lower_the_level(level: levels.Level) -> None:
    """It is tried again, and the third failure is an error; the next level is not looked at."""
    assert probed(TRIAL.replace("FAILS", "2")) == {"sandlock": "", "tries": "3"}
    failed = "sandlock: a trial sample: timeout, slow"
    assert probed(TRIAL.replace("FAILS", "9")) == {"failed": failed, "tries": "3"}


@pytest.mark.parametrize("number", ["EAGAIN", "ENOMEM", "EMFILE", "ENOSPC", "EUSERS"])
def test_what_may_be_had_the_next_moment_is_tried_again(level: levels.Level, number: str) -> None:
    code = STARTED.replace("NUMBER", f"levels.errno.{number}")
    assert probed(code.replace("FAILS", "2"))["sandlock"] == ""
    assert probed(code.replace("FAILS", "9"))["failed"] == "sandlock: user namespaces"


@pytest.mark.parametrize("number", ["EPERM", "ENOSYS", "EINVAL", "EACCES"])
def test_what_a_kernel_lacks_lowers_the_level(level: levels.Level, number: str) -> None:
    found = probed(STARTED.replace("NUMBER", f"levels.errno.{number}").replace("FAILS", "1"))
    assert (found["sandlock"], found["namespaces"], "failed" in found) == ("user namespaces", "", False)


def test_a_level_that_fails_ends_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"namespaces": "too old", "failed": "landlock: a trial sample: memory, killed"})
    done = subprocess.CompletedProcess([], 0, stdout=said, stderr="")
    monkeypatch.setattr(pool.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError) as caught:
        choose_level("rlimits")
    assert str(caught.value) == (
        "generated code: this host has a sandbox that fails now (landlock: a trial sample: memory, killed); run again,"
        " and if it stays so name a weaker level for all evaluations with PKT_SANDBOX"
    )


def test_a_level_that_is_named(level: levels.Level) -> None:
    assert choose_level("rlimits", LIMITS, "landlock") == "landlock"
    with pytest.raises(UserError) as caught:
        choose_level("landlock", LIMITS, "rlimits")
    assert str(caught.value) == (
        "generated code: sandbox 'rlimits' is below the floor 'landlock'; accept it with --sandbox-floor"
    )
    with pytest.raises(UserError, match=r"^unknown sandbox level 'jail'; expected one of sandlock, "):
        choose_level("rlimits", LIMITS, "jail")  # type: ignore[arg-type]


def _peers() -> tuple[Checker, Candidate]:
    printed = sys.stdout
    try:
        return Checker(-1, -1), Candidate(-1, -1)
    finally:
        sys.stdout = printed


def test_values_survive_the_line() -> None:
    tests, candidate = _peers()
    shared: list[Any] = [1]
    value = [
        (),
        frozenset({1}),
        {"a": {1: b"\x00"}},
        range(1, 9, 2),
        '\ud800\n"\\',
        -(2**80),
        1e300,
        True,
        -0.0,
        shared,
        shared,
    ]
    packer = _Packer(candidate, [])
    refs = [packer.ref(value)]
    message = json.loads(json.dumps({"nodes": packer.finish(), "values": refs}))
    (found,) = _Unpacker(tests, message, []).values(refs)
    assert found == value and str(found[8]) == "-0.0" and found[9] is found[10]


def test_what_the_tests_hand_out_does_not_lead_to_their_names() -> None:
    checker, _ = _peers()

    class Item:
        price = 3

        def double(self) -> int:
            return 2 * self.price

    def generator() -> Any:
        yield 1

    item = Item()
    assert checker.act("get", item, ["price"]) == 3
    assert checker.act("call", item.double, [(), {}]) == 6
    code: list[Any] = [generator, item.double, sys, generator.__code__, sys._getframe()]
    for of in code:
        with pytest.raises(NotPlain):
            checker.act("get", of, ["f_globals"])
    for of, name in ((item, "__class__"), (item, "_x"), (item, 3)):
        with pytest.raises(NotPlain):
            checker.act("get", of, [name])
    for of, name in ((item, "double"), (Item, "price")):
        with pytest.raises(NotPlain):
            checker.act("set", of, [name, 1])
    for do, values in (("operator", ["attrgetter", 1, False]), ("eval", ["1"])):
        with pytest.raises((ValueError, KeyError)):
            checker.act(do, item, values)


def test_malformed_messages_are_refused() -> None:
    """Whatever is changed in a message, what comes of it is plain data, a proxy, or NotPlain."""
    tests, candidate = _peers()
    packer = _Packer(candidate, [])
    values = [{"a": [1, (2, "é")]}, {frozenset({3})}, 7**99, print, iter("ab"), b"x", {"b": 1}.items(), 1 - 2j, int]
    whole = {"nodes": [], "values": [packer.ref(value) for value in values]}
    whole["nodes"] = packer.finish()
    whole = json.loads(json.dumps(whole))
    chance, refused = random.Random(0), 0
    for _ in range(3000):
        message = copy.deepcopy(whole)
        at: Any = message["nodes"]
        while isinstance(at, list) and at and (chance.random() < 0.8 or at is message["nodes"]):
            where, number = at, chance.randrange(len(at))
            at = at[number]
        where[number] = chance.choice(
            [None, -1, 0, 10**6, "x", "list", "mine", [[0]], [[99]], {}, [], ["tuple", [[0]]], 1.5]
        )
        try:
            _Unpacker(tests, message, []).values(message["values"])
        except NotPlain:
            refused += 1
    assert 500 < refused < 3000


def test_children_are_counted_while_threads_come_and_go() -> None:
    """A thread may end between listing a process's threads and reading their children."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            threading.Thread(target=time.sleep, args=(0.0005,)).start()
            time.sleep(0.0003)

    churner = threading.Thread(target=churn)
    churner.start()
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        assert all(sleeper.pid in worker._children() for _ in range(3000))
    finally:
        stop.set()
        churner.join()
        sleeper.kill()
        sleeper.wait()
