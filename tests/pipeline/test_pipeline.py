"""The graph through DVC, cut down to one task and random models: caching, what a change reruns, sharing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.repository import change, dvc, make_repository, ran, run, shrink

PAIR = "source-chat-target-chat-gsm8k"
UPSTREAM = {"prepare@gsm8k", "attribute@source-chat-gsm8k", "attribute@target-chat-gsm8k", f"select@{PAIR}"}
LATEN = {f"{stage}@laten-{PAIR}" for stage in ("align", "inject", "evaluate_transfer")}
TARGET = "target-chat-gsm8k"
# A method of the pair that follows from LaTen, and one that needs the target alone.
OTHERS = {f"{stage}@control_random_delta-{PAIR}" for stage in ("control", "evaluate_transfer")}
OTHERS |= {f"{stage}@postpkt_random-{TARGET}" for stage in ("finetune", "evaluate_target")}
BASELINES = {"evaluate_model@source-chat-gsm8k", "evaluate_model@target-chat-gsm8k"}
ANALYSIS = {"cka@source-chat-target-chat", f"deltas_transfer@laten-{PAIR}", "neurons@source-chat-gsm8k"}
ANALYSIS |= {"texts", f"cka_transfer@laten-{PAIR}", "neurons@target-chat-gsm8k"}


def stale(folder: Path) -> set[str]:
    """The stages whose own inputs changed; what depends on them follows."""
    output = dvc(folder, "status", "--json")
    return {name.removeprefix("dvc.yaml:") for name in json.loads(output[output.index("{") :])}


def choose(params: dict[str, Any]) -> None:
    shrink(params)
    params |= {"aligned_methods": ["laten"], "random_delta_methods": ["control_random_delta"]}
    params |= {"pair_methods": ["laten", "control_random_delta"], "target_methods": ["postpkt_random"]}
    params |= {"analysed_pair_methods": ["laten"]}


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, remote: Path) -> Path:
    """A team member's repository: attribution and selection are made, pushed and committed."""
    folder = make_repository(tmp_path_factory.mktemp("clones") / "first", choose)
    dvc(folder, "remote", "add", "-q", "-d", "team", str(remote))
    assert ran(dvc(folder, "repro", f"select@{PAIR}")) == UPSTREAM
    dvc(folder, "push", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "attribution and selection")
    return folder


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    """A colleague's clone, without the source model."""
    folder = first.parent / "second"
    run(first.parent, "git", "clone", "-q", str(first), str(folder))
    shutil.rmtree(folder / "data/tiny/source-chat")
    return folder


def test_a_colleague_without_the_source_model_reruns_nothing_upstream(second: Path) -> None:
    output = dvc(second, "repro", "--pull", "--allow-missing", f"evaluate_transfer@laten-{PAIR}")
    assert ran(output) == LATEN
    metrics = json.loads((second / "results/tiny/evaluate/laten/source-chat-target-chat/gsm8k.json").read_text())
    assert len(metrics["runs"]) == 2
    assert len(metrics["ids"]) == 5


def test_the_rest_runs_once_and_then_nothing(first: Path, second: Path) -> None:
    assert ran(dvc(first, "repro")) == LATEN | OTHERS | BASELINES | ANALYSIS | {"report"}
    assert ran(dvc(first, "repro")) == set()
    assert stale(first) == set()
    table = (first / "results/tiny/report.md").read_text()
    assert "source: source-chat" in table and "LaTen" in table
    # Two members, two folders, equal bytes.
    for path in (f"artifacts/tiny/transfer/laten/{PAIR.removesuffix('-gsm8k')}/gsm8k", "results/tiny/align"):
        mine = {p.relative_to(first): p.read_bytes() for p in (first / path).rglob("*") if p.is_file()}
        theirs = {p.relative_to(second): p.read_bytes() for p in (second / path).rglob("*") if p.is_file()}
        assert mine == theirs
        assert mine


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda p: p["align"]["common"].update(rate=0.2), {f"align@laten-{PAIR}"}),
        (lambda p: p["select"].update(layer_rule="block_gain"), {f"select@{PAIR}"}),
        (
            lambda p: p["evaluate"]["gsm8k"].update(max_new_tokens=6),
            BASELINES | {name for name in LATEN | OTHERS if name.startswith("evaluate")},
        ),
        (lambda p: p["evaluate"]["mbpp"].update(max_new_tokens=6), set()),
        (lambda p: p["methods"]["postpkt_random"].update(lr=1e-4), {f"finetune@postpkt_random-{TARGET}"}),
        (lambda p: p["methods"]["control_random_delta"].update(seed=1), {f"control@control_random_delta-{PAIR}"}),
        (lambda p: p["methods"]["kd"].update(lr=1e-4), set()),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_what_follows(
    first: Path, edit: Callable[[dict[str, Any]], None], expected: set[str]
) -> None:
    before = (first / "params.yaml").read_text()
    try:
        change(first, edit)
        # The report prints all params, so it is always among them.
        assert stale(first) == expected | {"report"}
    finally:
        (first / "params.yaml").write_text(before)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("core/attribution.py", {"attribute@source-chat-gsm8k", "attribute@target-chat-gsm8k"}),
        (
            "core/hypernetwork.py",
            {
                f"align@laten-{PAIR}",
                f"inject@laten-{PAIR}",
                "cka@source-chat-target-chat",
                f"cka_transfer@laten-{PAIR}",
            },
        ),
        ("core/similarity.py", ANALYSIS - {"texts", "neurons@source-chat-gsm8k", "neurons@target-chat-gsm8k"}),
        ("artifacts.py", set()),
    ],
)
def test_a_changed_module_reruns_the_stages_whose_result_it_can_change(
    first: Path, module: str, expected: set[str]
) -> None:
    path = first / "pkt_stages" / module
    before = path.read_text()
    try:
        path.write_text(before + "\n# changed\n")
        assert stale(first) == expected
    finally:
        path.write_text(before)


