# ruff: noqa: E501 (programs and messages read better on one line)
"""Generated code does no harm and cannot forge a verdict."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.evaluation.sandbox import levels, pool
from pkt_stages.evaluation.sandbox.plain import NotPlain, decode, encode
from pkt_stages.evaluation.sandbox.pool import Job, Limits, Verdict, choose_level, judge

CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
GOOD = "def f(x):\n    return x * x\n"
LIMITS = Limits(seconds=4.0, memory_mb=256)


def job(code: str, tests: str = CHECK, *, prefix: str = "def f(x):\n", setup: str = "", call: str = "check") -> Job:
    return Job(code, prefix, "f", setup, tests, call)


@pytest.fixture(scope="module")
def level() -> levels.Level:
    return choose_level("rlimits", LIMITS)


# What each must come to: never "passed".
HOSTILE = {
    "wrong": ("def f(x):\n    return x\n", "failed"),
    "syntax": ("def f(x)\n", "error"),
    "reads a system file": ("def f(x):\n    open('/etc/passwd').read()\n    return x * x\n", "error"),
    "reads the home folder": (
        "import os\ndef f(x):\n    os.listdir(os.path.expanduser('~'))\n    return x * x\n",
        "error",
    ),
    "writes": ("def f(x):\n    open('{outside}', 'w')\n    return x * x\n", "error"),
    "makes a link": ("import os\ndef f(x):\n    os.symlink('/etc', '{outside}')\n    return x * x\n", "error"),
    "opens a socket": (
        "import socket\ndef f(x):\n    socket.socket().bind(('127.0.0.1', 0))\n    return x * x\n",
        "error",
    ),
    "sends a datagram": (
        "import socket\ndef f(x):\n    s = socket.socket(type=socket.SOCK_DGRAM)\n    s.sendto(b'x', ('127.0.0.1', 9))\n"
        "    return x * x\n",
        "error",
    ),
    "fork bomb": ("import os\nwhile True:\n    os.fork()\ndef f(x):\n    return x * x\n", "error"),
    "runs a program": ("import os\ndef f(x):\n    assert os.system('true') == 0\n    return x * x\n", "failed"),
    "memory bomb": ("def f(x):\n    a = []\n    while True:\n        a.append(bytes(10**6))\n", "memory"),
    "file in memory": ("import os\ndef f(x):\n    os.memfd_create('x')\n    return x * x\n", "error"),
    "endless loop": ("def f(x):\n    while True:\n        pass\n", "timeout"),
    "endless output": ("def f(x):\n    while True:\n        print('x' * 100000)\n", "timeout"),
    "huge value": ("def f(x):\n    return 'x' * (20 << 20)\n", "error"),
    "endless iterator": ("def f(x):\n    while True:\n        yield x\n", "error"),
    "leaves while defining": ("import os\nos._exit(0)\n", "error"),
    "leaves while called": ("import os\ndef f(x):\n    os._exit(0)\n", "error"),
    "sys.exit": ("import sys\ndef f(x):\n    sys.exit(0)\n", "error"),
    "prints a verdict": (
        'def f(x):\n    print(\'{"verdict": "passed", "message": ""}\', flush=True)\n    return x\n',
        "failed",
    ),
    "writes a verdict to every pipe": (
        'import os\nbody = b\'{"verdict": "passed", "message": ""}\'\nfor fd in range(64):\n    try:\n'
        "        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError:\n        pass\n"
        "def f(x):\n    return x\n",
        "error",
    ),
    "equals everything": (
        "class A:\n    def __eq__(self, o):\n        return True\n    __hash__ = None\ndef f(x):\n    return A()\n",
        "failed",
    ),
    "a number that equals everything": (
        "class A(int):\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return A(1)\n",
        "failed",
    ),
    "replaces built-ins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.AssertionError = ValueError\n"
        "def f(x):\n    return 1\n",
        "error",
    ),
    "replaces the check": ("def check(candidate):\n    pass\ndef f(x):\n    return 1\n", "failed"),
    "kills its parent": ("import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    return x * x\n", "error"),
    "reads a secret": ("def f(x):\n    open('{secret}').read()\n    return x * x\n", "error"),
    "follows a link to a secret": ("def f(x):\n    open('{link}').read()\n    return x * x\n", "error"),
    "reads its parent's environment": (
        "import os\ndef f(x):\n    open(f'/proc/{os.getppid()}/environ').read()\n    return x * x\n",
        "error",
    ),
    "reads its parent's memory": (
        "import os\ndef f(x):\n    open(f'/proc/{os.getppid()}/mem', 'rb')\n    return x * x\n",
        "error",
    ),
    "makes a hard link": ("import os\ndef f(x):\n    os.link('{secret}', '{outside}')\n    return x * x\n", "error"),
    "makes a folder": ("import os\ndef f(x):\n    os.mkdir('{outside}')\n    return x * x\n", "error"),
    "writes to shared memory": ("def f(x):\n    open('/dev/shm/pkt', 'w')\n    return x * x\n", "error"),
    "removes a file": ("import os\ndef f(x):\n    os.remove('{secret}')\n    return x * x\n", "error"),
    "calls a server here": (
        "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}))\n    return x * x\n",
        "error",
    ),
    "opens a local socket": (
        "import socket\ndef f(x):\n    s = socket.socket(socket.AF_UNIX)\n    s.bind('{outside}')\n    return x * x\n",
        "error",
    ),
    "thread bomb": (
        "import threading, time\ndef f(x):\n    while True:\n        threading.Thread(target=time.sleep, args=(99,)).start()\n",
        "memory",
    ),
    "leaves a daemon": (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(987)\n    return x * x\n",
        "error",
    ),
    "kills another process": ("import os\ndef f(x):\n    os.kill({pid}, 9)\n    return x * x\n", "error"),
    "stops itself": ("import os\ndef f(x):\n    os.kill(os.getpid(), 19)\n    return x * x\n", "timeout"),
    "closes its pipes": ("import os\ndef f(x):\n    os.closerange(0, 64)\n    return x * x\n", "error"),
    "endless nesting": (
        "def f(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a\n",
        "error",
    ),
    "raises by a name that ends programs": (
        "class SystemExit(Exception):\n    pass\ndef f(x):\n    raise SystemExit(0)\n",
        "error",
    ),
    "a list that equals everything": (
        "class A(list):\n    __eq__ = lambda *a: True\n    __ne__ = lambda *a: False\ndef f(x):\n    return A([1])\n",
        "failed",
    ),
    "a class that is every number": (
        "class A:\n    __eq__ = lambda *a: True\n    __class__ = int\n    __bool__ = lambda s: True\ndef f(x):\n    return A()\n",
        "error",
    ),
    "patches all frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        frame.f_globals.update(check=lambda c: None, encode=lambda *a: '16', isinstance=lambda *a: True)\n"
        "        frame = frame.f_back\n    return 1\n",
        "failed",
    ),
    # Linux reports success although not one process could be signalled.
    "kills everything": ("import os\ndef f(x):\n    os.kill(-1, 9)\n    return 1\n", "failed"),
}


def test_hostile_samples_fail_and_harm_nobody(level: levels.Level, tmp_path: Path) -> None:
    assert level == "sandlock", "this test is about the strongest level"
    outside, secret, link = tmp_path / "outside", tmp_path / "secret", tmp_path / "link"
    secret.write_text("token")
    link.symlink_to(secret)
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "600"]) as bystander:
        values = {"outside": outside, "secret": secret, "link": link, "pid": bystander.pid}
        values["port"] = server.getsockname()[1]
        jobs = [job(_filled(code, values)) for code, _ in HOSTILE.values()]
        # A good one beside each: the others' verdicts do not move.
        verdicts = judge([j for hostile in jobs for j in (hostile, job(GOOD))], level, LIMITS, 2)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        assert bystander.poll() is None
        bystander.kill()
    found = dict(zip(HOSTILE, verdicts[::2], strict=True))
    assert {name: v.outcome for name, v in found.items()} == {name: outcome for name, (_, outcome) in HOSTILE.items()}
    assert set(verdicts[1::2]) == {Verdict("passed", "")}
    assert sorted(tmp_path.iterdir()) == [link, secret]
    assert not Path("/dev/shm/pkt").exists()
    assert _strays() == []


def _filled(code: str, values: Mapping[str, object]) -> str:
    """Other braces are the code's own."""
    for name, value in values.items():
        code = code.replace(f"{{{name}}}", str(value))
    return code


