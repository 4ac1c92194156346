"""From a benchmark's rows to this project's example sets (paper 5.1): extract, align, train, transfer and test.

The first four are drawn by seed from the training pool and do not overlap; each is a prefix of one permutation after
the other, with `transfer` (LaTen's unseen examples) last, so that more of those changes none of the others.

A team's own split files are taken in their order instead, whole where the params name no count; `transfer` is drawn
from their train file where it has no file, and left out of the train set.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pkt_stages import artifacts, hub, tasks
from pkt_stages.errors import UserError
from pkt_stages.examples import Example, check_ids, read_csv, read_examples, read_jsonl, write_jsonl
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.progress import track
from pkt_stages.tasks import Task

# The sets, and how many examples of a benchmark's pool each holds where the params do not say.
COUNTS = {"extract": 32, "align": 80, "train": 1000, "transfer": 3}
SETS = tuple(COUNTS)


@dataclass(frozen=True)
class PrepareParams:
    """How many examples each set holds; None: `COUNTS` of a benchmark's pool, or all that an own file holds."""

    extract: int | None = option(
        None,
        "Examples to locate neurons with, also LaTen's largest number of steps; None: 32, or all of an own file.",
        ge=1,
    )
    align: int | None = option(
        None,
        "Examples to align with, those held out to choose the step among them; None: 80, or all of an own file.",
        ge=1,
    )
    train: int | None = option(None, "Examples for fine-tuning; None: 1000, or all of an own file.", ge=1)
    transfer: int | None = option(
        None, "Unseen examples whose rows LaTen injects in the end; None: 3, or all of an own file.", ge=1
    )
    test: int | None = option(None, "Test examples, drawn by seed; none means all.", ge=1)
    max_chars: int | None = option(
        None, "Pool examples longer than this (prompt and answer, characters) are left out.", ge=1
    )
    seed: int = option(0, "Seed of the draw.")

    def count(self, name: str) -> int:
        """How many examples of a pool a set takes."""
        given: int | None = getattr(self, name)
        return COUNTS[name] if given is None else given


def run(given: Mapping[str, list[Example]], params: PrepareParams) -> dict[str, list[Example]]:
    """The sets with their examples, `test` last.

    Args:
        given: the pools `train` and `test`; or, with `extract` among them, a team's own sets and the pool `test`.

    Raises:
        UserError: a pool or a set is too small, or two sets overlap, in an example or an id.
    """
    test = given["test"]
    if "extract" in given:
        sets = split({name: given[name] for name in SETS if name in given}, test, params)
    else:
        sets = draw(given["train"], test, params)
    sets["test"] = draw_test(test, params)
    check_ids(sets)
    return sets


def draw(pool: list[Example], test: list[Example], params: PrepareParams) -> dict[str, list[Example]]:
    """Draw the sets from one pool. Examples that repeat a prompt, or stand in the test set, are left out.

    Raises:
        UserError: the pool is too small.
    """
    short = [e for e in pool if params.max_chars is None or len(e.prompt) + len(e.answer) <= params.max_chars]
    unique = _unlike(short, test)
    wanted = sum(map(params.count, SETS))
    if wanted > len(unique):
        raise UserError(
            f"{wanted} examples wanted ({', '.join(f'{n} {params.count(n)}' for n in SETS)}), the pool holds"
            f" {len(unique)} different ones; lower the section `prepare`"
        )
    order = random.Random(params.seed).sample(range(len(unique)), wanted)
    sets, start = {}, 0
    for name in SETS:
        sets[name] = [unique[i] for i in order[start : start + params.count(name)]]
        start += params.count(name)
    return sets


def split(own: dict[str, list[Example]], test: list[Example], params: PrepareParams) -> dict[str, list[Example]]:
    """The first examples of a team's own files; all of them where the params name no count.

    Args:
        own: extract, align, train, and transfer if there is a file of it.

    Raises:
        UserError: files are too short, or two of the sets (test included) share a prompt.
    """
    if params.max_chars is not None:
        raise UserError("`prepare.max_chars` is for a benchmark's rows; own files are taken as they are; remove it")
    own, beside = dict(own), ""
    if "transfer" not in own:
        held = random.Random(params.seed).sample(
            range(len(own["train"])), min(params.count("transfer"), len(own["train"]))
        )
        own["transfer"] = [own["train"][i] for i in held]
        own["train"] = [example for i, example in enumerate(own["train"]) if i not in held]
        beside = " beside the transfer examples"
    wanted = {name: getattr(params, name) or len(own[name]) for name in SETS}
    wanted["transfer"] = params.count("transfer") if beside else wanted["transfer"]
    if short := [name for name in SETS if len(own[name]) < max(1, wanted[name])]:
        held_by = {name: f"the file holds {len(own[name])}{beside * (name == 'train')}" for name in short}
        told = [f"{name}: {max(1, wanted[name])} examples wanted, {held_by[name]}" for name in short]
        raise UserError(f"{', '.join(told)}; set {', '.join(f'`prepare.{name}`' for name in short)}")
    taken = {example.prompt: "test" for example in test}
    for name in SETS:
        own[name] = own[name][: wanted[name]]
        for example in own[name]:
            if taken.setdefault(example.prompt, name) != name:
                other = taken[example.prompt]
                raise UserError(f"{name}: example {example.id} is in {other}, too; the sets must not overlap")
    return own


