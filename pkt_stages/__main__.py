"""The command `pkt`: one sub-command per stage, and tools. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import errno
import os
import sys

import typer

from pkt_stages import launch, warm
from pkt_stages.errors import UserError
from pkt_stages.stages.adopt import adopt
from pkt_stages.stages.align import align
from pkt_stages.stages.attribute import attribute
from pkt_stages.stages.cka import cka
from pkt_stages.stages.control import control
from pkt_stages.stages.deltas import deltas
from pkt_stages.stages.distill import distill
from pkt_stages.stages.evaluate import evaluate
from pkt_stages.stages.finetune import finetune
from pkt_stages.stages.generate import generate
from pkt_stages.stages.inject import inject
from pkt_stages.stages.neurons import neurons
from pkt_stages.stages.prepare import prepare
from pkt_stages.stages.report import report
from pkt_stages.stages.seek import seek
from pkt_stages.stages.select import select
from pkt_stages.stages.similarity import similarity
from pkt_stages.stages.texts import texts
from pkt_stages.stages.unaligned import unaligned
from pkt_stages.tools.convert import convert
from pkt_stages.tools.doctor import doctor
from pkt_stages.tools.inspect import inspect
from pkt_stages.tools.merge_lock import merge_lock
from pkt_stages.tools.pin import pin
from pkt_stages.tools.plan import plan
from pkt_stages.tools.provenance import check_inputs
from pkt_stages.tools.sweep import sweep

app = typer.Typer(
    name="pkt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Parametric knowledge transfer between language models, as stages: prepare -> attribute (source, target) ->"
    " select -> align -> inject -> evaluate -> report; seek, finetune and distill make other rows of the table."
    " `dvc repro` runs them all; each runs alone, too.",
)
STAGES = (
    *(prepare, texts, attribute, select, align, inject, control, seek, unaligned),
    *(finetune, generate, distill, evaluate, cka, similarity, deltas, neurons, adopt, report),
)
TOOLS = (plan, sweep, pin, convert, inspect, merge_lock, doctor)
for command in (*STAGES, *TOOLS):
    app.command()(command)


def main() -> None:
    """Entry point: a UserError becomes one line, an interrupt a short word; anything else is a bug with a traceback."""
    try:
        name, stages = "".join(sys.argv[1:2]), [stage.__name__ for stage in STAGES]
        launch.launch(name, stages)
        # Tools work here: `sweep` starts stages of its own, which must find the variable.
        if name in stages and warm.VARIABLE in os.environ and (status := warm.delegate()) is not None:
            sys.exit(status)
        launch.check_processes(name)
        if name in stages and os.environ.get("RANK", "0") == "0":
            check_inputs(sys.argv[2:])
        app()
    except UserError as error:
        print(f"pkt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pkt: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _lacks_space(error):
            raise
        print("pkt: error: no space to write a file; free some and run again, it goes on where it was", file=sys.stderr)
        sys.exit(2)


def _lacks_space(error: BaseException | None) -> bool:
    """Whether a full disk, quota or file size limit is behind an error; libraries have their own ways to say so."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = [*map(os.strerror, numbers), "PytorchStreamWriter failed writing"]
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in words):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
