"""The command `pkt`: one sub-command per stage, and tools. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import errno
import importlib
import keyword
import os
import sys

import typer

from pkt_stages import launch, warm
from pkt_stages.errors import UserError
from pkt_stages.tools.provenance import check_inputs

# Each is a function in the file of its name, in stages or tools.
STAGES = (
    *("prepare", "texts", "reexpress", "attribute", "select", "align", "inject", "correlate", "gradients"),
    *("derive", "scale", "seek", "finetune", "generate", "distill", "import", "evaluate", "adopt", "compare"),
    *("neurons", "report", "code"),
)
TOOLS = ("check", "new-profile", "plan", "sweep", "pin", "convert", "inspect", "merge-lock", "doctor", "export")


def application(name: str = "") -> typer.Typer:
    """The commands; only the one of this name, if there is one, as the files of the others take time to import."""
    app = typer.Typer(
        name="pkt",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Parametric knowledge transfer between language models, as stages: prepare -> attribute (source, target)"
        " -> select -> align -> inject -> evaluate -> report; derive, finetune, distill and import make other rows"
        " of the table. `dvc repro` runs them all; each runs alone, too.",
    )
    app.callback()(lambda: None)  # or else a single command would take no name
    for command in [name] if name in (*STAGES, *TOOLS) else (*STAGES, *TOOLS):
        function = command.replace("-", "_") + "_" * keyword.iskeyword(command)
        folder = "stages" if command in STAGES else "tools"
        app.command(command)(getattr(importlib.import_module(f"pkt_stages.{folder}.{function}"), function))
    return app


def main() -> None:
    """Entry point: a UserError becomes one line, an interrupt a short word; anything else is a bug with a traceback."""
    try:
        name = "".join(sys.argv[1:2])
        launch.launch(name, STAGES)
        # Tools work here: `sweep` starts stages of its own, which must find the variable.
        if name in STAGES and warm.VARIABLE in os.environ and (status := warm.delegate()) is not None:
            sys.exit(status)
        launch.check_processes(name)
        if name in STAGES and os.environ.get("RANK", "0") == "0":
            check_inputs(sys.argv[2:])
        application(name)()
    except UserError as error:
        print(f"pkt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pkt: interrupted; run again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _lacks_space(error):
            raise
        print("pkt: error: no space to write a file; free some and run again, it goes on where it was", file=sys.stderr)
        sys.exit(2)


def _lacks_space(error: BaseException | None) -> bool:
    """Whether a full disk, quota or file size limit is behind an error; libraries have their own ways to say so."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = [*map(os.strerror, numbers), "PytorchStreamWriter failed writing", ". unexpected pos "]
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in words):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
