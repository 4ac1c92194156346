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
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.methods import Method, laten
from pkt_stages.models.alignment import Alignment, Data, choose
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.losses import example_losses
from pkt_stages.models.selection import open_selection
from pkt_stages.stages.align import AlignParams
from tests.stages.selection_files import options, write_inputs, write_selection

Run = Callable[..., tuple[int, str, str]]
SITE_OF = {"up_proj": "ffn_up", "down_proj": "ffn_down", "v_proj": "attn_v", "o_proj": "attn_o"}
SETTINGS = [
    *("--steps", "3", "--batch-size", "4", "--validation-size", "4", "--rate", "0.2", "--lr", "1e-2"),
    *("--set", "init_std=0.02", "--penalty", "1"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), source_folder, target_folder)


@pytest.fixture
def outputs(tmp_path: Path) -> dict[str, Path]:
    return {"out": tmp_path / "mappings", "metrics": tmp_path / "align.json", "scratch": tmp_path / "scratch"}


def align(pkt: Run, target: Path, *given: dict[str, Path], settings: list[str] | None = None) -> tuple[int, str, str]:
    paths = {name: path for part in given for name, path in part.items()}
    return pkt("align", "--target", target, *options(**paths), *(SETTINGS if settings is None else settings))


def contents(outputs: dict[str, Path]) -> dict[str, bytes]:
    files = [*outputs["out"].iterdir(), outputs["metrics"]]
    return {path.name: path.read_bytes() for path in files}


# --- parity with the published code ---------------------------------------------------------------------------------


def encoded(golden: Path, part: str) -> list[Encoded]:
    """Recorded examples without their left padding."""
    data = load_file(golden / "laten" / "D_data.safetensors")
    rows = zip(*(data[f"{part}.{name}"] for name in ("input_ids", "labels", "attention_mask")), strict=True)
    return [Encoded(ids[mask == 1].tolist(), labels[mask == 1].tolist()) for ids, labels, mask in rows]


def reference_run(golden: Path, tmp_path: Path, size: str, micro_batch_size: int, **settings: Any) -> Alignment:
    """The authors' training on their data, from their start weights, with their drawn examples."""
    models = golden / "reference_models"
    selection = load_file(golden / "laten" / "D_selection.safetensors")
    selection = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in selection.items()}
    examples = [{"set": "extract", "id": f"e{i}"} for i in range(4)] + [{"set": "transfer", "id": "t0"}]
    folder = write_selection(tmp_path, models / "source", models / "target", selection, examples=examples, max_rate=0.1)
    params = AlignParams(batch_size=4, validation_size=2, loss_reduction="sum", labels="reference_code", **settings)
    extract = {f"e{i}": e for i, e in enumerate(encoded(golden, "extract"))}
    aligned = {f"a{i}": e for i, e in enumerate(encoded(golden, "align"))}
    run = Alignment(
        load_model(resolve(str(models / "target"))),
        open_selection(folder, rate=params.rate),
        Data(extract, aligned, aligned),
        params,
        Method("laten", laten, laten.Params()),
        micro_batch_size=micro_batch_size,
    )
    recorded = json.loads((golden / "laten" / "D_train_sched_big.json").read_text())
    run.step_ids = [[f"a{i}" for i in step] for step in recorded["sampled_align_indices_per_step"]]
    start = load_file(golden / "laten" / "C_extract_translate_inject.safetensors")
    for name, site in SITE_OF.items():
        for place in (0, 2):
            weight = start[f"translator.{size}.network.{name}.{place}.weight"]
            run.network.get_parameter(f"{site}.{place}.weight").data.copy_(weight)
    return run


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str) -> float:
    """Over all weights, ||found - expected|| / ||expected||."""
    errors = []
    for name, site in SITE_OF.items():
        for place in (0, 2):
            right = expected[f"{prefix}.network.{name}.{place}.weight"]
            errors.append(float((found[f"{site}.{place}.weight"] - right).norm() / right.norm()))
    return max(errors)


