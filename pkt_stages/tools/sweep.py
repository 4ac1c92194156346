"""`dvc repro` with several stages at a time: on the GPUs of one machine, or as jobs of a cluster (docs/scale.md).

One process, the driver, holds the graph. It asks DVC about each stage whose upstream stages are finished; one that is
out of date becomes a process `dvc repro -s STAGE` in a free slot. So everything that is written of DVC's (dvc.lock, the
cache, the run cache) is written by DVC itself under its own lock, which it gives up while a stage's command runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.tools.graph import Graph, open_repo

TICK_SECONDS = 0.1
LOGS = "sweep"  # a folder of scratch
TIMES = "times.json"  # in it: seconds that a stage took here when it last ran, by address
SHOWN_LINES = 20  # of a failing stage's output


@dataclass
class Run:
    """A stage in a slot: DVC's command lines, one after the other. Below DVC's process runs the stage's own command."""

    commands: list[list[str]]
    environment: dict[str, str]
    log: Path
    lock: int  # a file descriptor that DVC's processes keep open
    started: float = field(default_factory=time.monotonic)
    signalled: set[tuple[int, int]] = field(default_factory=set)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.log.unlink(missing_ok=True)
        self._next()

    def _next(self) -> None:
        with self.log.open("ab") as out:
            # A session of its own: Ctrl-C in a terminal must not hit DVC while it writes dvc.lock.
            self.process = subprocess.Popen(
                self.commands.pop(0),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock],
            )

    def status(self, stopping: bool) -> int | None:
        """The exit status, or None as long as it runs; the next command line is begun unless all is to stop."""
        status = self.process.poll()
        if status != 0 or not self.commands:
            return status
        if stopping:
            return 130
        self._next()
        return None

    def send(self, number: int) -> None:
        """Send a signal, once, to all that DVC has started. DVC sees its command fail, and cleans up."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                if (process.pid, number) not in self.signalled:
                    self.signalled.add((process.pid, number))
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-SHOWN_LINES:])


class Driver:
    """Runs a graph. A stage goes from waiting to up to date, or over ready and running to ran, failed or stopped."""

    def __init__(
        self, graph: Graph, slots: Sequence[dict[str, str]], logs: Path, lock: int, *, pull: bool, keep_going: bool
    ) -> None:
        from rich.console import Console

        self.states = dict.fromkeys(graph.stages, "waiting")
        self.times: dict[str, float] = {}  # seconds, of those that ran
        self._graph, self._logs, self._lock = graph, logs, lock
        self._pull, self._keep_going = pull, keep_going
        self._free = list(slots)
        self._commands: dict[Any, list[list[str]]] = {}  # of stages that are ready
        self._runs: dict[Any, Run] = {}
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

    def drive(self, signals: Sequence[int]) -> None:
        """Run until nothing is left to do, or signals arrive.

        The first signal has the stages' commands terminated, the second has them killed.
        """
        look, told = True, False
        while True:
            if signals:
                look = False
                if not told:
                    self._say("stopping   DVC puts its files in order; once more kills what does not end")
                    told = True
                for run in self._runs.values():
                    run.send(signal.SIGTERM if len(signals) == 1 else signal.SIGKILL)
            elif self._keep_going or "failed" not in self.states.values():
                self._start()
                if look and self._free:
                    look = not self._look()
                    self._start()
            else:
                look = False
            if not self._runs and not look:
                return
            time.sleep(TICK_SECONDS)
            for stage, run in list(self._runs.items()):
                if (status := run.status(bool(signals))) is not None:
                    self._end(stage, run, status, bool(signals))
                    look = True

    def _look(self) -> bool:
        """Ask DVC about every stage whose upstream is finished; False if DVC's lock is not to be had now."""
        with self._graph.locked() as locked:
            for stage in self._graph.stages if locked else ():  # upstream first, so one pass goes down a whole chain
                finished = {self.states[u] for u in self._graph.upstream[stage]} <= {"ran", "up to date"}
                if self.states[stage] == "waiting" and finished:
                    if self._graph.changed(stage):
                        self.states[stage], self._commands[stage] = "ready", self._commands_for(stage)
                    else:
                        self.states[stage] = "up to date"
        return locked

    def _commands_for(self, stage: Any) -> list[list[str]]:
        dvc = [sys.executable, "-m", "pkt_stages.quick_dvc", "--wait-for-lock"]
        # No --allow-missing: it would have DVC pass over what has just been found out of date.
        repro = [*dvc, "repro", "-s", *(["--pull"] if self._pull else []), stage.addressing]
        missing = self._graph.missing(stage) if self._pull else []
        return [[*dvc, "pull", *missing], repro] if missing else [repro]

    def _start(self) -> None:
        for stage in list(self._commands)[: len(self._free)]:
            log = self._logs / f"{stage.addressing.replace('/', '_').replace(':', '_')}.log"
            run = Run(self._commands.pop(stage), self._free.pop(0), log, self._lock)
            self.states[stage], self._runs[stage] = "running", run
            self._say(f"start      {stage.addressing}")

    def _end(self, stage: Any, run: Run, status: int, stopping: bool) -> None:
        del self._runs[stage]
        self._free.append(run.environment)
        state = "ran" if status == 0 else "stopped" if stopping else "failed"
        self.states[stage] = state
        if state == "ran":
            self.times[stage.addressing] = round(run.seconds(), 1)
        finished = sum(state in ("ran", "up to date") for state in self.states.values())
        self._say(f"{state:9}  {stage.addressing}  {run.seconds():.1f} s  ({finished} of {len(self.states)} finished)")
        if state == "failed":
            self._say(f"{run.last_lines()}\n    the whole output: {run.log}")

    def _say(self, line: str) -> None:
        self._console.print(line)


