"""`dvc repro` with several stages at a time: on the GPUs of one machine, or as jobs of a cluster (docs/scale.md).

One process, the driver, holds the graph. It asks DVC about each stage whose upstream stages are finished; one that is
out of date becomes a process `dvc repro -s STAGE` in a free slot. So everything that is written of DVC's (dvc.lock, the
cache, the run cache) is written by DVC itself under its own lock, which it gives up while a stage's command runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.quiet import quiet_dvc
from pkt_stages.tools.provenance import OUTPUTS

TICK_SECONDS = 0.1
SHOWN_LINES = 20  # of a failing stage's output


class Graph:
    """The stages that `dvc repro TARGETS` would look at, upstream first, and DVC's answers about them.

    With `open_repo` the only door to DVC's Python interface. Stages are its objects, read once: nobody else changes a
    stage's entry in dvc.lock before it runs, and it runs once.
    """

    def __init__(self, repo: Any, targets: Sequence[str], *, glob: bool, allow_missing: bool) -> None:
        from dvc.dependency import ParamsDependency
        from dvc.exceptions import DvcException
        from dvc.repo import lock_repo
        from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

        self._repo, self._allow_missing = repo, allow_missing
        self._params: dict[str, Any] = {}  # params files, read once each time that DVC's lock is held
        targets = targets or ["dvc.yaml"]
        try:
            with lock_repo(repo):
                wanted = collect_stages(repo, targets, glob=glob)
                graph = get_active_graph(self._around(wanted, [os.path.abspath(target) for target in targets]))
                self.stages: list[Any] = plan_repro(graph, wanted)
        except DvcException as error:
            raise UserError(" ".join(str(error).split())) from None
        self.upstream: dict[Any, list[Any]] = {stage: list(graph.successors(stage)) for stage in self.stages}
        for stage in self.stages:
            for dependency in stage.deps:
                if isinstance(dependency, ParamsDependency):
                    dependency.read_params = functools.partial(self._read_params, dependency)

    def _around(self, wanted: Sequence[Any], whole: Sequence[str]) -> Any:
        """DVC's graph of the stage files of these stages, or of the whole project if they use what others may make.

        To read all profiles takes DVC ten seconds.

        Args:
            whole: paths; the stages of such a file are all among the wanted.
        """
        from dvc.repo.index import Index

        more = [Index.from_file(self._repo, path) for path in sorted({s.path for s in wanted}.difference(whole))]
        mine = Index(self._repo, stages=[stage for stage in wanted if stage.path in whole])
        index = Index.from_indexes(self._repo, [mine, *more])
        for dependency in index.deps:
            inside = os.path.relpath(dependency.fs_path, self._repo.root_dir).split(os.sep)[0] in OUTPUTS
            key = dependency.fs.parts(dependency.fs_path)
            if inside and not index.outs_trie.has_node(key) and not index.outs_trie.shortest_prefix(key):
                return self._repo.index.graph
        return index.graph

    def _read_params(self, dependency: Any, **_: Any) -> dict[str, Any]:
        """What a stage names of a params file, by dotted key. DVC itself parses the file anew for every stage."""
        import dpath
        from dvc.utils.serialize import load_path

        path = dependency.fs_path
        if path not in self._params:
            self._params[path] = load_path(path, self._repo.fs)
        if not dependency.params:
            return dict(self._params[path])
        found = {}
        for key in dependency.params:
            with contextlib.suppress(KeyError):
                found[key] = dpath.get(self._params[path], key, separator=".")
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold DVC's lock, so that the methods below may be called; False if it is in use for longer than 3 s."""
        from dvc.lock import LockError
        from dvc.repo import lock_repo

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_repo(self._repo))
            except LockError:
                yield False
            else:
                self._params.clear()
                yield True

    def changed(self, stage: Any, known: Mapping[str, str] | None = None) -> bool:
        """Is it out of date? To be asked once the stages upstream are finished, as `dvc repro` does.

        Args:
            known: MD5 of dependencies by path, which are not looked up on disk.
        """
        return self._changed(stage, self._allow_missing, self.upstream[stage], known or {})

    def missing(self, stage: Any) -> list[str]:
        """Stages upstream of one that is out of date whose new outputs are not on this disk.

        They must be pulled beforehand: `dvc repro -s` does not look upstream, and would take what is missing for what
        the stage was made from.
        """
        if not self._changed(stage, True, self.upstream[stage], {}) or self._changed(stage, True, [], {}):
            return []
        missing = {dependency.fs_path for dependency in stage.deps if not dependency.exists}
        return [u.addressing for u in self.upstream[stage] if any(out.fs_path in missing for out in u.outs)]

    @staticmethod
    def _changed(stage: Any, allow_missing: bool, upstream: list[Any], known: Mapping[str, str]) -> bool:
        """DVC's `Stage.changed`, which besides takes a lock on the files of a stage six times, for a third of the time.

        Only `dvc repro -s` needs that, and meets files in use itself.
        """
        from dvc.exceptions import DvcException

        def deleted(item: Any, status: Mapping[str, Any]) -> bool:
            return allow_missing and status[str(item)] == "deleted"

        made = {out.fs_path: out.hash_info for other in upstream for out in other.outs}
        if stage.changed_stage() or (not stage.frozen and (stage.always_changed or stage.is_callback)):
            return True
        try:
            for dependency in () if stage.frozen else stage.deps:
                path = dependency.fs_path
                if path in known:
                    if dependency.hash_info.value != known[path]:
                        return True
                elif (status := dependency.status()) and (
                    not deleted(dependency, status) or made.get(path, dependency.hash_info) != dependency.hash_info
                ):
                    return True
            for out in stage.outs:
                if (status := out.status()) and not (
                    deleted(out, status) or (allow_missing and status[str(out)] == "not in cache")
                ):
                    return True
        except DvcException:  # e.g. a params file that is no YAML; `dvc repro -s` meets the same and says so
            return True
        return False


@contextlib.contextmanager
def open_repo() -> Iterator[Any]:
    """DVC's repository around the current folder.

    Raises:
        UserError: there is none.
    """
    with quiet_dvc():
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            repo = Repo()
        except DvcException as error:
            raise UserError(f"{error}; run this in the project's folder") from None
        with contextlib.closing(repo):
            yield repo


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
        dvc = [sys.executable, "-m", "dvc", "--wait-for-lock"]
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
        logs = Path(repo.root_dir) / scratch / "sweep"
        logs.mkdir(parents=True, exist_ok=True)
        with only_driver(Path(repo.tmp_dir) / "sweep.lock") as lock:
            graph = Graph(repo, targets or [], glob=glob, allow_missing=allow_missing)
            driver = Driver(graph, slots, logs, lock, pull=pull, keep_going=keep_going)
            with collected(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
                driver.drive(signals)
    counts = Counter("not run" if state in ("waiting", "ready") else state for state in driver.states.values())
    parts = [f"{counts[state]} {state}" for state in ("ran", "up to date", "failed", "stopped", "not run")]
    shown = ", ".join(part for part in parts if not part.startswith("0 "))
    seconds = time.monotonic() - started
    typer.echo(
        f"sweep: {len(driver.states)} stages: {shown} ({len(slots)} at a time, {seconds:.1f} s; output in {logs})"
    )
    if signals or counts["failed"]:
        raise typer.Exit(130 if signals else 1)
