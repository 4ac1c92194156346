"""SemAlign and the plain training of the same layers, by `pkt finetune --source`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.models import trainer
from pkt_stages.models.changes import read_changes
from pkt_stages.models.load import identity, resolve
from tests.conftest import make_model, write_examples
from tests.stages.selection_files import options

Run = Callable[..., tuple[int, str, str]]
ANSWERS = [f"It is {i + 1}." for i in range(8)]
# 4 steps an epoch, 8 in all; a checkpoint after each.
SETTINGS = ["--epochs", "2", "--batch-size", "2", "--micro-batch-size", "1", "--rank", "4", "--lr", "1e-2"]
SETTINGS += ["--max-length", "128", "--seeds", "0"]
SEMALIGN = ["--num-paired", "1", "--output-loss", "cosine", "--layer-loss", "source"]


@pytest.fixture
def paths(tmp_path: Path, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    names = {"out": "adapters", "metrics": "finetune.json", "scratch": "scratch"}
    return {
        "source": source_folder,
        "target": target_folder,
        "train": write_examples(tmp_path / "train.jsonl", ANSWERS),
        **{option: tmp_path / name for option, name in names.items()},
    }


def finetune(pkt: Run, paths: dict[str, Path], *settings: str) -> tuple[int, str, str]:
    return pkt("finetune", "--method", "m", *options(**paths), *SETTINGS, *settings)


def other(paths: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same input, other outputs and scratch."""
    return {**paths, "out": folder / "adapters", "metrics": folder / "finetune.json", "scratch": folder / "scratch"}


def contents(paths: dict[str, Path]) -> list[bytes]:
    return [p.read_bytes() for p in sorted(paths["out"].rglob("*.*"))] + [paths["metrics"].read_bytes()]


def told(paths: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paths["metrics"].read_text())
    return found


def adapter(paths: dict[str, Path]) -> dict[str, torch.Tensor]:
    return load_file(paths["out"] / "seed_0" / "adapter_model.safetensors")


def test_it_trains_the_paired_layer_alone(pkt: Run, paths: dict[str, Path]) -> None:
    status, printed, err = finetune(pkt, paths, *SEMALIGN, "--epochs", "10", "--dropout", "0")
    assert status == 0, err
    found = told(paths)
    [[source_layer, target_layer]] = found["layer_pairs"]
    scores = found["source_layer_scores"]
    # Counterparts of 3 layers in 4 are the first, second and fourth, floor(4 k / 3).
    assert (source_layer, target_layer) == [(0, 0), (1, 1), (3, 2), (3, 2)][scores.index(max(scores))]
    assert {name.split(".")[4] for name in adapter(paths)} == {str(target_layer)}
    assert len(adapter(paths)) == 2 * 4
    losses = found["seeds"]["0"]["loss_by_epoch"]
    assert losses[-1] < 0.9 * losses[0]
    assert printed.startswith(f"finetune: m, 1 seeds, loss by epoch {losses[0]:.4f} -> {losses[-1]:.4f} -> ")
    assert found["units"] == {"loss": "1 - cosine, and 1 - cosine of layers, per supervised token"}
    assert found["head_rank"] == {"source": 96, "target": 64}
    changes = read_changes(paths["out"])
    assert changes.meta["source"] == found["source"] == identity(resolve(str(paths["source"])))
    assert changes.meta["layer_pairs"] == found["layer_pairs"]


def test_with_all_layers_and_labels_alone_it_is_plain_fine_tuning(
    pkt: Run, paths: dict[str, Path], tmp_path: Path
) -> None:
    status, _, err = finetune(pkt, paths, "--num-paired", "4", "--dropout", "0")
    assert status == 0, err
    plain = {name: path for name, path in other(paths, tmp_path / "plain").items() if name != "source"}
    assert finetune(pkt, plain, "--dropout", "0")[0] == 0
    beside, alone = told(paths), told(plain)
    assert [pair[1] for pair in beside["layer_pairs"]] == [0, 1, 2] and "head_rank" not in beside
    assert beside["units"] == alone["units"] == {"loss": "nats per supervised token"}
    assert beside["seeds"]["0"]["loss_by_step"] == pytest.approx(alone["seeds"]["0"]["loss_by_step"], rel=1e-5)
    assert adapter(paths).keys() == adapter(plain).keys()
    for name, factor in adapter(paths).items():
        torch.testing.assert_close(factor, adapter(plain)[name], rtol=1e-3, atol=1e-4)


