from __future__ import annotations

import json
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
from pkt_stages.tools.card import card
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


def assert_may_be_read(folder: Path) -> None:
    """By whom the other files may be; safetensors writes its own for their owner alone."""
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("label", ["toy_10", "seed_0", "delta"])
def test_any_row_becomes_a_complete_model(
    pkt: Run, target_folder: Path, changes: dict[str, Change], row: Path, tmp_path: Path, label: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    status, printed, err = export(pkt, target_folder, row, out, "--run", label)
    assert status == 0, err
    assert printed.startswith(f"export: {label} in the target, ") and printed.count("\n") == 1
    assert_may_be_read(out)
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
    assert_may_be_read(tmp_path / "adapter")
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
        (source_folder, row / "seed_0", ("--adapter", "--any-base"),
         "adapter: lm_head.weight is [264, 96] in the model, [264, 64] in the adapter"),
        (target_folder, row, (*adapter, "--dtype", "float32"),
         "--dtype, --shard and --allow-rounding-loss are for whole models; leave them out, or --adapter"),
        (target_folder, row, ("--run", "delta", "--shard", "5 GB"), "--shard 5 GB: expected a size like 5GB, in KB, MB"
         " or GB"),
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
    (tmp_path / "0/README.md").unlink()
    (tmp_path / "1/README.md").unlink()
    files = [sorted((tmp_path / name).iterdir()) for name in ("row/seed_0", "0", "1")]
    assert len(files[0]) == 2
    for equal in zip(*files, strict=True):
        assert len({path.read_bytes() for path in equal}) == 1


def evaluated(row: Path, path: Path, **more: object) -> Path:
    """Metrics as `pkt evaluate` writes them."""
    made = read_changes(row).made()
    runs = [{"label": name, "score": 25.0, "nats": -1.5} for name in made["facts"]]
    metrics = {"task": "gsm8k", "metric": "accuracy", "n": 8, "runs": runs, "made": made} | more
    path.write_text(json.dumps(metrics))
    return path


def test_the_card_tells_a_stranger(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    scores = evaluated(row, tmp_path / "m.json")
    at = identity(resolve(str(target_folder)))["revision"]
    given = ("--run", "seed_0", "--scores", scores)
    texts = []
    for name, more in (("model", ()), ("adapter", ("--adapter",)), ("again", ("--adapter",))):
        status, _, err = export(pkt, target_folder, row, tmp_path / name, *given, *more)
        assert status == 0, err
        texts.append((tmp_path / name / "README.md").read_text())
        assert str(tmp_path) not in texts[-1] and "/" not in json.loads(
            (tmp_path / name / ("config.json" if name == "model" else "adapter_config.json")).read_text()
        ).get("base_model_name_or_path", "target")
        for line in (
            "# m on target",
            f"| base model | `target`, a local folder, {at} (`pkt inspect FOLDER` shows a model's) |",
            "| source of the change | none |",
            "| made by | `pkt inject`, method `m` |",
            "| change | `seed_0`, low-rank: a low-rank change, as a LoRA adapter has it |",
            "| gsm8k | 8 | 25.0 % accuracy | -1.5000 |",
        ):
            assert line in texts[-1].splitlines()
    model, adapter, again = texts
    assert adapter == again
    assert "base_model:" not in model and "library_name: transformers\n" in model
    assert "library_name: peft\n" in adapter and "| rank and alpha | 4 and 8, the factor in it |" in adapter
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in model


def test_a_base_on_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    base = {"name": "owner/model", "revision": "a" * 40}
    factors = {"lm_head": (torch.ones(2, 4), torch.ones(6, 2))}
    save_adapter(tmp_path / "row/x", Adapter(factors, 2.0), base["name"], base)
    config = json.loads((tmp_path / "row/x/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", "a" * 40)
    row = read_changes(tmp_path / "row/x")
    text = card(row, row.items["x"], base, facts={}, scale=0.5, scores=[], adapter=True)
    assert "base_model: owner/model\nbase_model_relation: adapter\n" in text
    assert f"| base model | [owner/model](https://huggingface.co/owner/model) at {'a' * 40} |" in text
    assert f'from_pretrained("owner/model", revision="{"a" * 40}")' in text
    assert "| made by | unknown: a bare adapter says nothing of it |" in text


def test_scores_of_something_else(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "m.json"
    other = {**read_changes(row).made(), "method": "other"}
    for more, message in (
        ({"made": other}, f"{file}: of another row or run than {row} (delta); give its own metrics"),
        ({"made": None}, f"{file}: of another row or run than {row} (delta); give its own metrics"),
        ({"runs": []}, f"{file}: of another row or run than {row} (delta); give its own metrics"),
        ({"scales": {"delta": 0.5}}, f"{file}: evaluated with the factor 0.5, exported with 1.0; give --scale 0.5"),
        ({"runs": 3}, f"{file}: no metrics of `pkt evaluate` ('int' object is not iterable); give those of this row"),
    ):
        scores = evaluated(row, file, **more)
        assert export(pkt, target_folder, row, out, "--run", "delta", "--scores", scores) == (
            2, "", f"pkt: error: {message}\n",
        )  # fmt: skip
        assert not out.exists()


def test_a_factor_goes_into_an_adapter(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    given = ("--run", "seed_0", "--scale", 0.25)
    assert export(pkt, target_folder, row, tmp_path / "adapter", *given, "--adapter")[0] == 0
    assert export(pkt, target_folder, row, tmp_path / "whole", *given)[0] == 0
    assert load_adapter(tmp_path / "adapter").alpha == 2.0
    model = load_model(resolve(str(target_folder)))
    with merged(model, load_adapter(tmp_path / "adapter")):
        torch.testing.assert_close(logits_of(model), logits_of(load_model(resolve(str(tmp_path / "whole")))))


def test_large_weights_are_several_files(pkt: Run, target_folder: Path, row: Path, tmp_path: Path) -> None:
    for name, more in (("one", ()), ("many", ("--shard", "200KB"))):
        status, _, err = export(pkt, target_folder, row, tmp_path / name, "--run", "delta", *more)
        assert status == 0, err
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors*"))
    assert len(files) > 2 and files[-1] == "model.safetensors.index.json"
    one, many = (load_model(resolve(str(tmp_path / name))) for name in ("one", "many"))
    assert torch.equal(logits_of(one), logits_of(many))