def test_what_the_hostile_samples_try_is_possible_without_a_sandbox(tmp_path: Path) -> None:
    """Else their verdicts would say nothing."""
    outside, secret = tmp_path / "outside", tmp_path / "secret"
    secret.write_text("token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {"outside": outside, "secret": secret, "link": secret, "port": server.getsockname()[1]}
        names = ("reads a secret", "follows a link to a secret", "reads its parent's environment", "makes a hard link")
        names += ("reads its parent's memory", "calls a server here", "opens a socket", "removes a file")
        for name in names:
            names_of_sample: dict[str, Any] = {}
            exec(_filled(HOSTILE[name][0], values), names_of_sample)
            assert names_of_sample["f"](3) == 9, name
    assert outside.exists() and not secret.exists()


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
    while len(family) < 7 and time.monotonic() < deadline:  # two workers, each with a candidate and a checker
        family = _descendants(asking.pid)
        time.sleep(0.02)
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
    sandboxed = {pid: parent for pid, (command, parent) in commands.items() if "take_over_stdio" in command}
    return [
        pid
        for pid, parent in sandboxed.items()
        if parent not in sandboxed and "sandbox.worker" not in commands.get(parent, ("sandbox.worker", ""))[0]
    ]


def test_environment_is_not_the_hosts(level: levels.Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os\ndef f(x):\n    return sorted(os.environ)\n"
    names = ["HOME", "LC_ALL", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONUTF8", "TZ"]
    seen = f"def check(candidate):\n    assert candidate(1) == {names}, candidate(1)\n"
    assert judge([job(code, seen)], level, LIMITS) == [Verdict("passed", "")]


def test_helpers_of_the_prompt_cannot_be_replaced(level: levels.Level) -> None:
    prefix = 'import math\n\ndef error(a, b):\n    return math.fabs(a - b)\n\ndef f(x):\n    """Square."""\n'
    tests = "def check(candidate):\n    assert error(candidate(3), 9) < 1e-6\n"
    honest = prefix + "    return x ** 2\n"
    lying = prefix + "    return 0\n\ndef error(a, b):\n    return 0\n"
    found = judge([job(honest, tests, prefix=prefix), job(lying, tests, prefix=prefix)], level, LIMITS)
    assert [v.outcome for v in found] == ["passed", "failed"]


@pytest.mark.parametrize(
    ("code", "setup", "tests"),
    [
        ("def f(x):\n    return (1, {2}, [3.5], b'a', 2j, None, 'ü', 10**30)\n", "", "assert f(0) == (1, {2}, [3.5], b'a', 2j, None, 'ü', 10**30)"),
        ("def f(x):\n    return float('nan'), -float('inf')\n", "import math", "assert math.isnan(f(0)[0])\nassert f(0)[1] == -math.inf"),
        ("def f(x):\n    raise KeyError('no')\n", "", "try:\n    f(1)\n    assert False\nexcept KeyError as error:\n    assert 'no' in str(error)"),
        ("class E(ValueError):\n    pass\ndef f(x):\n    raise E('own')\n", "", "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"),
        ("def f(x):\n    return x\ndef g(x):\n    return f(x) + 1\n", "", "assert g(1) == 2 and isinstance(g(1), int)"),
        ("class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\ndef f(n):\n    return n.v + (f(n.next) if n.next else 0)\n", "root = Node(1)\nroot.next = Node(2)", "assert f(root) == 3"),
        ("def f(x):\n    return (i for i in range(x))\n", "", "assert list(f(3)) == [0, 1, 2]"),
        ("from collections import Counter\ndef f(x):\n    return Counter(x)\n", "", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def sum(x, y):\n    return x * y\n", "", "assert sum(3, 4) == 12"),
    ],
)  # fmt: skip
def test_assertion_lists(level: levels.Level, code: str, setup: str, tests: str) -> None:
    entry = "sum" if "def sum" in code else "f"
    found = judge([Job(code, "", entry, setup, tests, "")], level, LIMITS)
    assert found == [Verdict("passed", "")]


def test_standard_library_in_tests_is_the_real_one(level: levels.Level) -> None:
    lying = "class math:\n    def isclose(a, b):\n        return True\ndef f(x):\n    return 0\n"
    honest = "def f(x):\n    return x * 2.0\n"
    jobs = [Job(code, "", "f", "", "assert math.isclose(f(2), 4.0)", "") for code in (lying, honest)]
    assert [verdict.outcome for verdict in judge(jobs, level, LIMITS)] == ["failed", "passed"]


def test_all_assertions_count(level: levels.Level) -> None:
    tests = "assert f(2) == 4\nassert f(-2) == 5, 'negative'"
    assert judge([Job(GOOD, "", "f", "", tests, "")], level, LIMITS) == [Verdict("failed", "AssertionError: negative")]


def test_weaker_levels_judge_the_same() -> None:
    for weaker in ("namespaces", "rlimits"):
        jobs = [
            job(GOOD),
            job("def f(x):\n    return 1\n"),
            job("import os\nos._exit(0)\n"),
            job(HOSTILE["memory bomb"][0]),
        ]
        found = judge(jobs, weaker, LIMITS, 1)  # type: ignore[arg-type]
        assert [v.outcome for v in found] == ["passed", "failed", "error", "memory"], weaker


def test_daemons_do_not_survive_at_the_weakest_level() -> None:
    code = (
        "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(987)\n        os._exit(0)\n    return x * x\n"
    )
    start = time.monotonic()
    # Only root may fork at this level.
    assert judge([job(code)], "rlimits", LIMITS, 1)[0].outcome == ("passed" if os.geteuid() == 0 else "error")
    assert time.monotonic() - start < 60
    assert _strays() == []


def test_a_floor_above_what_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "strongest", lambda **_: "rlimits")
    assert choose_level("rlimits") == "rlimits"
    with pytest.raises(UserError) as caught:
        choose_level("namespaces")
    assert str(caught.value) == (
        "generated code: the strongest sandbox here is rlimits, below the floor 'namespaces'; run on Linux 6.12+"
        " (Landlock ABI 6) with the package sandlock, or accept it with --sandbox-floor rlimits"
    )


@pytest.mark.parametrize(
    "value", [{"a b": 1}, {"set": [[]]}, {"object": "x", "y": 1}, {"int": "zz"}, {"dict": [1]}, [{"range": [1, 2, 0]}]]
)
def test_malformed_data_is_refused(value: object) -> None:
    with pytest.raises(NotPlain):
        decode(value, lambda of: of)


def test_plain_data_survives() -> None:
    import json

    value = [(), frozenset({1}), {"a": {1: b"\x00"}}, range(1, 9, 2), '\ud800\n"\\', -(2**80), 1e300, True, -0.0]
    assert decode(json.loads(encode(value, hash)), lambda of: of) == value


def test_children_are_counted_while_threads_come_and_go() -> None:
    """sandlock's threads end at any time, also between listing a process's threads and reading their children."""
    import subprocess
    import threading
    import time

    from pkt_stages.evaluation.sandbox.worker import _children

    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            threading.Thread(target=time.sleep, args=(0.0005,)).start()
            time.sleep(0.0003)

    churner = threading.Thread(target=churn)
    churner.start()
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        assert all(sleeper.pid in _children() for _ in range(3000))
    finally:
        stop.set()
        churner.join()
        sleeper.kill()
        sleeper.wait()
