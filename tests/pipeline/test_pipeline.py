"""The graph through DVC, cut down to one task and random models: caching, what a change reruns, sharing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.repository import LATEN as LATEN_ENTRY
from tests.pipeline.repository import change, dvc, environment, make_repository, ran, run, shrink
from tests.profiles import add_row, rows

OF = "source-gsm8k"
UPSTREAM = {"code", "prepare@gsm8k", "attribute@source-chat-gsm8k", "attribute@target-chat-gsm8k", f"select@{OF}"}
LATEN = {f"{stage}@laten-{OF}" for stage in ("align", "inject", "evaluate")}
# A method of the pair that follows from LaTen, and one that needs the target alone.
OTHERS = {f"{stage}@control_random_delta-{OF}" for stage in ("control", "evaluate")}
OTHERS |= {f"{stage}@postpkt_random-gsm8k" for stage in ("finetune", "evaluate_target")}
BASELINES = {"evaluate_model@source-chat-gsm8k", "evaluate_model@target-chat-gsm8k"}
ANALYSIS = {"texts", "compare_models@pair", f"compare@laten-{OF}"}
ANALYSIS |= {"neurons@source-chat-gsm8k", "neurons@target-chat-gsm8k"}


def stale(folder: Path) -> set[str]:
    """The stages whose own inputs changed; what depends on them follows."""
    output = dvc(folder, "status", "--json")
    return {name.removeprefix("dvc.yaml:") for name in json.loads(output[output.index("{") :])}


def choose(params: dict[str, Any]) -> None:
    shrink(params)
    control = {"control_random_delta": {"code": "random_delta"}}
    rows(params, align=LATEN_ENTRY, finetune={"postpkt_random": {"init": "random"}}, control=control)
    params["analysed"]["methods"] = ["laten"]


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, remote: Path) -> Path:
    """A team member's repository: attribution and selection are made, pushed and committed."""
    folder = make_repository(tmp_path_factory.mktemp("clones") / "first", choose)
    dvc(folder, "remote", "add", "-q", "-d", "team", str(remote))
    assert ran(dvc(folder, "repro", f"select@{OF}")) == UPSTREAM
    dvc(folder, "push", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "attribution and selection")
    return folder


@pytest.fixture(scope="module")
def second(first: Path) -> tuple[Path, set[str]]:
    """A colleague's clone, without the source model, after LaTen's row was made; and the stages that ran."""
    folder = first.parent / "second"
    run(first.parent, "git", "clone", "-q", str(first), str(folder))
    shutil.rmtree(folder / "data/tiny/source-chat")
    return folder, ran(dvc(folder, "repro", "--pull", "--allow-missing", f"evaluate@laten-{OF}"))


@pytest.fixture(scope="module")
def whole(first: Path) -> tuple[Path, set[str]]:
    """The first repository after the rest was made, and the stages that ran."""
    folder = Path(shutil.copytree(first, first.parent / "whole"))
    return folder, ran(dvc(folder, "repro"))


