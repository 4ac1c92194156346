from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.methods import laten
from pkt_stages.models.changes import read_changes
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.merge import merged
from pkt_stages.models.selection import open_selection
from tests.stages.selection_files import options, write_inputs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    """What `pkt inject` takes, with weights large enough to move the target."""
    folder = tmp_path_factory.mktemp("aligned")
    selection = write_inputs(folder, source_folder, target_folder)["selection"]
    of = open_selection(selection, rate=0.2).meta
    params = {"rate": 0.2, "variant": "default", "seed": 0, "code": "laten", "given": "selected", "d_hidden": 8}
    meta = {"source": of["source"], "target": of["target"], "method": "laten", "params": params}
    hashes = {}
    for step, std in ((1, 0.02), (2, 0.05), (3, 1e-4)):
        settings = laten.Params(init_std=std, d_hidden=8)
        generator = torch.Generator().manual_seed(step)
        weights = laten.mapping(settings, d_source=96, d_target=64, generator=generator).state_dict()
        path = folder / "mapping" / f"step_{step:02d}.safetensors"
        artifacts.save(path, artifacts.MAPPING, weights, {**meta, "step": step})
        hashes[step] = weights_hash(weights)
    artifacts.write_json(folder / "mapping" / "chosen.json", {"chosen_step": 2, "weights_hash": hashes, **meta})
    return {"selection": selection, "mapping": folder / "mapping"}


def inject(
    pkt: Run, target: Path, aligned: dict[str, Path], out: Path, *settings: object, **changed: Path
) -> tuple[int, str, str]:
    return pkt("inject", "--target", target, *options(**{**aligned, **changed}), "--out", out, *settings)


