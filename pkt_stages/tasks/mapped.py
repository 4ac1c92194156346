"""A task without code: its `task.yaml` says which fields of a row are question and answer, and how answers are scored.

    title: Capitals
    scoring: choice
    fields: {question: question, choices: options, answer: correct}

A field is the name of a row's column; `choices.text` is what the column `choices` holds as `text`. `scoring`:

- `choice`: the letter with the highest log-probability behind the forced prefix. `choices` names a column with a list,
  or is a list of columns with a choice each; the answer is a choice's text, its letter, or (a JSON number) its place
  counted from 0.
- `number`: the last number in the generated text, equal as a decimal. `solution` may name a column with the way to it.
- `exact_match`: the first line of the generated text, equal but for space around it and a full stop behind it.

docs/extend.md goes through one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pkt_stages.errors import UserError, shown
from pkt_stages.evaluation.scoring import last_number, reference_of, same_number
from pkt_stages.examples import Example
from pkt_stages.params import build, option, read_yaml
from pkt_stages.profile import TASK_FILE
from pkt_stages.tasks import Reference, Row, Task

LETTERS = string.ascii_uppercase
HARNESS: Mapping[str, Any] = {
    "test_split": "test",
    "doc_to_text": "prompt",
    "gen_prefix": "prefix",
    "doc_to_target": "target",
    "num_fewshot": 0,
    "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE_PROMPT = "The following is a multiple choice question.\n\n{question}\n{choices}\nAnswer:"
PLACE = r"\{(\w+)\}"  # of a field in a prompt
PROMPT = "Answer the following question.\n\nQuestion: {question}"


@dataclass(frozen=True)
class Definition:
    """What a task.yaml says."""

    scoring: Literal["choice", "number", "exact_match"]
    fields: dict
    title: str | None = option(None, "In tables; by default the task's name.")
    prompt: str | None = option(None, "The question as it is asked; {NAME} stands for a field.")
    prefix: str | None = option(None, "How the model's answer is forced to begin.")
    until: tuple[str, ...] | None = option(None, "Texts that end a generated answer.")
    num_test: int = option(1000, "Test rows, about, for `pkt plan`.", ge=1)
    answer_tokens: int = option(50, "Tokens of a generated answer, about, for `pkt plan`.", ge=1)


def read(folder: Path) -> Task:
    """The task of a folder that holds its task.yaml and nothing else that counts.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    path = folder / TASK_FILE
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with `scoring` and `fields`, found {shown(content)}")
    made = build(Definition, content, str(path))
    chosen = made.scoring == "choice"
    fields = _fields(path, made)
    prefix = made.prefix if made.prefix is not None else "The answer is:" if chosen else "Answer:"
    prompt = made.prompt if made.prompt is not None else CHOICE_PROMPT if chosen else PROMPT
    if not prefix.strip() or prefix != prefix.rstrip():
        raise UserError(f"{path}: prefix: expected a text without space behind it, found {shown(prefix)}")
    if chosen and made.until is not None:
        raise UserError(f"{path}: `until` ends generated answers, and with scoring choice none is generated; remove it")
    for needed in ("question", "choices") if chosen else ("question",):
        if f"{{{needed}}}" not in prompt:
            raise UserError(f"{path}: prompt: expected {{{needed}}} in it, found {shown(prompt)}")
    if unknown := [name for name in re.findall(PLACE, prompt) if name not in fields]:
        raise UserError(f"{path}: prompt: {{{unknown[0]}}} is none of the fields {', '.join(fields)}")
    if told := [name for name in ("answer", "solution") if f"{{{name}}}" in prompt]:
        raise UserError(f"{path}: prompt: {{{told[0]}}} would tell the answer; leave it out")
    rows = _Rows(path, made.scoring, fields, prompt, prefix)
    return Task(
        folder=folder,
        title=made.title if made.title is not None else folder.name,
        num_test=made.num_test,
        answer_tokens=0 if chosen else made.answer_tokens,
        schemas={folder.name: rows.example},
        reference_keys=frozenset({"answer", "choices"} if chosen else {"answer"}),
        extract=None if chosen else last_number if made.scoring == "number" else first_line,
        score=_same_number if made.scoring == "number" else _same_text,
        problem=_choice_problem if chosen else None,
        asked={**HARNESS, **_asked(made)},
    )


def first_line(text: str) -> str:
    """The first line that says something, without space around it and a full stop behind it."""
    return text.strip().partition("\n")[0].strip().removesuffix(".").rstrip()


def letter_of(answer: Any, choices: list[str]) -> str:
    """Which choice an answer means: by its text, its letter, or as a whole number counted from 0.

    Digits in a text are no number: some benchmarks count so from 1.

    Raises:
        ValueError: none, or several.
    """
    letters, text = LETTERS[: len(choices)], _text(answer)
    places = {place for place, choice in enumerate(choices) if choice == text}
    if text is not None and text in list(letters):
        places.add(letters.index(text))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        places.add(answer)
    if len(places) > 1:
        several = " and ".join(letters[place] for place in sorted(places))
        raise ValueError(f"answer {shown(answer)} stands for the choices {several}; give the letter")
    if not places:
        listed = ", ".join(map(shown, choices))
        raise ValueError(f"answer {shown(answer)} is none of the choices {listed}, nor one's letter or number from 0")
    return letters[places.pop()]


