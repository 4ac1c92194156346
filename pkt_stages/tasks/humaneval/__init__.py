"""HumanEval (openai_humaneval): a function's body after signature and docstring; hidden tests (METHODS section 10).

It has no training rows; the authors' are those of Evol-Instruct-Code-80k.
"""

from __future__ import annotations

from pathlib import Path

from pkt_stages.evaluation.sandbox import pool
from pkt_stages.examples import Example
from pkt_stages.tasks import Reference, Row, Task
from pkt_stages.tasks.code import completion


def example(row: Row, id: str) -> Example:
    begun, rest = row["prompt"], str(row["canonical_solution"]).rstrip()
    tests = {"test": row["test"], "entry_point": row["entry_point"]}
    return completion("humaneval", id, asked=begun, begun=begun, whole=begun + rest, tests=tests)


def evol_instruct(row: Row, id: str) -> Example:
    return Example(dataset="humaneval", id=id, prompt=str(row["instruction"]), answer=str(row["output"]))


def job(reference: Reference, text: str) -> pool.Job:
    """The prompt's code with the generated body; `check` is called with the function."""
    begun = reference["code_prefix"]
    return pool.Job(begun + text, begun, reference["entry_point"], "", reference["test"], "check")


TASK = Task(
    folder=Path(__file__).parent,
    title="HumanEval",
    num_test=164,
    answer_tokens=150,
    schemas={"humaneval": example, "evol_instruct": evol_instruct},
    reference_keys=frozenset({"code_prefix", "test", "entry_point"}),
    job=job,
    judge=pool,
)
