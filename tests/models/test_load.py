"""Tokenizers and generation configs of strangers' models: what no stage can work with is refused where it is loaded,
and what is written again is what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import end_tokens
from pkt_stages.models.adapters import Adapter, save_adapter
from pkt_stages.models.load import load_model, load_tokenizer, resolve
from tests.conftest import write_examples

Run = Callable[..., tuple[int, str, str]]
# As models from the hub have it: what transformers reads, but refuses to write.
INVALID: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"},
    {"do_sample": False, "top_k": 20, "typical_p": 0.9},
    {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    {"pad_token_id": -1},
    {"_from_model_config": True, "temperature": 0.6, "a_field_of_next_year": 3},
]


@pytest.fixture
def folder(tmp_path: Path, target_folder: Path) -> Path:
    return Path(shutil.copytree(target_folder, tmp_path / "model"))


def edit(file: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


def refusal(load: Callable[[Any], Any], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(resolve(str(folder)))
    return str(caught.value).removeprefix(str(folder)).removeprefix(": ")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos(pkt: Run, folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", drop=("eos_token",))
    said = "its tokenizer has no EOS token, which ends every answer; name it in tokenizer_config.json (eos_token)"
    assert refusal(load_tokenizer, folder) == said
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1.", "It is 2."])
    metrics, scratch = ("--metrics", tmp_path / "m.json"), ("--scratch", tmp_path / "scratch")
    for words in (
        ("attribute", "--model", folder, "--extract", examples, *scratch),
        ("seek", "--source", folder, "--target", folder, "--extract", examples, *metrics, *scratch),
        ("finetune", "--method", "m", "--target", folder, "--train", examples, "--rank", 2, *metrics, *scratch),
        ("generate", "--source", folder, "--train", examples, *metrics, *scratch),
        ("distill", "--source", folder, "--target", folder, "--train", examples, "--align", examples, *metrics),
    ):  # fmt: skip
        assert pkt(*words, "--out", tmp_path / "o") == (2, "", f"pkt: error: {folder}: {said}\n"), words


def added(folder: Path, *tokens: str, special: bool, **named: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    for name, token in named.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def test_tokens_without_a_row_of_the_embedding(folder: Path) -> None:
    """The tokenizer has 261 tokens, the embedding 264 rows."""
    added(folder, *(f"<{i}>" for i in range(3)), special=False)
    assert len(load_tokenizer(resolve(str(folder)))) == 264
    added(folder, "<3>", special=False)
    assert refusal(load_tokenizer, folder) == (
        "token '<3>' of its tokenizer is number 264, its embedding has 264 rows; give it the tokenizer that it was"
        " trained with"
    )


def test_special_tokens_without_a_row_that_nothing_uses(folder: Path) -> None:
    """CodeLlama's Python models have such: four tokens for filling in, and no rows for them."""
    added(folder, *(f"<fill{i}>" for i in range(4)), special=True)
    assert len(load_tokenizer(resolve(str(folder)))) == 265


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "bos_token"])
def test_special_tokens_without_a_row_that_are_used(folder: Path, name: str) -> None:
    added(folder, *(f"<fill{i}>" for i in range(4)), special=True, **{name: "<fill3>"})
    assert refusal(load_tokenizer, folder).startswith("token '<fill3>' of its tokenizer is number 264, its embedding")


def test_a_template_s_token_without_a_row(folder: Path) -> None:
    added(folder, *(f"<fill{i}>" for i in range(3)), "<|im_start|>", special=True)
    load_tokenizer(resolve(str(folder)))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    assert refusal(load_tokenizer, folder).startswith("token '<|im_start|>' of its tokenizer is number 264")


@pytest.mark.parametrize(
    "changes", [{"model_max_length": "2048"}, {"model_max_length": [1]}, {"padding_side": "above"}], ids=str
)
def test_settings_that_fail_at_first_use(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "tokenizer_config.json", **changes)
    assert refusal(load_tokenizer, folder).startswith("the tokenizer cannot be loaded (")


# --- generation configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["1", [1, "x"], [[1]], True, -1, 264, 10**9, 1.5])
def test_ends_that_are_no_tokens(folder: Path, ends: Any) -> None:
    edit(folder / "generation_config.json", eos_token_id=ends)
    assert refusal(load_model, folder).startswith("/generation_config.json: eos_token_id: expected tokens below 264")


