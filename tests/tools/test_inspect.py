from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pkt_stages import artifacts
from pkt_stages.models.adapters import Adapter, save_adapter
from pkt_stages.models.changes import DenseDelta, write_changes
from pkt_stages.models.inject import SparseDelta
from pkt_stages.tools.inspect import flat
from pkt_stages.tools.provenance import md5
from tests.families import CASES, save

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"cka.ffn_up": torch.tensor([[0.25, 0.5]], dtype=torch.float64)}
    path = tmp_path / "c.safetensors"
    artifacts.save(
        path, artifacts.CKA, tensors, {"first": {"name": "s", "revision": "abc"}, "params": {"num_texts": 8}}
    )
    return path


def test_what_an_artifact_is(pkt: Run, file: Path) -> None:
    status, printed, err = pkt("inspect", file)
    assert status == 0, err
    assert printed.splitlines()[0] == "c.safetensors: cka artifact (schema 1), made by `pkt compare`"
    assert "  first: name s, revision abc\n  params: num_texts 8\n" in printed
    assert "    cka.ffn_up  float64 [1, 2]  0.25 .. 0.5\n" in printed
    assert printed.endswith("  content: as its kind declares, all values finite\n")
    found = json.loads(pkt("inspect", file, "--json")[1])
    assert found["sha256"] == artifacts.content_hash(file)
    assert found["tensors"]["cka.ffn_up"]["max"] == 0.5


def test_what_a_file_holds_does_not_drive_the_terminal(pkt: Run, file: Path) -> None:
    meta = {"a\x1b]0;pwned\x07": {"b\x9b2J": "\x1b[2J"}, "list": ["\x9b31m\u202e", "\x7f"], "\x1b[1m": "x"}
    artifacts.save(file, artifacts.CKA, {"cka.ffn_up": torch.zeros(1, 2, dtype=torch.float64)}, meta)
    file = file.rename(file.with_name("c\x1b[5m.safetensors"))
    status, printed, err = pkt("inspect", file)
    assert status == 0, err
    assert all(line.isprintable() for line in printed.split("\n")), printed
    assert printed.startswith("c\\x1b[5m.safetensors: cka artifact")
    assert '  \\x1b[1m: x\n  a\\x1b]0;pwned\\x07: b\\x9b2J "\\u001b[2J"\n' in printed
    assert '  list: ["\\x9b31m\\u202e", "\\x7f"]\n' in printed
    assert all(line.isprintable() for line in pkt("inspect", file, "--json")[1].split("\n"))


def test_values_that_are_not_finite(pkt: Run, file: Path) -> None:
    meta = json.dumps({"kind": "cka", "schema_version": 1})
    save_file({"cka.x": torch.tensor([[float("nan")]], dtype=torch.float64)}, file, metadata={"pkt": meta})
    status, printed, err = pkt("inspect", file)
    assert (status, err) == (2, f"pkt: error: {file}: tensor cka.x holds NaN or infinity; make the file again\n")
    assert "NOT FINITE" in printed


@pytest.mark.parametrize(
    ("meta", "found"),
    [
        ({}, "no metadata of this project"),
        ({"pkt": "7"}, "no metadata of this project"),
        ({"pkt": '{"kind": "x"}'}, "kind 'x'"),
    ],
)
def test_other_files(pkt: Run, tmp_path: Path, meta: dict[str, str], found: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=meta)
    status, _, err = pkt("inspect", path)
    kinds = ", ".join(kind.name for kind in vars(artifacts).values() if isinstance(kind, artifacts.Kind))
    assert (status, err) == (2, f"pkt: error: {path}: expected an artifact of a kind among {kinds}; found {found}\n")


def test_broken_files(pkt: Run, file: Path) -> None:
    whole = file.read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 64, b'{"a":1}'):
        file.write_bytes(content)
        status, printed, err = pkt("inspect", file)
        assert (status, printed) == (2, "")
        assert err.startswith(f"pkt: error: {file}: not a readable safetensors file (") and err.count("\n") == 1
    file.rename(file := file.with_suffix(".jsonl"))
    assert pkt("inspect", file)[2] == (
        f"pkt: error: {file}: expected an artifact (.safetensors), the folder of a row, a LoRA adapter or a model,"
        " or what a stage in dvc.lock made\n"
    )
    file.unlink()
    assert pkt("inspect", file)[2] == f"pkt: error: {file}: no such file; expected an artifact (.safetensors)\n"


