"""Which code does a command reach, and is it still the same? What DVC compares instead of whole modules.

A params file's tasks and methods, the package's own text -> a file per command with a hash of what it can reach; a file
per task or method where it runs their code. See reach.py and docs/decisions/009-code-hashes.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.recipe import ALIGNMENT
from pkt_stages.options import Stopwatch
from pkt_stages.profile import GROUPS, TASK_FILE, TASKS, Method, Profile, read_profile
from pkt_stages.reach import WHOLE, Node, Package

BY_TASK = ("prepare", "evaluate")  # commands that run one task's code; others that run any's depend on all
# Commands that run the file of pkt_stages/methods, by the command that makes the row; and the functions it must have.
BY_METHOD = {"align": ("align", "inject"), "derive": ("derive",)}
FUNCTIONS = {"align": ALIGNMENT, "derive": ("derive",)}
MARK = "report"  # a file that is always among those written


def run(package: Package, profile: Profile) -> dict[str, list[Node]]:
    """Where the code of each command begins, by the name of its file.

    Raises:
        UserError: a task's or a method's code is missing or incomplete, or a module is no Python.
    """
    own_code = {name: _task(package, profile, name) for name in profile.tasks}
    begins: dict[str, list[Node]] = {}
    for command in _commands(package):
        own = [Node(f"{package.name}.stages.{command}", command)]
        command = command.removesuffix("_")  # of what Python keeps for itself
        if command in BY_TASK:
            begins |= {f"{command}/{name}": own + nodes for name, nodes in own_code.items()}
        elif any(command in commands for commands in BY_METHOD.values()):
            begins |= {
                f"{command}/{method.name}": own + _method(package, profile, method)
                for method in profile.methods
                if command in BY_METHOD.get(GROUPS[method.group].command, ())
            }
        elif Node(f"{package.name}.tasks", "load") in package.reach(own):
            begins[command] = own + [node for nodes in own_code.values() for node in nodes]
        else:
            begins[command] = own
    return begins


def _commands(package: Package) -> list[str]:
    """The files of stages/, but this one."""
    folder = f"{package.name}.stages"
    commands = [name.removeprefix(f"{folder}.") for name in package.modules(folder) if name not in (folder, __name__)]
    for command in commands:
        if command not in package.names(f"{folder}.{command}"):
            raise UserError(f"{package.name}/stages/{command}.py: has no command {command!r}; name it like its file")
    return commands


def _task(package: Package, profile: Profile, name: str) -> list[Node]:
    """All of a task's folder; of one without code its file, and what reads such files."""
    folder = f"{package.name}.tasks"
    if f"{folder}.{name}" not in package.packages(folder):
        if (file := TASKS / name / TASK_FILE).is_file():
            return [Node(f"{folder}.mapped", WHOLE), package.beside(file)]
        known = ", ".join(task.removeprefix(f"{folder}.") for task in package.packages(folder))
        raise UserError(
            f"{profile.path}: task {name!r}: no such folder in {package.name}/tasks; found {known}; and there is no"
            f" {file}"
        )
    return [Node(module, WHOLE) for module in package.modules(f"{folder}.{name}")]


def _method(package: Package, profile: Profile, method: Method) -> list[Node]:
    """All of a method's file."""
    where = f"{profile.path}: made_by.{method.group}.{method.name}"
    folder = f"{package.name}.methods"
    known = ", ".join(name.removeprefix(f"{folder}.") for name in package.modules(folder) if name != folder)
    if not method.code:
        raise UserError(f"{where}: names no `code`, a file of {package.name}/methods; found {known}")
    module = f"{folder}.{method.code}"
    if module not in package.modules(module):
        raise UserError(f"{where}: code {method.code!r}: no such file in {package.name}/methods; found {known}")
    for part in ("Params", *FUNCTIONS[GROUPS[method.group].command]):
        if part not in package.names(module):
            raise UserError(f"{where}: code {method.code!r}: {package.name}/methods/{method.code}.py has no `{part}`")
    return [Node(module, WHOLE)]


def code(
    params: Annotated[Path, typer.Option(help="Params file whose tasks and methods to use.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the hashes.")] = None,
    explain: Annotated[
        str | None, typer.Option(help="Show what a command reaches, and from where: `attribute`, `evaluate/gsm8k`.")
    ] = None,
) -> None:
    """Hash the code that each command can reach, so that DVC reruns what a change can change, and nothing else."""
    watch = Stopwatch()
    folder = Path(__file__).parents[1]
    _check_installed(folder)
    package = Package(folder)
    begins = run(package, read_profile(params))
    if explain is not None:
        if explain not in begins:
            raise UserError(f"--explain {explain}: no such file of hashes; expected one of {', '.join(begins)}")
        for node, by in package.reach(begins[explain]).items():
            shown = [str(one).removeprefix(f"{package.name}.") for one in (node, by) if one is not None]
            typer.echo(" <- ".join(shown))
    elif out is None:
        raise UserError("nothing to do; give --out FOLDER or --explain COMMAND")
    if out is not None:
        with artifacts.replaced_folder(out, MARK) as new:
            for name, nodes in begins.items():
                file = new / name
                file.parent.mkdir(exist_ok=True)
                file.write_text(f"{package.digest(nodes)}\n", encoding="utf-8")
        watch.summary("code", f"{len(begins)} hashes", out)


def _check_installed(running: Path) -> None:
    """Refuse to hash a package that is not the one in the folder where DVC works: stages would run other code."""
    here = Path.cwd() / running.name
    if here.is_dir() and not here.samefile(running):
        texts = [
            {file.relative_to(top): file.read_bytes() for file in top.rglob("*") if file.suffix in (".py", ".yaml")}
            for top in (here, running)
        ]
        if texts[0] != texts[1]:
            raise UserError(f"{here}: differs from what `pkt` runs, {running}; install this one: pip install -e .")
