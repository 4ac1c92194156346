"""Begins a profile of one's own: a copy of the graph, and a params file of what differs from the paper's settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pkt_stages import artifacts, tasks
from pkt_stages.errors import UserError
from pkt_stages.params import read_params
from pkt_stages.profile import GROUPS, NAME, UNIONS, chat_model
from pkt_stages.tools.check import GRAPH, NO_CHANGE, PARAMS, commands, problems, project

FOLDER = "profiles"
# Rows to begin with, by group: what needs the two chat models alone.
ROWS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "align": {"laten": {}},
    "unaligned": {"unaligned_seeking": {"code": "seeking", "rank": 16}},
    "finetune": {"postpkt_random": {"init": "random"}, "postpkt_pissa": {"init": "pissa"}},
    "finetune_seeking": {"postpkt_seeking": {"init": "seeking"}},
    "control": {"control_random_delta": {"code": "random_delta"}},
}


def text(name: str, source: str, target: str, found: Mapping[str, Any], chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The params file.

    Args:
        source: a pair's name, without `-chat`.
        found: a profile's content that has the models and data: its `models_dir`, `data_dir` are taken.
        chosen: tasks, each with what it changes.
    """
    its = commands()
    models = f"[{chat_model(source)}, {target}]"
    lines = [
        f"# Profile `{name}`: {source} to {target}. After each edit: pkt check {FOLDER}/{name}",
        "# What does not stand here is the paper's (`pkt COMMAND --help`); what the keys mean: CONTRIBUTING.md.",
        f"profile: {name}",
        "root: ../..",
        f"params_file: {FOLDER}/{name}/{PARAMS}",
        *(f"{key}: {folder}/{name}" for key, folder in _places(found)),
        *(f"{key}: {found[key]}" for key in ("models_dir", "data_dir")),
        "",
        f"source: [{source}] # {chat_model(source)}, and {source}-base where what training added to it is moved",
        f"target: {target}",
        "oracle: null # what the target's own training made of it, if there is such a model",
        f"models: {models} # evaluated",
        f"attributed: {models} # LaTen selects their neurons",
        f"seek_source: [{source}]",
        "teacher: [] # for rows of finetune_answers and distill",
        "transport_source: [] # for rows of transport and what works on them",
        "labelled_source: [] # for rows of labelled",
        f"selected: {{trained: [{source}], with_base: []}} # of these the base model's rows are kept, too",
        "reexpressed: {}",
        f"{NO_CHANGE}: &every {_flow({part: {} for part in found[NO_CHANGE]})}",
        "task: &task",
        *(f"  {task}: {_flow(change, '<<: *every')}" for task, change in chosen.items()),
        "prepared_task: *task",
        "",
        "made_by: # the table's rows by the stage that makes them; docs/methods.md has more",
    ]
    for group in GROUPS:
        rows = ROWS.get(group, {})
        lines += [f"  {group}: &{group}" + ("" if rows else " {}")]
        lines += [f"    {method}: {_flow(entry)}" for method, entry in rows.items()]
    for union in UNIONS:
        lines.append(f"{union}: &{union} {_united([group for group in GROUPS if GROUPS[group].union == union])}")
    lines += [
        f"methods: {_united([*UNIONS, *(group for group in GROUPS if not GROUPS[group].union)])}",
        "every_step: []",
        "adopted: []",
        "",
        "pairs:",
        f"  pair: {{first: {chat_model(source)}, second: {target}}}",
        "analysed: {task: [], source: [], methods: [], seeking: [], target_methods: []}",
        "",
        "# What differs from the paper, by command, e.g. evaluate: {dtype: float32}",
    ]
    return "\n".join([*lines, *(f"{section}: {{}}" for section in _sections(found, its))]) + "\n"


def _places(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The folders of a profile's own outputs, above its name."""
    return [(key, Path(str(found[key])).parent.as_posix()) for key in ("here", "there", "told", "heard")]


def _flow(values: Mapping[str, Any], first: str = "") -> str:
    """A mapping in one line of YAML."""
    made = yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=10_000).strip()
    return made if not first else f"{{{first}}}" if not values else f"{{{first}, {made[1:]}"


def _united(names: list[str]) -> str:
    return f"{{<<: [{', '.join(f'*{name}' for name in names)}]}}"


def _sections(found: Mapping[str, Any], its: Mapping[str, Any]) -> list[str]:
    """The sections that a profile has, in its order."""
    known = {command.section for command in its.values()}
    return [key for key in found if key in known]


def new_profile(
    name: Annotated[str, typer.Argument(help="Of the new folder in profiles/.")],
    source: Annotated[str, typer.Option(help="The source, a pair of models: SOURCE-chat and SOURCE-base.")],
    target: Annotated[str, typer.Option(help="The target, a folder of models.")],
    task: Annotated[list[str] | None, typer.Option(help="A task; may be repeated.", show_default="all")] = None,
    models_dir: Annotated[str | None, typer.Option(help="Folder of models.", show_default="that of a profile")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of data.", show_default="that of a profile")] = None,
) -> None:
    """Write profiles/NAME with the paper's settings and the rows of its two lines of methods, and check it."""
    if (root := project()) is None:
        raise UserError("no project around this folder; run this in the project's")
    allowed, said = NAME
    source = source.removesuffix("-chat")
    for what, given in (("NAME", name), ("--source", source), ("--target", target)):
        if not allowed.fullmatch(given):
            raise UserError(f"{what} {given!r} is no name here; use {said}")
    folder = root / FOLDER / name
    if folder.exists():
        raise UserError(f"{folder}: is there already; give another name, edit it, or remove the folder first")
    known = {path: read_params(path) for path in (root / PARAMS, *sorted((root / FOLDER).glob(f"*/{PARAMS}")))}
    wanted = {key: value for key, value in (("models_dir", models_dir), ("data_dir", data_dir)) if value is not None}
    fitting = [content for content in known.values() if wanted.items() <= content.items()] or list(known.values())
    # Where the models are; if they are nowhere yet, where most profiles have theirs.
    most = max((content["models_dir"] for content in fitting), key=[c["models_dir"] for c in fitting].count)
    there = [content for content in fitting if (root / content["models_dir"] / target).is_dir()]
    found = {**(there or [c for c in fitting if c["models_dir"] == most])[0], **wanted}
    names = list(dict.fromkeys(task or [name for name in tasks.names() if (root / found["data_dir"] / name).is_dir()]))
    alike = [content for content in known.values() if content["data_dir"] == found["data_dir"]]
    chosen: dict[str, dict[str, Any]] = {}
    for one in names:
        tasks.load(one)
        before: Mapping[str, Any] = next((content["task"][one] for content in alike if one in content["task"]), {})
        chosen[one] = {part: change for part, change in before.items() if change}
    with artifacts.replaced_folder(folder, PARAMS) as new:
        shutil.copyfile(root / GRAPH, new / GRAPH)
        (new / PARAMS).write_text(text(name, source, target, found, chosen), encoding="utf-8")
    path = Path(os.path.relpath(folder / PARAMS))
    left = problems(path)
    typer.echo(f"new-profile: {path} with {len(chosen)} tasks and {sum(map(len, ROWS.values()))} rows")
    for line in left:
        typer.echo(f"still missing: {line}")
    if not all((root / found["models_dir"] / model).is_dir() for model in (chat_model(source), target)):
        typer.echo(f"if a model's name is mistyped: rm -r {path.parent}, and once more")
    typer.echo(
        f"next: {'mend that, ' if left else ''}edit {path}, pkt check {path.parent}, pkt plan {path.parent / GRAPH}"
    )
