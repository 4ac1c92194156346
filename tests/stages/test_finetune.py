from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages import artifacts
from pkt_stages.models import trainer
from pkt_stages.models.changes import read_changes
from pkt_stages.models.load import identity, load_model, load_tokenizer, resolve
from tests.conftest import make_model, write_examples
from tests.stages.selection_files import options

Run = Callable[..., tuple[int, str, str]]
ANSWERS = [f"It is {i + 1}." for i in range(8)]
SOURCE = {"name": "source", "revision": "sha256:0"}
# 4 steps an epoch, 12 in all; a checkpoint after every second one.
SETTINGS = ["--epochs", "3", "--batch-size", "2", "--rank", "4", "--alpha", "8", "--lr", "1e-2", "--max-length", "128"]
SETTINGS += ["--seeds", "0"]


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    names = {"train": "train.jsonl", "out": "adapters", "metrics": "finetune.json", "scratch": "scratch"}
    write_examples(tmp_path / "train.jsonl", ANSWERS)
    return {option: tmp_path / name for option, name in names.items()}


def write_submatrices(path: Path, target: Path) -> Path:
    """Random values for the four sites of the target's layers, as `pkt seek` writes them."""
    model = load_model(resolve(str(target)))
    generator = torch.Generator().manual_seed(3)
    names = {
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_v": "self_attn.v_proj",
        "attn_o": "self_attn.o_proj",
    }
    tensors = {"layers": torch.tensor([0, 1, 2]), "layer_sensitivity": torch.ones(4, dtype=torch.float64)}
    for weight, name in names.items():
        tensors[f"{weight}.corner"] = torch.zeros(3, 2, dtype=torch.int64)
        for layer in range(3):
            shape = model.get_submodule(f"model.layers.{layer}.{name}").weight.shape
            tensors[f"{weight}.submatrix.{layer}"] = 0.1 * torch.randn(shape, generator=generator)
    meta = {"source": {"model": SOURCE}, "target": {"model": identity(resolve(str(target)))}}
    artifacts.save(path, artifacts.SUBMATRICES, tensors, meta)
    return path


def finetune(pkt: Run, target: Path, paths: dict[str, Path], *settings: str) -> tuple[int, str, str]:
    method = [] if "--method" in settings else ["--method", "m"]
    return pkt("finetune", "--target", target, *options(**paths), *method, *SETTINGS, *settings)


def contents(paths: dict[str, Path]) -> dict[str, bytes]:
    files = [p for p in paths["out"].rglob("*") if p.is_file()]
    return {str(p.relative_to(paths["out"])): p.read_bytes() for p in files} | {
        "metrics": paths["metrics"].read_bytes()
    }


