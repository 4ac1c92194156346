"""One reader of a checkpoint: what it says of names, files, dtype and ties is what transformers makes of them, or a
refusal in one line; and what it hashes is what it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import _stored_dtype
from pkt_stages.models.load import folder_hash, identity, load_config, load_model, resolve, weights_hash
from pkt_stages.models.rows import Checkpoint
from tests.conftest import make_model, write_examples

Run = Callable[..., tuple[int, str, str]]
EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, target_folder: Path) -> Path:
    return Path(shutil.copytree(target_folder, tmp_path / "model"))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tied", seed=5, tie_word_embeddings=True)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(weights, folder / name, metadata={"format": "pt"})


def split(folder: Path, *, at: int = 5) -> None:
    """Into two files with an index, the first with `at` weights."""
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:at], "model-00002-of-00002.safetensors": names[at:]}
    for file, part in files.items():
        store(folder, {name: weights[name] for name in part}, file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / INDEX).write_text(json.dumps(index))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path) -> str:
    """What every reader of this model says."""
    said = set()
    for read in (load_model, Checkpoint):
        with pytest.raises(UserError) as caught:
            read(resolve(str(folder)))
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop().removeprefix(str(folder)).removeprefix(": ")


def check_as_transformers(folder: Path) -> None:
    """Every weight, whole or by the reader, is what transformers loads; so is the dtype."""
    from transformers import AutoModelForCausalLM

    ref = resolve(str(folder))
    checkpoint, model = Checkpoint(ref), load_model(ref)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=checkpoint.dtype)
    assert weights_hash(model.state_dict()) == weights_hash(theirs.state_dict())
    assert model.dtype == checkpoint.dtype
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(checkpoint.weight(name).to(theirs.dtype), weight), name
    assert set(checkpoint.names()) == set(dict(theirs.named_parameters()))


# --- names ------------------------------------------------------------------------------------------------------------


def bare(name: str) -> str:
    return name.removeprefix("model.")


def wrapped(name: str) -> str:
    return f"model.{name}"


@pytest.mark.parametrize("rename", [bare, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize("sharded", [False, True])
def test_other_prefixes_that_transformers_accepts(folder: Path, rename: Callable[[str], str], sharded: bool) -> None:
    whole = weights_hash(load_model(resolve(str(folder))).state_dict())
    store(folder, {rename(name): weight for name, weight in weights_of(folder).items()})
    if sharded:
        split(folder)
    check_as_transformers(folder)
    assert weights_hash(load_model(resolve(str(folder))).state_dict()) == whole


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "transformer."])
def test_other_prefixes_are_refused(folder: Path, prefix: str) -> None:
    store(folder, {prefix + name: weight for name, weight in weights_of(folder).items()})
    assert refusal(folder).startswith(f"not the weights that its config.json describes; it has {prefix}")


def test_one_weight_by_two_names(folder: Path) -> None:
    weights = weights_of(folder)
    store(folder, weights | {bare(UP): weights[UP] + 1})
    assert refusal(folder) == f"/model.safetensors: weight {UP} stands twice in the checkpoint"


def test_buffers_of_old_checkpoints_do_not_count(folder: Path) -> None:
    half = {name: weight.half() for name, weight in weights_of(folder).items()}
    store(folder, half | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    checkpoint = Checkpoint(resolve(str(folder)))
    assert checkpoint.dtype == torch.float16
    assert checkpoint.names() == sorted(half)
    check_as_transformers(folder)


@pytest.mark.parametrize("odd", ["v_head.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.bias"])
def test_weights_that_transformers_would_pass_over(folder: Path, odd: str) -> None:
    store(folder, weights_of(folder) | {odd: torch.ones(264)})
    assert refusal(folder) == f"not the weights that its config.json describes; it has {odd} too many"


@pytest.mark.parametrize("rename", [str, bare, wrapped], ids=["plain", "bare", "wrapped"])
def test_all_stages_read_the_same(pkt: Run, tied: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    """From attribution to rows, sub-matrices, the grid, ranges and a re-expression, of a tied model."""
    store(tied, {rename(name): weight for name, weight in weights_of(tied).items()})
    examples, texts = write_examples(tmp_path / "e.jsonl", ["It is 1.", "It is 2."]), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "abc" * i}) + "\n" for i in range(1, 5)))
    out, scores = tmp_path / "out", tmp_path / "scores.safetensors"
    scratch = ("--scratch", tmp_path / "scratch")
    pairs = ("--source-scores", scores, "--target-scores", scores, "--source", tied)
    compared = ("--texts", texts, "--num-texts", 4, "--batch-size", 4, "--metrics", tmp_path / "m.json")
    for words in (
        ("attribute", "--model", tied, "--extract", examples, "--out", scores, *scratch),
        ("select", *pairs, "--out", out / "selection"),
        ("seek", "--source", tied, "--target", tied, "--extract", examples, "--out", out / "s", "--metrics",
         out / "s.json", *scratch),
        ("derive", "--code", "grid", "--target", tied, "--source", tied, "--out", out / "grid"),
        ("compare", "--first", tied, "--second", tied, "--out", out / "compared", *compared),
        ("reexpress", "--model", tied, "--d-ff", 128, "--out", out / "larger"),
    ):  # fmt: skip
        status, _, err = pkt(*words)
        assert (status, err) == (0, ""), err
    found = load_file(out / "selection/rows.safetensors")
    neurons = found["neurons.ffn.0"]
    name = rename("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(found["ffn_down.0"], weights_of(tied)[name][:, neurons].T)
    assert load_config(resolve(str(out / "larger"))).intermediate_size == 128


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_hash_of_well_formed_folders_stays() -> None:
    """It stands in artifacts and locks."""
    assert folder_hash(Path("data/tiny/target-chat")) == (
        "b68ceffcf80254b75fa6b4a1677a3933fbf494b2b41907daf2225615666c6067"
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_files_beside_the_weights_do_not_count(folder: Path, sharded: bool) -> None:
    if sharded:
        split(folder)
    before, weights = identity(resolve(str(folder))), weights_hash(load_model(resolve(str(folder))).state_dict())
    for name in ("consolidated.safetensors", "model-00003-of-00003.safetensors", "optimizer.safetensors"):
        store(folder, {UP: torch.zeros(96, 64)}, name)
    assert identity(resolve(str(folder))) == before
    assert weights_hash(load_model(resolve(str(folder))).state_dict()) == weights
    check_as_transformers(folder)


def test_the_hash_is_of_all_that_is_read(folder: Path) -> None:
    split(folder)
    seen = {folder_hash(folder)}
    for file in ("config.json", *sorted(path.name for path in folder.glob("model-*"))):
        with (folder / file).open("ab") as changed:
            changed.write(b"\n")
        seen.add(folder_hash(folder))
    assert len(seen) == 4


def test_an_index_that_names_files_that_are_missing(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002.safetensors, which is not there"):
        identity(resolve(str(folder)))
    assert refusal(folder) == (
        f"/{INDEX}: names model-00002-of-00002.safetensors, which is not there; fetch the model again"
    )


def test_an_index_that_leaves_a_file_out(folder: Path) -> None:
    split(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "00001" in f}
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder).startswith("not the weights that its config.json describes; it lacks model.layers.")


def test_two_checkpoints_in_one_folder(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "whole")
    split(folder)
    (folder / "whole").rename(folder / "model.safetensors")
    assert refusal(folder) == ("holds model.safetensors and an index of other files; remove the one that is not meant")


def test_a_weight_in_two_files(folder: Path) -> None:
    split(folder)
    second = folder / "model-00002-of-00002.safetensors"
    store(folder, load_file(second) | {HEAD: torch.ones(264, 64)}, second.name)
    assert refusal(folder) == f"/{second.name}: weight {HEAD} stands twice in the checkpoint"


def test_an_index_without_files(folder: Path) -> None:
    for weight_map in ({}, [], None):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert refusal(folder).startswith(f"/{INDEX}: not the index of a checkpoint; expected a mapping `weight_map`")


def test_a_file_that_the_config_names(folder: Path) -> None:
    """transformers would read it in place of what everybody else reads."""
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")
    assert refusal(folder).startswith("its config.json names a file of its own for the weights (transformers_weights)")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "extra.safetensors", "tokenizer.json", "generation_config.json", "hub.yaml", "x/y"]
)
def test_pipes_are_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError) as caught:
        resolve(str(folder))
    assert str(caught.value) == f"{folder / name}: a pipe, socket or device; a model's folder may hold files alone"


def test_a_device_is_no_file(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"tokenizer.model: a pipe, socket or device"):
        resolve(str(folder))


# --- ties -------------------------------------------------------------------------------------------------------------


def test_either_name_of_a_tied_weight_may_be_stored(tied: Path) -> None:
    weights = weights_of(tied)
    assert HEAD not in weights
    check_as_transformers(tied)
    store(tied, weights | {HEAD: weights[EMBEDDING].clone()})
    check_as_transformers(tied)
    store(tied, {HEAD if name == EMBEDDING else name: weight for name, weight in weights.items()})
    check_as_transformers(tied)
    checkpoint = Checkpoint(resolve(str(tied)))
    assert torch.equal(checkpoint.weight(HEAD), weights[EMBEDDING])
    assert torch.equal(checkpoint.weight(EMBEDDING), weights[EMBEDDING])


def test_a_tie_that_the_weights_contradict(tied: Path) -> None:
    weights = weights_of(tied)
    store(tied, weights | {HEAD: weights[EMBEDDING].bfloat16()})
    assert refusal(tied).endswith("but both are stored and differ; set it to false if they are two")
    store(tied, weights | {HEAD: weights[EMBEDDING] + 1})
    assert refusal(tied) == (
        "its config.json says that embedding and head are one weight (tie_word_embeddings), but both are stored and"
        " differ; set it to false if they are two"
    )


def test_no_tie_and_no_head(folder: Path, tied: Path) -> None:
    weights = weights_of(folder)
    del weights[HEAD]
    store(folder, weights)
    assert refusal(folder) == f"not the weights that its config.json describes; it lacks {HEAD}"
    del (weights := weights_of(tied))[EMBEDDING]
    store(tied, weights)
    assert refusal(tied) == f"not the weights that its config.json describes; it lacks {EMBEDDING}"


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("said", ["float32", "float16", "bfloat16", None])
def test_the_dtype_is_the_stored_one_whatever_the_config_says(
    folder: Path, stored: torch.dtype, said: str | None
) -> None:
    store(folder, {name: weight.to(stored) for name, weight in weights_of(folder).items()})
    edit(folder, dtype=said)
    assert Checkpoint(resolve(str(folder))).dtype == stored
    check_as_transformers(folder)


def test_mixed_dtypes_are_not_rounded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {n: w.to(torch.float32 if "norm" in n else torch.bfloat16) for n, w in weights_of(folder).items()}
    weights["model.norm.weight"] = torch.full((64,), 1 + 2**-20)
    store(folder, weights)
    model = load_model(resolve(str(folder)))
    assert model.dtype == torch.float32
    assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])
    assert capsys.readouterr().err == (
        f"pkt: warning: {folder}: weights are stored as bfloat16 and float32; dtype auto takes float32, which rounds"
        " none of them\n"
    )
    store(folder, {n: w.to(torch.float16 if "norm" in n else torch.bfloat16) for n, w in weights.items()})
    assert load_model(resolve(str(folder))).dtype == torch.float32
    assert load_model(resolve(str(folder)), dtype="bfloat16").dtype == torch.bfloat16


def test_float64_needs_a_choice(folder: Path) -> None:
    store(folder, {name: weight.double() for name, weight in weights_of(folder).items()})
    with pytest.raises(UserError, match="stored as float64, in which no model computes here; choose --dtype float32"):
        load_model(resolve(str(folder)))
    assert load_model(resolve(str(folder)), dtype="float32").dtype == torch.float32
    assert Checkpoint(resolve(str(folder))).weight(UP).dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "int32"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_quantised_weights_without_a_word_in_the_config(folder: Path, dtype: torch.dtype, said: str) -> None:
    store(folder, weights_of(folder) | {UP: torch.ones(96, 64).to(dtype), f"{UP}_scale": torch.ones(96)})
    assert refusal(folder) == (
        f"weight {UP} is stored as {said}; expected one of float32, float16, bfloat16, float64: quantised weights are"
        " not read, use the model that was quantised"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"quantization_config": {"quant_method": "of-next-year"}},
        {"compression_config": {"format": "int-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
    ids=str,
)
def test_quantised_models_are_refused_before_anything_is_computed(
    pkt: Run, folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    edit(folder, **config)
    said = refusal(folder)
    assert said.startswith("its config.json says that its weights are quantised (")
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    status, _, err = pkt("attribute", "--model", folder, "--extract", examples, "--out", tmp_path / "o")
    assert (status, err) == (2, f"pkt: error: {folder}: {said}\n")


def test_no_door_takes_quantised_weights(pkt: Run, folder: Path, target_folder: Path, tmp_path: Path) -> None:
    store(folder, weights_of(folder) | {UP: torch.ones(96, 64, dtype=torch.int8)})
    examples, texts = write_examples(tmp_path / "e.jsonl", ["It is 1."]), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "abc" * i}) + "\n" for i in range(1, 5)))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(json.loads(examples.read_text()) | {"reference": {"answer": "1"}, "prefix": ""}) + "\n")
    before = set(tmp_path.rglob("*"))
    out, scratch = ("--out", tmp_path / "o"), ("--scratch", tmp_path / "scratch")
    told = ("--metrics", tmp_path / "m.json")
    for words in (
        ("attribute", "--model", folder, "--extract", examples, *out, *scratch),
        ("seek", "--source", folder, "--target", target_folder, "--extract", examples, *out, *told, *scratch),
        ("derive", "--code", "grid", "--target", target_folder, "--source", folder, *out),
        ("compare", "--first", target_folder, "--second", folder, "--texts", texts, "--num-texts", 4, "--batch-size", 4,
         *out, *told),
        ("correlate", "--source", folder, "--target", target_folder, "--texts", texts, "--num-texts", 4, *out),
        ("reexpress", "--model", folder, *out),
        ("finetune", "--method", "m", "--target", folder, "--train", examples, "--rank", 2, *out, *told, *scratch),
        ("generate", "--source", folder, "--train", examples, *out, *told, *scratch),
        ("evaluate", "--model", folder, "--task", "gsm8k", "--test", test, *out, *scratch),
    ):  # fmt: skip
        status, _, err = pkt(*words)
        assert status == 2, words
        assert f"{folder}: weight {UP} is stored as I8; expected one of " in err.splitlines()[-1], err
    assert {path for path in set(tmp_path.rglob("*")) - before if "scratch" not in str(path)} == set()


# --- what vLLM reads itself -------------------------------------------------------------------------------------------


def test_vllm_is_given_the_stored_dtype_and_nothing_it_would_read_otherwise(folder: Path, tied: Path) -> None:
    ref = resolve(str(folder))
    edit(folder, dtype="bfloat16")
    assert _stored_dtype(ref) == "float32"
    store(folder, {UP: torch.zeros(96, 64)}, "copy.safetensors")
    with pytest.raises(UserError) as caught:
        _stored_dtype(ref)
    assert str(caught.value) == (
        f"backend vllm: {folder}: holds copy.safetensors beside its weights, which vLLM reads in another way; use"
        " --backend hf"
    )
    (folder / "copy.safetensors").unlink()
    store(folder, {bare(name): weight for name, weight in weights_of(folder).items()})
    with pytest.raises(UserError, match="is not called so in the model, which vLLM reads in another way"):
        _stored_dtype(ref)
    store(tied, {HEAD if name == EMBEDDING else name: weight for name, weight in weights_of(tied).items()})
    with pytest.raises(UserError, match=r"weight lm_head.weight is not called so in the model"):
        _stored_dtype(resolve(str(tied)))


# --- the hub's cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_a_cached_model_is_read_offline(folder: Path, tmp_path: Path, sharded: bool) -> None:
    """As `hf download` leaves it: nothing says there that a file that may be missing does not exist."""
    if sharded:
        split(folder)
    (folder / "generation_config.json").unlink()
    cache = tmp_path / "home/hub/models--owner--name"
    cache.mkdir(parents=True)
    commit = "0123456789" * 4
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    program = (
        "from pkt_stages.models.load import *\n"
        "for name in ('owner/name', 'owner/name@' + COMMIT):\n"
        "    ref = resolve(name)\n"
        "    load_tokenizer(ref)\n"
        "    print(identity(ref)['revision'] == COMMIT, weights_hash(load_model(ref).state_dict()))\n"
    )
    program = program.replace("COMMIT", repr(commit))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    expected = weights_hash(load_model(resolve(str(folder))).state_dict())
    assert (done.returncode, done.stdout) == (0, f"True {expected}\n" * 2), done.stderr
