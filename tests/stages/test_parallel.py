"""Two processes do what one does: the same bytes, or the same numbers up to the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from tests.conftest import write_examples

Run = Callable[..., tuple[int, str, str]]
SCRIPT = """
import json, sys
import torch.distributed as dist
from pkt_stages.__main__ import main
dist.init_process_group("gloo")  # once: a second one would find the first one's addresses in the launcher's store
for command in json.load(open(sys.argv[1])):
    sys.argv = ["pkt", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, command
"""


def commands(source: Path, target: Path, tmp_path: Path, out: Path) -> list[list[str]]:
    examples = write_examples(tmp_path / "examples.jsonl", ["1", "2", "3", "4", "5"])
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"A text: {'abcdefg'[i] * (i + 2)}."}) + "\n" for i in range(7)))
    scratch = out / "scratch"
    lora = ("--rank", 4, "--batch-size", 4, "--epochs", 2, "--dropout", 0, "--seeds", 0, "--dtype", "float32")
    given = [
        ("attribute", "--model", source, "--extract", examples, "--out", out / "a", "--scratch", scratch),
        (
            *("seek", "--source", source, "--target", target, "--extract", examples, "--scratch", scratch),
            *("--out", out / "s", "--metrics", out / "s.json"),
        ),
        (
            *("compare", "--first", source, "--second", target, "--texts", texts, "--num-texts", 7, "--batch-size", 7),
            *("--out", out / "c", "--metrics", out / "c.json"),
        ),
        (
            *("finetune", "--method", "m", "--target", target, "--train", examples, "--num-examples", 4, *lora),
            *("--out", out / "f", "--metrics", out / "f.json", "--scratch", scratch, "--micro-batch-size", 1),
        ),
        (
            *("finetune", "--method", "s", "--target", target, "--source", source, "--train", examples, *lora),
            *("--num-examples", 4, "--num-paired", 1, "--output-loss", "cosine", "--layer-loss", "source"),
            *("--out", out / "p", "--metrics", out / "p.json", "--scratch", scratch, "--micro-batch-size", 1),
        ),
    ]
    return [[str(word) for word in command] for command in given]


def test_two_processes_equal_one(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for command in commands(source_folder, target_folder, tmp_path, one):
        status, _, err = pkt(*command)
        assert status == 0, err
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "commands.json").write_text(json.dumps(commands(source_folder, target_folder, tmp_path, two)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path / "commands.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attribute:") == 1 and not list((two / "scratch").glob("attribute-*"))

    assert (one / "a").read_bytes() == (two / "a").read_bytes()

    sought = [json.loads((folder / "s.json").read_text()) for folder in (one, two)]
    assert sought[0]["layers"] == sought[1]["layers"]
    assert [b["corner"] for b in sought[0]["submatrices"]] == [b["corner"] for b in sought[1]["submatrices"]]
    assert sought[1]["layer_sensitivity"] == pytest.approx(sought[0]["layer_sensitivity"], rel=1e-6)

    maps = [artifacts.load(folder / "c" / "cka.safetensors", artifacts.CKA).tensors() for folder in (one, two)]
    for site, expected in maps[0].items():
        torch.testing.assert_close(maps[1][site], expected, rtol=1e-6, atol=0)

    for trained in ("f", "p"):
        told = [json.loads((folder / f"{trained}.json").read_text()) for folder in (one, two)]
        losses = [found["seeds"]["0"]["loss_by_step"] for found in told]
        assert len(losses[0]) == 2
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        adapters = [load_file(folder / trained / "seed_0" / "adapter_model.safetensors") for folder in (one, two)]
        for name, expected in adapters[0].items():
            torch.testing.assert_close(adapters[1][name], expected, rtol=1e-4, atol=1e-6)


def test_other_commands_run_in_one_process(pkt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = pkt("inspect", "x")
    assert (status, err) == (
        2,
        "pkt: error: `pkt inspect` runs in one process; torchrun is for attribute, seek, compare, finetune\n",
    )


def test_attribution_goes_on_after_a_kill(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third batch of examples and then in the second layer: no finished one is done again."""
    from pkt_stages.core import attribution
    from pkt_stages.models import capture

    whole, *_ = commands(source_folder, target_folder, tmp_path, tmp_path / "whole")
    killed, *_ = commands(source_folder, target_folder, tmp_path, tmp_path / "killed")
    assert pkt(*whole)[0] == 0
    calls = {"capture_all": 0, "neuron_scores": 0}
    limits = {"capture_all": 2, "neuron_scores": 10**9}

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: object, **named: object) -> object:
            if calls[name] == limits[name]:
                raise KeyboardInterrupt
            calls[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(capture, "MAX_TOKENS", 1)  # a batch for each
    counted(capture, "capture_all")
    counted(attribution, "neuron_scores")
    assert pkt(*killed)[0] == 130
    assert calls == {"capture_all": 2, "neuron_scores": 0}
    # Two calls a layer, attention and FFN: the second one of the second layer is never made.
    limits.update(capture_all=10**9, neuron_scores=3)
    assert pkt(*killed)[0] == 130
    assert calls == {"capture_all": 5, "neuron_scores": 3}
    limits.update(neuron_scores=10**9)
    assert pkt(*killed)[0] == 0
    assert calls == {"capture_all": 5, "neuron_scores": 3 + 2 * 3}
    assert (tmp_path / "whole/a").read_bytes() == (tmp_path / "killed/a").read_bytes()


def test_sensitivity_goes_on_after_a_kill(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt_stages.models import sensitivity

    _, whole, *_ = commands(source_folder, target_folder, tmp_path, tmp_path / "whole")
    _, killed, *_ = commands(source_folder, target_folder, tmp_path, tmp_path / "killed")
    assert pkt(*whole)[0] == 0
    monkeypatch.setattr(sensitivity, "Seldom", lambda num_bytes: lambda save: save())
    real, seen = sensitivity.example_losses, []

    def losses(model: object, examples: list[object]) -> object:
        if len(seen) == 3:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(examples[0])
        return real(model, examples)

    monkeypatch.setattr(sensitivity, "example_losses", losses)
    assert pkt(*killed)[0] == 130
    assert pkt(*killed)[0] == 0
    assert len(seen) == 3 + 1 + 2
    for name in ("s", "s.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list((tmp_path / "killed/scratch").glob("seek-*"))