def test_one_delta_per_transfer_example_at_the_chosen_step(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    status, printed, err = inject(pkt, target_folder, aligned, tmp_path / "d")
    assert status == 0, err
    assert printed.startswith("inject: 2 deltas at step 2, up to ")
    selection = artifacts.load(aligned["selection"] / "selection.safetensors", artifacts.SELECTION)
    rows = artifacts.load(aligned["selection"] / "rows.safetensors", artifacts.SOURCE_ROWS)
    weights = load_file(aligned["mapping"] / "step_02.safetensors")
    changes = read_changes(tmp_path / "d")
    assert list(changes.items) == ["toy_10", "toy_11"]
    assert (changes.meta["command"], changes.meta["method"]) == ("inject", "laten")
    assert changes.meta["params"]["rate"] == 0.2
    assert changes.meta["target"]["name"] == "target" and changes.meta["source"]["name"] == "source"
    hashes = {changes.meta["base_weights_hash"]}
    for id, example in (("toy_10", 3), ("toy_11", 4)):
        stored = changes.items[id]
        delta: Any = stored.load()
        # floor(0.2 * 96) FFN and floor(0.2 * 64) attention neurons: the first of the selection's.
        for site, sublayer, k in (("ffn_down", "ffn", 19), ("attn_v", "attn", 12)):
            expected = selection[f"default.{sublayer}_target_neurons"][example, :, :k]
            assert torch.equal(delta[site].neurons, expected)
            assert torch.equal(delta[site].layers, torch.arange(3))
            layer = int(selection[f"default.{sublayer}_layers"][example, 1, 0])
            neuron = int(selection[f"default.{sublayer}_source_neurons"][example, 1, 2])
            row = rows[f"{site}.{layer}"][rows[f"neurons.{sublayer}.{layer}"].tolist().index(neuron)]
            mapped = weights[f"{site}.2.weight"] @ torch.relu(weights[f"{site}.0.weight"] @ row)
            assert torch.allclose(delta[site].rows[1, 2], mapped, rtol=1e-4, atol=1e-7)
        assert stored.facts["step"] == 2 and 0 < stored.facts["rounding_loss"] < 0.01
        assert set(stored.facts["range"]) == set(delta)
        hashes.add(stored.facts["weights_hash"])
    assert len(hashes) == 3


def test_every_step(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    status, printed, err = inject(pkt, target_folder, aligned, tmp_path / "all", "--every-step")
    assert status == 0, err
    assert printed.startswith("inject: 6 deltas at step 1, 2, 3, up to ")
    assert inject(pkt, target_folder, aligned, tmp_path / "one", "--step", "3")[0] == 0
    every, one = read_changes(tmp_path / "all"), read_changes(tmp_path / "one")
    assert list(every.items) == [f"step_0{step}/{id}" for step in (1, 2, 3) for id in ("toy_10", "toy_11")]
    for id in ("toy_10", "toy_11"):
        alone, among = (load_file(stored.path) for stored in (one.items[id], every.items[f"step_03/{id}"]))
        assert alone.keys() == among.keys() and all(torch.equal(alone[name], among[name]) for name in alone)


def test_a_delta_gives_the_recorded_weights_and_comes_out_again(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    assert inject(pkt, target_folder, aligned, tmp_path / "d")[0] == 0
    model = load_model(resolve(str(target_folder)))
    base = weights_hash(model.state_dict())
    hashes = []
    for stored in read_changes(tmp_path / "d").items.values():
        with merged(model, stored.load()) as report:
            hashes.append(weights_hash(model.state_dict()))
        assert stored.facts["weights_hash"] == hashes[-1] != base
        assert stored.facts["changed_weights"] == report.changed_weights
        assert weights_hash(model.state_dict()) == base
    assert hashes[0] != hashes[1]


def test_one_example_alone(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    for wanted in ("toy_11", "1"):
        assert inject(pkt, target_folder, aligned, tmp_path / wanted, "--example", wanted)[0] == 0
        assert list(read_changes(tmp_path / wanted).items) == ["toy_11"]


def test_runs_write_equal_bytes(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert inject(pkt, target_folder, aligned, tmp_path / name)[0] == 0
    names = [p.name for p in (tmp_path / "a").iterdir()]
    assert len(names) == 3
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_rounding_warns_and_refuses(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "warned", "--dtype", "bfloat16", "--step", "2")
    assert status == 0
    assert "warning: toy_10: rounding loses " in err
    small = ("--dtype", "float16", "--step", "3")
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "refused", *small)
    assert status == 2
    message = err[err.index("pkt: error") :]
    assert message.startswith("pkt: error: rounding to float16 would lose ")
    assert "of the delta's norm (limit 50%); choose a wider dtype (--dtype float32)" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--step", "1", "--every-step"), "--every-step and --step contradict each other; leave one out"),
        (("--step", "4"), "step 4 is not one of the 3 steps in {mapping}"),
        (("--example", "toy_1"), "the selection has no transfer example 'toy_1'; found 0: toy_10, 1: toy_11"),
        (
            ("--dtype", "int8"),
            "options of `inject`: dtype: expected one of auto, float32, float16, bfloat16, found 'int8'",
        ),
    ],
)
def test_bad_settings(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", *settings)
    assert status == 2
    assert err == f"pkt: error: {message.format(**aligned)}\n"
    assert not (tmp_path / "out").exists()


def changed(aligned: dict[str, Path], tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the folder of mappings with another chosen.json."""
    folder = Path(shutil.copytree(aligned["mapping"], tmp_path / "changed"))
    content = json.loads((folder / "chosen.json").read_text())
    edit(content)
    (folder / "chosen.json").write_text(json.dumps(content))
    return folder


def test_steps_of_another_run(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    folder = changed(aligned, tmp_path, lambda c: c["weights_hash"].update({"2": c["weights_hash"]["1"]}))
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", mapping=folder)
    assert status == 2
    of = folder / "chosen.json"
    assert err == f"pkt: error: {folder / 'step_02.safetensors'}: not of the same run of `pkt align` as {of}\n"


def test_code_that_is_gone(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    folder = changed(aligned, tmp_path, lambda c: c["params"].update(code="mine"))
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", mapping=folder)
    assert status == 2
    assert err.startswith("pkt: error: code 'mine': no such file in pkt_stages/methods; found ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "JSONDecodeError: "), ("[]", "TypeError: "), ('{"weights_hash": {}}', "KeyError: 'chosen_step'")],
)
def test_a_malformed_choice(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path, content: str, reason: str
) -> None:
    bad = tmp_path / "mapping"
    bad.mkdir()
    (bad / "chosen.json").write_text(content)
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", mapping=bad)
    assert status == 2
    assert err.startswith(f"pkt: error: {bad / 'chosen.json'}: not written by `pkt align` ({reason}")
    assert len(err.splitlines()) == 1
    (bad / "chosen.json").unlink()
    _, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", mapping=bad)
    assert err == f"pkt: error: {bad / 'chosen.json'}: no such file; expected a folder of `pkt align`\n"


def test_wrong_target(
    pkt: Run, aligned: dict[str, Path], source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    _, _, err = inject(pkt, source_folder, aligned, tmp_path / "out")
    assert err == f"pkt: error: {source_folder}: this is the selection's source; its target is target\n"


def test_a_mapping_between_other_models(
    pkt: Run, aligned: dict[str, Path], source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    other = write_inputs(tmp_path / "swapped", source_folder, source_folder)["selection"]
    _, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", selection=other)
    assert err == (
        f"pkt: error: {aligned['mapping']}: trained for another target than the selection's, source;"
        " run `pkt align` again\n"
    )
