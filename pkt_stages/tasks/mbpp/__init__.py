"""MBPP (mbpp): a function from one sentence and its signature; every assertion must hold (METHODS section 10)."""

from __future__ import annotations

import re
from pathlib import Path

from pkt_stages.evaluation.sandbox import pool
from pkt_stages.examples import Example
from pkt_stages.tasks import Reference, Row, Task
from pkt_stages.tasks.code import completion


def example(row: Row, id: str) -> Example:
    whole = str(row["code"]).replace("\r\n", "\n").rstrip()
    begun = signature(whole)
    tests = {"setup": row.get("test_setup_code", ""), "test_list": list(row["test_list"])}
    return completion("mbpp", id, asked=f"{row['text']}\n{begun}", begun=begun, whole=whole, tests=tests)


def signature(code: str) -> str:
    """What stands before the first function's colon: imports and `def name(arguments)`, as in the authors' splits."""
    match = re.search(r"def\s+\w+\s*\((?:[^()]|\([^()]*\))*\)", code)
    if match is None:
        raise KeyError("a function definition in `code`")
    return code[: match.end()]


def job(reference: Reference, text: str) -> pool.Job:
    """The signature with the generated rest; the assertions call it by name."""
    begun = reference["code_prefix"]
    entries = re.findall(r"^def\s+(\w+)", begun, re.MULTILINE)
    tests = "\n".join(reference["test_list"])
    return pool.Job(begun + text, begun, entries[-1] if entries else "", reference["setup"], tests, "")


TASK = Task(
    folder=Path(__file__).parent,
    title="MBPP",
    num_test=500,
    answer_tokens=150,
    schemas={"mbpp": example},
    reference_keys=frozenset({"code_prefix", "setup", "test_list"}),
    job=job,
    judge=pool,
)