def values(run: Alignment) -> dict[str, torch.Tensor]:
    return run.weights()


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_four_steps_agree_with_the_published_code(golden: Path, tmp_path: Path, micro_batch_size: int) -> None:
    run = reference_run(golden, tmp_path, "big", micro_batch_size, steps=4, schedule="onecycle")
    recorded = json.loads((golden / "laten" / "D_train_sched_big.json").read_text())
    tensors = load_file(golden / "laten" / "D_train_sched_big.safetensors")
    start = values(run)
    for index in range(4):
        record = run.step(index)
        of_step = [m for m in recorded["micro_batches"] if m["idx"] == index]
        assert record["lm_loss"] == pytest.approx(sum(m["lm"] for m in of_step) / 4, rel=1e-5)
        assert record["penalty"] == pytest.approx(1000 * of_step[0]["mse"], rel=1e-5)
        assert record["loss"] == pytest.approx(sum(m["total"] for m in of_step), rel=1e-5)
        assert record["lr"] == pytest.approx(recorded["steps"][index]["lr_used"], rel=1e-9)
        assert record["beta1"] == pytest.approx(recorded["steps"][index]["betas_used"][0], rel=1e-9)
        if index == 0:
            gradients = {name: weight.grad for name, weight in run.network.named_parameters()}
            assert largest_error(gradients, tensors, "grad.step0") < 1e-4
        if index in (0, 3):
            assert largest_error(values(run), tensors, f"weight.after{index}") < 1e-6
            # The weights hardly move, so compare the movement as well.
            moved = {name: weight - start[name] for name, weight in values(run).items()}
            expected = {
                f"m.network.{name}.{place}.weight": tensors[f"weight.after{index}.network.{name}.{place}.weight"]
                - start[f"{site}.{place}.weight"]
                for name, site in SITE_OF.items()
                for place in (0, 2)
            }
            assert largest_error(moved, expected, "m") < 2e-3


@pytest.mark.parametrize("size", ["small", "big"])
def test_a_step_at_constant_rate_agrees_with_the_published_code(golden: Path, tmp_path: Path, size: str) -> None:
    run = reference_run(golden, tmp_path, size, 4, steps=1)
    record = run.step(0)
    tensors = load_file(golden / "laten" / f"D_train_nosched_{size}.safetensors")
    assert largest_error(values(run), tensors, "weight.after0") < 1e-4
    if size == "small":
        recorded = json.loads((golden / "laten" / "D_train_nosched_small.json").read_text())["micro_batches"]
        assert record["lm_loss"] == pytest.approx(sum(m["lm"] for m in recorded[:4]) / 4, rel=1e-6)


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_run_trains_and_records(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    status, printed, err = align(pkt, target_folder, inputs, outputs, {"curves": tmp_path / "curves"})
    assert status == 0, err
    found = json.loads(outputs["metrics"].read_text())
    steps = found["steps"]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert [s["extract_id"] for s in steps] == ["toy_0", "toy_1", "toy_2"]
    assert sorted(p.name for p in outputs["out"].iterdir()) == [
        "chosen.json",
        *(f"step_0{i}.safetensors" for i in (1, 2, 3)),
    ]
    held_out = set(found["validation_ids"])
    assert len(held_out) == 4
    assert all(len(s["align_ids"]) == 3 and not held_out & set(s["align_ids"]) for s in steps)
    assert found["chosen_step"] == min(steps, key=lambda s: s["validation_loss"])["step"]
    # It learns something, so that the comparisons below mean something.
    assert steps[-1]["validation_loss"] < found["validation_loss_without_delta"] - 1e-3
    assert printed.startswith(f"align: step {found['chosen_step']} of 3, held-out loss ")
    for entry in steps:
        by_example = entry["validation_loss_by_transfer_example"]
        assert list(by_example) == ["toy_10", "toy_11"] == found["transfer_ids"]
        assert entry["validation_loss"] == pytest.approx(sum(by_example.values()) / 2)
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + entry["penalty"])
        assert set(entry["delta"]) == set(SITE_OF.values())
        assert all(d["min"] < 0 < d["rms"] < d["max"] for d in entry["delta"].values())
    mapping = artifacts.load(outputs["out"] / "step_02.safetensors", artifacts.MAPPING)
    assert mapping.shapes["ffn_up.0.weight"] == (96, 96)
    assert mapping.shapes["attn_o.2.weight"] == (64, 96)
    assert mapping.meta["step"] == 2
    assert mapping.meta["params"]["rate"] == 0.2
    assert mapping.meta["params"]["code"] == "laten"
    assert mapping.meta["params"]["init_std"] == 0.02
    chosen = json.loads((outputs["out"] / "chosen.json").read_text())
    assert chosen["chosen_step"] == found["chosen_step"]
    assert chosen["weights_hash"] == {str(s["step"]): s["weights_hash"] for s in steps}
    assert not list(outputs["scratch"].iterdir())
    curve = (tmp_path / "curves" / "plots" / "metrics" / "validation_loss.tsv").read_text().splitlines()
    assert curve[0] == "step\tvalidation_loss"
    assert [float(line.split("\t")[1]) for line in curve[1:]] == pytest.approx([s["validation_loss"] for s in steps])
    assert (tmp_path / "curves" / "plots" / "metrics" / "delta" / "ffn_up" / "rms.tsv").is_file()