def test_several_ends(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[1, 3])
    model = load_model(resolve(str(folder)))
    assert end_tokens(model.generation_config, load_tokenizer(resolve(str(folder)))) == [1, 3]


def test_an_unreadable_one_is_not_passed_over(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]')
    assert refusal(load_model, folder).startswith("/generation_config.json: not readable as JSON (")


@pytest.mark.parametrize("content", INVALID, ids=str)
def test_what_transformers_refuses_to_write_stays_as_it_is(
    pkt: Run, folder: Path, tmp_path: Path, content: dict[str, Any]
) -> None:
    """`pkt convert`, `pkt export` and `pkt reexpress` hand the file on byte for byte."""
    text = json.dumps({"bos_token_id": 0, "eos_token_id": [1, 3], **content}, indent=1)
    (folder / "generation_config.json").write_text(text)
    factors = {"model.layers.0.mlp.up_proj": (torch.ones(1, 64), torch.ones(96, 1))}
    save_adapter(tmp_path / "adapter", Adapter(factors, alpha=0.1), "model")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for name, words in {
        "converted": ("convert", "--model", pickled),
        "exported": ("export", "--model", folder, "--delta", tmp_path / "adapter"),
        "larger": ("reexpress", "--model", folder, "--d-ff", 128),
    }.items():
        status, _, err = pkt(*words, "--out", tmp_path / name)
        assert status == 0, err
        assert (tmp_path / name / "generation_config.json").read_text() == text
        assert load_model(resolve(str(tmp_path / name))).generation_config.eos_token_id == [1, 3]


def test_settings_of_generation_in_the_config(pkt: Run, folder: Path, tmp_path: Path) -> None:
    """Where older models have them."""
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", temperature=0.9, top_p=0.6, eos_token_id=3)
    factors = {"model.layers.0.mlp.up_proj": (torch.ones(1, 64), torch.ones(96, 1))}
    save_adapter(tmp_path / "adapter", Adapter(factors, alpha=0.1), "model")
    status, _, err = pkt("export", "--model", folder, "--delta", tmp_path / "adapter", "--out", tmp_path / "out")
    assert status == 0, err
    assert not (tmp_path / "out/generation_config.json").exists()
    for made in (folder, tmp_path / "out"):
        assert load_model(resolve(str(made))).generation_config.eos_token_id == 3


# --- pickled checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("legacy", [False, True])
def test_conversion_keeps_names_and_dtype(
    pkt: Run, pickled: Path, tmp_path: Path, stored: torch.dtype, legacy: bool
) -> None:
    """Whatever prefix they had, whatever the config says."""
    weights = {n: w.to(stored) for n, w in torch.load(pickled / "pytorch_model.bin").items()}
    edit(pickled / "config.json", dtype="bfloat16")
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    torch.save(renamed, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    status, _, err = pkt("convert", "--model", pickled, "--out", tmp_path / "out")
    assert status == 0, err
    made = load_file(tmp_path / "out/model.safetensors")
    assert made.keys() == weights.keys()
    assert all(made[name].dtype == stored and torch.equal(made[name], weight) for name, weight in weights.items())


def test_a_pickled_index_points_to_no_other_folder(pkt: Run, pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model.bin").rename(tmp_path / "else.bin")
    names = torch.load(tmp_path / "else.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../else.bin")}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert pkt("convert", "--model", pickled, "--out", tmp_path / "out") == (
        2,
        "",
        f"pkt: error: {pickled}/pytorch_model.bin.index.json: names '../else.bin'; expected bin files in the same"
        " folder\n",
    )


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model.norm.weight": "x"}, {"model.norm.weight": None}])
def test_a_pickle_of_something_else(pkt: Run, pickled: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    status, _, err = pkt("convert", "--model", pickled, "--out", tmp_path / "out")
    assert (status, err) == (
        2,
        f"pkt: error: {pickled}: the model cannot be loaded (pytorch_model.bin holds something else than tensors by"
        " name)\n",
    )
    assert not (tmp_path / "out").exists()
