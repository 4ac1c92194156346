"""What a cluster has, on this machine and for one test: Slurm with two nodes, an SSH server, an S3 server.

All of them listen on loopback alone and keep what they have in one folder. Needs Debian's slurmctld, slurmd,
slurm-client, munge and openssh-server, and the extra `cluster`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SERVERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not on every user's PATH
USER = pwd.getpwuid(os.getuid()).pw_name


def program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *SERVERS]))
    assert found, f"no {name}: apt install slurmctld slurmd slurm-client munge openssh-server"
    return found


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def daemon(command: Sequence[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the foreground, in a process group of its own; it and what it has started is killed in the end."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **variables},
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SLURM_CONF = """\
ClusterName=pkt
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=node[1-2] Default=YES State=UP
"""


@dataclass
class Slurm:
    """Two nodes of two cores each, which are this machine."""

    folder: Path
    stack: contextlib.ExitStack
    nodes: dict[str, contextlib.ExitStack] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            capture_output=True,
            text=True,
            env={**os.environ, **self.environment},
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, node: str) -> None:
        own = contextlib.ExitStack()
        log = self.folder / f"{node}.log"
        own.enter_context(daemon([program("slurmd"), "-D", "-N", node], log, **self.environment))
        self.nodes[node] = own
        self.stack.push(own)
        until(lambda: self.state(node) == "idle", f"{node} is idle")

    def crash(self, node: str) -> None:
        """As when the power fails: nothing of the node is left, and nobody is told."""
        self.nodes.pop(node).close()
        tasks = [process for process in psutil.process_iter() if _variable(process, "SLURMD_NODENAME") == node]
        for process in [*(task.parent() for task in tasks), *tasks]:  # a step's daemon first: it would tell
            if process is not None and (process in tasks or process.name().startswith("slurmstepd")):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def state(self, node: str) -> str:
        return self("sinfo", "--noheader", "--nodes", node, "--format", "%T").strip().rstrip("*~#!%$@^-")

    def jobs(self, *only: str) -> list[str]:
        """Ids of the jobs that wait, run or end."""
        return self("squeue", "--noheader", "--format=%i", *only).split()

    def count_jobs(self) -> int:
        """How many there ever were."""
        return (self.folder / "slurmctld.log").read_text().count("_slurm_rpc_allocate_resources JobId=")

    def works(self, job: str) -> bool:
        """Whether a process of the job has computed for a second."""
        processes = [process for process in psutil.process_iter() if _variable(process, "SLURM_JOB_ID") == job]
        return any(_seconds(process) > 1 for process in processes if process.name() != "srun")


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _seconds(process: psutil.Process) -> float:
    try:
        return process.cpu_times().user
    except psutil.Error:
        return 0.0


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A controller and two nodes that are idle."""
    folder.mkdir(mode=0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    controller, *ports = free_ports(3)
    nodes = [
        f"NodeName=node{i} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
        for i, port in enumerate(ports, start=1)
    ]
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(host=socket.gethostname(), user=USER, folder=folder, port=controller, nodes="\n".join(nodes))
    )
    with contextlib.ExitStack() as stack:
        munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
        stack.enter_context(daemon([program("munged"), *munge], folder / "munged.out"))
        until((folder / "munge.socket").exists, "munged listens")
        cluster = Slurm(folder, stack)
        log = folder / "slurmctld.log"
        stack.enter_context(daemon([program("slurmctld"), "-D", "-c"], log, **cluster.environment))
        until(lambda: answers(controller), "slurmctld listens")
        for node in ("node1", "node2"):
            cluster.start(node)
        yield cluster


@contextlib.contextmanager
def ssh_server(folder: Path, *, read_only: bool = False) -> Iterator[int]:
    """The port of a server that lets this user in by `folder/key`, for files alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("host", "key"):
        if not (folder / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's server keeps nothing, but wants to
    (port,) = free_ports(1)
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "Subsystem": "sftp internal-sftp" + (" -R" if read_only else ""),
        "ForceCommand": "internal-sftp" + (" -R" if read_only else ""),
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    with daemon([program("sshd"), "-D", "-e", "-f", "/dev/null", *words], folder / "sshd.log"):
        until(lambda: answers(port), "sshd listens")
        yield port


@contextlib.contextmanager
def s3_server(folder: Path, *, free_requests: int) -> Iterator[int]:
    """The port of moto's server; the first requests need no credentials, so that users can be made."""
    folder.mkdir(exist_ok=True)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with daemon(command, folder / "moto.log", INITIAL_NO_AUTH_ACTION_COUNT=str(free_requests)):
        until(lambda: answers(port), "moto listens")
        yield port


class Cut:
    """A port that passes everything on to another one, until so many bytes went through: then all connections break,
    and no new ones are taken until it is mended."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._left: int | None = None
        self._lock = threading.Lock()
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def after(self, count: int | None) -> None:
        """Cut after so many bytes from now on; None mends."""
        with self._lock:
            self.passed, self._left = 0, count

    @property
    def _is_cut(self) -> bool:
        return self._left is not None and self.passed > self._left

    def _listen(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._is_cut:
                client.close()
                continue
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            while not self._is_cut:
                for one in select.select([client, server], [], [], 0.1)[0]:
                    try:
                        data = one.recv(65536)
                        (server if one is client else client).sendall(data)
                    except OSError:
                        return
                    with self._lock:
                        self.passed += len(data)
                    if not data or self._is_cut:
                        return