@pytest.fixture
def copy(whole: tuple[Path, set[str]], tmp_path: Path) -> Path:
    """A copy of the whole, for one test to change."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def test_a_colleague_without_the_source_model_reruns_nothing_upstream(second: tuple[Path, set[str]]) -> None:
    folder, stages = second
    assert stages == LATEN
    metrics = json.loads((folder / "results/tiny/evaluate/laten/source/gsm8k.json").read_text())
    assert len(metrics["runs"]) == 2
    assert len(metrics["ids"]) == 5


def test_the_rest_runs_once_and_then_nothing(whole: tuple[Path, set[str]], second: tuple[Path, set[str]]) -> None:
    first, stages = whole
    assert stages == LATEN | OTHERS | BASELINES | ANALYSIS | {"report"}
    assert ran(dvc(first, "repro")) == set()
    assert stale(first) == set()
    table = (first / "results/tiny/report.md").read_text()
    assert "source: source-chat" in table and "LaTen" in table
    # Two members, two folders, equal bytes.
    for path in ("artifacts/tiny/transfer/laten/source/gsm8k", "results/tiny/analysis/align"):
        mine, theirs = (
            {p.relative_to(folder): p.read_bytes() for p in (folder / path).rglob("*") if p.is_file()}
            for folder in (first, second[0])
        )
        assert mine == theirs
        assert mine


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda p: p["align"].update(rate=0.2), {f"align@laten-{OF}"}),
        (lambda p: p["select"].update(layer_rule="block_gain"), {f"select@{OF}"}),
        # Rows are stored for the task's steps.
        (lambda p: p["task"]["gsm8k"]["align"].update(steps=1), {"code", f"select@{OF}", f"align@laten-{OF}"}),
        (
            lambda p: p["task"]["gsm8k"]["evaluate"].update(max_new_tokens=6),
            BASELINES | {name for name in LATEN | OTHERS if name.startswith("evaluate")} | {"code"},
        ),
        (lambda p: p["finetune"].update(lr=1e-4), {"finetune@postpkt_random-gsm8k"}),
        (lambda p: p["distill"].update(lr=1e-4), set()),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_what_follows(
    copy: Path, edit: Callable[[dict[str, Any]], None], expected: set[str]
) -> None:
    change(copy, edit)
    # The report prints all params, so it is always among them.
    assert stale(copy) == expected | {"report"}


def test_a_methods_setting_reruns_its_own_rows(copy: Path) -> None:
    entry = {"code": "random_delta", "seed": 1}
    change(copy, lambda p: add_row(p, "control", "control_random_delta", entry))
    assert stale(copy) == {"code", "report", f"control@control_random_delta-{OF}"}


@pytest.mark.parametrize(
    ("module", "old", "new", "expected"),
    [
        ("models/sites.py", '"""Where a model', '"""WHERE a model', set()),
        ("core/attribution.py", "import torch\n", "import torch  # of course\n", set()),
        ("methods/laten.py", "* 1_000_003", "* 1_000_033", {f"align@laten-{OF}", f"inject@laten-{OF}"}),
        ("methods/random_delta.py", "randn", "rand", {f"control@control_random_delta-{OF}"}),
        ("core/selection.py", "+ 1e-9", "+ 2e-9", {f"select@{OF}", f"align@laten-{OF}", f"inject@laten-{OF}"}),
        ("reporting/report.html.j2", "<body>", "<body >", {"report"}),
    ],
)
def test_a_change_of_code_reruns_what_it_can_change(
    copy: Path, module: str, old: str, new: str, expected: set[str]
) -> None:
    path = copy / "pkt_stages" / module
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))
    assert stale(copy) == {"code"}
    assert ran(dvc(copy, "repro", "code")) == {"code"}
    assert stale(copy) == expected


def test_a_removed_method_leaves_the_table(copy: Path) -> None:
    before = (copy / "params.yaml").read_text()
    change(copy, lambda p: rows(p, **(p["made_by"] | {"finetune": {}})))
    shutil.rmtree(copy / "results/tiny/evaluate/postpkt_random")
    assert "LoRA, random init" in (copy / "results/tiny/report.md").read_text()
    assert ran(dvc(copy, "repro")) == {"code", "report"}
    assert "LoRA, random init" not in (copy / "results/tiny/report.md").read_text()
    # Listed again, what was trained comes back from the cache; its evaluation, whose file is in git alone, runs again.
    (copy / "params.yaml").write_text(before)
    assert ran(dvc(copy, "repro")) <= {"code", "evaluate_target@postpkt_random-gsm8k", "report"}
    assert "LoRA, random init" in (copy / "results/tiny/report.md").read_text()


def test_a_report_that_fails_leaves_the_last_one(copy: Path) -> None:
    """DVC removes the outputs of a stage before it runs, but for those that persist; the next report mends all."""
    made = [
        copy / f"results/tiny/{name}" for name in ("report.md", "report.json", "scores.json", "scores.csv", "table.tex")
    ]
    made += [path for folder in ("report", "figures") for path in (copy / "artifacts/tiny" / folder).iterdir()]
    before = {path: path.read_bytes() for path in made}
    left = copy / "results/tiny/evaluate/removed/gsm8k.json"
    left.parent.mkdir()
    left.write_text("{}")
    failed = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "-s", "report"],
        cwd=copy,
        capture_output=True,
        text=True,
        env=environment(copy),
    )
    assert failed.returncode != 0 and "rm -r results/tiny/evaluate/removed" in failed.stderr
    assert {path: path.read_bytes() for path in made} == before
    assert stale(copy) == {"report"}
    shutil.rmtree(left.parent)
    (copy / "artifacts/tiny/figures/of_a_removed_row.png").write_bytes(b"")
    dvc(copy, "repro", "-s", "-f", "report")
    assert {path: path.read_bytes() for path in made} == before
    assert not (copy / "artifacts/tiny/figures/of_a_removed_row.png").exists()


def test_dvc_shows_scores_as_metrics_and_losses_as_plots(copy: Path) -> None:
    shown = json.loads(dvc(copy, "metrics", "show", "--json"))[""]["data"]
    assert list(shown) == ["results/tiny/scores.json"]
    scores = shown["results/tiny/scores.json"]["data"]
    assert scores.keys() == {"source-chat", "target-chat", "laten", "control_random_delta", "postpkt_random"}
    assert scores["laten"].keys() == {"source"} and scores["laten"]["source"].keys() == {"gsm8k"}
    drawn = json.loads(dvc(copy, "plots", "show", "--json"))["data"]
    assert {path: len(plot[0]["content"]["data"]["values"]) for path, plot in drawn.items()} == {
        "results/tiny/analysis/align/laten/source/gsm8k.json": 2,
        "results/tiny/train/postpkt_random/gsm8k.json": 2,
    }


def test_a_setting_that_is_set_back_trains_nothing(copy: Path) -> None:
    before = (copy / "params.yaml").read_text()
    change(copy, lambda p: p["finetune"].update(lr=1e-4))
    trained = {"finetune@postpkt_random-gsm8k", "evaluate_target@postpkt_random-gsm8k", "report"}
    assert ran(dvc(copy, "repro")) == trained
    (copy / "params.yaml").write_text(before)
    assert "finetune@postpkt_random-gsm8k" not in ran(dvc(copy, "repro"))


def test_a_new_task_reruns_nothing_that_exists(copy: Path) -> None:
    change(copy, lambda p: p["task"].update(mbpp=p["task"]["gsm8k"]))
    assert {name for name in stale(copy) if name.endswith("gsm8k")} == set()


@pytest.fixture(scope="module")
def published(whole: tuple[Path, set[str]]) -> Path:
    """A repository in which everything was made, pushed and committed, of this profile and of a second one."""
    first = Path(shutil.copytree(whole[0], whole[0].parent / "published"))
    other = first / "profiles/other"
    other.mkdir(parents=True)
    shutil.copy(first / "dvc.yaml", other)
    params = yaml.safe_load((first / "params.yaml").read_text())
    params |= {"profile": "other", "root": "../..", "params_file": "profiles/other/params.yaml"}
    params |= {"here": "artifacts/other", "there": "artifacts/other", "told": "results/other", "heard": "results/other"}
    (other / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert len(ran(dvc(first, "repro", "profiles/other/dvc.yaml:prepare@gsm8k"))) == 2
    dvc(first, "push", "-q")
    run(first, "git", "add", "-A")
    run(first, "git", "commit", "-q", "-m", "all results, and a second profile")
    return first


@pytest.fixture
def third(published: Path, tmp_path: Path) -> Path:
    """A clone of it, without the source model."""
    folder = tmp_path / "third"
    run(tmp_path, "git", "clone", "-q", str(published), str(folder))
    shutil.rmtree(folder / "data/tiny/source-chat")
    return folder


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("report", {"tiny/report"}),
        (f"select@{OF}", {"tiny/select/source/gsm8k"}),
        ("profiles/other/dvc.yaml:prepare", {"other/examples/gsm8k"}),
    ],
    ids=["the report", "the deltas of a task", "another profile's stage"],
)
def test_a_part_is_fetched_alone(third: Path, target: str, expected: set[str]) -> None:
    dvc(third, "pull", "-q", target)
    found = {file.parent.relative_to(third / "artifacts") for file in (third / "artifacts").rglob("*.*")}
    assert {str(folder) for folder in found if folder.name != "figures"} == expected


def test_a_profile_is_fetched_alone(published: Path, third: Path) -> None:
    dvc(third, "pull", "-q", "dvc.yaml")
    mine, theirs = (
        {str(path.relative_to(folder / "artifacts")) for path in (folder / "artifacts").rglob("*.*")}
        for folder in (third, published)
    )
    assert mine == {path for path in theirs if path.startswith("tiny/")} < theirs


def test_a_colleague_adds_a_method_and_gets_a_whole_report(published: Path, third: Path) -> None:
    assert ran(dvc(third, "repro", "--pull", "--allow-missing", "dvc.yaml")) == set()
    change(third, lambda p: add_row(p, "finetune", "postpkt_pissa", {"init": "pissa"}))
    added = {f"{stage}@postpkt_pissa-gsm8k" for stage in ("finetune", "evaluate_target")}
    assert ran(dvc(third, "repro", "--pull", "--allow-missing", "dvc.yaml")) == added | {"code", "report"}
    mine, theirs = ((folder / "results/tiny/report.json").read_text() for folder in (third, published))
    assert "postpkt_pissa" in mine and "postpkt_pissa" not in theirs
    table = (third / "results/tiny/report.md").read_text()
    assert all(row in table for row in ("LaTen", "LoRA, random init", "source: source-chat"))
    # What was not needed was not fetched: neither scores nor deltas.
    assert not (third / "artifacts/tiny/attribute").exists() and not (third / "artifacts/tiny/select").exists()
