from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.models.adapters import Adapter, load_adapter, save_adapter
from pkt_stages.models.changes import Change, DenseDelta, read_changes, write_changes
from pkt_stages.models.load import identity, load_model, load_tokenizer, resolve
from pkt_stages.models.merge import merged
from tests.models.deltas import logits_of, oracle, random_delta

Run = Callable[..., tuple[int, str, str]]
SHAPES = {"model.layers.0.mlp.up_proj": (96, 64), "lm_head": (264, 64), "model.embed_tokens": (64, 264)}


@pytest.fixture
def changes(target_folder: Path) -> dict[str, Change]:
    """One of each kind, all of which move the target."""
    model, generator = load_model(resolve(str(target_folder))), torch.Generator().manual_seed(1)
    factors = {
        name: (torch.randn(4, in_, generator=generator), 0.05 * torch.randn(out, 4, generator=generator))
        for name, (out, in_) in SHAPES.items()
    }
    dense = oracle(model, random_delta(model, k=30, scale=0.05, seed=4))
    return {
        "toy_10": random_delta(model, k=20, scale=0.05),
        "seed_0": Adapter(factors, alpha=8.0),
        "delta": DenseDelta({name: matrix.float() for name, matrix in dense.items()}),
    }


@pytest.fixture
def row(target_folder: Path, changes: dict[str, Change], tmp_path: Path) -> Path:
    meta = {"command": "inject", "method": "m", "source": None, "params": {}}
    write_changes(tmp_path / "row", changes, meta | {"target": identity(resolve(str(target_folder)))})
    return tmp_path / "row"


