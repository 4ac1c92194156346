"""An adapter from elsewhere becomes a row: what PEFT wrote, evaluated as PEFT computes; or one line why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_stages.models.changes import read_changes
from pkt_stages.models.load import identity, load_model, resolve
from pkt_stages.models.merge import merged
from tests.models.deltas import logits_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, target_folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter as PEFT saves it, and the logits of PEFT's own model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(target_folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    folder = tmp_path_factory.mktemp("peft") / "somebody"
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return folder, logits_of(model)


@pytest.fixture
def adapter(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy, for a test to change."""
    return Path(shutil.copytree(trained[0], tmp_path / "somebody"))


def change(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def imported(pkt: Run, adapter: Path, target: Path, *more: object) -> tuple[int, str, str]:
    return pkt("import", "--adapter", adapter, "--target", target, "--out", adapter.parent / "row", *more)


def test_a_row_computes_as_peft_does(
    pkt: Run, trained: tuple[Path, torch.Tensor], adapter: Path, target_folder: Path
) -> None:
    status, printed, err = imported(pkt, adapter, target_folder)
    assert (status, err) == (0, "")
    assert printed.startswith("import: 1 adapter of rank 4 -> ")
    row = read_changes(adapter.parent / "row")
    assert {key: row.meta[key] for key in ("command", "method", "source", "target", "params")} == {
        "command": "import",
        "method": None,
        "source": None,
        "target": identity(resolve(str(target_folder))),
        "params": {"any_base": False},
    }
    model = load_model(resolve(str(target_folder)))
    with merged(model, row.items["somebody"].load()):
        torch.testing.assert_close(logits_of(model), trained[1], rtol=1e-4, atol=1e-4)


def test_several_are_runs_of_one_row(pkt: Run, adapter: Path, target_folder: Path) -> None:
    for seed in (1, 0):
        shutil.copytree(adapter, adapter.parent / f"seeds/seed_{seed}")
    status, printed, err = imported(pkt, adapter.parent / "seeds", target_folder)
    assert (status, err) == (0, "")
    assert printed.startswith("import: 2 adapters of rank 4 -> ")
    assert list(read_changes(adapter.parent / "row").items) == ["seed_0", "seed_1"]


def test_it_is_listed_by_its_entry_alone(pkt: Run, adapter: Path, target_folder: Path) -> None:
    params = adapter.parent / "params.yaml"
    for entry, status, message in (
        ("{}", 0, ""),
        ("{alpha: 2}", 2, f"pkt: error: {params}: import: unknown key 'alpha'; expected one of any_base\n"),
    ):
        params.write_text(f"import: {{}}\nmade_by: {{imported: {{mine: {entry}}}}}\n")
        found = imported(pkt, adapter, target_folder, "--params", params, "--method", "mine")
        assert found[::2] == (status, message)
    assert read_changes(adapter.parent / "row").meta["method"] == "mine"


def refused(pkt: Run, adapter: Path, target: Path, message: str, *more: object) -> None:
    assert imported(pkt, adapter, target, *more) == (2, "", f"pkt: error: {message}\n")
    assert not (adapter.parent / "row").exists()


def test_another_base_is_refused_by_name(pkt: Run, adapter: Path, target_folder: Path) -> None:
    at = identity(resolve(str(target_folder)))["revision"]
    change(adapter, base_model_name_or_path="/models/of/other")
    refused(
        pkt, adapter, target_folder,
        f"{adapter}: made for the target /models/of/other at an unknown revision, found target at {at}; give its"
        " own target, or insist with --any-base",
    )  # fmt: skip
    assert imported(pkt, adapter, target_folder, "--any-base")[0] == 0
    assert read_changes(adapter.parent / "row").meta["params"] == {"any_base": True}


def test_no_base_is_a_warning(pkt: Run, adapter: Path, target_folder: Path) -> None:
    change(adapter, base_model_name_or_path=None)
    status, _, err = imported(pkt, adapter, target_folder)
    assert status == 0
    assert err == f"pkt: warning: {adapter}: says nothing of the model that it was made for\n"


def test_what_does_not_fit(pkt: Run, adapter: Path, target_folder: Path, source_folder: Path) -> None:
    status, _, err = imported(pkt, adapter, source_folder, "--any-base")
    assert status == 2 and err.splitlines()[1:] == [
        f"pkt: error: {adapter}: does not fit the target source: adapter: model.layers.0.mlp.down_proj.weight is [96,"
        " 128] in the model, [64, 96] in the adapter"
    ]
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.0.", "layers.7."): tensor.clone() for name, tensor in weights.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    refused(
        pkt, adapter, target_folder,
        f"{adapter}: does not fit the target target: adapter: the model has no weight"
        " model.layers.7.mlp.down_proj.weight; it belongs to another target",
    )  # fmt: skip
    change(adapter, use_rslora=True)
    refused(
        pkt, adapter, target_folder,
        f"{adapter}: its use_rslora (True) is not supported; expected plain LoRA: W + (lora_alpha / r) B A of the"
        " original weights",
    )  # fmt: skip


def test_no_adapter(pkt: Run, tmp_path: Path, target_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        message = f"{tmp_path / name}: no PEFT adapter (adapter_config.json), and no folder with one in it"
        refused(pkt, tmp_path / name, target_folder, message)
