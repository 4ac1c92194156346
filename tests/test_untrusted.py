"""Models, adapters and examples from anywhere: no code of theirs runs, no file elsewhere is touched or read, and sizes
that cannot be true are refused before memory is taken. Each ends in one line and exit status 2."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_examples
from tests.stages.selection_files import options, write_inputs

Run = Callable[..., tuple[int, str, str]]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@pytest.fixture
def model(tmp_path: Path, target_folder: Path) -> Path:
    return Path(shutil.copytree(target_folder, tmp_path / "model"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GiB more than this process has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(pkt: Run, model: Path) -> str:
    """What the user reads when the model is used; nothing is written."""
    folder = model.parent
    examples = write_examples(folder / "e.jsonl", ["It is 1."])
    before = set(folder.rglob("*"))
    status, out, err = pkt("attribute", "--model", model, "--extract", examples, "--out", folder / "o.safetensors")
    assert (status, out) == (2, "")
    assert set(folder.rglob("*")) == before
    lines = [line for line in err.splitlines() if line.startswith("pkt: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0].removeprefix(f"pkt: error: {model}").removeprefix(": ")


def test_pickled_weights_are_not_opened(pkt: Run, model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    weights = model / "model.safetensors"
    torch.save({"model.norm.weight": Payload(marker)}, model / "pytorch_model.bin")
    weights.unlink()
    assert refusal(pkt, model).startswith("holds no safetensors weights (")
    assert not marker.exists()
    # The payload is a live one.
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_of_a_model_is_not_run(pkt: Run, model: Path, tmp_path: Path, kind: str) -> None:
    (model / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(model / "config.json", model_type=kind, auto_map=names)
    said = refusal(pkt, model)
    assert "asks for code of its own" in said and ("take the key out of a copy" in said) == (kind == "llama")
    assert not (tmp_path / "marker").exists()


def test_code_of_a_tokenizer_is_not_run(pkt: Run, model: Path, tmp_path: Path) -> None:
    (model / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    edit(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert refusal(pkt, model) == "the tokenizer cannot be loaded (it asks for code of its own, which is never run)"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, "it has lm_head.weight of shape [264, 64], not [264, 1000000000]"),
        ({"intermediate_size": 10**9}, "mlp.down_proj.weight of shape [64, 96], not [64, 1000000000]"),
        ({"vocab_size": 10**9}, "it has lm_head.weight of shape [264, 64], not [1000000000, 64]"),
        ({"head_dim": 10**9}, "self_attn.k_proj.weight of shape [32, 64], not [2000000000, 64]"),
        ({"num_attention_heads": 10**9}, "is not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 10**9}, "config: 4 heads cannot share 1000000000 key/value heads evenly"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers; expected 1 to 1000"),
        ({"num_hidden_layers": 0}, "0 layers; expected 1 to 1000"),
        # transformers would fill in random numbers, and pass over what it has no place for.
        ({"num_hidden_layers": 4}, "its config.json describes; it lacks model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "its config.json describes; it has model.layers.2.input_layernorm.weight too many"),
        ({"hidden_size": -64}, "the model cannot be loaded ("),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "the model cannot be loaded ("),
        ({"dtype": "nonsense"}, "the model cannot be loaded ("),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("little_memory")
def test_a_config_that_does_not_fit_the_weights(pkt: Run, model: Path, changes: dict[str, Any], message: str) -> None:
    edit(model / "config.json", **changes)
    assert message in refusal(pkt, model)


@pytest.mark.parametrize(("name", "message"), [
    ("config.json", "the model cannot be loaded ("),
    ("tokenizer.json", "the tokenizer cannot be loaded ("),
    ("tokenizer_config.json", "the tokenizer cannot be loaded ("),
    ("generation_config.json", "/generation_config.json: "),
    ("model.safetensors", "/model.safetensors: not a readable safetensors file ("),
    ("model.safetensors.index.json", "/model.safetensors.index.json: "),
    ("hub.yaml", "/hub.yaml: "),
])  # fmt: skip
@pytest.mark.parametrize("content", ["[1]", "{", "\0\0\0\0\0\0\0\x7f", '{"a": ' * 5000])
def test_files_of_a_model_that_are_something_else(pkt: Run, model: Path, name: str, message: str, content: str) -> None:
    (model / name).write_text(content)
    assert refusal(pkt, model).startswith(message)


@pytest.mark.parametrize("elsewhere", ["../else.safetensors", "/etc/passwd", "a/../model.safetensors", "x.bin", 3])
def test_an_index_points_to_no_other_folder(pkt: Run, model: Path, elsewhere: object) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "else.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, elsewhere)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(pkt, model) == (
        f"/model.safetensors.index.json: names {elsewhere!r}; expected safetensors files in the same folder"
    )


BOMBS = {
    # Aliases of aliases: a few values for Python, 9^9 for whoever writes them out.
    "aliases": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    # Merge keys copy what they name, so that reading alone would never end.
    "merges": "a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)),
    "itself": "a: &a [*a]\n",
    "itself by its key": "a: &a {b: *a}\n",
    "depth": "[" * 5000 + "]" * 5000,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.usefixtures("little_memory")
def test_yaml_that_stands_for_more_than_it_says(pkt: Run, tmp_path: Path, model: Path, bomb: str) -> None:
    """By every door: a model's pointer, a data set's, params, a lock."""
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    folder = tmp_path / "pointer"
    folder.mkdir()
    pointer, params = folder / "hub.yaml", tmp_path / "params.yaml"
    for file in (pointer, params):
        file.write_text(BOMBS[bomb])
    out = ("--out", tmp_path / "o")
    attribute = ("attribute", "--model", model, "--extract", examples, *out)
    for file, words in (
        (pointer, ("attribute", "--model", folder, "--extract", examples, *out)),
        (pointer, ("export", "--model", folder, "--delta", examples, *out)),
        (pointer, ("prepare", "--task", "gsm8k", "--data", folder, *out)),
        (pointer, ("texts", "--data", folder, *out)),
        (pointer, ("pin", folder)),
        (params, (*attribute, "--params", params)),
        (params, ("merge-lock", params, params, params)),
        (params, ("code", "--params", params, *out)),
    ):
        status, _, err = pkt(*words)
        assert status == 2 and err.count("\n") == 1 and str(file) in err and len(err) < 1000, (words, err)
        assert file.read_text() == BOMBS[bomb]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"repo": ["x"] * 10**4, "revision": "y"},
        {"repo": "x" * 10**6},
        {"repo": "x" * 10**6, "revision": "y"},
        ["x"] * 10**4,
        f"repo: 0x{'f' * 10**4}",
        "0x" + "f" * 10**4,
        "{repo: o/m, revision: main, sizes: {num_layers: -0x%s, d_model: 1, d_ff: 1, num_heads: 1, num_kv_heads: 1,"
        " d_head: 1, vocab_size: 1}}" % ("f" * 10**4),
    ],
    ids=["list", "text", "name", "no mapping", "number in a mapping", "number", "size"],
)
def test_what_is_quoted_is_cut(pkt: Run, tmp_path: Path, content: Any) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/hub.yaml").write_text(content if isinstance(content, str) else json.dumps(content))
    status, _, err = pkt("attribute", "--model", tmp_path / "m", "--extract", tmp_path / "e", "--out", tmp_path / "o")
    assert status == 2 and len(err) < 1000 and err.startswith(f"pkt: error: {tmp_path}/m/hub.yaml: ")
    assert "Traceback" not in err and ": expected " in err and "found " in err


@pytest.mark.parametrize("repo", ["../model", "/etc/x", "~/model", "./model", "a/b/c", "model", "owner/..", "o/m@main"])
def test_a_pointer_leads_to_the_hub_alone(pkt: Run, tmp_path: Path, repo: str) -> None:
    """Else it would lead to a folder of this machine, past what is asked of one."""
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    (tmp_path / "p").mkdir()
    file, out = tmp_path / "p/hub.yaml", ("--out", tmp_path / "o")
    said = f"pkt: error: {file}: repo: expected a name on the hub, owner/name, found {repo!r}\n"
    file.write_text(json.dumps({"repo": repo, "revision": "main"}))
    assert pkt("attribute", "--model", tmp_path / "p", "--extract", examples, *out) == (2, "", said)
    file.write_text(json.dumps({pool: {"repo": repo, "split": pool, "revision": "main"} for pool in ("train", "test")}))
    assert pkt("prepare", "--task", "gsm8k", "--data", tmp_path / "p", *out) == (2, "", said)


def test_a_folder_that_is_called_like_a_pointer_s_repository(
    pkt: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "owner/name")
    (tmp_path / "p").mkdir()
    (tmp_path / "p/hub.yaml").write_text("repo: owner/name\nrevision: main\n")
    monkeypatch.chdir(tmp_path)
    assert pkt("attribute", "--model", "p", "--extract", "e.jsonl", "--out", "o")[2] == (
        "pkt: error: p/hub.yaml: repo: owner/name is a folder here, which would be taken for it; rename the folder\n"
    )


def test_a_template_beside_a_pointer_that_is_no_text(pkt: Run, tmp_path: Path) -> None:
    (tmp_path / "hub.yaml").write_text("repo: owner/name\nrevision: main\n")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    status, _, err = pkt("attribute", "--model", tmp_path, "--extract", tmp_path / "e", "--out", tmp_path / "o")
    assert status == 2 and err.startswith(f"pkt: error: {tmp_path}/chat_template.jinja: not readable as text (")


def test_an_adapter_in_the_model_s_folder_is_not_active(pkt: Run, model: Path, adapter: Path) -> None:
    for file in adapter.iterdir():
        shutil.copy(file, model)
    assert refusal(pkt, model) == (
        "holds an adapter (adapter_config.json), which would change the model unseen; give the base model's folder,"
        " and the adapter as --delta"
    )


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from pkt_stages.models.adapters import Adapter, save_adapter

    factors = {"model.layers.0.mlp.up_proj": (torch.ones(2, 64), torch.ones(96, 2))}
    save_adapter(tmp_path / "adapter", Adapter(factors, alpha=2.0), "target")
    return tmp_path / "adapter"


@pytest.fixture
def refuse_adapter(pkt: Run, target_folder: Path, tmp_path: Path) -> Callable[[Path], str]:
    def refused(adapter: Path) -> str:
        metrics = tmp_path / "metrics.json"
        given = (
            "--delta",
            adapter,
            "--out",
            tmp_path / "o.safetensors",
            "--metrics",
            metrics,
            "--num-texts",
            4,
            "--batch-size",
            4,
        )
        status, _, err = pkt("compare", "--first", target_folder, "--texts", texts, *given)
        assert status == 2 and err.count("pkt: ") == 1 and "Traceback" not in err, err
        assert not metrics.exists()
        return err.splitlines()[-1].removeprefix("pkt: error: ").removeprefix(f"{adapter}: ")

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "abc" * i}) + "\n" for i in range(1, 5)))
    return refused


def test_a_pickled_adapter_is_not_opened(refuse_adapter: Callable[[Path], str], adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "marker")}, adapter / "adapter_model.bin")
    assert refuse_adapter(adapter) == "expected a PEFT adapter, adapter_model.safetensors is missing"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.../../x", "adapter: the model has no weight ../../x.weight; it belongs to another target"),
        ("base_model.model.model", "adapter: the model has no weight model.weight; it belongs to another target"),
        ("base_model.model.", "unexpected tensor base_model.model..lora_A.weight of shape [2, 64] in a LoRA adapter"),
        ("../../x", "unexpected tensor ../../x.lora_A.weight of shape [2, 64] in a LoRA adapter"),
    ],
)
def test_names_in_an_adapter(refuse_adapter: Callable[[Path], str], adapter: Path, name: str, message: str) -> None:
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(96, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit(adapter / "adapter_config.json", target_modules=".*")
    assert refuse_adapter(adapter) == message


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"lora_alpha": None}, "2 and None"), ({"lora_alpha": "1"}, "2 and '1'"), ({"r": 0}, "0 and 2.0")],
)
def test_numbers_of_an_adapter(
    refuse_adapter: Callable[[Path], str], adapter: Path, changes: dict[str, Any], found: str
) -> None:
    edit(adapter / "adapter_config.json", **changes)
    assert refuse_adapter(adapter) == f"expected numbers r above 0 and lora_alpha, found {found}"


# --- examples -----------------------------------------------------------------------------------------------------


def test_ids_are_no_paths(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ids and data set names that point elsewhere to deltas and predictions: all lies where it belongs."""
    work = tmp_path / "a" / "work"
    inputs = write_inputs(work, source_folder, target_folder)
    for path in inputs.values():
        if path.suffix == ".jsonl":
            path.write_text(path.read_text().replace('"toy', '"../../toy'))
    monkeypatch.chdir(work)
    ids = [f"../../toy_{i}" for i in (0, 1, 2, 10, 11)]
    extract, transfer = Path("extract.jsonl"), Path("transfer.jsonl")
    transfer.write_text(
        write_examples(transfer, ["It is 1.", "It is 2."], 10).read_text().replace('"toy', '"../../toy')
    )
    for model in (source_folder, target_folder):
        given = ("--extract", extract, "--transfer", transfer, "--out", f"{model.name}.safetensors")
        assert pkt("attribute", "--model", model, *given)[0] == 0
    scores = ("--source-scores", "source.safetensors", "--target-scores", "target.safetensors")
    made = options(out=inputs["selection"])
    assert pkt("select", *scores, "--source", source_folder, "--max-rate", 0.25, *made)[0] == 0
    given = options(**inputs, target=target_folder, out=Path("align"), metrics=Path("align.json"))
    settings = ("--steps", 1, "--batch-size", 4, "--validation-size", 3, "--set", "init_std=0.02")
    assert pkt("align", *given, *settings)[0] == 0
    given = options(selection=inputs["selection"], target=target_folder, out=Path("deltas"), mapping=Path("align"))
    status, _, err = pkt("inject", *given)
    assert status == 0, err
    names = ["changes.json", "delta_0.safetensors", "delta_1.safetensors"]
    assert sorted(path.name for path in Path("deltas").iterdir()) == names
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert list((tmp_path / "a").iterdir()) == [work]
    assert [e["id"] for e in json.loads(pkt("inspect", "source.safetensors", "--json")[1])["meta"]["examples"]] == ids
