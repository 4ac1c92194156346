"""The only door to example files: benchmark rows, the `messages` format, chat templates, label masks.

One example is a JSON object on one line::

    {"dataset": "gsm8k", "id": "...", "messages": [{"role": "user", "content": ...},
                                                   {"role": "assistant", "content": ...}]}

Rows of a test set carry two fields more: `prefix`, the beginning of the assistant's answer that evaluation forces
(zero-shot protocols, METHODS section 10), and `reference`, what the scoring needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkt_stages.artifacts import written_whole
from pkt_stages.errors import UserError

TASKS = ("mmlu", "gsm8k", "humaneval", "mbpp")
CODE_LEAD = "Here is the completed function:\n\n\n```python\n"


@dataclass(frozen=True)
class Example:
    """A question with its answer; `prefix` and `reference` are empty outside test sets."""

    dataset: str
    id: str
    prompt: str
    answer: str
    prefix: str = ""
    reference: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "dataset": self.dataset,
            "id": self.id,
            "messages": [
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.answer},
            ],
        }
        if self.prefix or self.reference:
            row |= {"prefix": self.prefix, "reference": dict(self.reference)}
        return row


def read_examples(path: Path) -> list[Example]:
    """Read a file in the `messages` format.

    Raises:
        UserError: naming the line, if the file is missing, empty, not JSON, or not a user/assistant exchange.
    """
    examples = []
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        messages = row.get("messages")
        turns = messages if isinstance(messages, list) else []
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        if roles != ["user", "assistant"]:
            raise UserError(
                f"{where}: expected `messages` with one user and one assistant turn, found {roles or 'none'}"
            )
        reference = row.get("reference", {})
        _check_reference(reference, where)
        contents = [turn.get("content") for turn in turns]
        if not all(isinstance(c, str) and c.strip() for c in contents):
            raise UserError(f"{where}: a message's `content` is empty or not text; give both turns a text")
        examples.append(
            Example(
                dataset=str(row.get("dataset", "")),
                id=str(row.get("id", f"{path.stem}_{number}")),
                prompt=contents[0],
                answer=contents[1],
                prefix=str(row.get("prefix", "")),
                reference=reference,
            )
        )
    return examples


def _check_reference(reference: Any, where: str) -> None:
    """Raise UserError unless it is what the converters below write: texts, and lists of texts, by name."""
    if not isinstance(reference, dict):
        raise UserError(f"{where}: `reference` is {type(reference).__name__}; expected an object of texts")
    for name, value in reference.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: `reference` holds {type(value).__name__} as {name!r}; expected text")


def training_file(train_set: str, train: Path, align: Path | None) -> Path:
    """The file that a method trains on: the train set, or the few examples of the align set (the paper's "< 100").

    Raises:
        UserError: the align set is wanted and not given.
    """
    if train_set == "align" and align is None:
        raise UserError("train_set align needs --align")
    return align if train_set == "align" and align is not None else train


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a `.jsonl` file with their line numbers; blank lines are passed over.

    Raises:
        UserError: if the file is missing, holds no row, or a line is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text, for tokenizers and files
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise UserError(f"{path}: holds no example; expected one JSON object a line")
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# --- benchmark rows -> examples -----------------------------------------------------------------------------------


def _mmlu(row: Mapping[str, Any], id: str) -> Example:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    subject = str(row["subject"]).replace("_", " ")
    letter = "ABCD"[row["answer"]]
    return Example(
        dataset="mmlu",
        id=id,
        prompt=f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question']}\n{options}\nAnswer:",
        answer=f"The answer is: {letter}",
        prefix="The answer is:",
        reference={"answer": letter},
    )


def _gsm8k(row: Mapping[str, Any], id: str) -> Example:
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


def _humaneval(row: Mapping[str, Any], id: str) -> Example:
    solution = str(row["canonical_solution"]).rstrip()
    return Example(
        dataset="humaneval",
        id=id,
        prompt=f"Complete the following python function.\n\n\n{row['prompt']}",
        answer=f"{CODE_LEAD}{row['prompt']}{solution}\n```",
        prefix=CODE_LEAD + row["prompt"],
        reference={"code_prefix": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]},
    )


def _mbpp(row: Mapping[str, Any], id: str) -> Example:
    code = str(row["code"]).replace("\r\n", "\n").rstrip()
    signature = _signature(code)
    return Example(
        dataset="mbpp",
        id=id,
        prompt=f"Complete the following python function.\n\n\n{row['text']}\n{signature}",
        answer=f"{CODE_LEAD}{code}\n```",
        prefix=CODE_LEAD + signature,
        reference={
            "code_prefix": signature,
            "setup": row.get("test_setup_code", ""),
            "test_list": list(row["test_list"]),
        },
    )


def _signature(code: str) -> str:
    """What stands before the first function's colon: imports and `def name(arguments)`, as in the authors' splits."""
    match = re.search(r"def\s+\w+\s*\((?:[^()]|\([^()]*\))*\)", code)
    if match is None:
        raise KeyError("a function definition in `code`")
    return code[: match.end()]


def _evol_instruct(row: Mapping[str, Any], id: str) -> Example:
    return Example(dataset="humaneval", id=id, prompt=str(row["instruction"]), answer=str(row["output"]))


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "evol_instruct": _evol_instruct,
}


def from_benchmark(schema: str, row: Mapping[str, Any], id: str) -> Example:
    """One row in a benchmark's own schema as an example with this project's prompt (METHODS section 10).

    Schemas: mmlu (cais/mmlu), gsm8k (openai/gsm8k), humaneval (openai_humaneval), mbpp (mbpp), evol_instruct
    (Evol-Instruct-Code-80k, the authors' training data for humaneval).

    Raises:
        UserError: if the schema is unknown or the row lacks one of its fields.
    """
    if schema not in _CONVERTERS:
        raise UserError(f"unknown benchmark schema {schema!r}; expected one of {', '.join(_CONVERTERS)}")
    try:
        return _CONVERTERS[schema](row, id)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"row {id}: not in the {schema} schema ({type(error).__name__}: {error})") from None
