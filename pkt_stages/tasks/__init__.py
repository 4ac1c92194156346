"""Benchmarks, a folder each. A folder that is put here is a task; nothing else names it but a profile's params.

Its `__init__.py` holds `TASK`, see `Task`; its `task.yaml` tells lm-evaluation-harness how the questions are asked: by
choice or by generation, where that stops, and what the score is called.

A task that needs no code is one YAML file in the project instead, `tasks/NAME/task.yaml` in the folder where `pkt`
runs: which fields of a row are question and answer, and how answers are scored (`mapped.py`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from pkt_stages.errors import UserError, meant
from pkt_stages.examples import Example
from pkt_stages.profile import TASK_FILE, TASKS

if TYPE_CHECKING:
    from pkt_stages.evaluation.sandbox.pool import Job

Row = Mapping[str, Any]
Reference = Mapping[str, Any]  # an example's


@dataclass(frozen=True)
class Task:
    """A benchmark: from its rows to examples, and from answers to a score.

    Attributes:
        folder: of its package; its name is the task's.
        title: in tables.
        num_test: rows of the benchmark's test set.
        answer_tokens: that a model writes per answer, about; 0 if it only chooses.
        schemas: make an example from a row and an id, by the name of the rows' schema; the first is the benchmark's
            own.
        reference_keys: what scoring needs of an example's `reference`.
        extract: the answer in a generated text; without it `task.yaml` says what that is.
        score: 0 .. 1 for an answer; or
        job: for generated code, the program to test, from the text that the model wrote; with
        judge: the module that runs such programs (`evaluation.sandbox.pool`). The engine takes it from here, so that a
            task without code does not depend on the sandbox's.
        problem: where a reference needs more than its keys, what is wrong with it, or None.
        asked: what lm-evaluation-harness reads in place of `task.yaml`.
    """

    folder: Path
    title: str
    num_test: int
    answer_tokens: int
    schemas: Mapping[str, Callable[[Row, str], Example]]
    reference_keys: frozenset[str]
    extract: Callable[[str], str] | None = None
    score: Callable[[Reference, str], float] | None = None
    job: Callable[[Reference, str], Job] | None = None
    judge: ModuleType | None = None
    problem: Callable[[Reference], str | None] | None = None
    asked: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        assert (self.score is None) != (self.job is None), f"{self.folder}: expected either `score` or `job`"
        assert (self.job is None) == (self.judge is None), f"{self.folder}: expected `job` and `judge`, or neither"

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        return self.folder / TASK_FILE

    def harness(self) -> dict[str, Any]:
        """What lm-evaluation-harness reads."""
        return dict(yaml.safe_load(self.file.read_text(encoding="utf-8")) if self.asked is None else self.asked)

    def example(self, row: Row, id: str, schema: str | None = None) -> Example:
        """One row as an example with this project's prompt (METHODS section 10).

        Args:
            schema: of the row, if it is not the benchmark's own.

        Raises:
            UserError: the schema is unknown or the row lacks one of its fields.
        """
        name = next(iter(self.schemas)) if schema is None else schema
        if name not in self.schemas:
            raise UserError(f"task {self.name}: unknown schema {name!r} of rows; expected one of {self._schemas}")
        try:
            return self.schemas[name](row, id)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"row {id}: not in the {name} schema ({type(error).__name__}: {error})") from None

    @property
    def _schemas(self) -> str:
        return ", ".join(self.schemas)

    def check(self, example: Example) -> None:
        """Raise UserError unless the example has what its scoring needs."""
        if missing := self.reference_keys - set(example.reference):
            raise UserError(
                f"example {example.id}: `reference` lacks {min(missing)!r}, which task {self.name} needs;"
                " make the test set with `pkt prepare`"
            )
        if self.problem is not None and (problem := self.problem(example.reference)) is not None:
            raise UserError(f"example {example.id}: {problem}")


def names() -> list[str]:
    """The tasks that there are, the package's and the project's."""
    return sorted({*_packages(), *_mapped()})


def _packages() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def _mapped() -> list[str]:
    return [file.parent.name for file in TASKS.glob(f"*/{TASK_FILE}")]


def load(name: str) -> Task:
    """A task by its name; imports its package and nothing heavy.

    Raises:
        UserError: there is no such folder, there are two, or it is incomplete.
    """
    if name not in names():
        there = TASKS / name / TASK_FILE
        known = f"expected one of {', '.join(names())}, or {there} here"
        raise UserError(f"unknown task {name!r}{meant(name, names())}; {known}")
    if name not in _packages():
        # By name, so that a task with code of its own does not depend on it.
        found: Task = importlib.import_module(f"{__name__}.mapped").read(TASKS / name)
        return found
    if name in _mapped():
        raise UserError(f"{TASKS / name / TASK_FILE}: there is a task {name} in the package, too; rename the folder")
    task = getattr(importlib.import_module(f"{__name__}.{name}"), "TASK", None)
    if not isinstance(task, Task):
        raise UserError(f"task {name}: its package holds no `TASK`; expected one of class pkt_stages.tasks.Task")
    if not task.file.is_file():
        raise UserError(f"task {name}: {task.file} is missing; lm-evaluation-harness reads there how it is asked")
    return task
