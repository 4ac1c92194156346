"""The benchmark files and the models' own training corpus, both functions of a seed.

The corpus is drawn from the same families, never holds a row of the pool or test files (compared by chat prompt), and
is never stored: document `number` of step `step` is made when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pkt_stages.examples import write_jsonl
from pkt_stages.tasks import load
from tiny.draw import GradedRow, Part, draw
from tiny.facts import exposure, make_facts, quiz_parts, quiz_row, recall_parts
from tiny.functions import CORPUS_EXPONENT, list_function_row, step_function_row
from tiny.settings import (
    ANSWER_WEIGHT,
    CHAT_LETTER_WEIGHT,
    EVEN,
    POOL_ROWS,
    TASKS,
    TEST_ROWS,
    TEXT_ROWS,
    RawMix,
)
from tiny.word_problems import arithmetic_parts, problem_row

MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Document:
    """A text of the corpus in parts (see `Part`); `weight` is the loss weight of a token that is to be learned."""

    family: str
    parts: tuple[Part, ...]
    weight: float = ANSWER_WEIGHT

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


class Corpus:
    """The seeded families with their benchmark rows, and documents that avoid those rows."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.facts = make_facts(seed)
        self.exposure = exposure(self.facts)
        self._example = {task: load(task).example for task in TASKS}
        self._taken: set[str] = set()
        # Tests first: a small family keeps its easy rows for them.
        self.test = {task: self._test_rows(task) for task in TASKS}
        self.pool = {task: self._rows(task, "train", POOL_ROWS[task]) for task in TASKS}
        self._excluded = frozenset(self._taken)

    def raw_document(self, rng: Random, mix: RawMix) -> Document:
        """A plain text: statements, open questions, quizzes, arithmetic, word problems, code."""
        family = draw(rng, TASKS, [mix.families[task] for task in TASKS])
        kind = rng.random()
        if family == "mmlu" and kind < mix.recall:
            return Document(family, tuple(recall_parts(rng, self.facts, self.exposure)), mix.recall_weight)
        if family == "gsm8k" and kind < mix.arithmetic:
            return Document(family, tuple(arithmetic_parts(rng)))
        row = self._corpus_row(family, rng)
        if family == "mmlu":
            return Document(family, tuple(quiz_parts(row)), mix.letter_weight)
        if family == "gsm8k":
            answer = self._example[family](row, "").answer.removeprefix("Answer:")
            return Document(family, ((f"Question: {row['question']}\nAnswer:", False), (answer, True)))
        if family == "humaneval":
            return Document(family, ((row["prompt"], False), (row["canonical_solution"], True)))
        head, colon, body = row["code"].partition(":")
        return Document(family, ((f"# {row['text']}\n{head}", False), (colon + body, True)))

    def chat_document(self, rng: Random, families: Mapping[str, float]) -> Document:
        """An exchange in the chat template and the words of the evaluation protocols, without <s> and </s>.

        Its learned part begins where the forced prefix ends.
        """
        family = draw(rng, TASKS, [families[task] for task in TASKS])
        example = self._example[family](self._corpus_row(family, rng), "")
        lead = f"<|user|>\n{example.prompt}\n<|assistant|>\n{example.prefix}"
        weight = CHAT_LETTER_WEIGHT if family == "mmlu" else ANSWER_WEIGHT
        return Document(family, ((lead, False), (example.answer[len(example.prefix) :], True)), weight)

    def _corpus_row(self, family: str, rng: Random) -> dict[str, Any]:
        for _ in range(MAX_DRAWS):
            if family == "mmlu":
                row = quiz_row(rng, draw(rng, self.facts, self.exposure)).row
            elif family == "gsm8k":
                row = problem_row(rng).row
            elif family == "humaneval":
                row = list_function_row(rng, CORPUS_EXPONENT).row
            else:
                row = step_function_row(rng, CORPUS_EXPONENT).row
            if self._example[family](row, "").prompt not in self._excluded:
                return row
        raise AssertionError(f"{family}: no row outside the benchmark files in {MAX_DRAWS} draws")

    def _test_rows(self, task: str) -> list[GradedRow]:
        if task == "mmlu":  # one question about every fact
            facts = iter(self.facts)
            return self._rows(task, "test", TEST_ROWS, lambda rng: quiz_row(rng, next(facts)))
        return self._rows(task, "test", TEST_ROWS)

    def _rows(
        self, task: str, split: str, count: int, make: Callable[[Random], GradedRow] | None = None
    ) -> list[GradedRow]:
        """`count` rows whose prompts are new; adds their prompts to the taken ones."""
        rng = Random(f"{task}-{split}-{self.seed}")
        makers: Mapping[str, Callable[[Random], GradedRow]] = {
            "mmlu": lambda rng: quiz_row(rng, rng.choice(self.facts)),
            "gsm8k": problem_row,
            "humaneval": list_function_row,
            "mbpp": step_function_row,
        }
        make = make or makers[task]
        rows: list[GradedRow] = []
        for _ in range(MAX_DRAWS):
            graded = make(rng)
            prompt = self._example[task](graded.row, "").prompt
            if prompt in self._taken:
                continue
            self._taken.add(prompt)
            number = len(rows)
            if task == "humaneval":
                graded.row["task_id"] = f"tiny-{split}/{number}"
            if task == "mbpp":
                graded.row["task_id"] = number + (0 if split == "test" else TEST_ROWS)
            rows.append(graded)
            if len(rows) == count:
                return rows
        raise AssertionError(f"{task}/{split}: only {len(rows)} of {count} rows in {MAX_DRAWS} draws")


def write_data(out: Path, corpus: Corpus) -> None:
    """Write `{task}/{train,test}.jsonl` and `texts/texts.jsonl`, held-out raw texts of the base corpus."""
    for task in TASKS:
        write_jsonl(out / task / "test.jsonl", [graded.row for graded in corpus.test[task]])
        write_jsonl(out / task / "train.jsonl", [graded.row for graded in corpus.pool[task]])
    rng = Random(f"text-{corpus.seed}")
    documents = [corpus.raw_document(rng, EVEN) for _ in range(TEXT_ROWS)]
    write_jsonl(out / "texts" / "texts.jsonl", [{"text": document.text} for document in documents])
