# ruff: noqa: E501 (messages read better on one line)
"""What every task has, and that a folder is all that a new one takes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pkt_stages
from pkt_stages import tasks
from pkt_stages.errors import UserError
from pkt_stages.examples import read_examples, read_jsonl, write_jsonl
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder beside the package's own, for tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    before = set(sys.modules)
    yield folder
    for name in {name for name in sys.modules if name.startswith("pkt_stages.tasks.")} - before:
        del sys.modules[name]
        delattr(tasks, name.rpartition(".")[2])


def test_the_paper_s_tasks() -> None:
    assert tasks.names() == ["gsm8k", "humaneval", "mbpp", "mmlu"]
    assert {name: (tasks.load(name).title, tasks.load(name).num_test) for name in tasks.names()} == {
        "gsm8k": ("GSM8K", 1319),
        "humaneval": ("HumanEval", 164),
        "mbpp": ("MBPP", 500),
        "mmlu": ("MMLU", 14042),
    }


@pytest.mark.parametrize("name", tasks.names())
def test_what_is_generated_ends_as_the_protocol_says(name: str) -> None:
    task = tasks.load(name)
    assert task.name == name
    asked = yaml.safe_load(task.file.read_text())
    assert (asked["output_type"] == "generate_until") == (task.answer_tokens > 0)
    assert asked.get("generation_kwargs", {}).get("until") == {
        "gsm8k": ["Question:"],
        "humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"],
        "mbpp": ["```"],
        "mmlu": None,
    }[name]  # fmt: skip


def test_loading_one_imports_nothing_heavy() -> None:
    program = (
        "import sys; from pkt_stages import tasks; [tasks.load(name) for name in tasks.names()];"
        "print(sorted({'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_nothing_else_names_a_task() -> None:
    """Not even another task; but for the builder of the tiny pair, which writes rows of each."""
    package = Path(pkt_stages.__file__).parent
    own = {tasks.load(name).folder: name for name in tasks.names()}
    for path in package.rglob("*.py"):
        if package / "tiny" in path.parents:
            continue
        others = set(own.values()) - {own.get(path.parent)}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in others, f"{path}, line {node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {part for word in ast.unparse(node).replace(",", " ").split() for part in word.split(".")}
                assert not named & others, f"{path}, line {node.lineno}"


@pytest.mark.parametrize(
    ("name", "row", "schema", "message"),
    [
        ("mmlu", {"question": "?"}, None, "row x: not in the mmlu schema (KeyError: 'choices')"),
        ("gsm8k", {"question": "?", "answer": "7"}, None, "row x: not in the gsm8k schema (KeyError: '#### in `answer`')"),
        ("mbpp", {"code": "x = 1"}, None, "row x: not in the mbpp schema (KeyError: 'a function definition in `code`')"),
        ("humaneval", {}, "evol_instruct", "row x: not in the evol_instruct schema (KeyError: 'instruction')"),
        ("humaneval", {}, "squad", "task humaneval: unknown schema 'squad' of rows; expected one of humaneval, evol_instruct"),
    ],
)  # fmt: skip
def test_rows_in_another_schema(name: str, row: dict[str, object], schema: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        tasks.load(name).example(row, "x", schema)
    assert str(caught.value) == message


def test_names_that_are_no_task(dropped: Path) -> None:
    for name in ("arc", "code", "..", "mmlu.task"):
        with pytest.raises(UserError) as caught:
            tasks.load(name)
        near = " (did you mean 'mmlu'?)" if name == "mmlu.task" else ""
        assert str(caught.value) == (
            f"unknown task {name!r}{near}; expected one of gsm8k, humaneval, mbpp, mmlu, or tasks/{name}/task.yaml here"
        )
    (dropped / "empty").mkdir()
    (dropped / "empty" / "__init__.py").touch()
    with pytest.raises(UserError) as caught:
        tasks.load("empty")
    assert str(caught.value) == "task empty: its package holds no `TASK`; expected one of class pkt_stages.tasks.Task"
    (dropped / "silent").mkdir()
    (dropped / "silent" / "__init__.py").write_text(SUMS)
    with pytest.raises(UserError) as caught:
        tasks.load("silent")
    assert str(caught.value) == (
        f"task silent: {dropped}/silent/task.yaml is missing; lm-evaluation-harness reads there how it is asked"
    )


# --- a task of one's own ------------------------------------------------------------------------------------------

SUMS = """
from pathlib import Path
from pkt_stages.examples import Example
from pkt_stages.tasks import Task

