"""dvc.yaml covers the code: each stage depends on every module that can change its result."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# Shared plumbing: a change here reruns nothing. It is guarded by golden tests, and by `code_version` in the params.
PLUMBING = {
    "pkt_stages/__init__.py",
    "pkt_stages/artifacts.py",
    "pkt_stages/curves.py",
    "pkt_stages/errors.py",
    "pkt_stages/hub.py",
    "pkt_stages/examples.py",
    "pkt_stages/options.py",
    "pkt_stages/parallel.py",
    "pkt_stages/params.py",
    "pkt_stages/progress.py",
    "pkt_stages/scratch.py",
    "pkt_stages/models/load.py",
}
PACKAGES = {"pkt_stages/core/__init__.py", "pkt_stages/models/__init__.py", "pkt_stages/stages/__init__.py"}


def imported(path: Path) -> set[Path]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "pkt_stages":
                module = ROOT / Path(*name.split("."))
                found |= {p for p in (module.with_suffix(".py"), module / "__init__.py") if p.is_file()}
    return found


def reachable(start: Path) -> set[str]:
    """All modules of the package that a file imports, directly or not."""
    seen, todo = set(), [start]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path)
    return {str(path.relative_to(ROOT)) for path in seen}


def command_of(stage: str) -> str:
    return str(GRAPH[stage]["cmd"]).split()[1]


def covered(path: str, deps: list[str]) -> bool:
    return any(path == dep or path.startswith(dep + "/") for dep in deps)


@pytest.mark.parametrize("stage", sorted(GRAPH))
def test_a_stage_depends_on_the_modules_it_reaches(stage: str) -> None:
    deps = [dep for dep in GRAPH[stage]["deps"] if dep.startswith("pkt_stages/")]
    assert all((ROOT / dep).exists() for dep in deps)
    needed = reachable(ROOT / "pkt_stages" / "stages" / f"{command_of(stage)}.py") - PLUMBING - PACKAGES
    assert {path for path in needed if not covered(path, deps)} == set()
    used = needed | PLUMBING
    code = [dep for dep in deps if not dep.endswith(".j2")]
    assert {dep for dep in code if not any(covered(path, [dep]) for path in used)} == set()


@pytest.mark.parametrize("stage", sorted(GRAPH))
def test_commands_hold_no_machine_facts(stage: str) -> None:
    command = GRAPH[stage]["cmd"]
    assert not any(word in command for word in ("--device", "--batch-size", "cuda", "tensor-parallel"))
    assert all(not word.startswith("/") for word in command.split())


def test_profiles_share_the_graph_byte_for_byte() -> None:
    copies = sorted(ROOT.glob("profiles/*/dvc.yaml"))
    assert copies
    assert all(copy.read_bytes() == (ROOT / "dvc.yaml").read_bytes() and not copy.is_symlink() for copy in copies)


def test_no_path_literal_in_the_package() -> None:
    """Only dvc.yaml says where things lie."""
    for path in sorted((ROOT / "pkt_stages").rglob("*.py")):
        if "tiny" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("artifacts/", "results/", "data/", "profiles/")), (path, node.value)


def test_adopted_rows_were_trained_alike() -> None:
    """What a profile takes over is compared with rows of its own, so that their training must agree."""
    params = {path.parent.name: yaml.safe_load(path.read_text()) for path in ROOT.glob("profiles/*/params.yaml")}
    sharing = [name for name, ours in params.items() if ours["adopted_target_methods"]]
    assert sharing
    for name in sharing:
        ours, theirs = params[name], params[params[name]["shared"]]
        for task in ours["task"]:
            assert [ours["finetune"][part] for part in ("common", task)] == [
                theirs["finetune"][part] for part in ("common", task)
            ], (name, task)
        for method in ours["adopted_target_methods"]:
            assert ours["methods"].get(method, theirs["methods"][method]) == theirs["methods"][method], (name, method)


def test_every_profile_resolves() -> None:
    """Every stage of every profile gets its inputs from another stage or from the repository; no two make the same."""
    from dvc.repo import Repo

    repo = Repo(str(ROOT))
    made = {out.fs_path for out in repo.index.outs}
    used = {Path(stage.path).parent.name for stage in repo.index.stages}
    assert used == {path.parent.name for path in ROOT.glob("profiles/*/dvc.yaml")} | {ROOT.name}
    folders = {parent for path in made for parent in Path(path).parents}
    for dep in repo.index.deps:
        path = Path(dep.fs_path)
        assert dep.fs_path in made or path in folders or path.exists(), (dep.stage.addressing, dep.fs_path)
    assert repo.index.graph.number_of_nodes() == len(repo.index.stages)
