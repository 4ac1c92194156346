from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pkt_stages.errors import UserError
from pkt_stages.examples import Example, read_examples, write_jsonl
from pkt_stages.stages.prepare import PrepareParams, draw, run, split

Run = Callable[..., tuple[int, str, str]]
SMALL = PrepareParams(extract=3, align=4, train=10, transfer=2)


def pool(size: int, name: str = "pool") -> list[Example]:
    return [Example(dataset="gsm8k", id=f"{name}_{i}", prompt=f"{name} {i}?", answer=str(i)) for i in range(size)]


def test_sets_do_not_overlap_and_repeat_by_seed() -> None:
    sets = draw(pool(30), pool(5, "test"), SMALL)
    assert {name: len(examples) for name, examples in sets.items()} == {
        "extract": 3,
        "align": 4,
        "train": 10,
        "transfer": 2,
    }
    prompts = [e.prompt for examples in sets.values() for e in examples]
    assert len(prompts) == len(set(prompts))
    assert draw(pool(30), pool(5, "test"), SMALL) == sets
    other = draw(pool(30), pool(5, "test"), PrepareParams(extract=3, align=4, train=10, transfer=2, seed=1))
    assert other["extract"] != sets["extract"]


def test_more_transfer_examples_change_no_other_set() -> None:
    few = draw(pool(30), [], SMALL)
    more = draw(pool(30), [], PrepareParams(extract=3, align=4, train=10, transfer=6))
    assert more["transfer"][:2] == few["transfer"]
    assert all(more[name] == few[name] for name in ("extract", "align", "train"))


def test_test_questions_and_repetitions_leave_the_pool() -> None:
    doubled = pool(19) + pool(5) + pool(3, "test")
    sets = draw(doubled, pool(3, "test"), SMALL)
    used = [e.prompt for name in ("extract", "align", "train", "transfer") for e in sets[name]]
    assert len(used) == len(set(used)) == 19
    assert not any(prompt.startswith("test") for prompt in used)


def test_long_examples_leave_the_pool() -> None:
    long = [Example(dataset="gsm8k", id="long", prompt="?" * 30, answer="x")]
    sets = draw(long + pool(19), [], PrepareParams(extract=3, align=4, train=10, transfer=2, max_chars=20))
    assert not any(e.id == "long" for examples in sets.values() for e in examples)


def test_a_pool_that_is_too_small() -> None:
    with pytest.raises(UserError) as caught:
        draw(pool(18), [], SMALL)
    assert str(caught.value) == (
        "19 examples wanted (extract 3, align 4, train 10, transfer 2), the pool holds 18 different ones;"
        " lower the section `prepare`"
    )