@dataclass(frozen=True)
class _Rows:
    """From rows to examples.

    Attributes:
        fields: columns by the field's name; several of `choices` alone.
    """

    path: Path
    scoring: str
    fields: Mapping[str, list[str]]
    prompt: str
    prefix: str

    def example(self, row: Row, id: str) -> Example:
        """Raises UserError where a row has not what the fields say."""
        try:
            return self._example(row, id)
        except ValueError as error:
            raise UserError(f"row {id}: {error}; mend the row, or {self.path}") from None

    def _example(self, row: Row, id: str) -> Example:
        taken = {name: self._taken(row, name) for name in self.fields}
        choices = []
        if self.scoring == "choice":
            choices = _texts(taken["choices"])
            taken["answer"] = letter_of(taken["answer"], choices)
            taken["choices"] = "\n".join(map("{}. {}".format, LETTERS, choices))
        texts = {name: _text(value) for name, value in taken.items()}
        if empty := [name for name, text in texts.items() if text is None]:
            raise ValueError(f"{empty[0]}: expected a text or a number, found {shown(taken[empty[0]])}")
        answer = str(texts["answer"])
        if self.scoring == "number" and not same_number(answer, answer):
            raise ValueError(f"answer: expected a number, found {shown(answer)}")
        if self.scoring == "exact_match" and ("\n" in answer or not first_line(answer)):
            raise ValueError(f"answer: expected one line of text, found {shown(answer)}")
        said = f"{texts['solution']} So the answer is {answer}." if "solution" in texts else answer
        return Example(
            dataset=self.path.parent.name,
            id=str(texts.get("id", id)),
            prompt=re.sub(PLACE, lambda match: str(texts[match[1]]), self.prompt),
            answer=f"{self.prefix} {said}",
            prefix=self.prefix,
            reference={"answer": answer, "choices": choices} if choices else {"answer": answer},
        )

    def _taken(self, row: Row, name: str) -> Any:
        """What a row has for a field; a list, if that has several columns."""
        values = []
        for column in self.fields[name]:
            value: Any = row
            for part in [column] if column in row else column.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    found = ", ".join(map(str, row)) or "nothing"
                    raise ValueError(f"has no {column!r}, from which fields.{name} is taken; it has {found}")
                value = value[part]
            values.append(value)
        return values if len(values) > 1 else values[0]


def _fields(path: Path, made: Definition) -> dict[str, list[str]]:
    """The columns by field; UserError unless they are what the scoring needs."""
    columns = {}
    for name, value in made.fields.items():
        listed = value if isinstance(value, list) and name == "choices" else [value]
        if not isinstance(name, str) or not all(isinstance(one, str) and one for one in listed) or not listed:
            several = ", or a list of them" if name == "choices" else ""
            raise UserError(f"{path}: fields.{name}: expected the name of a column{several}, found {shown(value)}")
        columns[name] = listed
    needed = ["question", "answer", *(["choices"] if made.scoring == "choice" else [])]
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"{path}: fields: {missing[0]!r} is missing; scoring {made.scoring} needs {', '.join(needed)}")
    for name, scoring in (("choices", "choice"), ("solution", "number")):
        if name in columns and made.scoring != scoring:
            raise UserError(f"{path}: fields.{name}: is for scoring {scoring}, not {made.scoring}; remove it")
    return columns


def _asked(made: Definition) -> dict[str, Any]:
    """What of lm-evaluation-harness's settings depends on the scoring."""
    if made.scoring == "choice":
        return {"output_type": "multiple_choice", "target_delimiter": " ", "doc_to_choice": _letters}
    until = made.until if made.until is not None else ("Question:",) if made.scoring == "number" else ("\n",)
    return {"output_type": "generate_until", "generation_kwargs": {"until": list(until)}}


def _letters(doc: Mapping[str, Any]) -> list[str]:
    """Those that a row of the harness chooses from."""
    return list(LETTERS[: len(reference_of(doc)["choices"])])


def _choice_problem(reference: Reference) -> str | None:
    letters = LETTERS[: len(reference["choices"])]
    if isinstance(reference["choices"], list) and len(letters) > 1 and reference["answer"] in list(letters):
        return None
    return f"expected an answer among {', '.join(letters) or 'its choices'}, found {shown(reference['answer'])}"


def _same_number(reference: Reference, said: str) -> float:
    return float(same_number(said, reference["answer"]))


def _same_text(reference: Reference, said: str) -> float:
    """In a choice's letter, or in the first lines of two texts."""
    return float(said == first_line(reference["answer"]))


def _text(value: Any) -> str | None:
    """A text without space around it, of a number as well; None for anything else, and for nothing."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return str(value).strip() or None


def _texts(choices: Any) -> list[str]:
    """The choices of a row; ValueError unless they are some texts."""
    texts = [text for one in choices if (text := _text(one)) is not None] if isinstance(choices, list) else []
    if not 2 <= len(texts) <= len(LETTERS) or len(texts) < len(choices):
        raise ValueError(f"choices: expected a list of 2 to {len(LETTERS)} texts, found {shown(choices)}")
    return texts