def test_the_validation_is_the_held_out_answer_loss(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models.load import load_tokenizer
    from pkt_stages.models.merge import merged

    assert align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, "--labels", "all"])[0] == 0
    found = json.loads(outputs["metrics"].read_text())
    ref = resolve(str(target_folder))
    model, tokenizer = load_model(ref), load_tokenizer(ref)
    held_out = [
        encode(tokenizer, e, template="chat", max_length=256, labels="answer")
        for e in read_examples(inputs["align"])
        if e.id in found["validation_ids"]
    ]

    def loss() -> float:
        with torch.no_grad():
            return sum(float(example_losses(model, [e])[0]) for e in held_out) / len(held_out)

    assert found["validation_loss_without_delta"] == pytest.approx(loss(), rel=1e-5)
    selection, settings = open_selection(inputs["selection"], rate=0.2), laten.Params()
    network = laten.mapping(settings, d_source=96, d_target=64, generator=torch.Generator())
    mapping = artifacts.load(outputs["out"] / "step_03.safetensors", artifacts.MAPPING)
    network.load_state_dict(mapping.tensors())
    with torch.no_grad():
        mapped = network(laten.source_rows(selection, 4, settings, seed=0))
    with merged(model, laten.place(selection, 4, mapped)):
        recorded = found["steps"][2]["validation_loss_by_transfer_example"]["toy_11"]
        assert recorded == pytest.approx(loss(), rel=1e-5)


def test_micro_batches_change_rounding_only(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    runs = []
    for size in ("1", "4"):
        assert align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, "--micro-batch-size", size])[0] == 0
        runs.append(json.loads(outputs["metrics"].read_text())["steps"])
    for one, four in zip(*runs, strict=True):
        for name in ("loss", "lm_loss", "penalty", "validation_loss"):
            assert one[name] == pytest.approx(four[name], rel=1e-5)


def test_killed_and_started_again_ends_in_the_same_bytes(
    pkt: Run,
    inputs: dict[str, Path],
    outputs: dict[str, Path],
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert align(pkt, target_folder, inputs, outputs)[0] == 0
    undisturbed = contents(outputs)
    again = {name: tmp_path / "again" / path.name for name, path in outputs.items()}
    plain_step, taken = Alignment.step, []

    def dying(self: Alignment, index: int) -> dict[str, Any]:
        if index == 2:
            raise KeyboardInterrupt
        return plain_step(self, index)

    def counted(self: Alignment, index: int) -> dict[str, Any]:
        taken.append(index)
        return plain_step(self, index)

    monkeypatch.setattr(Alignment, "step", dying)
    assert align(pkt, target_folder, inputs, again)[0] == 130
    assert not again["out"].exists()
    assert not again["metrics"].exists()
    monkeypatch.setattr(Alignment, "step", counted)
    status, _, err = align(pkt, target_folder, inputs, again)
    assert status == 0
    assert "align: going on after step 2" in err
    assert taken == [2]
    assert contents(again) == undisturbed
    assert not list(again["scratch"].iterdir())


def test_another_setting_does_not_go_on_from_the_scratch_state(
    pkt: Run,
    inputs: dict[str, Path],
    outputs: dict[str, Path],
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_step = Alignment.step

    def dying(self: Alignment, index: int) -> dict[str, Any]:
        if index == 1:
            raise KeyboardInterrupt
        return plain_step(self, index)

    monkeypatch.setattr(Alignment, "step", dying)
    align(pkt, target_folder, inputs, outputs)
    monkeypatch.setattr(Alignment, "step", plain_step)
    status, _, err = align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, "--seed", "1"])
    assert status == 0
    assert "going on" not in err