def test_the_command(pkt: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, count in (("train", 20), ("test", 6)):
        rows = [{"question": f"{name} {i}?", "answer": f"Think.\n#### {i}"} for i in range(count)]
        write_jsonl(data / f"{name}.jsonl", rows)
    counts = {"extract": 3, "align": 4, "train": 10, "transfer": 2, "test": 5}
    given = [word for name, count in counts.items() for word in (f"--{name}", count)]
    given += ["--out", tmp_path / "out", "--metrics", tmp_path / "metrics.json"]
    status, printed, err = pkt("prepare", "--task", "gsm8k", "--data", data, *given)
    assert status == 0, err
    assert printed.startswith("prepare: 3 extract, 4 align, 10 train, 2 transfer, 5 test ->")
    made = json.loads((tmp_path / "metrics.json").read_text())
    assert made["counts"] == counts
    sha256 = {name: hashlib.sha256((data / f"{name}.jsonl").read_bytes()).hexdigest() for name in ("train", "test")}
    assert made["pools"] == {name: {"file": f"{name}.jsonl", "sha256": digest} for name, digest in sha256.items()}
    test = read_examples(tmp_path / "out" / "test.jsonl")
    assert all(e.prefix == "Answer:" and e.reference["answer"].isdigit() for e in test)

    status, _, err = pkt("prepare", "--task", "arc", "--data", data, "--out", tmp_path / "out")
    known = "gsm8k, humaneval, mbpp, mmlu, or tasks/arc/task.yaml here"
    assert (status, err) == (2, f"pkt: error: unknown task 'arc'; expected one of {known}\n")
    status, _, err = pkt("prepare", "--task", "mbpp", "--data", data, "--out", tmp_path / "out")
    assert status == 2
    assert "row mbpp_train_1: not in the mbpp schema (KeyError: 'code')" in err
    status, _, err = pkt("prepare", "--task", "gsm8k", "--data", data, "--out", tmp_path / "out", "--test", 0)
    assert (status, err) == (2, "pkt: error: options of `prepare`: test must be at least 1, found 0\n")


def test_a_task_has_counts_of_its_own(pkt: Run, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 6)):
        rows = [{"question": f"{name} {i}?", "answer": f"Think.\n#### {i}"} for i in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    params = tmp_path / "params.yaml"
    params.write_text("prepare: {extract: 2, align: 3, train: 9, transfer: 1}\ntask: {gsm8k: {prepare: {train: 8}}}\n")
    given = ("prepare", "--params", params, "--data", tmp_path, "--out", tmp_path / "out")
    status, printed, err = pkt(*given, "--task", "gsm8k")
    assert status == 0, err
    assert printed.startswith("prepare: 2 extract, 3 align, 8 train, 1 transfer, 6 test ->")
    status, _, err = pkt(*given, "--task", "mmlu")
    assert (status, err) == (2, f"pkt: error: {params}: no task 'mmlu' in `task`; found gsm8k\n")


def own_sets() -> dict[str, list[Example]]:
    return {name: pool(size, name) for name, size in (("extract", 3), ("align", 4), ("train", 12))}


def test_own_sets_keep_their_order_and_lend_the_transfer_examples() -> None:
    own = own_sets()
    sets = split(own, [], SMALL)
    assert sets["extract"] == own["extract"] and sets["align"] == own["align"]
    assert len(sets["transfer"]) == 2 and len(sets["train"]) == 10
    assert sets["train"] == [e for e in own["train"] if e not in sets["transfer"]]
    given = split(own | {"transfer": pool(3, "transfer")}, [], SMALL)
    assert given["train"] == own["train"][:10] and given["transfer"] == pool(2, "transfer")


def test_own_sets_that_are_too_small_or_overlap() -> None:
    own = own_sets()
    with pytest.raises(UserError) as caught:
        split(own | {"train": own["train"][:11]}, [], SMALL)
    assert str(caught.value) == (
        "train: 10 examples wanted, the file holds 9 beside the transfer examples; set `prepare.train`"
    )
    with pytest.raises(UserError) as caught:
        split(own | {"align": [*own["align"][:3], own["extract"][0]]}, [], SMALL)
    assert str(caught.value) == "align: example extract_0 is in extract, too; the sets must not overlap"
    with pytest.raises(UserError) as caught:
        split(own, [own["align"][2]], SMALL)
    assert str(caught.value) == "align: example align_2 is in test, too; the sets must not overlap"
    with pytest.raises(UserError, match=r"^`prepare.max_chars` is for a benchmark's rows; own files are taken"):
        split(own, [], replace(SMALL, max_chars=100))


def test_own_sets_that_share_an_id() -> None:
    """Two examples that are called alike, in files that become one profile's sets."""
    own = own_sets()
    same = replace(own["align"][0], id="extract_0")
    with pytest.raises(UserError) as caught:
        run({**own, "align": [same, *own["align"][1:]], "test": pool(1, "test")}, SMALL)
    assert str(caught.value) == "align: id 'extract_0' is in extract, too; give each example one of its own"


def test_the_command_on_own_sets(pkt: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, examples in own_sets().items():
        write_jsonl(data / f"{name}.jsonl", [e.to_row() for e in examples])
    write_jsonl(data / "test.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)])
    counts = ("--extract", 3, "--align", 4, "--train", 10, "--transfer", 2)
    status, printed, err = pkt("prepare", "--task", "gsm8k", "--data", data, "--out", tmp_path / "out", *counts)
    assert status == 0, err
    assert printed.startswith("prepare: 3 extract, 4 align, 10 train, 2 transfer, 3 test ->")
    assert read_examples(tmp_path / "out/extract.jsonl") == own_sets()["extract"]


def test_the_command_on_the_hub(pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pools from `hub.yaml`; the hub itself is stood in for."""
    asked = []

    def load_dataset(repo: str, config: str | None, *, split: str, revision: str) -> list[dict[str, str]]:
        asked.append((repo, config, split, revision))
        if split == "test":
            rest = {"canonical_solution": "    pass", "test": "", "entry_point": "f"}
            return [{"prompt": f"def f{i}():\n", **rest} for i in range(3)]
        return [{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(19)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = tmp_path / "data"
    data.mkdir()
    commit = "0" * 40
    (data / "hub.yaml").write_text(
        f"train: {{repo: o/pool, split: train, revision: main, schema: evol_instruct}}\n"
        f"test: {{repo: o/test, config: c, split: test, revision: '{commit}'}}\n"
    )
    counts = ("--extract", 3, "--align", 4, "--train", 10, "--transfer", 2)
    given = ("prepare", "--task", "humaneval", "--data", data, "--out", tmp_path / "out", *counts)
    status, _, err = pkt(*given, "--metrics", tmp_path / "metrics.json")
    assert status == 0, err
    assert json.loads((tmp_path / "metrics.json").read_text())["pools"] == {
        "train": {"repo": "o/pool", "revision": "main"},
        "test": {"repo": "o/test", "revision": commit},
    }
    assert asked == [("o/pool", None, "train", "main"), ("o/test", "c", "test", commit)]
    assert err == "pkt: warning: o/pool at revision main may change; `pkt pin` writes its commit down\n"
    assert {e.answer.split()[0] for e in read_examples(tmp_path / "out/train.jsonl")} == {"Done"}

    (data / "hub.yaml").write_text("train: {repo: o/pool, split: train}\n")
    status, _, err = pkt("prepare", "--task", "humaneval", "--data", data, "--out", tmp_path / "out", *counts)
    assert (status, err) == (2, f"pkt: error: {data / 'hub.yaml'}: train: key 'revision' is missing\n")
    (data / "hub.yaml").write_text("test: {}\n")
    status, _, err = pkt("prepare", "--task", "humaneval", "--data", data, "--out", tmp_path / "out", *counts)
    assert (status, err) == (
        2,
        f"pkt: error: {data / 'hub.yaml'}: expected a mapping `train` with repo, split and revision, found"
        " {'test': {}}\n",
    )


def test_own_sets_are_taken_whole_where_no_count_is_named() -> None:
    own = own_sets()
    sets = split(own, [], PrepareParams())
    assert {name: len(examples) for name, examples in sets.items()} == {
        "extract": 3,
        "align": 4,
        "train": 9,
        "transfer": 3,
    }
    assert sets["extract"] == own["extract"] and sets["align"] == own["align"]
    given = split(own | {"transfer": pool(5, "transfer")}, [], PrepareParams(align=2))
    assert [len(given[name]) for name in ("align", "train", "transfer")] == [2, 12, 5]


def test_every_set_that_is_too_small_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        split(own_sets(), [], PrepareParams(extract=5, align=9, train=10, transfer=2))
    assert str(caught.value) == (
        "extract: 5 examples wanted, the file holds 3, align: 9 examples wanted, the file holds 4; set"
        " `prepare.extract`, `prepare.align`"
    )
    with pytest.raises(UserError) as caught:
        split(own_sets() | {"train": pool(3, "train")}, [], PrepareParams())
    assert str(caught.value) == (
        "train: 1 examples wanted, the file holds 0 beside the transfer examples; set `prepare.train`"
    )
