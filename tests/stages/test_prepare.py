from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import Example, read_examples, write_rows
from pkt_stages.stages.prepare import PrepareParams, run

Run = Callable[..., tuple[int, str, str]]
SMALL = PrepareParams(extract=3, align=4, train=10, transfer=2)


def pool(size: int, name: str = "pool") -> list[Example]:
    return [Example(dataset="gsm8k", id=f"{name}_{i}", prompt=f"{name} {i}?", answer=str(i)) for i in range(size)]


def test_sets_do_not_overlap_and_repeat_by_seed() -> None:
    sets = run(pool(30), pool(5, "test"), SMALL)
    assert {name: len(examples) for name, examples in sets.items()} == {
        "extract": 3,
        "align": 4,
        "train": 10,
        "transfer": 2,
        "test": 5,
    }
    prompts = [e.prompt for examples in sets.values() for e in examples]
    assert len(prompts) == len(set(prompts))
    assert run(pool(30), pool(5, "test"), SMALL) == sets
    other = run(pool(30), pool(5, "test"), PrepareParams(extract=3, align=4, train=10, transfer=2, seed=1))
    assert other["extract"] != sets["extract"]


def test_more_transfer_examples_change_no_other_set() -> None:
    few = run(pool(30), [], SMALL)
    more = run(pool(30), [], PrepareParams(extract=3, align=4, train=10, transfer=6))
    assert more["transfer"][:2] == few["transfer"]
    assert all(more[name] == few[name] for name in ("extract", "align", "train"))


def test_test_questions_and_repetitions_leave_the_pool() -> None:
    doubled = pool(19) + pool(5) + pool(3, "test")
    sets = run(doubled, pool(3, "test"), SMALL)
    used = [e.prompt for name in ("extract", "align", "train", "transfer") for e in sets[name]]
    assert len(used) == len(set(used)) == 19
    assert not any(prompt.startswith("test") for prompt in used)


def test_a_pool_that_is_too_small() -> None:
    with pytest.raises(UserError) as caught:
        run(pool(18), [], SMALL)
    assert str(caught.value) == (
        "19 examples wanted (extract 3, align 4, train 10, transfer 2), the pool holds 18 different ones;"
        " lower the section `prepare`"
    )


def test_the_command(pkt: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 20), ("test", 6)):
        rows = [{"question": f"{split} {i}?", "answer": f"Think.\n#### {i}"} for i in range(count)]
        write_rows(data / f"{split}.jsonl", rows)
    counts = ("--extract", 3, "--align", 4, "--train", 10, "--transfer", 2, "--test", 5)
    status, printed, err = pkt("prepare", "--task", "gsm8k", "--data", data, "--out", tmp_path / "out", *counts)
    assert status == 0, err
    assert printed.startswith("prepare: 3 extract, 4 align, 10 train, 2 transfer, 5 test ->")
    test = read_examples(tmp_path / "out" / "test.jsonl")
    assert all(e.prefix == "Answer:" and e.reference["answer"].isdigit() for e in test)

    status, _, err = pkt("prepare", "--task", "arc", "--data", data, "--out", tmp_path / "out")
    assert (status, err) == (2, "pkt: error: unknown task 'arc'; expected one of mmlu, gsm8k, humaneval, mbpp\n")
    status, _, err = pkt("prepare", "--task", "mbpp", "--data", data, "--out", tmp_path / "out")
    assert status == 2
    assert "row mbpp_train_1: not in the mbpp schema (KeyError: 'code')" in err
