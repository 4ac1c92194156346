"""dvc.yaml, the profiles and the package agree; each rule is read from the files, none is listed here."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.params import read_settings
from pkt_stages.profile import GROUPS, SOURCE_LISTS, UNIONS, read_profile

ROOT = Path(__file__).parents[2]
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PROFILES = {ROOT.name: ROOT} | {path.parent.name: path.parent for path in sorted(ROOT.glob("profiles/*/params.yaml"))}
CODE = "${here}/code"
MADE_BY = re.compile(r"\$\{made_by\.(\w+)\}")


def definition(stage: str) -> dict[str, Any]:
    """A stage's definition; that of a `foreach` stands one deeper."""
    found: dict[str, Any] = GRAPH[stage]
    return found.get("do", found)


def command_of(stage: str) -> str:
    return str(definition(stage)["cmd"]).split()[1]


@pytest.mark.parametrize("stage", sorted(set(GRAPH) - {"code"}))
def test_a_stage_depends_on_its_command_s_code_and_no_other(stage: str) -> None:
    """A command whose code varies has a folder of them, and the stage depends on the one of its item."""
    code = [dep for dep in definition(stage)["deps"] if dep.startswith((CODE, "pkt_stages"))]
    command = command_of(stage)
    assert len(code) == 1
    assert code[0] in {f"{CODE}/{command}", f"{CODE}/{command}/${{item.task}}", f"{CODE}/{command}/${{item.method}}"}
    for axis in re.findall(r"\$\{item\.(\w+)\}", code[0]):
        assert axis in GRAPH[stage]["matrix"]


def test_the_stages_of_a_command_depend_on_its_code_alike() -> None:
    found: dict[str, set[str]] = {}
    for stage in set(GRAPH) - {"code"}:
        code = {dep for dep in definition(stage)["deps"] if dep.startswith(CODE)}
        assert found.setdefault(command_of(stage), code) == code, stage
    # What any command can be is a file of stages/, and each of those but `code` is in the graph.
    files = {path.stem for path in (ROOT / "pkt_stages/stages").glob("*.py")} - {"__init__", "code"}
    assert set(found) == {name.removesuffix("_") for name in files}


def test_code_is_made_once_from_the_whole_package() -> None:
    assert command_of("code") == "code"
    assert GRAPH["code"]["deps"] == ["pkt_stages", "tasks"]
    assert GRAPH["code"]["outs"] == [CODE]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_methods_is_a_stage_that_makes_them(group: str) -> None:
    """Stages named like the group run its command over the axes that its rows have."""
    stage = GRAPH[group]
    assert command_of(group) == GROUPS[group].command
    assert stage["matrix"]["method"] == f"${{made_by.{group}}}"
    assert ("source" in stage["matrix"]) is GROUPS[group].by_source
    assert stage["matrix"].get("source", "") == (f"${{{GROUPS[group].sources}}}" if GROUPS[group].by_source else "")
    assert ("task" in stage["matrix"]) is GROUPS[group].by_task
    assert "--method ${item.method}" in stage["cmd"]
    assert any(dep == f"{CODE}/{GROUPS[group].command}/${{item.method}}" for dep in stage["deps"]) is (
        GROUPS[group].runs_code
    )


def test_no_stage_goes_over_a_group_that_is_none() -> None:
    used = {group for stage in GRAPH.values() for group in MADE_BY.findall(str(stage.get("matrix", "")))}
    assert used == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_is_evaluated_once_for_its_own_sources(group: str) -> None:
    """By a stage over the group or over the union that it is in; never over other sources than it is made for."""
    of = GROUPS[group]
    over = of.union or f"made_by.{group}"
    stages = [
        stage["matrix"]
        for name, stage in GRAPH.items()
        if name.startswith("evaluate") and stage["matrix"].get("method") == f"${{{over}}}"
    ]
    assert [matrix.get("source", "") for matrix in stages] == [f"${{{of.sources}}}" if of.sources else ""]
    assert stages[0]["task"] == "${task}"


def test_every_union_holds_groups_of_equal_sources() -> None:
    for union in UNIONS:
        assert len({GROUPS[group].sources for group in GROUPS if GROUPS[group].union == union}) == 1
    assert {"source", "seek_source", "teacher", "transport_source"} == set(SOURCE_LISTS)


