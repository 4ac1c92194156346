"""From a benchmark's rows to this project's example sets (paper 5.1): extract, align, train, transfer and test.

The first four are drawn by seed from the training pool and do not overlap; each is a prefix of one permutation after
the other, with `transfer` (LaTen's unseen examples) last, so that more of those changes none of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pkt_stages.errors import UserError
from pkt_stages.examples import TASKS, Example, from_benchmark, read_rows, write_rows
from pkt_stages.options import Stopwatch, option, with_params

SETS = ("extract", "align", "train", "transfer")


@dataclass(frozen=True)
class PrepareParams:
    """How many examples each set holds."""

    extract: int = option(32, "Examples to locate neurons with, also LaTen's largest number of steps.")
    align: int = option(80, "Examples to align with, those held out for the choice of the step among them.")
    train: int = option(1000, "Examples for fine-tuning.")
    transfer: int = option(3, "Unseen examples whose rows LaTen injects in the end.")
    test: int | None = option(None, "Test examples, drawn by seed; none means all.")
    seed: int = option(0, "Seed of the draw.")

    def __post_init__(self) -> None:
        for name in SETS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


def run(pool: list[Example], test: list[Example], params: PrepareParams) -> dict[str, list[Example]]:
    """Draw the sets. Examples of the pool that repeat a prompt, or stand in the test set, are left out."""
    import random

    taken = {example.prompt for example in test}
    unique = []
    for example in pool:
        if example.prompt not in taken:
            taken.add(example.prompt)
            unique.append(example)
    wanted = sum(getattr(params, name) for name in SETS)
    if wanted > len(unique):
        raise UserError(
            f"{wanted} examples wanted ({', '.join(f'{n} {getattr(params, n)}' for n in SETS)}), the pool holds"
            f" {len(unique)} different ones; lower the section `prepare`"
        )
    order = random.Random(params.seed).sample(range(len(unique)), wanted)
    sets, start = {}, 0
    for name in SETS:
        sets[name] = [unique[i] for i in order[start : start + getattr(params, name)]]
        start += getattr(params, name)
    chosen = list(range(len(test)))
    if params.test is not None:
        if params.test > len(test):
            raise UserError(f"{params.test} test examples wanted, there are {len(test)}; lower `prepare.test`")
        chosen = sorted(random.Random(params.seed + 1).sample(range(len(test)), params.test))
    sets["test"] = [test[i] for i in chosen]
    return sets


@with_params("prepare", PrepareParams)
def prepare(
    params: PrepareParams,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmark's own train.jsonl and test.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for extract, align, train, transfer and test .jsonl.")],
) -> None:
    """Turn a benchmark's rows into prompts and draw the example sets."""
    watch = Stopwatch()
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    pools = {
        split: [from_benchmark(task, row, f"{task}_{split}_{n}") for n, row in read_rows(data / f"{split}.jsonl")]
        for split in ("train", "test")
    }
    sets = run(pools["train"], pools["test"], params)
    for name, examples in sets.items():
        write_rows(out / f"{name}.jsonl", [example.to_row() for example in examples])
    watch.summary("prepare", ", ".join(f"{len(examples)} {name}" for name, examples in sets.items()), out)
