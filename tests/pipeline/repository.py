"""A small repository with the real graph: random models, one task, and what a test leaves of the params."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pkt_stages.examples import write_jsonl
from tests.conftest import make_model
from tests.profiles import one_source, rows

ROOT = Path(__file__).parents[2]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment(folder: Path) -> dict[str, str]:
    """Commands of dvc.yaml find `pkt` beside this interpreter, and the package in the repository itself.

    What DVC keeps of a repository elsewhere it keeps in it.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = str(folder / ".dvc/tmp/site")
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "DVC_SITE_CACHE_DIR": cache}


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def ran(output: str) -> set[str]:
    """The stages that a `dvc repro` really ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    edit(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def shrink(params: dict[str, Any]) -> None:
    """One task, one source, no method, and sizes that take no time."""
    one_source(params)
    task = {part: {} for part in params["task"]["gsm8k"]} | {"align": {"steps": 2}, "evaluate": {"max_new_tokens": 4}}
    params |= {"task": {"gsm8k": task}, "prepared_task": {"gsm8k": {}}}
    params |= {"seek_source": [], "teacher": []}
    params["analysed"] |= {"task": ["gsm8k"], "source": ["source"]}
    params["compare"] = {"num_texts": 6, "batch_size": 6}
    params["finetune"] |= {"epochs": 1, "batch_size": 4, "rank": 4}
    params["prepare"] = {"extract": 3, "align": 8, "train": 5, "transfer": 2}
    params["select"] = {"max_rate": 0.25}
    params["align"] |= {"batch_size": 4, "validation_size": 3, "lr": 1e-3, "max_length": 256}
    rows(params)


LATEN = {"laten": {"init_std": 0.02}}


def make_repository(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A git and DVC repository in a new folder; nothing has run, nothing is committed.

    Args:
        edit: changes the params of the default profile.
    """
    folder.mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "pkt_stages", folder / "pkt_stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tasks", folder / "tasks")
    change(folder, edit)
    make_model(folder / "data/tiny/source-chat", seed=1, hidden_size=96, intermediate_size=128, num_hidden_layers=4)
    make_model(folder / "data/tiny/target-chat", seed=2)
    for split, count in (("train", 20), ("test", 5)):
        rows = [{"question": f"{split} {i}?", "answer": f"One.\n#### {i}"} for i in range(count)]
        write_jsonl(folder / f"data/tiny/gsm8k/{split}.jsonl", rows)
    texts = [{"text": f"Text {i}: {'abcdef'[i] * (i + 3)}"} for i in range(6)]
    write_jsonl(folder / "data/tiny/texts/texts.jsonl", texts)
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "git", "config", "user.email", "someone@example.com")
    run(folder, "git", "config", "user.name", "someone")
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "config", "core.check_update", "false")
    return folder
