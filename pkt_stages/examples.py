"""The only door to example files: the `messages` format, and JSON objects a line in general.

One example is a JSON object on one line::

    {"dataset": "gsm8k", "id": "...", "messages": [{"role": "user", "content": ...},
                                                   {"role": "assistant", "content": ...}]}

Rows of a test set carry two fields more: `prefix`, the beginning of the assistant's answer that evaluation forces
(zero-shot protocols, METHODS section 10), and `reference`, what the scoring needs. Examples are made from a benchmark's
rows by its task (`pkt_stages.tasks`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkt_stages.artifacts import written_whole
from pkt_stages.errors import UserError


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


def read_examples(path: Path, num_examples: int | None = None) -> list[Example]:
    """Read a file in the `messages` format.

    Args:
        num_examples: only the first so many; all by default.

    Raises:
        UserError: naming the line, if the file is missing, empty, not JSON, or not a user/assistant exchange; an id
            that is no text or stands twice; fewer examples. A row without `id` is called after file and line.
    """
    examples = []
    for number, row in read_jsonl(path):
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
        for key in ("dataset", "prefix"):
            if not isinstance(row.get(key, ""), str):
                raise UserError(f"{where}: `{key}` is {type(row[key]).__name__}; expected text")
        contents = [turn.get("content") for turn in turns]
        if not all(isinstance(c, str) and c.strip() for c in contents):
            raise UserError(f"{where}: a message's `content` is empty or not text; give both turns a text")
        examples.append(
            Example(
                dataset=row.get("dataset", ""),
                id=_id(row, f"{path.stem}_{number}", where),
                prompt=contents[0],
                answer=contents[1],
                prefix=row.get("prefix", ""),
                reference=reference,
            )
        )
    check_ids({str(path): examples})
    if num_examples is not None and len(examples) < num_examples:
        raise UserError(f"{path}: holds {len(examples)} examples, num_examples asks for {num_examples}")
    return examples[:num_examples]


def _id(row: Mapping[str, Any], otherwise: str, where: str) -> str:
    """The row's id; UserError if it is null, empty or no text."""
    found = row.get("id", otherwise)
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{where}: `id` is {found!r}; expected a text of its own, or no `id` at all")
    return found


def check_ids(sets: Mapping[str, Iterable[Example]]) -> None:
    """Raise UserError if an id stands twice, in one set or in two that go together; metrics and deltas are told by it.

    Args:
        sets: by what to call them.
    """
    taken: dict[str, str] = {}
    for name, examples in sets.items():
        for example in examples:
            if example.id in taken:
                other = f"in {taken[example.id]}, too" if taken[example.id] != name else "there twice"
                raise UserError(f"{name}: id {example.id!r} is {other}; give each example one of its own")
            taken[example.id] = name


def _check_reference(reference: Any, where: str) -> None:
    """Raise UserError unless it is what tasks write: texts, and lists of texts, by name."""
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


def align_files(folder: Path, tasks: Sequence[str] = ()) -> dict[str, Path]:
    """The align sets <task>/align.jsonl below a folder by task; only those of `tasks`, if some are named.

    Raises:
        UserError: one of them is missing, or there is none.
    """
    files = {path.parent.name: path for path in sorted(folder.glob("*/align.jsonl"))}
    if missing := [task for task in tasks if task not in files] or ([] if files else ["<task>"]):
        raise UserError(f"{folder}: no {missing[0]}/align.jsonl below it; make it with `pkt prepare`")
    return {task: files[task] for task in tasks or files}


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
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
        line = line.removeprefix("\ufeff")  # a byte order mark, also of a file that was appended
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


def read_csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table with a line of column names, by those, with the line on which each ends.

    Raises:
        UserError: naming the line, if the file is not readable as text, holds no row, repeats a column's name, or has a
            row of another length.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(lines, newline=""), strict=True)
        found = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not readable as a table ({error}); expected commas between columns, UTF-8") from None
    if len(found) < 2:
        raise UserError(f"{path}: holds no row; expected a line of column names, then a row a line")
    (_, names), *rows = found
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one")
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} columns; expected {len(names)}: {', '.join(names)}")
    return [(line, dict(zip(names, row, strict=True))) for line, row in rows]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