def test_a_permuted_source_teaches_something_else(pkt: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    """The control has the same layers, labels and start; only what the source's directions mean differs."""
    permuted = other(paths, tmp_path / "permuted")
    assert finetune(pkt, paths, *SEMALIGN)[0] == 0
    assert finetune(pkt, permuted, *SEMALIGN, "--layer-loss", "permuted")[0] == 0
    ours, theirs = told(paths), told(permuted)
    assert ours["layer_pairs"] == theirs["layer_pairs"] and ours["head_rank"] == theirs["head_rank"]
    assert ours["seeds"]["0"]["loss_by_step"][0] != theirs["seeds"]["0"]["loss_by_step"][0]
    assert ours["seeds"]["0"]["adapter_hash"] != theirs["seeds"]["0"]["adapter_hash"]


def test_an_interrupted_run_ends_in_the_same_bytes(
    pkt: Run, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SEMALIGN, "--dropout", "0.1"]
    assert finetune(pkt, paths, *settings)[0] == 0
    again = other(paths, tmp_path / "again")
    step_end = trainer._Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise InterruptedError
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer._Watch, "on_step_end", stop)
    with pytest.raises(InterruptedError):
        finetune(pkt, again, *settings)
    assert not again["out"].exists() and not again["metrics"].exists()
    assert [p.parent.name for p in again["scratch"].rglob(trainer._WHOLE)] != []
    monkeypatch.setattr(trainer._Watch, "on_step_end", step_end)
    assert finetune(pkt, again, *settings)[0] == 0
    assert contents(again) == contents(paths)


def test_two_processes_write_the_same_bytes(pkt: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    assert finetune(pkt, paths, *SEMALIGN)[0] == 0
    again = other(paths, tmp_path / "again")
    command = ["finetune", "--method", "m", *options(**again), *SETTINGS, *SEMALIGN]
    program = [sys.executable, "-m", "pkt_stages", *map(str, command)]
    subprocess.run(program, check=True, capture_output=True, cwd=tmp_path)
    assert contents(again) == contents(paths)
    assert str(tmp_path).encode() not in b"".join(contents(paths))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--num-paired", "5"], "num_paired 5: the source has 4 layers; choose at most that many"),
        (["--num-paired", "0"], "options of `finetune`: num_paired must be at least 1, found 0"),
        ([], "without num_paired --source has no use"),
        (
            ["--layer-loss", "source"],
            "options of `finetune`: output_loss and layer_loss are those of paired layers; give num_paired, too",
        ),
        (
            ["--num-paired", "1", "--layer-loss", "shuffled"],
            "options of `finetune`: layer_loss: expected one of none, source, permuted, found 'shuffled'",
        ),
        (
            ["--num-paired", "1", "--init", "seeking"],
            "options of `finetune`: init seeking trains all layers; num_paired goes with init random or pissa",
        ),
        (
            ["--num-paired", "1", "--rank", "40"],
            "rank 40 is larger than a side of model.layers.{layer}.self_attn.v_proj [32, 64]; use at most 32",
        ),
    ],
)
def test_bad_settings(settings: list[str], message: str, pkt: Run, paths: dict[str, Path]) -> None:
    status, printed, err = finetune(pkt, paths, *settings)
    assert (status, printed) == (2, "")
    assert any(err == f"pkt: error: {message.format(layer=layer)}\n" for layer in range(3)), err
    assert not paths["out"].exists() and not paths["metrics"].exists()


def test_a_source_is_needed_and_its_tokens_must_be_the_targets(
    pkt: Run, paths: dict[str, Path], tmp_path: Path
) -> None:
    alone = {name: path for name, path in paths.items() if name != "source"}
    status, _, err = finetune(pkt, alone, *SEMALIGN)
    assert (status, err) == (2, "pkt: error: num_paired 1 needs --source, whose layers are paired\n")
    stranger = make_model(tmp_path / "stranger", seed=4)
    file = stranger / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {
        {"a": "aa"}.get(token, token): number for token, number in content["model"]["vocab"].items()
    }
    file.write_text(json.dumps(content))
    status, _, err = finetune(pkt, {**paths, "source": stranger}, *SEMALIGN)
    assert status == 2 and err.startswith("pkt: error: source and target must share their vocabulary: token 'a"), err
    assert not paths["out"].exists() and not paths["metrics"].exists()


def test_no_train_examples(pkt: Run, paths: dict[str, Path]) -> None:
    paths["train"].write_text("\n")
    _, _, err = finetune(pkt, paths, *SEMALIGN)
    assert err == f"pkt: error: {paths['train']}: holds no example; expected one JSON object a line\n"