def draw_test(test: list[Example], params: PrepareParams) -> list[Example]:
    """The test set, in its own order."""
    if params.test is None:
        return test
    if params.test > len(test):
        raise UserError(f"{params.test} test examples wanted, there are {len(test)}; lower `prepare.test`")
    return [test[i] for i in sorted(random.Random(params.seed + 1).sample(range(len(test)), params.test))]


def _unlike(pool: list[Example], test: list[Example]) -> list[Example]:
    taken = {example.prompt for example in test}
    unique = []
    for example in pool:
        if example.prompt not in taken:
            taken.add(example.prompt)
            unique.append(example)
    return unique


def pool_files(folder: Path, pool: str) -> list[Path]:
    """The files that hold a pool or set, as JSON lines or as a table; more than one is an error of the user's."""
    return [file for file in (folder / f"{pool}.jsonl", folder / f"{pool}.csv") if file.is_file()]


def read_pool(folder: Path, pool: str, task: Task) -> list[Example]:
    """A pool's examples: from its file of benchmark rows, else from the hub as the folder's `hub.yaml` says.

    Raises:
        UserError: neither is there, there are two files, or a row does not fit.
    """
    files, pointer = pool_files(folder, pool), folder / hub.POINTER
    if len(files) > 1:
        raise UserError(f"{folder}: holds {files[0].name} and {files[1].name}; remove the one that is not meant")
    if files or not pointer.is_file():
        file = files[0] if files else folder / f"{pool}.jsonl"
        rows = read_csv(file) if file.suffix == ".csv" else read_jsonl(file)
        return [task.example(row, f"{task.name}_{pool}_{n}") for n, row in rows]
    split = hub.read_data_pointer(pointer, pool)
    numbered = enumerate(track(hub.read_hub_rows(split), f"{task.name}: {pool} rows"), start=1)
    return [task.example(row, f"{task.name}_{pool}_{n}", split.schema) for n, row in numbered]


def read_given(data: Path, task: Task, pools: Sequence[str] = ("train", "test")) -> dict[str, list[Example]]:
    """What `run` takes, from a task's folder of data.

    Args:
        pools: to read, but for a train pool in whose place there are own sets.

    Raises:
        UserError: as `read_examples` and `read_pool`.
    """
    given: dict[str, list[Example]] = {}
    if (data / "extract.jsonl").is_file():
        names = [name for name in SETS if name != "transfer" or (data / "transfer.jsonl").is_file()]
        given = {name: read_examples(data / f"{name}.jsonl") for name in names}
    for name in pools:
        if name not in given:
            given[name] = read_pool(data, name, task)
    return given


def origins(data: Path) -> dict[str, dict[str, str]]:
    """What `read_given` reads, by set or pool: a `file` and its `sha256`; or a hub `repo` and its `revision`."""
    found = {}
    own = SETS if (data / "extract.jsonl").is_file() else ("train",)
    for name in (*own, "test"):
        for file in pool_files(data, name):
            found[name] = {"file": file.name, "sha256": artifacts.content_hash(file)}
    if (data / hub.POINTER).is_file():
        for pool in (pool for pool in ("train", "test") if pool not in found):
            split = hub.read_data_pointer(data / hub.POINTER, pool)
            found[pool] = {"repo": split.repo, "revision": split.revision}
    return found


@with_params("prepare", PrepareParams)
def prepare(
    params: PrepareParams,
    task: Annotated[str, typer.Option(help="Name of a task: a folder of pkt_stages/tasks, or of tasks here.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with train.jsonl and test.jsonl (or .csv), the benchmark's own rows; or own split files"
            " extract.jsonl, align.jsonl, train.jsonl (messages format), maybe transfer.jsonl, and test.jsonl (rows);"
            " hub.yaml names a hub data set in place of train.jsonl or test.jsonl."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for extract, align, train, transfer and test .jsonl.")],
    metrics: Annotated[Path | None, typer.Option(help="Where to write what the sets were drawn from (JSON).")] = None,
) -> None:
    """Turn a benchmark's rows into prompts and draw the example sets."""
    watch = Stopwatch()
    sets = run(read_given(data, tasks.load(task)), params)
    for name, examples in sets.items():
        write_jsonl(out / f"{name}.jsonl", [example.to_row() for example in examples])
    if metrics is not None:
        counts = {name: len(examples) for name, examples in sets.items()}
        artifacts.write_json(metrics, {"task": task, "counts": counts, "pools": origins(data)})
    watch.summary("prepare", ", ".join(f"{len(examples)} {name}" for name, examples in sets.items()), out)
