"""MMLU (cais/mmlu): multiple choice by the letter's log-probability after the forced prefix (METHODS section 10)."""

from __future__ import annotations

from pathlib import Path

from pkt_stages.examples import Example
from pkt_stages.tasks import Reference, Row, Task

LETTERS = ("A", "B", "C", "D")


def example(row: Row, id: str) -> Example:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    subject = str(row["subject"]).replace("_", " ")
    letter = LETTERS[row["answer"]]
    return Example(
        dataset="mmlu",
        id=id,
        prompt=f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question']}\n{options}\nAnswer:",
        answer=f"The answer is: {letter}",
        prefix="The answer is:",
        reference={"answer": letter},
    )


def problem(reference: Reference) -> str | None:
    if reference["answer"] in LETTERS:
        return None
    return f"expected an answer of {', '.join(LETTERS)}, found {reference['answer']!r}"


def score(reference: Reference, letter: str) -> float:
    return float(letter == reference["answer"])


TASK = Task(
    folder=Path(__file__).parent,
    title="MMLU",
    num_test=14042,
    answer_tokens=0,
    schemas={"mmlu": example},
    reference_keys=frozenset({"answer"}),
    score=score,
    problem=problem,
)