def test_every_row_ends_in_one_place() -> None:
    """However a row is made: transfer/<method>/[<source>/]<task>, which evaluations, comparisons and controls read."""
    for group, of in GROUPS.items():
        path = "/".join(
            ["${here}/transfer/${item.method}", *["${item.source}"] * of.by_source, *["${item.task}"] * of.by_task]
        )
        # The alignment's rows are made by the stage after it.
        assert GRAPH["inject" if group == "align" else group]["outs"] == [path]


@pytest.mark.parametrize("stage", sorted(GRAPH))
def test_commands_hold_no_machine_facts(stage: str) -> None:
    command = definition(stage)["cmd"]
    assert not any(word in command for word in ("--device", "--batch-size", "--scratch", "cuda", "tensor-parallel"))
    assert all(not word.startswith("/") for word in command.split())


def test_the_graph_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) < 660
    assert len(GRAPH) < 50


def test_profiles_share_the_graph_byte_for_byte() -> None:
    copies = sorted(ROOT.glob("profiles/*/dvc.yaml"))
    assert copies
    assert all(copy.read_bytes() == (ROOT / "dvc.yaml").read_bytes() and not copy.is_symlink() for copy in copies)


def test_no_path_literal_in_the_package() -> None:
    """Only dvc.yaml says where things lie."""
    for path in sorted((ROOT / "pkt_stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("artifacts/", "results/", "data/", "profiles/")), (path, node.value)


def test_adopted_rows_were_trained_alike() -> None:
    """What a profile takes over is compared with rows of its own, so that their training must agree."""
    profiles = {name: read_profile(folder / "params.yaml") for name, folder in PROFILES.items()}
    by_told = {profile.content["told"]: profile for profile in profiles.values()}
    assert len(by_told) == len(profiles)
    adopting = [profile for profile in profiles.values() if profile.adopted]
    assert adopting
    for ours in adopting:
        theirs = by_told[ours.content["heard"]]
        assert theirs.content["models_dir"] == ours.content["models_dir"]
        assert theirs.target == ours.target
        for row in ours.adopted:
            if row in theirs.models:
                continue
            method = theirs.method(row)
            assert not GROUPS[method.group].by_source, (ours.path, row)
            command = GROUPS[method.group].command
            for task in ours.tasks:
                made = read_settings(theirs.path, command, task=task, method=row)
                here = read_settings(ours.path, command, task=task) | dict(method.entry)
                assert here == made, (ours.path, row, task)


@pytest.mark.parametrize("folder", PROFILES.values(), ids=PROFILES)
def test_a_profile_lists_what_its_groups_hold(folder: Path) -> None:
    """The lists that DVC needs as such are unions of `made_by`, in the order of the table."""
    profile = read_profile(folder / "params.yaml")
    for union in UNIONS:
        united = {method.name: method.entry for method in profile.methods if GROUPS[method.group].union == union}
        assert profile.content[union] == united
    assert sorted(profile.content["methods"]) == sorted(method.name for method in profile.methods)
    assert all(profile.content["methods"][method.name] == method.entry for method in profile.methods)


def test_every_profile_resolves() -> None:
    """Every stage of every profile gets its inputs from another stage or from the repository; no two make the same.

    Data that git ignores are put together by a script.
    """
    from dvc.repo import Repo

    repo = Repo(str(ROOT))
    made = {out.fs_path for out in repo.index.outs}
    used = {Path(stage.path).parent.name for stage in repo.index.stages}
    assert used == set(PROFILES)
    folders = {parent for path in made for parent in Path(path).parents}
    lines = (ROOT / ".gitignore").read_text().splitlines()
    put = {ROOT / line.strip("/") for line in lines if line.startswith("/data/")}
    for dep in repo.index.deps:
        path = Path(dep.fs_path)
        inside = any(str(parent) in made or parent in put for parent in (path, *path.parents))
        assert dep.fs_path in made or inside or path in folders or path.exists(), (dep.stage.addressing, dep.fs_path)
    assert repo.index.graph.number_of_nodes() == len(repo.index.stages)