def test_two_processes_write_equal_bytes(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    assert align(pkt, target_folder, inputs, outputs)[0] == 0
    other = {key: tmp_path / "other" / path.name for key, path in outputs.items()}
    command = "from pkt_stages.stages.align import align; import typer; a = typer.Typer(); a.command()(align); a()"
    arguments = ["--target", str(target_folder), *options(**inputs, **other), *SETTINGS]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, capture_output=True)
    assert contents(outputs) == contents(other)


def test_fewer_steps_leave_no_older_checkpoint(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    assert align(pkt, target_folder, inputs, outputs)[0] == 0
    first = contents(outputs)["step_01.safetensors"]
    assert align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, "--steps", "1"])[0] == 0
    assert set(contents(outputs)) == {"step_01.safetensors", "chosen.json", "align.json"}
    step = artifacts.load(outputs["out"] / "step_01.safetensors", artifacts.MAPPING)
    outputs["out"].joinpath("before.safetensors").write_bytes(first)
    before = load_file(outputs["out"] / "before.safetensors")
    assert all(torch.equal(before[name], step[name]) for name in before)


def test_the_first_of_equal_steps_is_chosen() -> None:
    steps = [{"step": s, "validation_loss": loss} for s, loss in ((1, 2.0), (2, 1.5), (3, 1.5))]
    assert choose(steps) == 2


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--rate", "0.3"], "rate 0.3 is above the selection's max_rate 0.25; run `pkt select` with a higher one"),
        (["--rate", "0.01"], "rate 0.01 selects no ffn neuron of the target; raise it"),
        (["--rate", "0"], "options of `align`: rate must be above 0 and at most 1, found 0.0"),
        (["--steps", "4"], "4 steps need as many extract examples, the selection has 3"),
        (
            ["--batch-size", "10"],
            "12 align examples are too few for 4 held out (validation_size) and 9 in a step (batch_size - 1)",
        ),
        (["--max-length", "9"], "example toy_0: 34 tokens, more than the 9 that are allowed"),
        (
            ["--labels", "question"],
            "options of `align`: labels: expected one of answer, all, reference_code, found 'question'",
        ),
        (["--device", "warp"], "device 'warp' cannot be used here"),
    ],
)
def test_bad_settings(
    pkt: Run,
    inputs: dict[str, Path],
    outputs: dict[str, Path],
    target_folder: Path,
    settings: list[str],
    message: str,
) -> None:
    status, _, err = align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, *settings])
    assert status == 2
    assert err.startswith("pkt: error: " + message.format(**inputs))
    assert len(err.splitlines()) == 1
    assert not any(path.exists() for path in outputs.values())