def export(pkt: Run, target: Path, row: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return pkt("export", "--model", target, "--delta", row, "--out", out, *more)


def expected_logits(target: Path, change: Change) -> Tensor:
    model = load_model(resolve(str(target)))
    with merged(model, change):
        found = logits_of(model)
    assert float((found - logits_of(model)).abs().max()) > 0.1
    return found


@pytest.mark.parametrize("label", ["toy_10", "seed_0", "delta"])
def test_any_row_becomes_a_complete_model(
    pkt: Run, target_folder: Path, changes: dict[str, Change], row: Path, tmp_path: Path, label: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    status, printed, err = export(pkt, target_folder, row, out, "--run", label)
    assert status == 0, err
    assert printed.startswith(f"export: {label} in the target, ") and printed.count("\n") == 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(model), expected_logits(target_folder, changes[label]))
    assert model.dtype == torch.float32
    text = "What comes after 1?"
    tokenizers = [AutoTokenizer.from_pretrained(out), load_tokenizer(resolve(str(target_folder)))]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "row"]
    # It is a model for every command, so that another row can go on top.
    assert export(pkt, out, row / "seed_0", tmp_path / "next", "--any-base")[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "next"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{n}.weight" for n in SHAPES}


def test_a_low_rank_change_becomes_an_adapter(
    pkt: Run, target_folder: Path, changes: dict[str, Change], row: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    status, printed, err = export(pkt, target_folder, row, tmp_path / "adapter", "--run", 1, "--adapter")
    assert status == 0, err
    assert printed.startswith("export: seed_0 as a PEFT adapter -> ")
    base = load_model(resolve(str(target_folder)))
    with torch.no_grad():
        found = logits_of(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    torch.testing.assert_close(found, expected_logits(target_folder, changes["seed_0"]), rtol=1e-4, atol=1e-4)
    assert load_adapter(tmp_path / "adapter").alpha == 8.0
    assert list(read_changes(tmp_path / "adapter").items) == ["adapter"]


@pytest.mark.parametrize(("label", "file", "kind"), [("toy_10", 0, "sparse"), ("delta", 2, "dense")])
def test_what_is_no_adapter(
    pkt: Run, target_folder: Path, row: Path, tmp_path: Path, label: str, file: int, kind: str
) -> None:
    out = tmp_path / "adapter"
    assert export(pkt, target_folder, row, out, "--run", label, "--adapter") == (
        2,
        "",
        f"pkt: error: {row}/delta_{file}.safetensors: a {kind} change, which is no product of two factors as PEFT's"
        " adapters are; leave out --adapter for a whole model\n",
    )
    assert not out.exists()


def test_the_dtype_is_the_checkpoint_s_or_another(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    load_model(resolve(str(target_folder)), dtype="bfloat16").save_pretrained(half)
    load_tokenizer(resolve(str(target_folder))).save_pretrained(half)
    adapter = row / "seed_0"
    for name, more, dtype in (("a", (), torch.bfloat16), ("b", ("--dtype", "float32"), torch.float32)):
        status, _, err = export(pkt, half, adapter, tmp_path / name, "--any-base", *more)
        assert status == 0, err
        assert load_model(resolve(str(tmp_path / name))).dtype == dtype
        assert all(w.dtype == dtype for w in load_file(tmp_path / name / "model.safetensors").values())


def test_rounding_warns_and_refuses(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    meta = {"command": "inject", "method": None, "target": identity(resolve(str(target_folder))), "source": None}
    for name, scale in (("some", 1e-3), ("most", 1e-6)):
        write_changes(tmp_path / name, {name: random_delta(model, k=5, scale=scale)}, meta | {"params": {}})
    status, _, err = export(pkt, target_folder, tmp_path / "some", tmp_path / "a", "--dtype", "bfloat16")
    assert status == 0 and err.startswith("warning: some: rounding loses ")
    most = (tmp_path / "most", tmp_path / "b", "--dtype", "bfloat16")
    status, _, err = export(pkt, target_folder, *most)
    assert status == 2 and err.startswith("pkt: error: rounding to bfloat16 would lose ")
    assert not (tmp_path / "b").exists()
    assert export(pkt, target_folder, *most, "--allow-rounding-loss")[0] == 0
    assert (tmp_path / "b" / "config.json").is_file()


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, row: Path, tmp_path: Path) -> None:
    names = [identity(resolve(str(folder))) for folder in (target_folder, source_folder)]
    out, adapter = tmp_path / "out", ("--run", "seed_0", "--adapter")
    for target, given, more, message in (
        (target_folder, row, (), f"{row}: holds 3 runs; choose one with --run: toy_10, seed_0, delta"),
        (target_folder, row, ("--run", "seed_1"), f"{row}: has no run 'seed_1'; found toy_10, seed_0, delta"),
        (target_folder, tmp_path / "x", (), f"{tmp_path}/x: no such file or folder; expected a row's folder, a PEFT"
         " adapter or a delta"),
        (source_folder, row, ("--run", "delta"), f"{row}: made for the target target at {names[0]['revision']}, found"
         f" source at {names[1]['revision']}; give its own target, or insist with --any-base"),
        (source_folder, row / "seed_0", ("--any-base",), "adapter: lm_head.weight is [264, 96] in the model, [264, 64]"
         " in the adapter"),
        (source_folder, row / "seed_0", ("--adapter",), "adapter: lm_head.weight is [264, 96] in the model, [264, 64]"
         " in the adapter"),
        (target_folder, row, (*adapter, "--dtype", "float32"),
         "--dtype, --scale and --allow-rounding-loss are for whole models; leave them out, or --adapter"),
        (target_folder, row, (*adapter, "--device", "tpu9"),
         "device 'tpu9' cannot be used here (Invalid device string: 'tpu9'); expected cpu, cuda, cuda:N or auto"),
    ):  # fmt: skip
        status, printed, err = export(pkt, target, given, out, *more)
        assert (status, printed, err.splitlines()[-1]) == (2, "", f"pkt: error: {message}")
        assert not out.exists()
    out.mkdir()
    assert (
        export(pkt, target_folder, row, out, *adapter)[2] == f"pkt: error: {out}: is there already; give a new folder\n"
    )
    assert list(out.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(
    pkt: Run, target_folder: Path, row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt_stages.models import load

    monkeypatch.setattr(load, "load_tokenizer", lambda ref: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(pkt, target_folder, row, tmp_path / "out", "--run", 0)
    assert list(tmp_path.iterdir()) == [row]


def test_an_exported_adapter_equals_the_row_s(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    """And one from elsewhere is written anew, with the target's name."""
    foreign = tmp_path / "foreign"
    save_adapter(foreign, load_adapter(row / "seed_0"), "somebody/else")
    for number, given in enumerate((row / "seed_0", foreign)):
        assert export(pkt, target_folder, given, tmp_path / str(number), "--adapter", "--any-base")[0] == 0
    files = [sorted((tmp_path / name).iterdir()) for name in ("row/seed_0", "0", "1")]
    assert len(files[0]) == 2
    for equal in zip(*files, strict=True):
        assert len({path.read_bytes() for path in equal}) == 1