def example(row, id):
    return Example("sums", id, f"{row['a']} + {row['b']}", f"= {row['sum']}", "=", {"answer": str(row["sum"])})

TASK = Task(
    folder=Path(__file__).parent, title="Sums", num_test=9, answer_tokens=4, schemas={"sums": example},
    reference_keys=frozenset({"answer"}), score=lambda reference, said: float(said == reference["answer"]),
)
"""
COMMON = "{test_split: test, doc_to_text: prompt, gen_prefix: prefix, doc_to_target: target, num_fewshot: 0,"
METRICS = "metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]"
FIRST_DIGIT = (
    "filter_list: [{name: d, filter: [{function: regex, regex_pattern: '\\d', group_select: 0, fallback: ''}]}]"
)
WRITTEN = f"{COMMON} {METRICS}, output_type: generate_until, generation_kwargs: {{until: []}}, {FIRST_DIGIT}}}"
CHOSEN = f"{COMMON} {METRICS}, output_type: multiple_choice, target_delimiter: '', doc_to_choice: ['3', '4', '5', '6', '7']}}"


@pytest.mark.parametrize("asked", [WRITTEN, CHOSEN])
def test_a_folder_and_a_line_of_params_are_a_task(pkt: Run, dropped: Path, tmp_path: Path, asked: str) -> None:
    """From `prepare` to `evaluate`, with no other edit: a folder of two files, and the task's line in the params."""
    (dropped / "sums").mkdir()
    (dropped / "sums" / "__init__.py").write_text(SUMS)
    (dropped / "sums" / "task.yaml").write_text(asked)
    params = tmp_path / "params.yaml"
    line = (
        "task: {sums: {prepare: {extract: 2, align: 2, train: 2, transfer: 1, test: 5}, evaluate: {max_new_tokens: 4}}}"
    )
    params.write_text(f"{line}\nprepare: {{}}\nevaluate: {{dtype: float32, sandbox_floor: rlimits}}\n")
    for name, first in (("train", 0), ("test", 3)):
        rows = [{"a": a, "b": b, "sum": a + b} for a in range(first, first + 3) for b in range(3)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    given = ("--params", params, "--task", "sums")
    status, _, err = pkt("prepare", *given, "--data", tmp_path / "data", "--out", tmp_path / "sets")
    assert status == 0, err
    model = make_model(tmp_path / "model", seed=3, vocab_size=272)
    files = {"test": "sets/test.jsonl", "out": "m.json", "predictions": "p.jsonl", "scratch": "scratch"}
    paths = [text for name, path in files.items() for text in (f"--{name}", tmp_path / path)]
    status, _, err = pkt("evaluate", *given, "--model", model, *paths)
    assert status == 0, err
    made: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())
    assert (made["task"], made["metric"], made["n"]) == ("sums", "exact", 5)
    assert ("max_new_tokens" in made["settings"]) == (asked == WRITTEN)
    said = [row for _, row in read_jsonl(tmp_path / "p.jsonl")]
    for row, example in zip(said, read_examples(tmp_path / "sets/test.jsonl"), strict=True):
        assert row["correct"] == float(row["extracted"] == example.reference["answer"])
        assert row["prompt"].endswith("<|assistant|>\n=")
        assert list(row.get("log_probabilities", {})) == (["3", "4", "5", "6", "7"] if asked == CHOSEN else [])
