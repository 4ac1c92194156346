"""A hash per command: what changes it, on a copy of this package; and what DVC reruns then, on a toy repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.profile import GROUPS, read_profile
from pkt_stages.reach import Package
from pkt_stages.stages import code
from tests.profiles import add_row, one_source, rows, write_params

ROOT = Path(__file__).parents[2]
PACKAGE = "pkt_stages"
PKT = Callable[..., tuple[int, str, str]]
Edits = Mapping[str, Callable[[str], str]]  # by module: its new text from the old one
Edited = Callable[[Edits], set[str]]


def copied(folder: Path) -> Path:
    return shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this package; a test edits it with `edited`."""
    return copied(tmp_path_factory.mktemp("copy"))


def hashes(folder: Path, params: Path = ROOT / "params.yaml") -> dict[str, str]:
    package = Package(folder)
    return {name: package.digest(begins) for name, begins in code.run(package, read_profile(params)).items()}


@pytest.fixture(scope="module")
def before(copy: Path) -> Mapping[str, str]:
    return hashes(copy)


@pytest.fixture
def edited(copy: Path, before: Mapping[str, str]) -> Iterator[Edited]:
    """Edit modules of the copy and say whose hashes that changes."""
    texts: dict[Path, str] = {}

    def edit(edits: Edits) -> set[str]:
        for name, change in edits.items():
            texts[copy / name] = (copy / name).read_text()
            (copy / name).write_text(change(texts[copy / name]))
            assert (copy / name).read_text() != texts[copy / name]
        after = hashes(copy)
        return {name for name in {*before, *after} if before.get(name) != after.get(name)}

    yield edit
    for path, text in texts.items():
        path.write_text(text)


def begin(function: str) -> Callable[[str], str]:
    """Let a function begin with a call that it did not make."""
    pattern = re.compile(rf"^(?:async )?def {function}\(.*?\)(?: -> [^\n]*)?:\n", re.MULTILINE | re.DOTALL)

    def change(text: str) -> str:
        assert len(pattern.findall(text)) == 1, function
        return pattern.sub(lambda match: match[0] + "    id(0)\n", text)

    return change


def reword(text: str) -> str:
    """Other comments, docstrings and help texts, everywhere."""
    text = re.sub(r'("""\w)', r"\1 New words.", text)
    text = re.sub(r'(typer\.Option\((?:"[^"]*", )*help=")', r"\1New words. ", text)
    text = re.sub(r'(option\([^",()]+, ")', r"\1New words. ", text)
    return text.replace("\n\n\n", "\n\n# A new comment.\n\n") + "# The last.\n"


def test_words_change_nothing(copy: Path, edited: Edited) -> None:
    modules = [path for path in copy.rglob("*.py") if path.stat().st_size]
    assert edited({path.relative_to(copy).as_posix(): reword for path in modules}) == set()
    assert "New words." in (copy / "stages/align.py").read_text()


def test_a_new_kind_of_artifact_changes_nothing(edited: Edited) -> None:
    kind = 'NEW = Kind("new", "pkt new", {"values": _spec("float32", "value")})\n'
    assert edited({"artifacts.py": lambda text: text.replace("DELTA = Kind(", kind + "DELTA = Kind(", 1)}) == set()


LATEN = {"align/laten", "inject/laten"}


@pytest.mark.parametrize(
    ("module", "change", "expected"),
    [
        ("methods/laten.py", begin("mapping"), LATEN),
        ("core/hypernetwork.py", begin("draw_weights"), LATEN),
        ("methods/seeking.py", begin("derive"), {"derive/unaligned_seeking"}),
        ("methods/random_delta.py", begin("derive"), {"derive/control_random_delta"}),
        ("core/attribution.py", begin("neuron_scores"), {"attribute"}),
        ("core/statistics.py", begin("holm"), {"report"}),
        ("stages/seek.py", begin("run"), {"seek"}),
        ("tasks/gsm8k/__init__.py", begin("score"), {"evaluate/gsm8k", "prepare/gsm8k", "report", "scale"}),
        (
            "tasks/humaneval/task.yaml",
            lambda text: text + "# Data count whole.\n",
            {"evaluate/humaneval", "prepare/humaneval", "report", "scale"},
        ),
        ("reporting/paper.yaml", lambda text: text + "# Data count whole.\n", {"report"}),
        ("tools/plan.py", lambda text: text + "\nprint()\n", set()),
        ("__main__.py", lambda text: text + "\nprint()\n", set()),
    ],
)
def test_a_change_counts_where_it_is_reached(
    edited: Edited, module: str, change: Callable[[str], str], expected: set[str]
) -> None:
    assert edited({module: change}) == expected


def test_shared_code_counts_for_all(edited: Edited) -> None:
    some = {"attribute", "seek", "finetune", "compare", "evaluate/mmlu", "derive/unaligned_seeking", *LATEN}
    assert edited({"params.py": begin("build")}) >= some


