# ruff: noqa: E501 (messages read better on one line)
"""A task that is one YAML of the project: rows to examples, scoring, and what is wrong with either in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages import tasks
from pkt_stages.errors import UserError
from pkt_stages.examples import Example, read_examples, read_jsonl, write_jsonl
from pkt_stages.stages.code import run as begins_of
from pkt_stages.tasks.mapped import first_line
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
CHOICE = {"scoring": "choice", "fields": {"question": "q", "choices": "c", "answer": "a"}}
NUMBER = {"scoring": "number", "fields": {"question": "q", "answer": "a"}}
TEXT = {"scoring": "exact_match", "fields": {"question": "q", "answer": "a"}}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def define(content: Any, name: str = "own") -> tasks.Task:
    path = Path("tasks") / name / "task.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return tasks.load(name)


def test_a_choice() -> None:
    task = define(CHOICE | {"title": "Own"})
    assert (task.name, task.title, tasks.names()) == ("own", "Own", ["gsm8k", "humaneval", "mbpp", "mmlu", "own"])
    row = {"q": "Which?", "c": ["red", "green", 3], "a": "green"}
    assert task.example(row, "x") == Example(
        dataset="own",
        id="x",
        prompt="The following is a multiple choice question.\n\nWhich?\nA. red\nB. green\nC. 3\nAnswer:",
        answer="The answer is: B",
        prefix="The answer is:",
        reference={"answer": "B", "choices": ["red", "green", "3"]},
    )
    for said in (1, "B", " green "):
        assert task.example(row | {"a": said}, "x").reference["answer"] == "B"
    assert task.score is not None
    assert [task.score({"answer": "B"}, letter) for letter in "ABC"] == [0, 1, 0]


def test_columns_below_others_ids_and_a_prompt_of_one_s_own() -> None:
    fields = {"question": "q.stem", "choices": "c.text", "answer": "key", "id": "n", "hint": "h"}
    task = define({"scoring": "choice", "fields": fields, "prompt": "{hint}: {question}\n{choices}", "prefix": "I say"})
    made = task.example({"q": {"stem": "{choices}?"}, "c": {"text": ["a", "b"]}, "key": "A", "n": 7, "h": "Think"}, "x")
    assert (made.id, made.prompt, made.answer) == ("7", "Think: {choices}?\nA. a\nB. b", "I say A")
    task = define({"scoring": "choice", "fields": {"question": "q", "choices": ["o1", "o.2"], "answer": "a"}})
    assert task.example({"q": "?", "o1": "x", "o.2": "y", "a": "y"}, "x").reference == {
        "answer": "B",
        "choices": ["x", "y"],
    }


def test_a_number_with_the_way_to_it() -> None:
    task = define({"scoring": "number", "fields": {"question": "q", "answer": "a", "solution": "s"}})
    made = task.example({"q": "1+1?", "a": 2, "s": "One and one."}, "x")
    assert made.prompt == "Answer the following question.\n\nQuestion: 1+1?"
    assert (made.answer, made.prefix) == ("Answer: One and one. So the answer is 2.", "Answer:")
    assert task.extract is not None and task.score is not None
    assert task.score(made.reference, task.extract(" 1 and 1, so $2.00.")) == 1
    assert task.score(made.reference, task.extract("2, no, 3")) == 0
    assert define(NUMBER).example({"q": "?", "a": "1,000"}, "x").answer == "Answer: 1,000"


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" Rome", True),
        ("Rome.\nOr not", True),
        ("\n Rome \n", True),
        ("rome", False),
        ("Rome, Italy", False),
        ("", False),
    ],
)
def test_an_exact_text(said: str, right: bool) -> None:
    task = define(TEXT)
    made = task.example({"q": "?", "a": " Rome. "}, "x")
    assert (made.answer, task.harness()["generation_kwargs"]) == ("Answer: Rome.", {"until": ["\n"]})
    assert task.score is not None
    assert task.score(made.reference, first_line(said)) == right


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a mapping with `scoring` and `fields`, found []"),
        (CHOICE | {"scoring": "bleu"}, "scoring: expected one of choice, number, exact_match, found 'bleu'"),
        ({"fields": {}}, "key 'scoring' is missing"),
        (CHOICE | {"titel": "x"}, "unknown key 'titel' (did you mean 'title'?); expected one of scoring, fields, title, prompt, prefix, until, num_test, answer_tokens"),
        ({"scoring": "choice", "fields": {"question": "q", "answer": "a"}}, "fields: 'choices' is missing; scoring choice needs question, answer, choices"),
        (NUMBER | {"fields": {"question": "q", "answer": 3}}, "fields.answer: expected the name of a column, found 3"),
        (CHOICE | {"fields": {"question": "q", "answer": "a", "choices": []}}, "fields.choices: expected the name of a column, or a list of them, found []"),
        (CHOICE | {"scoring": "number"}, "fields.choices: is for scoring choice, not number; remove it"),
        (TEXT | {"fields": TEXT["fields"] | {"solution": "s"}}, "fields.solution: is for scoring number, not exact_match; remove it"),  # type: ignore[operator]
        (CHOICE | {"prompt": "{question}"}, "prompt: expected {choices} in it, found '{question}'"),
        (TEXT | {"prompt": "{question} {hint}"}, "prompt: {hint} is none of the fields question, answer"),
        (TEXT | {"prompt": "{question} {answer}"}, "prompt: {answer} would tell the answer; leave it out"),
        (TEXT | {"prefix": "A: "}, "prefix: expected a text without space behind it, found 'A: '"),
        (CHOICE | {"until": ["x"]}, "`until` ends generated answers, and with scoring choice none is generated; remove it"),
    ],
)  # fmt: skip
def test_a_definition_that_is_none(content: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        define(content)
    assert str(error.value) == f"tasks/own/task.yaml: {message}"


def test_a_name_that_the_package_has() -> None:
    with pytest.raises(UserError) as error:
        define(CHOICE, "mmlu")
    assert str(error.value) == "tasks/mmlu/task.yaml: there is a task mmlu in the package, too; rename the folder"


@pytest.mark.parametrize(
    ("content", "row", "message"),
    [
        (CHOICE, {"q": "?", "a": 0}, "has no 'c', from which fields.choices is taken; it has q, a"),
        (CHOICE, {"q": "?", "c": ["x", "y"], "a": "z"}, "answer 'z' is none of the choices 'x', 'y', nor one's letter or number from 0"),
        (CHOICE, {"q": "?", "c": ["x", "y"], "a": "1"}, "answer '1' is none of the choices 'x', 'y', nor one's letter or number from 0"),
        (CHOICE, {"q": "?", "c": ["x", "y"], "a": 2}, "answer 2 is none of the choices 'x', 'y', nor one's letter or number from 0"),
        (CHOICE, {"q": "?", "c": ["x", "y"], "a": True}, "answer True is none of the choices 'x', 'y', nor one's letter or number from 0"),
        (CHOICE, {"q": "?", "c": ["1", "0"], "a": 1}, "answer 1 stands for the choices A and B; give the letter"),
        (CHOICE, {"q": "?", "c": ["B", "A"], "a": "A"}, "answer 'A' stands for the choices A and B; give the letter"),
        (CHOICE, {"q": "?", "c": "xy", "a": "x"}, "choices: expected a list of 2 to 26 texts, found 'xy'"),
        (CHOICE, {"q": "?", "c": ["x", None], "a": "x"}, "choices: expected a list of 2 to 26 texts, found ['x', None]"),
        (NUMBER, {"q": " ", "a": 1}, "question: expected a text or a number, found ' '"),
        (NUMBER, {"q": "?", "a": "many"}, "answer: expected a number, found 'many'"),
        (TEXT, {"q": "?", "a": "a\nb"}, "answer: expected one line of text, found 'a\\nb'"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit(content: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        define(content).example(row, "own_test_3")
    assert str(error.value) == f"row own_test_3: {message}; mend the row, or tasks/own/task.yaml"


def test_a_test_set_of_something_else() -> None:
    task = define(CHOICE)
    for reference, message in (
        ({"answer": "A"}, "`reference` lacks 'choices', which task own needs; make the test set with `pkt prepare`"),
        ({"answer": "C", "choices": ["x", "y"]}, "expected an answer among A, B, found 'C'"),
        ({"answer": "A", "choices": "xy"}, "expected an answer among A, B, found 'A'"),
    ):
        with pytest.raises(UserError) as error:
            task.check(Example("own", "e", "?", "A", "", reference))
        assert str(error.value) == f"example e: {message}"


TABLE = "id,q,red,green,blue,right\n" + "".join(
    f'{{0}}{n},"Which, of {{0}}{n}?",r{n},g{n},b{n},{"rgb"[n % 3]}{n}\n' for n in range(20)
)
COLUMNS = {
    "scoring": "choice",
    "fields": {"question": "q", "choices": ["red", "green", "blue"], "answer": "right", "id": "id"},
}
COUNTS = ("--extract", 4, "--align", 4, "--train", 8, "--transfer", 2)


def prepared(pkt: Run) -> tuple[int, str, str]:
    return pkt("prepare", "--task", "own", "--data", "data", "--out", "sets", *COUNTS)


def test_a_table_is_prepared_and_evaluated(pkt: Run, project: Path) -> None:
    define(COLUMNS)
    (project / "data").mkdir()
    for name in ("train", "test"):
        (project / f"data/{name}.csv").write_text(TABLE.format(name) if name == "train" else TABLE.format("test"))
    status, _, err = prepared(pkt)
    assert status == 0, err
    examples = read_examples(project / "sets/test.jsonl")
    assert [e.reference["answer"] for e in examples] == [*"ABC" * 6, "A", "B"]
    assert (examples[0].id, examples[0].reference["choices"]) == ("test0", ["r0", "g0", "b0"])
    # A question that stands twice is asked once and counts twice.
    rows = [row for _, row in read_jsonl(project / "sets/test.jsonl")]
    write_jsonl(project / "sets/test.jsonl", [*rows, rows[0] | {"id": "again"}])
    model = make_model(project / "model", seed=3, vocab_size=272)
    from pkt_stages.models.load import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(str(model)))
    tokenizer.add_tokens([" A", " B", " C"])
    tokenizer.save_pretrained(model)
    paths = ("--test", "sets/test.jsonl", "--out", "m.json", "--predictions", "p.jsonl")
    status, _, err = pkt("evaluate", "--task", "own", "--model", model, *paths)
    assert status == 0, err
    made = json.loads((project / "m.json").read_text())
    assert (made["task"], made["metric"], made["n"]) == ("own", "accuracy", 21)
    said = [row for _, row in read_jsonl(project / "p.jsonl")]
    assert all(list(row["log_probabilities"]) == ["A", "B", "C"] for row in said)
    assert [row["correct"] for row in said[:-1]] == [
        float(r["extracted"] == a) for r, a in zip(said, "ABC" * 7, strict=False)
    ][:20]
    assert said[-1] | {"id": "test0"} == said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("test7,", "test3,"), "test: id 'test3' is there twice; give each example one of its own"),
        (lambda t: t.replace("test7,", "train3,"), "is in train, too; give each example one of its own"),
        (lambda t: t.replace(",r9,", ",r9,r9,"), "data/test.csv, line 11: 7 columns; expected 6: id, q, red, green, blue, right"),
        (lambda t: t.replace("blue", "red"), "data/test.csv: two columns are called 'red'; rename one"),
        (lambda t: t.splitlines()[0], "data/test.csv: holds no row; expected a line of column names, then a row a line"),
        (lambda t: t + '"', "data/test.csv: not readable as a table (unexpected end of data); expected commas between columns, UTF-8"),
    ],
)  # fmt: skip
def test_a_table_that_is_none(pkt: Run, project: Path, change: Callable[[str], str], message: str) -> None:
    define(COLUMNS)
    (project / "data").mkdir()
    (project / "data/train.csv").write_text(TABLE.format("train"))
    (project / "data/test.csv").write_text(change(TABLE.format("test")))
    status, _, err = prepared(pkt)
    assert status == 2 and err.startswith("pkt: error: ") and err.endswith(f"{message}\n"), err
    assert err.count("\n") == 1 and not (project / "sets").exists()


def test_two_files_of_one_pool(pkt: Run, project: Path) -> None:
    define(COLUMNS)
    (project / "data").mkdir()
    for name in ("train.csv", "train.jsonl"):
        (project / "data" / name).touch()
    assert prepared(pkt)[2] == "pkt: error: data: holds train.jsonl and train.csv; remove the one that is not meant\n"


def test_its_file_counts_for_its_own_stages_alone(project: Path) -> None:
    from pkt_stages.profile import read_profile
    from pkt_stages.reach import Package
    from tests.profiles import write_params

    for name in ("own", "other"):
        define(CHOICE, name)
    params = write_params(project, lambda p: p["task"].update(own=p["no_change"], other=p["no_change"]))

    def hashes() -> dict[str, str]:
        package = Package(ROOT / "pkt_stages")
        return {name: package.digest(nodes) for name, nodes in begins_of(package, read_profile(params)).items()}

    before = hashes()
    assert before["prepare/own"] == before["prepare/other"] != before["prepare/mmlu"]
    define(CHOICE | {"title": "New"})
    after = hashes()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"prepare/own", "evaluate/own", "report", "scale"}
