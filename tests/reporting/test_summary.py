"""What the page begins with: the sentences hold whatever the rows are, and the box says what the metrics record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.result import result
from pkt_stages.reporting.summary import facts, sentences
from tests.reporting.metrics import TASKS, metrics, profile

N = 24
NONE, ALL, SOME = [0.0] * N, [1.0] * N, [1.0] * (N // 2) + [0.0] * (N // 2)
METHOD = {"transport": {"matched": {}}}
CONTROLLED = {"transport": {"matched": {}, "control_random_isometry": {}}}


def said(folder: Path, rows: dict[str, list[float]], **changes: Any) -> list[str]:
    found = profile(folder, transport_source=["s"], **changes)
    for row, right in {"s-chat": ALL, "t": NONE, **rows}.items():
        write_json(folder / f"{row}/gsm8k.json", metrics(right, ids="abcdefghijklmnopqrstuvwx"))
    names = {"matched": "matched transport", "control_random_isometry": "random", "postpkt_random": "LoRA"}
    return sentences(found, [result(Folder(folder), Folder(folder), found, "s", names, [])], TASKS)


def test_above_the_target_and_its_control(tmp_path: Path) -> None:
    found = said(tmp_path, {"matched/s": ALL, "control_random_isometry/s": NONE}, made_by=CONTROLLED)
    assert found == [
        "Shown to transfer, by score (above the target and above each of its controls): matched transport (from s, 1 of"
        " 1 tasks by +100.0 points).",
        "Every row differs from the target, so that power is no question here.",
    ]


@pytest.mark.parametrize(
    ("method", "control", "more"),
    [
        (SOME, ALL, " A control is even shown above matched transport (from s, 1 of 1 tasks)."),
        (ALL, ALL, ""),
        (NONE, NONE, ""),
    ],
    ids=["a control above the method", "a control as good", "nothing moves"],
)
def test_no_better_than_a_control(tmp_path: Path, method: list[float], control: list[float], more: str) -> None:
    found = said(tmp_path, {"matched/s": method, "control_random_isometry/s": control}, made_by=CONTROLLED)
    assert found[:2] == [
        "Nothing was shown to transfer by score: no row with a source is above both the target and its controls.",
        f"On no task above both the target and its controls: matched transport (from s).{more}",
    ]


def test_without_a_control_nothing_is_called_a_transfer(tmp_path: Path) -> None:
    found = said(tmp_path, {"matched/s": ALL}, made_by=METHOD)
    assert found[:2] == [
        "No row with a source has a control here, so nothing of it can be called a transfer.",
        "Above the target, but without a control of what the source adds: matched transport (from s, 1 of 1 tasks).",
    ]


def test_what_could_not_be_seen(tmp_path: Path) -> None:
    found = said(tmp_path, {"matched/s": NONE}, made_by=METHOD)
    assert found[1] == "Not shown above the target, and without a control: matched transport (from s)."
    # 24 examples, a family of two: 7 must change on one side alone for p <= .025: 80 % likely if 35.4 % do.
    assert found[2] == (
        "Not to be seen with these test sets (80 % power, by row): true differences to the target below GSM8K 35.4"
        " points."
    )


def test_a_profile_without_a_source_s_rows(tmp_path: Path) -> None:
    found = said(tmp_path, {"postpkt_random": ALL}, made_by={"finetune": {"postpkt_random": {}}})
    assert found == ["No row of this report has a source, so it says nothing of a transfer."]


def test_the_box_says_what_the_metrics_record(tmp_path: Path) -> None:
    found = profile(tmp_path, made_by={"align": {"laten": {}}}, oracle="c", models=["s-chat", "t", "c"])
    geometry = {"num_layers": 2, "d_model": 64, "d_ff": 160, "vocab_size": 1024}
    alignment = {"params": {}, "selection": {}, "chosen_step": 1, "steps": [], "validation_loss_without_delta": 2.0}
    alignment["target"] = {"model": {"name": "m"}, "geometry": geometry}
    write_json(tmp_path / "align/laten/s/gsm8k.json", alignment)
    machine = {"device": "cpu", "torch": "2.0", "transformers": "5.0"}
    for row in ("s-chat", "t", "laten/s"):
        one = {"machine": machine} if row == "t" else {}
        write_json(tmp_path / f"{row}/gsm8k.json", metrics([1, 0, 0, 1]) | one)
    made = [result(Folder(tmp_path), Folder(tmp_path), found, "s", {"laten": "LaTen"}, [])]
    models = {"t": {"name": "m", "revision": "sha256:" + "a" * 64}, "c": {"name": "c", "revision": None}}
    counts = {"extract": 32, "align": 80, "test": 4}
    pools = {"train": {"file": "train.jsonl", "sha256": "b" * 64}, "test": {"repo": "o/g", "revision": "c" * 40}}
    data = {"gsm8k": {"counts": counts, "pools": pools}}
    assert facts(found, made, models, TASKS, data, "abc") == [
        (
            "Models",
            [
                "t (m), target; 2 layers, d_model 64, d_ff 160, 1024 tokens; revision sha256:aaaaaaaaaaaa",
                "c, oracle: the target's own training; revision unpinned",
            ],
        ),
        (
            "Data",
            [
                "GSM8K: 4 test examples, ids f729ae0cbcc8; 32 extract, 80 align; train.jsonl sha256:bbbbbbbbbbbb;"
                " test from o/g at cccccccccccc"
            ],
        ),
        ("Computed by", ["not recorded", "device cpu, torch 2.0, transformers 5.0"]),
        ("Code", ["fingerprint abc; once dvc.lock is committed, git log -S abc -- '*dvc.lock' finds commit and date"]),
    ]
