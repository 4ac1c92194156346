"""A launcher before a stage's command: `PKT_LAUNCH="srun --gres=gpu:1"` for all, `PKT_LAUNCH_ATTRIBUTE=...` for one.

DVC hashes a stage's `cmd`, so that the way to a GPU must not stand in it. `pkt` therefore replaces itself by the
launcher followed by its own command line. An empty value means no launcher, e.g. `PKT_LAUNCH_REPORT=`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Collection

from pkt_stages.errors import UserError

VARIABLE = "PKT_LAUNCH"
# What several processes can work on together (pkt_stages/parallel.py).
DIVISIBLE = ("attribute", "seek", "compare", "finetune")


def launch(command: str, stages: Collection[str]) -> None:
    """Become the launcher of this command, if it is a stage and has one; else return.

    Every variable is checked whatever the command, so that `pkt sweep` refuses a wrong one before a stage has run.

    Raises:
        UserError: a variable names no stage, or a launcher that is not there.
    """
    launchers = {name: _words(name) for name in sorted(os.environ) if _is_launcher(name)}
    known = {f"{VARIABLE}_{stage.upper()}": stage for stage in stages}
    for name in launchers:
        if name != VARIABLE and name not in known:
            raise UserError(f"{name}: no such stage; expected {VARIABLE}, or one of {', '.join(known)}")
    if command not in stages or "--help" in sys.argv:
        return
    words = launchers.get(f"{VARIABLE}_{command.upper()}", launchers.get(VARIABLE, []))
    if words:
        # What the launcher starts is `pkt` again: without the variables it does the work.
        environment = {name: value for name, value in os.environ.items() if not _is_launcher(name)}
        os.execvpe(words[0], [*words, "pkt", *sys.argv[1:]], environment)


def check_processes(command: str) -> None:
    """Raise UserError if a launcher started several processes of a command that would do all its work in each."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in DIVISIBLE:
        raise UserError(f"`pkt {command}` runs in one process; torchrun is for {', '.join(DIVISIBLE)}")


def _is_launcher(name: str) -> bool:
    return name == VARIABLE or name.startswith(f"{VARIABLE}_")


def _words(name: str) -> list[str]:
    try:
        words = shlex.split(os.environ[name])
    except ValueError as error:
        raise UserError(f"{name}: not a command line ({error}): {os.environ[name]}") from None
    if words and shutil.which(words[0]) is None:
        raise UserError(f"{name}: no program {words[0]!r} on this machine; install it, or unset {name}")
    return words