def test_models_and_params_are_shown_whole() -> None:
    """A stranger needs the revision more than anything: it comes first, and nothing but long lists is cut."""
    meta = {
        "examples": [{"id": f"e{i}"} for i in range(9)],
        "params": {"align": {"lr": 1e-3, "given": "selected"}, "seed": 0},
        "source": {"geometry": {"d_ff": 256}, "model": {"name": "s", "revision": "f" * 200}},
    }
    assert list(flat(meta)) == [
        ("source.model", "name s, revision " + "f" * 200),
        ("source.geometry", "d_ff 256"),
        ("examples", '9: {"id": "e0"}, {"id": "e1"}, {"id": "e2"}, ...'),
        ("params", "seed 0"),
        ("params.align", "given selected, lr 0.001"),
    ]


META = {
    "command": "finetune",
    "method": "mine",
    "target": {"name": "target", "revision": "sha256:1"},
    "source": None,
    "params": {"lr": 0.003},
}


def lora() -> Adapter:
    return Adapter({"model.layers.0.mlp.up_proj": (torch.ones(2, 3), torch.zeros(4, 2))}, 2.0)


@pytest.fixture
def row(tmp_path: Path) -> Path:
    sparse = {"ffn_up": SparseDelta(torch.tensor([0]), torch.tensor([[1]]), torch.ones(1, 1, 3))}
    changes = {"toy_10": sparse, "seed_0": lora(), "delta": DenseDelta({"w": torch.ones(1, 3)})}
    facts = {"toy_10": {"rounding_loss": 0.25, "range": {"ffn_up": {"max": 1.0}}}, "seed_0": {"seed": 0}}
    write_changes(tmp_path / "row", changes, META, facts)
    return tmp_path / "row"


def test_a_row_of_the_table(pkt: Run, row: Path) -> None:
    status, printed, err = pkt("inspect", row)
    assert status == 0, err
    assert printed.splitlines() == [
        "row: row of the table with 3 changes, made by `pkt finetune`",
        "  target: name target, revision sha256:1",
        "  command: finetune",
        "  method: mine",
        "  params: lr 0.003",
        "  source: null",
        "  changes, to be inspected one by one:",
        "    toy_10: file delta_0.safetensors, kind sparse, rounding_loss 0.25",
        "    toy_10.range.ffn_up: max 1.0",
        "    seed_0: file seed_0, kind low_rank, seed 0",
        "    delta: file delta_2.safetensors, kind dense",
        "  content: all that it names is there",
    ]
    assert pkt("inspect", row / "changes.json") == (0, printed, "")
    found = json.loads(pkt("inspect", row, "--json")[1])
    assert found["meta"] == META and found["changes"][1] == {
        "label": "seed_0",
        "kind": "low_rank",
        "file": "seed_0",
        "seed": 0,
    }
    (row / "delta_2.safetensors").unlink()
    assert pkt("inspect", row)[2] == (
        f"pkt: error: {row}/delta_2.safetensors: not there, or no dense change, but {row}/changes.json names it; fetch"
        " or make the row again\n"
    )


def test_a_change_of_a_row_says_what_made_it(pkt: Run, row: Path) -> None:
    """Whichever command made it, and for an adapter its row says it."""
    for name, what in (
        ("delta_0.safetensors", "delta artifact (schema 1)"),
        ("delta_2.safetensors", "dense_delta artifact (schema 1)"),
        ("seed_0", "LoRA adapter (PEFT)"),
    ):
        status, printed, err = pkt("inspect", row / name)
        assert status == 0, err
        assert printed.startswith(f"{name}: {what}, made by `pkt finetune`\n")
        assert "  target: name target, revision sha256:1\n" in printed and "  params: lr 0.003\n" in printed
        assert printed.endswith("  content: as its kind declares, all values finite\n")


LOCK = """\
schema: '2.0'
stages:
  code:
    cmd: pkt code --params params.yaml --out made/code
    outs:
    - path: made/code
      md5: abc.dir
  finetune@mine:
    cmd: pkt finetune --out made/mine
    deps:
    - path: data/model
      md5: abc.dir
    - path: made/code/finetune
      md5: def
    params:
      params.yaml:
        finetune:
          lr: 0.003
    outs:
    - path: made/mine
      md5: HASH
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that a stage of a profile has made."""
    folder = tmp_path / "made/mine/seed_0"
    save_adapter(folder, lora(), "target")
    for name in (".dvc", "profiles/p"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "profiles/p/dvc.lock").write_text(LOCK.replace("HASH", md5(folder.parent)))
    return folder


def test_an_artifact_that_is_not_here(pkt: Run, tmp_path: Path) -> None:
    for name in (".dvc", "profiles/p"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "profiles/p/dvc.lock").write_text(LOCK.replace("made/mine", "made/it.safetensors"))
    file = tmp_path / "made/it.safetensors"
    line = f"pkt: error: {file}: not here; fetch it with: dvc pull profiles/p/dvc.yaml:finetune@mine\n"
    assert pkt("inspect", file) == (2, "", line)