def test_more_steps_than_rows_are_stored_for(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    for name, kind in (("selection", artifacts.SELECTION), ("rows", artifacts.SOURCE_ROWS)):
        found = artifacts.load(inputs["selection"] / f"{name}.safetensors", kind)
        meta = {**found.meta, "params": {"max_rate": 0.25, "steps": 1}}
        artifacts.save(tmp_path / f"few/{name}.safetensors", kind, found.tensors(), meta)
    few = {"selection": tmp_path / "few"}
    status, _, err = align(pkt, target_folder, inputs, few, outputs, settings=[*SETTINGS, "--steps", "2"])
    assert status == 2
    assert err == (
        "pkt: error: 2 steps need the rows of as many extract examples, the selection stores those of 1; set"
        " `select.steps` to 2 and run `pkt select` again\n"
    )
    assert not any(path.exists() for path in outputs.values())


def test_swapped_artifacts(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    names = ("selection.safetensors", "rows.safetensors")
    for name, other in zip(names, reversed(names), strict=True):
        shutil.copy(inputs["selection"] / name, swapped / other)
    status, _, err = align(pkt, target_folder, inputs, {"selection": swapped}, outputs)
    assert status == 2
    assert err == (
        f"pkt: error: {swapped / names[0]}: expected a selection artifact (made by `pkt select`), found source_rows\n"
    )


def test_rows_of_another_selection(
    pkt: Run,
    inputs: dict[str, Path],
    outputs: dict[str, Path],
    source_folder: Path,
    target_folder: Path,
    tmp_path: Path,
) -> None:
    mixed = write_selection(tmp_path / "mixed", source_folder, target_folder, max_rate=0.3)
    shutil.copy(inputs["selection"] / "selection.safetensors", mixed)
    status, _, err = align(pkt, target_folder, inputs, {"selection": mixed}, outputs)
    assert status == 2
    rows, selection = mixed / "rows.safetensors", mixed / "selection.safetensors"
    assert f"{rows}: not of the same run of `pkt select` as {selection} (params differs)" in err


def test_another_variant_of_the_selection(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    status, _, err = align(pkt, target_folder, inputs, outputs, settings=[*SETTINGS, "--variant", "mean"])
    assert status == 2
    assert err == (
        f"pkt: error: {inputs['selection']}: has no selection 'mean'; found default; add it to `select.variants`\n"
    )


def test_the_source_given_as_target(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], source_folder: Path
) -> None:
    status, _, err = align(pkt, source_folder, inputs, outputs)
    assert status == 2
    assert err == f"pkt: error: {source_folder}: this is the selection's source; its target is target\n"


def test_other_extract_examples(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    status, _, err = align(pkt, target_folder, inputs, {"extract": inputs["align"]}, outputs)
    assert status == 2
    assert err == (
        f"pkt: error: {inputs['align']}: not the extract examples of the selection (12 here, 3 there; toy_0 differs)\n"
    )


def test_a_folder_with_other_files_is_not_replaced(
    pkt: Run, inputs: dict[str, Path], outputs: dict[str, Path], target_folder: Path
) -> None:
    outputs["out"].mkdir()
    (outputs["out"] / "thesis.tex").write_text("years of work")
    status, _, err = align(pkt, target_folder, inputs, outputs)
    assert status == 2
    refused = "holds thesis.tex and no chosen.json, so it is not ours to replace; give a new folder"
    assert err == f"pkt: error: {outputs['out']}: {refused}\n"
    assert (outputs["out"] / "thesis.tex").is_file()


def test_a_loss_of_nan_names_the_step_and_keeps_the_last_checkpoint(
    pkt: Run,
    inputs: dict[str, Path],
    outputs: dict[str, Path],
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_step = Alignment.step

    def poisoned(self: Alignment, index: int) -> dict[str, Any]:
        if index == 1:
            self.network.get_parameter("ffn_up.2.weight").data[0, 0] = float("nan")
        return plain_step(self, index)

    monkeypatch.setattr(Alignment, "step", poisoned)
    status, _, err = align(pkt, target_folder, inputs, outputs)
    kept = next(outputs["scratch"].rglob("step_01.safetensors"))
    assert status == 2
    assert err == (
        "pkt: error: step 2: loss nan or its gradient is not finite; lower lr, or use float32;"
        f" the last good checkpoint is {kept}\n"
    )
    artifacts.load(kept, artifacts.MAPPING)
    assert not outputs["out"].exists()
    assert not outputs["metrics"].exists()


def test_weights_do_not_move_on_a_bad_loss(golden: Path, tmp_path: Path) -> None:
    run = reference_run(golden, tmp_path, "big", 4, steps=1)
    run.data.extract["e0"].labels[:] = [-100] * len(run.data.extract["e0"].labels)  # a mean over no token is NaN
    before = values(run)
    with pytest.raises(UserError, match="step 1: loss nan or its gradient is not finite"):
        run.step(0)
    assert all(torch.equal(before[name], weight) for name, weight in values(run).items())
