"""GSM8K (openai/gsm8k): word problems; the last number of the text counts (METHODS section 10)."""

from __future__ import annotations

import re
from pathlib import Path

from pkt_stages.evaluation.scoring import last_number, same_number
from pkt_stages.examples import Example
from pkt_stages.tasks import Reference, Row, Task


def example(row: Row, id: str) -> Example:
    reasoning, separator, answer = str(row["answer"]).rpartition("####")
    if not separator:
        raise KeyError("#### in `answer`")
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip().replace("\n", " ")
    answer = answer.strip()
    return Example(
        dataset="gsm8k",
        id=id,
        prompt=f"Answer the following question.\n\nQuestion: {row['question']}",
        answer=f"Answer: {reasoning} So the answer is {answer}.",
        prefix="Answer:",
        reference={"answer": answer},
    )


def score(reference: Reference, number: str) -> float:
    return float(same_number(number, reference["answer"]))


TASK = Task(
    folder=Path(__file__).parent,
    title="GSM8K",
    num_test=1319,
    answer_tokens=150,
    schemas={"gsm8k": example},
    reference_keys=frozenset({"answer"}),
    extract=last_number,
    score=score,
)