def test_an_adapter_and_the_stage_that_made_it(pkt: Run, adapter: Path) -> None:
    status, printed, err = pkt("inspect", adapter)
    assert status == 0, err
    first, size, *rest = printed.splitlines()
    assert first == "seed_0: LoRA adapter (PEFT), made by `pkt finetune`"
    assert size.endswith(artifacts.content_hash(adapter / "adapter_model.safetensors"))
    assert rest == [
        "  stage: profiles/p/dvc.yaml:finetune@mine",
        "  alpha: 2.0",
        "  rank: 2",
        "  target: target",
        "  params.finetune: lr 0.003",
        "  input: data/model, md5 abc.dir",
        "  2 tensors:",
        "    model.layers.0.mlp.up_proj.A  float32 [2, 3]  1 .. 1",
        "    model.layers.0.mlp.up_proj.B  float32 [4, 2]  0 .. 0",
        "  content: as its kind declares, all values finite; the bytes that its stage in dvc.lock made",
    ]
    assert pkt("inspect", adapter / "adapter_model.safetensors") == (0, printed, "")


def test_a_folder_and_what_is_no_longer_what_the_stage_made(pkt: Run, adapter: Path, tmp_path: Path) -> None:
    printed = pkt("inspect", adapter.parent)[1]
    assert "mine: folder, made by `pkt finetune`\n" in printed and "    seed_0/adapter_config.json\n" in printed
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    assert pkt("inspect", adapter)[1].endswith(
        "; NOT what dvc.lock names: older, edited or only partly here;"
        " `dvc pull profiles/p/dvc.yaml:finetune@mine` fetches that\n"
    )
    assert pkt("inspect", tmp_path / "made/mine/gone.json")[2] == (
        f"pkt: error: {tmp_path}/made/mine/gone.json: not here; fetch it with:"
        " dvc pull profiles/p/dvc.yaml:finetune@mine\n"
    )
    shutil.rmtree(tmp_path / "made")
    for path in ("made/mine", "made/mine/seed_0", "made/mine/seed_0/adapter_model.safetensors"):
        assert pkt("inspect", tmp_path / path) == (
            2,
            "",
            f"pkt: error: {tmp_path / path}: not here; fetch it with: dvc pull profiles/p/dvc.yaml:finetune@mine\n",
        )


def test_an_adapter_of_no_stage(pkt: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").rmdir()
    assert "  stage: unknown, no dvc.lock around it names this" in pkt("inspect", adapter)[1]


def test_a_folder_is_hashed_as_dvc_does(tmp_path: Path) -> None:
    """Recorded from dvc 3.67.1."""
    for name, text in (("b/x", "1"), ("b-/x", "2"), ("a", "3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert md5(tmp_path) == "2ff9b18e8ca6cc0f8a4d5bdfbdebafe5.dir"


def test_a_model(pkt: Run, target_folder: Path) -> None:
    from pkt_stages.models.load import identity, load_model, resolve

    status, printed, err = pkt("inspect", target_folder)
    assert status == 0, err
    ref = resolve(str(target_folder))
    model = load_model(ref)
    lines = printed.splitlines()
    assert lines[0] == f"{target_folder.name}: model of architecture llama"
    for line in (
        f"  identity: name target, revision {identity(ref)['revision']}",
        f"  parameters: {sum(p.numel() for p in model.parameters())}",
        "  dtype: float32",
        "  ties: embedding and head are two weights",
        "  sizes: context 256, d_ff 96, d_head 16, d_model 64, num_heads 4, num_kv_heads 2, num_layers 3, vocab_size"
        " 264",
        f"  {len(model.state_dict())} weights:",
        "    model.layers.{0..2}.self_attn.v_proj.weight  [32, 64]",
        "    lm_head.weight  [264, 64]",
        "  content: names and shapes are those of its config.json; values were not looked at",
    ):
        assert line in lines
    found = json.loads(pkt("inspect", target_folder, "--json")[1])
    assert found["shapes"] == {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert found["meta"]["tokenizer"] | {"class": ""} == {
        "class": "", "tokens": 261, "chat_template": True, "bos": "<s>", "eos": "</s>", "pad": "<pad>",
    }  # fmt: skip
    assert found["meta"]["sites"]["attn_v"] == "64 neurons a layer in model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize("name", ["neox", "phi3"])
def test_weights_are_called_as_the_architecture_calls_them(pkt: Run, tmp_path: Path, name: str) -> None:
    status, out, _ = pkt("inspect", save(CASES[name], tmp_path / "model"), "--json")
    assert status == 0
    found = json.loads(out)
    assert all(said.rpartition(" ")[2] in found["shapes"] for said in found["meta"]["sites"].values())


def test_a_model_that_is_damaged(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(target_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    status, printed, err = pkt("inspect", folder)
    assert (status, printed) == (2, "")
    assert err.startswith(f"pkt: error: {folder}: holds no safetensors weights (") and err.count("\n") == 1