def test_every_path_of_the_graph_is_written(copy: Path) -> None:
    wanted = set(re.findall(r"\$\{here\}/code/([^\"\s\]]+)", (ROOT / "dvc.yaml").read_text()))
    assert wanted
    package = Package(copy)
    for params in (ROOT / "params.yaml", *ROOT.glob("profiles/*/params.yaml")):
        written = set(code.run(package, read_profile(params)))
        profile = read_profile(params)
        for path in wanted:
            command = path.partition("/")[0]
            makers = [group for group, of in GROUPS.items() if command in code.BY_METHOD.get(of.command, ())]
            rows = [method.name for group in makers for method in profile.in_group(group)]
            items = profile.tasks if "${item.task}" in path else rows
            names = {re.sub(r"\$\{item\.\w+\}", item, path) for item in items} if "$" in path else {path}
            assert names <= written, params


def test_a_row_whose_code_is_another_s_has_its_hash(copy: Path, tmp_path: Path) -> None:
    def add(params: dict[str, Any]) -> None:
        add_row(params, "align", "one", {"init_std": 1})
        add_row(params, "align", "two", {"code": "laten"})

    found = hashes(copy, write_params(tmp_path, add))
    assert found["align/one"] == found["align/two"] == found["align/laten"]
    assert found["inject/one"] == found["inject/laten"] != found["align/laten"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda p: add_row(p, "control", "control_new", {"code": "new"}),
            "made_by.control.control_new: code 'new': no such file in pkt_stages/methods; found ",
        ),
        (
            lambda p: add_row(p, "unaligned", "new", {}),
            "made_by.unaligned.new: names no `code`, a file of pkt_stages/methods; found ",
        ),
        (
            lambda p: add_row(p, "align", "new", {"code": "seeking"}),
            "made_by.align.new: code 'seeking': pkt_stages/methods/seeking.py has no `mapping`",
        ),
        (
            lambda p: add_row(p, "unaligned", "new", {"code": "laten"}),
            "made_by.unaligned.new: code 'laten': pkt_stages/methods/laten.py has no `derive`",
        ),
        (
            lambda p: p["task"].update(new=p["no_change"]),
            "task 'new': no such folder in pkt_stages/tasks; found gsm8k, humaneval, ",
        ),
        (
            lambda p: p["made_by"]["distill"].update(laten={}),
            "made_by.distill: laten is in made_by.align, too; list it once",
        ),
        (
            lambda p: p["made_by"].update(other={}),
            "made_by.other: no such group; expected any of oracle, transport, labelled, align, ",
        ),
    ],
)
def test_wrong_params_are_one_line(tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    params = write_params(tmp_path, edit)
    with pytest.raises(UserError) as error:
        hashes(ROOT / PACKAGE, params)
    assert str(error.value).startswith(f"{params}: {message}")


def test_a_file_of_stages_that_is_no_command_is_one_line(copy: Path) -> None:
    file = copy / "stages/helper.py"
    try:
        file.write_text("def other(): pass\n")
        with pytest.raises(UserError) as error:
            hashes(copy)
    finally:
        file.unlink()
    assert str(error.value) == "pkt_stages/stages/helper.py: has no command 'helper'; name it like its file"


def test_the_command_writes_a_line_per_file_and_leaves_nothing_old(
    pkt: PKT, tmp_path: Path, before: Mapping[str, str]
) -> None:
    out = tmp_path / "code"
    params = write_params(tmp_path, lambda p: add_row(p, "align", "more", {}))
    assert pkt("code", "--params", params, "--out", out)[0] == 0
    assert (out / "align/more").is_file()
    status, text, _ = pkt("code", "--params", ROOT / "params.yaml", "--out", out)
    assert status == 0
    assert re.fullmatch(rf"code: {len(before)} hashes -> {re.escape(str(out))} \(\d+\.\d s\)\n", text)
    written = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert written == {name: f"{digest}\n" for name, digest in before.items()}


def test_a_folder_of_something_else_is_left_alone(pkt: PKT, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    status, _, error = pkt("code", "--params", ROOT / "params.yaml", "--out", tmp_path)
    assert status == 2
    assert error == (
        f"pkt: error: {tmp_path}: holds mine and no report, so it is not ours to replace; give a new folder\n"
    )


def test_explain_shows_what_is_reached_and_from_where(pkt: PKT) -> None:
    status, text, _ = pkt("code", "--params", ROOT / "params.yaml", "--explain", "evaluate/gsm8k")
    assert status == 0
    lines = text.splitlines()
    assert lines[:2] == ["stages.evaluate:evaluate", "tasks.gsm8k:*"]
    assert "tasks.gsm8k:/task.yaml <- tasks.gsm8k:*" in lines
    assert "options:with_params <- stages.evaluate:evaluate" in lines


def test_explain_of_nothing_there_is_one_line(pkt: PKT) -> None:
    status, _, error = pkt("code", "--params", ROOT / "params.yaml", "--explain", "evaluate")
    assert status == 2
    assert error.startswith(
        "pkt: error: --explain evaluate: no such file of hashes; expected one of adopt, align/laten"
    )
    assert pkt("code", "--params", ROOT / "params.yaml")[2] == (
        "pkt: error: nothing to do; give --out FOLDER or --explain COMMAND\n"
    )


def test_another_package_than_the_one_that_runs_is_refused(
    pkt: PKT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = copied(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ("code", "--params", ROOT / "params.yaml", "--out", tmp_path / "out")
    assert pkt(*arguments)[0] == 0
    (here / "errors.py").write_text("")
    status, _, error = pkt(*arguments)
    assert status == 2
    assert error == (
        f"pkt: error: {here}: differs from what `pkt` runs, {ROOT / PACKAGE}; install this one: pip install -e .\n"
    )


def test_nothing_heavy_is_imported_and_two_processes_agree(tmp_path: Path, before: Mapping[str, str]) -> None:
    program = """
import sys
from pathlib import Path
sys.argv = ["pkt", "code", *sys.argv[1:]]
from pkt_stages.__main__ import main
try:
    main()
finally:
    assert not {"torch", "transformers", "numpy", "pkt_stages.methods.laten", "pkt_stages.tasks"} & set(sys.modules)
"""
    for seed in "12":
        command = [sys.executable, "-c", program, "--params", str(ROOT / "params.yaml"), "--out", str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
        for name, digest in before.items():
            assert (tmp_path / seed / name).read_text() == f"{digest}\n"


# The toy repository: the real graph and the real `pkt code`, on a copy of this package; for every other command a
# program stands in that writes something wherever the command line says, and costs nothing.
STAND_IN = """#!{python}
import runpy, sys
from pathlib import Path

if sys.argv[1] == "code":
    sys.path.insert(0, "")
    runpy.run_module("pkt_stages", run_name="__main__")  # and ends here
for flag, value in zip(sys.argv, sys.argv[1:]):
    if flag in ("--out", "--metrics", "--predictions", "--html", "--figures", "--table", "--scores", "--csv", "--tex"):
        names = [f"{{name}}.jsonl" for name in ("extract", "transfer", "align", "train", "test")]
        for path in [Path(value)] if Path(value).suffix else [Path(value) / name for name in names]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sys.argv[1])
"""
TASKS = ("mmlu", "gsm8k")


def shrink(params: dict[str, Any]) -> None:
    """Two tasks; LaTen, Seeking's sub-matrices and a fine-tuning."""
    rows(
        params,
        align={"laten": {}},
        unaligned={"unaligned_seeking": {"code": "seeking"}},
        finetune={"postpkt_pissa": {"init": "pissa"}},
    )
    params |= {"task": {task: params["task"][task] for task in TASKS}, "prepared_task": list(TASKS)}
    one_source(params)
    params["analysed"] |= {"task": ["gsm8k"], "source": ["source"], "methods": ["laten"]}


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which everything has run."""
    folder = tmp_path_factory.mktemp("toy")
    copied(folder)
    shutil.copytree(ROOT / "tasks", folder / "tasks")
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    write_params(folder, shrink)
    for name in ("source-chat", "target-chat", "texts", *TASKS):
        (folder / "data/tiny" / name).mkdir(parents=True)
        (folder / "data/tiny" / name / "file").write_text(name)
    (folder / "bin").mkdir()
    (folder / "bin/pkt").write_text(STAND_IN.format(python=sys.executable))
    (folder / "bin/pkt").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "config", "core.check_update", "false")
    ran = dvc(folder, "repro").count("Running stage")
    assert ran > 20
    return folder


@pytest.fixture
def rerun(toy: Path) -> Iterator[Edited]:
    """Edit modules of the toy repository, run the stage `code`, and say which stages are out of date then."""
    texts: dict[Path, str] = {}

    def edit(edits: Edits) -> set[str]:
        for name, change in edits.items():
            path = toy / PACKAGE / name
            texts[path] = path.read_text()
            path.write_text(change(texts[path]))
        assert re.findall(r"Running stage '([^']+)'", dvc(toy, "repro", "code")) == ["code"]
        status = dvc(toy, "status", "--json")
        return set(json.loads(status[status.index("{") :]))

    yield edit
    for path, text in texts.items():
        path.write_text(text)


PAIRS = [f"source-{task}" for task in TASKS]


def test_dvc_reruns_nothing_after_new_words_and_a_new_kind_of_artifact(rerun: Edited) -> None:
    kind = 'NEW = Kind("new", "pkt new", {})\n'
    assert rerun({"models/sites.py": reword, "artifacts.py": lambda text: reword(text) + kind}) == set()


def test_dvc_reruns_laten_alone_after_a_change_of_its_mapping(rerun: Edited) -> None:
    expected = {f"{stage}@laten-{pair}" for stage in ("align", "inject") for pair in PAIRS}
    assert rerun({"methods/laten.py": begin("mapping")}) == expected


def test_dvc_reruns_one_task_after_a_change_of_its_scoring(rerun: Edited) -> None:
    stages = {f"evaluate_model@{model}-gsm8k" for model in ("source-chat", "target-chat")}
    stages |= {"evaluate@laten-source-gsm8k", "evaluate_sought@unaligned_seeking-source-gsm8k"}
    stages |= {"evaluate_target@postpkt_pissa-gsm8k", "prepare@gsm8k", "report"}
    assert rerun({"tasks/gsm8k/__init__.py": begin("score")}) == stages
