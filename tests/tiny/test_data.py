"""The shipped benchmark files: reproducible, in the benchmarks' schemas, disjoint, true."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pkt_stages.examples import read_jsonl
from pkt_stages.tasks import load
from tiny.corpus import Corpus, write_data
from tiny.settings import POOL_ROWS, SEED, TASKS, TEST_ROWS, TEXT_ROWS

EVENLY = dict.fromkeys(TASKS, 0.25)
FIELDS: dict[str, dict[str, type]] = {
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
    "gsm8k": {"question": str, "answer": str},
    "humaneval": {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str},
    "mbpp": {
        "task_id": int,
        "text": str,
        "code": str,
        "test_list": list,
        "test_setup_code": str,
        "challenge_test_list": list,
    },
}


def _rows(shipped: Path, task: str, split: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(shipped / task / f"{split}.jsonl")]


def _prompts(shipped: Path, task: str, split: str) -> list[str]:
    return [load(task).example(row, "").prompt for row in _rows(shipped, task, split)]


def test_generator_reproduces_the_shipped_bytes(corpus: Corpus, shipped: Path, tmp_path: Path) -> None:
    write_data(tmp_path, corpus)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(made) == 2 * len(TASKS) + 1
    for path in made:
        assert (tmp_path / path).read_bytes() == (shipped / path).read_bytes(), path


def test_another_seed_makes_other_rows(corpus: Corpus) -> None:
    other = Corpus(SEED + 1)
    for task in TASKS:
        assert [graded.row for graded in other.test[task]] != [graded.row for graded in corpus.test[task]]


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_schema(shipped: Path, task: str) -> None:
    pool, test = _rows(shipped, task, "train"), _rows(shipped, task, "test")
    assert (len(pool), len(test)) == (POOL_ROWS[task], TEST_ROWS)
    for row in pool + test:
        assert {name: type(value) for name, value in row.items()} == FIELDS[task]
    if "task_id" in FIELDS[task]:
        assert len({row["task_id"] for row in pool + test}) == len(pool) + len(test)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_twice(shipped: Path, task: str) -> None:
    counts = Counter(_prompts(shipped, task, "train") + _prompts(shipped, task, "test"))
    assert [prompt for prompt, count in counts.items() if count > 1] == []


def test_corpus_holds_no_benchmark_prompt(corpus: Corpus, shipped: Path) -> None:
    taken = {prompt for task in TASKS for split in ("train", "test") for prompt in _prompts(shipped, task, split)}
    rng = Random("leak")
    for _ in range(3000):
        text = corpus.chat_document(rng, EVENLY).text
        question = text.removeprefix("<|user|>\n").partition("\n<|assistant|>\n")[0]
        assert question not in taken
    assert corpus._excluded == taken


def test_corpus_would_leak_without_the_exclusion(shipped: Path) -> None:
    corpus = Corpus(SEED)
    taken, corpus._excluded = corpus._excluded, frozenset()
    rng = Random("leak")
    prompts = {
        corpus.chat_document(rng, EVENLY).text.removeprefix("<|user|>\n").partition("\n<|assistant|>\n")[0]
        for _ in range(3000)
    }
    assert prompts & taken


def test_mmlu_test_asks_every_fact_once_and_truly(corpus: Corpus, shipped: Path) -> None:
    truth = {question.format(e=f.entity): f for f in corpus.facts for question in f.attribute.questions}
    asked = []
    for row in _rows(shipped, "mmlu", "test"):
        fact = next(fact for question, fact in truth.items() if question in row["question"])
        assert row["choices"] == list(fact.attribute.values) and row["choices"][row["answer"]] == fact.value
        asked.append((fact.entity, fact.attribute.questions))
    assert len(set(asked)) == len(corpus.facts) == TEST_ROWS
    letters = Counter(row["answer"] for row in _rows(shipped, "mmlu", "test"))
    assert max(letters.values()) < TEST_ROWS * 0.35  # no letter answers much more than its quarter


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_steps_are_true_and_end_in_the_answer(shipped: Path, split: str) -> None:
    for row in _rows(shipped, "gsm8k", split):
        *steps, last = row["answer"].split("\n")
        for step in steps:
            left, result = re.fullmatch(r"(\d+ [-+*] \d+) = (\d+)\.", step).groups()  # type: ignore[union-attr]
            assert eval(left) == int(result)
        assert 1 <= len(steps) <= 3 and last == f"#### {result}"
        assert row["question"].split()[2] == steps[0].split()[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_humaneval_solutions_pass_and_an_empty_body_fails(shipped: Path, split: str) -> None:
    for row in _rows(shipped, "humaneval", split):
        assert row["prompt"].endswith('"""\n') and row["canonical_solution"].startswith("    ")
        space: dict[str, Any] = {}
        exec(row["prompt"] + row["canonical_solution"] + row["test"], space)
        space["check"](space[row["entry_point"]])
        with pytest.raises(AssertionError):
            space["check"](lambda numbers: None)


@pytest.mark.parametrize("split", ["train", "test"])
def test_mbpp_solutions_pass_and_are_short(shipped: Path, split: str) -> None:
    for row in _rows(shipped, "mbpp", split):
        assert len(row["test_list"]) >= 3 and 2 <= row["code"].count("\n") <= 5
        assert row["test_setup_code"] == "" and row["challenge_test_list"] == []
        space: dict[str, Any] = {}
        exec("\n".join([row["code"], *row["test_list"]]), space)
        name = row["code"].split("(")[0].removeprefix("def ")
        with pytest.raises(AssertionError):
            exec("\n".join(row["test_list"]), {name: lambda value: None})


def test_texts(shipped: Path) -> None:
    lines = (shipped / "texts/texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    assert len(texts) == TEXT_ROWS
    assert all(set(row) == {"text"} and row["text"].strip() for row in texts)