def other(paths: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The same input, other outputs and scratch."""
    return {**paths, "out": folder / "adapters", "metrics": folder / "finetune.json", "scratch": folder / "scratch"}


def test_it_learns_and_the_adapter_fits_the_untouched_target(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models.losses import example_losses

    curves = tmp_path / "curves"
    status, printed, err = finetune(
        pkt, target_folder, {**paths, "curves": curves}, "--epochs", "12", "--dropout", "0", "--seeds", "0,3"
    )
    assert status == 0, err
    found = json.loads(paths["metrics"].read_text())
    assert (found["num_examples"], found["num_steps"]) == (8, 48)
    # 8 bytes and EOS.
    assert found["num_supervised_tokens"] == 12 * 8 * 9
    assert set(found["seeds"]) == {"0", "3"} and found["params"]["seeds"] == [0, 3]
    assert printed.startswith("finetune: m, 2 seeds, loss by epoch ")
    records = found["seeds"]
    means = [sum(r["loss_by_epoch"][i] for r in records.values()) / 2 for i in (0, -1)]
    assert [found["first_epoch_loss"], found["last_epoch_loss"]] == pytest.approx(means)
    assert records["0"]["adapter_hash"] != records["3"]["adapter_hash"]
    tokenizer = load_tokenizer(resolve(str(target_folder)))
    examples = [encode(tokenizer, e, template="chat", max_length=128) for e in read_examples(paths["train"])]
    for seed, record in records.items():
        assert (record["initial_logits_error"], record["adapter_rank"]) == (0, 4)
        assert record["num_trainable_parameters"] == sum(
            p.numel() for p in load_tensors(paths["out"] / f"seed_{seed}").values()
        )
        assert len(record["loss_by_epoch"]) == 12 and len(record["loss_by_step"]) == 48
        assert [point["step"] for point in found["curve"]] == list(range(1, 49))
        # The random head's logits are small, so that the loss ends at 1.5 however long the training.
        assert record["loss_by_epoch"][-1] < 2 < 4 < record["loss_by_epoch"][0]
        mean = sum(record["loss_by_step"][4:8]) / 4
        assert record["loss_by_epoch"][1] == pytest.approx(mean)
        model = PeftModel.from_pretrained(load_model(resolve(str(target_folder))), paths["out"] / f"seed_{seed}")
        with torch.no_grad():
            assert float(example_losses(model, examples).mean()) < record["loss_by_epoch"][-1] + 0.1
    written = (curves / "plots" / "metrics" / "seed_3" / "loss.tsv").read_text().splitlines()
    assert [float(line.split("\t")[1]) for line in written[1:]] == pytest.approx(records["3"]["loss_by_step"])


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_the_first_loss_is_the_mean_over_the_batchs_tokens(
    pkt: Run, target_folder: Path, paths: dict[str, Path]
) -> None:
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples

    write_examples(paths["train"], ["It is 1.", "A far longer answer than the others.", "3"])
    settings = ["--batch-size", "3", "--epochs", "1", "--dropout", "0", "--labels", "all"]
    assert finetune(pkt, target_folder, {**paths}, *settings, "--micro-batch-size", "2")[0] == 0
    ref = resolve(str(target_folder))
    model, tokenizer = load_model(ref).double(), load_tokenizer(ref)
    total, count = 0.0, 0
    for example in read_examples(paths["train"]):
        e = encode(tokenizer, example, template="chat", max_length=128, labels="all")
        with torch.no_grad():
            logs = model(torch.tensor([e.ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(e.labels[1:]):
            if label != -100:
                total, count = total - float(logs[place, label]), count + 1
    found = json.loads(paths["metrics"].read_text())
    assert found["seeds"]["0"]["loss_by_step"][0] == pytest.approx(total / count, rel=1e-5)
    assert found["num_supervised_tokens"] == count


@pytest.mark.parametrize("init", ["random", "pissa", "seeking"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    init: str,
    pkt: Run,
    target_folder: Path,
    paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if init == "seeking":
        paths = {**paths, "submatrices": write_submatrices(tmp_path / "sub.safetensors", target_folder)}
    settings = ["--init", init, "--dropout", "0.1"]
    assert finetune(pkt, target_folder, paths, *settings)[0] == 0
    again = other(paths, tmp_path / "again")
    steps: list[int] = []
    step_end = trainer._Watch.on_step_end

    def stop_at(last: int) -> None:
        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == last:
                raise InterruptedError
            steps.append(state.global_step)
            step_end(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainer._Watch, "on_step_end", on_step_end)

    for last in (1, 8, 11):  # before any checkpoint, after the one of step 6 (within an epoch), after 10
        stop_at(last)
        with pytest.raises(InterruptedError):
            finetune(pkt, target_folder, again, *settings)
    assert not again["out"].exists() and not again["metrics"].exists()
    stop_at(-1)
    assert finetune(pkt, target_folder, again, *settings)[0] == 0
    assert steps == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    assert contents(again) == contents(paths)
    assert not list(again["scratch"].rglob("checkpoint-*"))


def test_a_half_written_checkpoint_is_passed_over(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(pkt, target_folder, paths)[0] == 0
    again = other(paths, tmp_path / "again")
    save = trainer._Watch.on_save

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise InterruptedError
        save(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer._Watch, "on_save", on_save)
    with pytest.raises(InterruptedError):
        finetune(pkt, target_folder, again)
    next(again["scratch"].glob("*/trainer/checkpoint-6/trainer_state.json")).write_text("{")
    monkeypatch.setattr(trainer._Watch, "on_save", save)
    assert finetune(pkt, target_folder, again)[0] == 0
    assert contents(again) == contents(paths)


@pytest.mark.parametrize(
    ("damaged", "left"),
    [
        ("trainer/checkpoint-10/adapter_model.safetensors", 8),
        ("trainer/checkpoint-10/optimizer.pt", 8),
        ("trainer/checkpoint-10/trainer_state.json", 8),
        ("trainer/checkpoint-10/whole", 8),
        ("begun.json", 0),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(
    pkt: Run,
    target_folder: Path,
    paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: str,
    left: int,
) -> None:
    """The run goes on from the one before, to the same bytes."""
    assert finetune(pkt, target_folder, paths)[0] == 0
    again = other(paths, tmp_path / "again")
    step_end, steps = trainer._Watch.on_step_end, []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 11 and not steps:
            raise InterruptedError
        if tmp_path.joinpath("damaged").exists():
            steps.append(state.global_step)
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer._Watch, "on_step_end", on_step_end)
    with pytest.raises(InterruptedError):
        finetune(pkt, target_folder, again)
    path = next(again["scratch"].glob(f"*/{damaged}"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tmp_path.joinpath("damaged").touch()
    status, _, err = finetune(pkt, target_folder, again)
    assert (status, err.count("damaged, or of another run; set aside and made again")) == (0, 1), err
    assert steps[0] == left + 1
    assert contents(again) == contents(paths)


def test_a_run_killed_after_its_last_step(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(pkt, target_folder, paths, "--init", "pissa")[0] == 0
    again = other(paths, tmp_path / "again")
    save = trainer.adapters.save_adapter

    def kill(*args: Any, **kwargs: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(trainer.adapters, "save_adapter", kill)
    with pytest.raises(InterruptedError):
        finetune(pkt, target_folder, again, "--init", "pissa")
    monkeypatch.setattr(trainer.adapters, "save_adapter", save)
    assert finetune(pkt, target_folder, again, "--init", "pissa")[0] == 0
    assert contents(again) == contents(paths)


def test_an_added_seed_trains_alone(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = trainer.train
    monkeypatch.setattr(trainer, "train", lambda seed, *a, **k: (trained.append(seed), train(seed, *a, **k))[1])
    assert finetune(pkt, target_folder, paths, "--seeds", "1")[0] == 0
    first = contents(paths)
    # DVC deletes the outputs before it runs a stage again.
    shutil.rmtree(paths["out"])
    curves = tmp_path / "curves"
    assert finetune(pkt, target_folder, {**paths, "curves": curves}, "--seeds", "0,1")[0] == 0
    assert trained == [1, 0]
    both = contents(paths)
    adapter = {name: value for name, value in first.items() if name.startswith("seed_1/")}
    assert len(adapter) == 2 and {name: both[name] for name in adapter} == adapter
    assert json.loads(both["metrics"])["seeds"]["1"] == json.loads(first["metrics"])["seeds"]["1"]
    assert len((curves / "plots" / "metrics" / "seed_1" / "loss.tsv").read_text().splitlines()) == 13
    # An adapter that was damaged in scratch is made again.
    damaged = next(p for p in paths["scratch"].glob("*/adapter/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert finetune(pkt, target_folder, paths, "--seeds", "0,1")[0] == 0
    assert len(trained) == 3 and contents(paths) == both
    # So is a record in which one digit has changed.
    damaged = next(p for p in paths["scratch"].glob("*/record.json"))
    digit = damaged.read_bytes().index(b"loss_by_epoch") + 20
    content = damaged.read_bytes()
    damaged.write_bytes(content[:digit] + b"7" + content[digit + 1 :])
    assert finetune(pkt, target_folder, paths, "--seeds", "0,1")[0] == 0
    assert len(trained) == 4 and contents(paths) == both
    del trained[2:]
    # Anything else that changes makes both train again.
    assert finetune(pkt, target_folder, paths, "--seeds", "0,1", "--lr", "1e-3")[0] == 0
    assert trained == [1, 0, 0, 1]


def test_two_processes_write_the_same_bytes(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*SETTINGS, "--method", "pissa", "--init", "pissa", "--micro-batch-size", "1"]
    written = []
    for name in ("one", "two"):
        outputs = other(paths, tmp_path / name)
        command = ["finetune", "--target", target_folder, *options(**outputs), *settings]
        if name == "two":
            program = [sys.executable, "-m", "pkt_stages", *map(str, command)]
            subprocess.run(program, check=True, capture_output=True, cwd=tmp_path)
        else:
            assert pkt(*command)[0] == 0
        written.append(contents(outputs))
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in b"".join(written[0].values())


def test_settings_come_from_section_task_and_method(
    pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        "finetune: {epochs: 9, rank: 3, lr: 1.0e-3}\ntask: {toy: {finetune: {epochs: 1}}}\n"
        "made_by: {finetune: {few: {num_examples: 2, init: pissa}}}\n"
    )
    given = ["--method", "few", "--task", "toy", "--params", str(file), "--batch-size", "2"]
    assert pkt("finetune", "--target", target_folder, *options(**paths), *given)[0] == 0
    found = json.loads(paths["metrics"].read_text())
    assert (found["num_examples"], found["num_steps"], found["method"]) == (2, 1, "few")
    assert {k: found["params"][k] for k in ("init", "epochs", "rank")} == {"init": "pissa", "epochs": 1, "rank": 3}


def test_what_is_noted_down_about_a_row(pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    target = identity(resolve(str(target_folder)))
    assert finetune(pkt, target_folder, paths, "--epochs", "1", "--seeds", "3,0")[0] == 0
    found = read_changes(paths["out"])
    assert {key: found.meta[key] for key in ("command", "method", "target", "source")} == {
        "command": "finetune",
        "method": "m",
        "target": target,
        "source": None,
    }
    assert (found.meta["params"]["epochs"], found.meta["params"]["init"]) == (1, "random")
    assert {label: stored.facts for label, stored in found.items.items()} == {
        "seed_3": {"seed": 3},
        "seed_0": {"seed": 0},
    }
    config = json.loads((paths["out"] / "seed_0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == target["name"]
    paths = {**paths, "submatrices": write_submatrices(tmp_path / "sub.safetensors", target_folder)}
    assert finetune(pkt, target_folder, paths, "--epochs", "1", "--init", "seeking")[0] == 0
    assert read_changes(paths["out"]).meta["source"] == SOURCE
    assert json.loads(paths["metrics"].read_text())["source"] == SOURCE


def test_a_loss_that_is_not_finite_stops(pkt: Run, target_folder: Path, paths: dict[str, Path]) -> None:
    status, _, err = finetune(pkt, target_folder, paths, "--lr", "1e30", "--max-grad-norm", "0", "--warmup-ratio", "0")
    assert status == 2
    assert "seed 0, step 2: loss nan or its gradient is not finite; lower lr, or use float32" in err
    assert not paths["out"].exists() and not paths["metrics"].exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--init", "seeking"], "init seeking needs --submatrices (from `pkt seek`)"),
        (["--submatrices", "x"], "init random has no use for --submatrices"),
        (["--init", "svd"], "options of `finetune`: init: expected one of random, pissa, seeking, found 'svd'"),
        (["--num-examples", "9"], "{train}: holds 8 examples, num_examples asks for 9"),
        (["--max-length", "20"], "example toy_0: {tokens} tokens, more than the 20 that are allowed"),
        (
            ["--rank", "40"],
            "rank 40 is larger than a side of model.layers.0.self_attn.v_proj [32, 64]; use at most 32",
        ),
        (
            ["--seeds", "1,1"],
            "options of `finetune`: seeds must be different numbers, at least one, found [1, 1]",
        ),
        (["--dropout", "1"], "options of `finetune`: dropout must be at least 0 and below 1, found 1.0"),
        (["--lr", "0"], "options of `finetune`: lr must be above 0, found 0.0"),
        (["--warmup-ratio", "1"], "options of `finetune`: warmup_ratio must be at least 0 and below 1, found 1.0"),
    ],
)
def test_bad_settings(settings: list[str], message: str, pkt: Run, target_folder: Path, paths: dict[str, Path]) -> None:
    status, printed, err = finetune(pkt, target_folder, paths, *settings)
    tokens = (
        len(
            load_tokenizer(resolve(str(target_folder)))(
                "<s><|user|>\nWhat comes after 0?\n<|assistant|>\nIt is 1.", add_special_tokens=False
            ).input_ids
        )
        + 1
    )
    assert (status, printed) == (2, "")
    assert err == f"pkt: error: {message.format(train=paths['train'], tokens=tokens)}\n"
    assert not paths["out"].exists() and not paths["metrics"].exists()


def test_an_empty_train_file(pkt: Run, target_folder: Path, paths: dict[str, Path]) -> None:
    paths["train"].write_text("\n")
    _, _, err = finetune(pkt, target_folder, paths)
    assert err == f"pkt: error: {paths['train']}: holds no example; expected one JSON object a line\n"


def test_submatrices_of_another_target(pkt: Run, target_folder: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    other_target = make_model(tmp_path / "elsewhere", seed=7)
    paths = {**paths, "submatrices": write_submatrices(tmp_path / "sub.safetensors", other_target)}
    _, _, err = finetune(pkt, target_folder, paths, "--init", "seeking")
    theirs, ours = (identity(resolve(str(folder)))["revision"] for folder in (other_target, target_folder))
    assert err == (
        f"pkt: error: {paths['submatrices']}: made for the target elsewhere at {theirs}, found {target_folder} at"
        f" {ours}; run `pkt seek` for this target\n"
    )


def test_a_folder_with_other_things_is_kept(pkt: Run, target_folder: Path, paths: dict[str, Path]) -> None:
    paths["out"].mkdir()
    (paths["out"] / "thesis.tex").write_text("years of work")
    _, _, err = finetune(pkt, target_folder, paths)
    assert err == (
        f"pkt: error: {paths['out']}: holds thesis.tex and no changes.json, so it is not ours to"
        " replace; give a new folder\n"
    )
