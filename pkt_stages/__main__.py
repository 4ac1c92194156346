"""The command `pkt`: one sub-command per stage. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys

import typer

from pkt_stages import warm
from pkt_stages.errors import UserError
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
from pkt_stages.stages.unaligned import unaligned
from pkt_stages.tools.doctor import doctor
from pkt_stages.tools.inspect import inspect
from pkt_stages.tools.merge_lock import merge_lock

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
    *(prepare, attribute, select, align, inject, control, seek, unaligned),
    *(finetune, generate, distill, evaluate, cka, similarity, deltas, neurons, report),
    *(inspect, doctor, merge_lock),
)
for stage in STAGES:
    app.command()(stage)


def main() -> None:
    """Entry point: a UserError becomes one line, an interrupt a short word; anything else is a bug with a traceback."""
    try:
        if warm.VARIABLE in os.environ and (status := warm.delegate()) is not None:
            sys.exit(status)
        app()
    except UserError as error:
        print(f"pkt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pkt: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
