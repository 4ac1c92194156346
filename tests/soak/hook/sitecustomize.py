"""Breaks a stage at a chosen moment. Python imports this file at start where its folder is on PYTHONPATH.

The package knows nothing of it: an audit hook sees every file that a stage opens or renames. PKT_FAULTS names a folder
with `plan.json`, a list of {"stage", "at", "act"}; `at` is the number of a write (an opening for writing or a renaming
below artifacts, results or .scratch, counted from 0 in each process) or "compute", a moment after the first input was
read and before anything is written. Each entry acts once: `fired/<number>` says that it has. Without a plan, writes are
listed in `writes`, a line each: stage, number, what, path.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

INPUTS, OUTPUTS = ("data", "artifacts"), ("artifacts", "results", ".scratch")
DELAY = 0.15  # seconds of computing
SMALLEST_FILE = 64  # bytes; what is longer does not fit on the "full" disk


class Faults:
    """The audit hook. All is looked up late, because a warm process forks its stages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._timer: threading.Timer | None = None
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename") or self._busy or "DVC_STAGE" not in os.environ:
            return
        self._busy = True  # what this hook opens itself does not count
        try:
            self._see(event, arguments)
        finally:
            self._busy = False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        part = _part(arguments[0])
        writes = event == "os.rename" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        number, fault = self._next()
        if not writes and part in INPUTS and fault.get("at") == "compute" and self._timer is None:
            self._timer = threading.Timer(DELAY, self._act, (number, fault))
            self._timer.start()
        if not writes or part not in OUTPUTS:
            return
        if not (self._folder / "plan.json").exists():
            with (self._folder / "writes").open("a") as file:
                print(os.environ["DVC_STAGE"], self._count, event, os.fspath(arguments[0]), file=file)
        if fault.get("at") in ("compute", self._count):
            if event == "os.rename" and os.path.isfile(arguments[0]):
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            self._act(number, fault)
        self._count += 1

    def _next(self) -> tuple[int, dict[str, Any]]:
        """The first entry for this stage that has not acted yet."""
        plan = self._folder / "plan.json"
        for number, fault in enumerate(json.loads(plan.read_text()) if plan.exists() else []):
            if fault["stage"] == os.environ["DVC_STAGE"] and not (self._folder / "fired" / str(number)).exists():
                return number, fault
        return -1, {}

    def _act(self, number: int, fault: dict[str, Any]) -> None:
        (self._folder / "fired" / str(number)).touch()
        if fault["act"] == "kill all":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        elif fault["act"] == "kill stage":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["act"] == "interrupt":
            os.killpg(os.getpgrp(), signal.SIGINT)
        elif fault["act"] == "fill disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE, resource.RLIM_INFINITY))
        else:
            raise AssertionError(fault)


def _part(path: Any) -> str:
    """The first folder of a path in the repository, or ""."""
    if isinstance(path, int):
        return ""
    inside = os.path.relpath(os.fsdecode(path), os.environ["DVC_ROOT"])
    return inside.split(os.sep)[0]


if "PKT_FAULTS" in os.environ:
    import sys

    sys.addaudithook(Faults(Path(os.environ["PKT_FAULTS"])))