def test_a_removed_method_leaves_the_table(first: Path) -> None:
    before = (first / "params.yaml").read_text()
    try:
        change(first, lambda p: p.update(target_methods=[]))
        shutil.rmtree(first / "results/tiny/evaluate/postpkt_random")
        assert "LoRA, random init" in (first / "results/tiny/report.md").read_text()
        assert ran(dvc(first, "repro")) == {"report"}
        assert "LoRA, random init" not in (first / "results/tiny/report.md").read_text()
    finally:
        (first / "params.yaml").write_text(before)
    # Listed again, it comes back from the cache.
    assert ran(dvc(first, "repro")) <= {"report"}
    assert "LoRA, random init" in (first / "results/tiny/report.md").read_text()


def test_a_new_task_reruns_nothing_that_exists(first: Path) -> None:
    before = (first / "params.yaml").read_text()
    try:
        change(first, lambda p: p["task"].append("mbpp"))
        assert {name for name in stale(first) if name.endswith("gsm8k")} == set()
    finally:
        (first / "params.yaml").write_text(before)


@pytest.fixture(scope="module")
def third(first: Path) -> Path:
    """A clone without the source model after everything was made and pushed, of this profile and of a second one."""
    dvc(first, "repro", "-q")
    other = first / "profiles/other"
    other.mkdir(parents=True)
    shutil.copy(first / "dvc.yaml", other)
    params = yaml.safe_load((first / "params.yaml").read_text())
    params |= {"profile": "other", "root": "../..", "params_file": "profiles/other/params.yaml"}
    (other / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert len(ran(dvc(first, "repro", "profiles/other/dvc.yaml:prepare@gsm8k"))) == 1
    dvc(first, "push", "-q")
    run(first, "git", "add", "-A")
    run(first, "git", "commit", "-q", "-m", "all results, and a second profile")
    folder = first.parent / "third"
    run(first.parent, "git", "clone", "-q", str(first), str(folder))
    shutil.rmtree(folder / "data/tiny/source-chat")
    return folder


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("report", {"tiny/report"}),
        (f"select@{PAIR}", {f"tiny/select/{PAIR.removesuffix('-gsm8k')}/gsm8k"}),
        ("profiles/other/dvc.yaml:prepare", {"other/prepare/gsm8k"}),
    ],
    ids=["the report", "the deltas of a task", "another profile's stage"],
)
def test_a_part_is_fetched_alone(third: Path, target: str, expected: set[str]) -> None:
    shutil.rmtree(third / "artifacts", ignore_errors=True)
    dvc(third, "pull", "-q", target)
    found = {file.parent.relative_to(third / "artifacts") for file in (third / "artifacts").rglob("*.*")}
    assert {str(folder) for folder in found if folder.name != "figures"} == expected


def test_a_profile_is_fetched_alone(first: Path, third: Path) -> None:
    shutil.rmtree(third / "artifacts", ignore_errors=True)
    dvc(third, "pull", "-q", "dvc.yaml")
    mine, theirs = (
        {str(path.relative_to(folder / "artifacts")) for path in (folder / "artifacts").rglob("*.*")}
        for folder in (third, first)
    )
    assert mine == {path for path in theirs if path.startswith("tiny/")} < theirs


def test_a_colleague_adds_a_method_and_gets_a_whole_report(third: Path) -> None:
    shutil.rmtree(third / "artifacts", ignore_errors=True)
    assert ran(dvc(third, "repro", "--pull", "--allow-missing", "dvc.yaml")) == set()
    change(third, lambda p: p["target_methods"].append("postpkt_pissa"))
    added = {f"{stage}@postpkt_pissa-{TARGET}" for stage in ("finetune", "evaluate_target")}
    assert ran(dvc(third, "repro", "--pull", "--allow-missing", "dvc.yaml")) == added | {"report"}
    mine, theirs = ((folder / "results/tiny/report.json").read_text() for folder in (third, third.parent / "first"))
    assert "postpkt_pissa" in mine and "postpkt_pissa" not in theirs
    table = (third / "results/tiny/report.md").read_text()
    assert all(row in table for row in ("LaTen", "LoRA, random init", "source: source-chat"))
    # What was not needed was not fetched: neither scores nor deltas.
    assert not (third / "artifacts/tiny/attribute").exists() and not (third / "artifacts/tiny/select").exists()