@contextlib.contextmanager
def only_driver(path: Path) -> Iterator[int]:
    """Hold the lock of the repository's one driver; its file descriptor.

    DVC's processes inherit it, so that it outlives a driver that is killed until the last of its stages has ended. The
    file stays; the lock is the kernel's, and goes with the processes.

    Raises:
        UserError: another driver holds it.
    """
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another sweep runs on this repository ({file.read().strip()}); wait for it, or stop it with Ctrl-C"
                " there (if it was killed, its last stages are still running)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n")
        file.flush()
        yield file.fileno()


@contextlib.contextmanager
def collected(*numbers: int) -> Iterator[list[int]]:
    """Signals as a list that grows, instead of exceptions anywhere; what was ignored (nohup) stays so."""
    found: list[int] = []
    handlers = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, lambda received, _: found.append(received))
    try:
        yield found
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def environments(workers: int | None, gpus: str | None) -> list[dict[str, str]]:
    """What each slot adds to the environment.

    Raises:
        UserError: the two options contradict each other, or a GPU has no name.
    """
    if gpus is None:
        return [{} for _ in range(1 if workers is None else workers)]
    names = [name.strip() for name in gpus.split(",")]
    if not all(part for name in names for part in name.split("+")):
        raise UserError(f"--gpus {gpus}: an empty name; expected one GPU per worker, e.g. 0,1, or 0+1,2+3 for pairs")
    if workers not in (None, len(names)):
        raise UserError(f"--gpus {gpus}: {len(names)} for {workers} workers; name one per worker (0,0 shares one)")
    return [{"CUDA_VISIBLE_DEVICES": name.replace("+", ",")} for name in names]


def read_times(scratch: Path) -> dict[str, float]:
    """Seconds that stages took on this machine when a sweep last ran them, by address; with what else ran then."""
    path = scratch / LOGS / TIMES
    if not path.exists():
        return {}
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(path.read_text()).items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: expected seconds by stage, as `pkt sweep` writes them; remove it") from None


def sweep(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages or dvc.yaml files, as for `dvc repro`.", show_default="dvc.yaml")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Stages at a time.", show_default="one per GPU of --gpus, else 1")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="CUDA_VISIBLE_DEVICES of each worker: 0,1 for two, 0+1,2+3 for two with a pair.")
    ] = None,
    glob: Annotated[bool, typer.Option("--glob", help="Targets are patterns, e.g. 'select@*'.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", "-k", help="After a failure run all that does not follow from it.")
    ] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch what a stage needs from the DVC remote.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Do not run a stage only because its files are not here.")
    ] = False,
    scratch: Annotated[Path, typer.Option(help="Folder for the stages' output.", envvar="PKT_SCRATCH")] = Path(
        ".scratch"
    ),
) -> None:
    """Run the stages of a graph that are out of date, several at a time; exit status 1 if one fails."""
    slots = environments(workers, gpus)
    started = time.monotonic()
    with open_repo() as repo:
        logs = Path(repo.root_dir) / scratch / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        with only_driver(Path(repo.tmp_dir) / "sweep.lock") as lock:
            graph = Graph(repo, targets or [], glob=glob, allow_missing=allow_missing)
            driver = Driver(graph, slots, logs, lock, pull=pull, keep_going=keep_going)
            with collected(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                driver.drive(signals)
            if driver.times:
                beside = logs / f".{TIMES}"
                beside.write_text(json.dumps(read_times(logs.parent) | driver.times, indent=0, sort_keys=True))
                beside.replace(logs / TIMES)
    counts = Counter("not run" if state in ("waiting", "ready") else state for state in driver.states.values())
    parts = [f"{counts[state]} {state}" for state in ("ran", "up to date", "failed", "stopped", "not run")]
    shown = ", ".join(part for part in parts if not part.startswith("0 "))
    seconds = time.monotonic() - started
    typer.echo(
        f"sweep: {len(driver.states)} stages: {shown} ({len(slots)} at a time, {seconds:.1f} s; output in {logs})"
    )
    if signals or counts["failed"]:
        typer.echo("sweep: run it again to go on: what has ended stays, and what was stopped goes on where it was")
        raise typer.Exit(130 if signals else 1)
