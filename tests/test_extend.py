"""docs/extend.md, literally: its files are written into a throw-away project, its params set, its commands run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_model
from tests.pipeline.repository import change, make_repository, ran, run, shrink
from tests.profiles import add_row

PAGE = (Path(__file__).parents[1] / "docs/extend.md").read_text()
ADAPTED = "model.layers.0.mlp.up_proj"


def files() -> dict[str, str]:
    """The files that the page shows, by their paths."""
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def commands() -> list[str]:
    """What the page has a reader type, in order."""
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


def entries() -> list[dict[str, Any]]:
    """The parts of a params file that the page shows; an anchor of another part of it stands for nothing here."""
    blocks = re.findall(r"^```yaml\n((?:made_by|task):.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(f"no_change: &every {{}}\n{block}") for block in blocks]


def add(params: dict[str, Any]) -> None:
    shrink(params)
    names = ["source-chat", "sibling-early", "sibling-chat"]
    params |= {"target": "sibling-early", "oracle": "sibling-chat", "models": names, "attributed": names[:2]}
    params["pairs"] = {}
    params["analysed"] |= {"task": [], "source": []}
    for shown in entries():
        for group, rows in shown.get("made_by", {}).items():
            for name, entry in rows.items():
                add_row(params, group, name, entry)
        for name, parts in shown.get("task", {}).items():
            params["task"][name] = params["no_change"] | parts
            params["prepared_task"][name] = params["task"][name]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_repository(tmp_path_factory.mktemp("extend") / "project", lambda params: None)
    for name, seed in (("sibling-early", 5), ("sibling-chat", 6)):
        model = make_model(folder / "data/tiny" / name, seed=seed, vocab_size=272)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([" A", " B", " C"])
        tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "data/tiny/sibling-early")
    config = LoraConfig(r=2, target_modules=[ADAPTED], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(folder / "data/tiny/theirs"))
    for path, text in files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    head = re.search(r"^```csv\n(.*?\n)(.*?\n)```", PAGE, re.MULTILINE | re.DOTALL)
    assert head is not None
    for name, places in (("test", range(15)), ("train", range(15, 40))):
        rows = [f"What is the capital of {n}?,R{n},P{n},B{n},{'RPB'[n % 3]}{n}\n" for n in places]
        table = folder / f"data/tiny/capitals/{name}.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text(head[1] + (head[2] if name == "test" else "") + "".join(rows))
    change(folder, add)
    return folder


def test_the_page_shows_a_method_a_task_and_commands() -> None:
    assert list(files()) == ["pkt_stages/methods/layer_copy.py", "tasks/capitals/task.yaml"]
    assert len(files()["pkt_stages/methods/layer_copy.py"].splitlines()) < 50
    assert {command.split()[0] for command in commands()} == {"pkt", "dvc"}
    assert [list(entry)[1] for entry in entries()] == ["made_by", "made_by", "task"]


def test_every_command_of_the_page(project: Path) -> None:
    # One after the other, with shared imports.
    typed = run(project, sys.executable, "-m", "pkt_stages.warm", "sh", "-c", " && ".join(commands()))
    assert ran(typed) == {
        "code", "prepare@gsm8k", "oracle@layer_copy", "evaluate_oracle@layer_copy-gsm8k", "imported@theirs",
        "evaluate_imported@theirs-gsm8k", "prepare@capitals", "evaluate_model@sibling-early-capitals",
    }  # fmt: skip
    from pkt_stages import load_delta, read_scores
    from pkt_stages.models.load import resolve
    from pkt_stages.models.rows import Checkpoint

    ours, theirs = (
        Checkpoint(resolve(str(project / "data/tiny" / name))) for name in ("sibling-early", "sibling-chat")
    )
    copied = load_delta(project / "artifacts/tiny/transfer/layer_copy")["delta"].weights  # type: ignore[union-attr]
    assert len(copied) == 2 * 9
    for name, added in copied.items():
        assert added.equal(theirs.weight(name) - ours.weight(name))
    assert list(load_delta(project / "artifacts/tiny/transfer/theirs")["theirs"].factors) == [ADAPTED]  # type: ignore[union-attr]
    scores = {row["row"]: row for row in read_scores(project / "params.yaml")}
    assert {name: (row["task"], row["n"], row["command"]) for name, row in scores.items()} == {
        "layer_copy": ("gsm8k", 5, "derive"),
        "theirs": ("gsm8k", 5, "import"),
        "sibling-early": ("capitals", 16, None),
    }
    assert json.loads((project / "mine/capitals.json").read_text())["nats"] == scores["sibling-early"]["nats"]
