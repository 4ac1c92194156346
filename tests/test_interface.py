"""What `from pkt_stages import ...` gives: nothing before it is asked for, and then what the commands compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pkt_stages
from pkt_stages import UserError, load_delta, merge, read_predictions, read_scores
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import DenseDelta, write_changes
from pkt_stages.models.load import identity, load_model, resolve
from tests.models.deltas import logits_of, random_delta

ROOT = Path(__file__).parents[1]
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def row(target_folder: Path, tmp_path: Path) -> Path:
    model, generator = load_model(resolve(str(target_folder))), torch.Generator().manual_seed(0)
    changes = {
        "sparse": random_delta(model, k=20, scale=0.05),
        "low": Adapter({NAME: (torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator))}, 2.0),
        "whole": DenseDelta({f"{NAME}.weight": 0.1 * torch.randn(96, 64, generator=generator)}),
    }
    meta = {"command": "derive", "method": "m", "source": None, "params": {"rank": 2}}
    facts = {"low": {"seed": 0}}
    write_changes(tmp_path / "row", changes, meta | {"target": identity(resolve(str(target_folder)))}, facts)
    return tmp_path / "row"


def test_importing_is_instant() -> None:
    program = (
        "import sys, pkt_stages as p; print(sorted(p.__all__)); print(set(p.__all__) <= set(dir(p)))\n"
        "from pkt_stages import load_delta, read_scores, UserError\n"
        "print(sorted({'torch', 'transformers', 'yaml', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(sorted(pkt_stages.__all__)), "True", "[]"]
    with pytest.raises(AttributeError, match="module 'pkt_stages' has no attribute 'lode_delta'"):
        pkt_stages.lode_delta  # noqa: B018


def test_changes_by_label(row: Path) -> None:
    delta = load_delta(row)
    assert (list(delta), len(delta)) == (["sparse", "low", "whole"], 3)
    assert delta.kinds == {"sparse": "sparse", "low": "low_rank", "whole": "dense"}
    assert (delta.meta["command"], delta.meta["params"], delta.facts["low"]) == ("derive", {"rank": 2}, {"seed": 0})
    assert list(delta["whole"].weights) == [f"{NAME}.weight"]  # type: ignore[union-attr]
    assert delta["low"].alpha == 2.0  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        delta["other"]
    assert list(load_delta(str(row / "low"))) == ["low"]
    with pytest.raises(UserError, match="no such file or folder"):
        load_delta(row / "nothing")


def test_a_merged_model(row: Path, target_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    delta = load_delta(row)
    base = AutoModelForCausalLM.from_pretrained(target_folder)
    before, weight = logits_of(base), base.get_parameter(f"{NAME}.weight").detach().clone()
    added = delta["whole"].weights[f"{NAME}.weight"]  # type: ignore[union-attr]
    for given in (target_folder, str(target_folder), base):
        for scale in (1.0, 0.5):
            made = merge(given, delta, scale, run="whole")
            assert torch.equal(made.get_parameter(f"{NAME}.weight"), weight + scale * added)
    assert torch.equal(logits_of(base), before)
    assert torch.equal(base.get_parameter(f"{NAME}.weight"), weight)
    assert not torch.equal(logits_of(merge(target_folder, row, run="sparse")), before)
    assert merge(target_folder, row / "low", dtype="bfloat16").dtype == torch.bfloat16


def test_another_base_is_refused(row: Path, target_folder: Path, source_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source_folder)
    for given in (source_folder, loaded):
        with pytest.raises(UserError, match="made for the target target at sha256:"):
            merge(given, row, run="whole")
    with pytest.raises(UserError, match="does not say where it was loaded from"):
        merge(
            LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
            row,
            run="whole",
        )
    with pytest.raises(UserError, match="holds 3 runs; choose one"):
        merge(target_folder, row)


def test_scores_are_the_metrics(tmp_path: Path) -> None:
    rows = read_scores(ROOT / "params.yaml")
    assert rows == read_scores(ROOT) == read_scores(ROOT / "results/tiny")
    found = {(r["row"], r["source"], r["task"]): r for r in rows}
    assert len(found) == len(rows) == len(list((ROOT / "results/tiny/evaluate").rglob("*.json")))
    metrics = json.loads((ROOT / "results/tiny/evaluate/laten/source/gsm8k.json").read_text())
    one = found["laten", "source", "gsm8k"]
    assert (one["points"], one["nats"], one["n"]) == (metrics["score"], metrics["nats"], metrics["n"])
    assert (one["runs"], one["command"], one["model"]) == (len(metrics["runs"]), "inject", "sibling-early")
    assert found["sibling-chat", None, "mmlu"]["command"] is None
    assert read_scores(ROOT / "profiles/ladder")[0]["n"] == 256


def test_no_scores(tmp_path: Path) -> None:
    nothing = "no results (a folder with `evaluate`), no params file and no folder with one"
    empty = f"{tmp_path}/evaluate: holds no metrics; `dvc repro` makes a profile's, or give another folder"
    for message in (f"{tmp_path}: {nothing}", empty):
        with pytest.raises(UserError) as error:
            read_scores(tmp_path)
        assert str(error.value) == message
        (tmp_path / "evaluate").mkdir(exist_ok=True)
    (tmp_path / "evaluate/m").mkdir()
    (tmp_path / "evaluate/m/t.json").write_text("{}")
    with pytest.raises(UserError, match=r"t\.json: not the metrics of this version, 'n' is missing; run `dvc repro`"):
        read_scores(tmp_path)
    (tmp_path / "params.yaml").write_text("told: 3\nroot: .\n")
    with pytest.raises(UserError, match="expected `root` and `told`, paths, as a profile has them; found 3"):
        read_scores(tmp_path / "params.yaml")


def test_predictions(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"run": "base", "id": f"q{i}", "log_likelihood": -1.0, "correct": i} for i in (0, 1)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_predictions(path)
    assert next(found) == rows[0] and list(found) == rows[1:]
    path.write_text(json.dumps({"id": "x"}))
    with pytest.raises(UserError, match=r"p\.jsonl, line 1: no prediction of `pkt evaluate`, it lacks 'run'"):
        read_predictions(path)
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "none")


@pytest.mark.parametrize("example", sorted((ROOT / "docs/examples").glob("*.py")), ids=lambda path: path.name)
def test_the_examples_of_the_docs_run(example: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, example], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "derive sibling-early {'delta': 'dense'}" in said
    assert any(line.startswith("sibling-chat ") for line in said)
    assert " of 32 wrong; the first: mmlu_test_" in said[-1]
