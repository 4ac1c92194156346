"""Bad input across all commands, in one table: each ends with exit status 2 and one exact line, and writes nothing."""

# ruff: noqa: E501
from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, write_examples

Run = Callable[..., tuple[int, str, str]]

# A name, the command line, and the message; {x} are the paths of `world`, {tmp} is where output would go.
TABLE = [
    ("no task", "prepare --task chess --data {data} --out {tmp}/o", "unknown task 'chess'; expected one of gsm8k, humaneval, mbpp, mmlu, or tasks/chess/task.yaml here"),
    ("no data", "prepare --task gsm8k --data {nowhere} --out {tmp}/o", "{nowhere}/train.jsonl: no such file of examples"),
    ("wrong schema", "prepare --task mmlu --data {data} --out {tmp}/o", "row mmlu_train_1: not in the mmlu schema (KeyError: 'choices')"),
    ("no model", "attribute --model {nowhere} --extract {examples} --out {tmp}/o", "{nowhere}: no such folder, and not a hub name of the form owner/name or owner/name@revision"),
    ("second file", "attribute --model {target} --examples {examples} --examples {data} --out {tmp}/o", "--extract {data}: a second file; give the examples that deltas are for as --transfer"),
    ("folder without config", "attribute --model {data} --extract {examples} --out {tmp}/o", "{data}: a folder without config.json; expected a Hugging Face model folder"),
    ("architecture", "attribute --model {opt} --extract {examples} --out {tmp}/o", "{opt}: architecture 'opt' is not supported: its positions are embedded and its FFN has no gate; supported are llama, mistral, qwen2, qwen3, smollm3, granite, gemma, gemma2, gemma3_text, olmo2, phi3, gpt_neox, llama4_text"),
    ("device", "attribute --model {target} --extract {examples} --out {tmp}/o --device tpu9", "device 'tpu9' cannot be used here (Invalid device string: 'tpu9'); expected cpu, cuda, cuda:N or auto"),
    ("pickle only", "attribute --model {pickled} --extract {examples} --out {tmp}/o", "{pickled}: holds no safetensors weights ("),
    ("truncated weights", "attribute --model {truncated} --extract {examples} --out {tmp}/o", "{truncated}/model.safetensors: not a readable safetensors file ("),
    ("NaN in weights", "attribute --model {nan} --extract {examples} --out {tmp}/o", "{nan}: weight model.norm.weight holds NaN or infinity; the checkpoint is broken"),
    ("no examples", "attribute --model {target} --extract {empty} --out {tmp}/o", "{empty}: holds no example; expected one JSON object a line"),
    ("not JSON", "attribute --model {target} --extract {broken} --out {tmp}/o", "{broken}, line 2: not JSON ("),
    ("no messages", "attribute --model {target} --extract {rows} --out {tmp}/o", "{rows}, line 1: expected `messages` with one user and one assistant turn, found none"),
    ("no useful token", "attribute --model {target} --extract {useless} --out {tmp}/o", "example toy_0: its answer '...' holds no useful token"),
    ("too long", "attribute --model {target} --extract {long} --out {tmp}/o", "example toy_0: "),
    ("unknown norm", "attribute --model {target} --extract {examples} --out {tmp}/o --norms x", "options of `attribute`: norms: expected one of rms, reference_code, found 'x'"),
    ("no params file", "attribute --model {target} --extract {examples} --out {tmp}/o --params {nowhere}", "{nowhere}: no such params file"),
    ("unknown key", "attribute --model {target} --extract {examples} --out {tmp}/o --params {typo}", "{typo}: attribute: unknown key 'norm' (did you mean 'norms'?); expected one of "),
    ("section missing", "select --source-scores {scores} --target-scores {scores} --source {target} --out {tmp}/o --params {typo}", "{typo}: section 'select' is missing"),
    ("wrong kind", "select --source-scores {delta} --target-scores {scores} --source {target} --out {tmp}/o", "{delta}: expected a attribution artifact (made by `pkt attribute`), found delta"),
    ("not an artifact", "select --source-scores {weights} --target-scores {scores} --source {target} --out {tmp}/o", "{weights}: a safetensors file without this project's metadata; expected a attribution artifact"),
    ("truncated artifact", "select --source-scores {cut} --target-scores {scores} --source {target} --out {tmp}/o", "{cut}: not a readable safetensors file ("),
    ("another source", "select --source-scores {scores} --target-scores {scores} --source {source} --out {tmp}/o", "{source}: not the model that {scores} was made from (expected "),
    ("no delta", "derive --code random_delta --delta {data} --out {tmp}/o", "{data}: a folder without changes.json and no PEFT adapter; expected what a method of the table made"),
    ("swapped", "seek --source {target} --target {source} --extract {examples} --out {tmp}/o --metrics {tmp}/m", "the source has 3 layers, the target 4; Seeking needs as many"),
    ("grid swapped", "derive --code grid --target {source} --source {target} --out {tmp}/o", "the source has 3 layers, the target 4; swap the two"),
    ("seeking without sub-matrices", "derive --code seeking --target {target} --out {tmp}/o", "the method takes --target and --submatrices, nothing else; found --target"),
    ("no code", "derive --target {target} --out {tmp}/o", "options of `derive`: no code; name a file of pkt_stages/methods: ariadne, bico, cross_lora, gradfix, grid, laten, matched, own, random_delta, seeking, theseus, transport_merge"),
    ("no such code", "derive --code hercules --target {target} --out {tmp}/o", "code 'hercules': no such file in pkt_stages/methods; found ariadne, bico, cross_lora, gradfix, grid, laten, matched, own, random_delta, seeking, theseus, transport_merge"),
    ("code of another command", "derive --code laten --target {target} --out {tmp}/o", "code 'laten': pkt_stages/methods/laten.py has no `derive`; it is for another command, or not whole"),
    ("setting of no code", "derive --code grid --set widht=pca --target {target} --source {source} --out {tmp}/o", "options of `derive`: unknown key 'widht' (did you mean 'width'?); expected one of layers, width, neurons, seed, stored"),
    ("rank", "finetune --method m --target {target} --train {examples} --out {tmp}/o --metrics {tmp}/m --rank 65 --max-length 128", "rank 65 is larger than a side of model.layers.0.mlp.up_proj [96, 64]; use at most 64"),
    ("init without blocks", "finetune --method m --target {target} --train {examples} --out {tmp}/o --metrics {tmp}/m --init seeking", "init seeking needs --submatrices (from `pkt seek`)"),
    ("too few examples", "finetune --method m --target {target} --train {examples} --out {tmp}/o --metrics {tmp}/m --num-examples 9", "{examples}: holds 2 examples, num_examples asks for 9"),
    ("unknown metric task", "evaluate --model {target} --task chess --test {examples} --out {tmp}/o", "unknown task 'chess'; expected one of gsm8k, humaneval, mbpp, mmlu, or tasks/chess/task.yaml here"),
    ("no reference", "evaluate --model {target} --task gsm8k --test {examples} --out {tmp}/o", "example toy_0: `reference` lacks 'answer', which task gsm8k needs; make the test set with `pkt prepare`"),
    ("too few texts", "compare --first {target} --second {target} --texts {texts} --out {tmp}/o --metrics {tmp}/m", "{texts}: 2 texts, 200 wanted (num_texts)"),
    ("text without text", "compare --first {target} --second {target} --texts {examples} --out {tmp}/o --metrics {tmp}/m", "{examples}:1: expected a key `text` that is not empty, found "),
    ("nothing to compare", "compare --first {target} --texts {texts} --out {tmp}/o --metrics {tmp}/m", "give --second, --delta, or both"),
    ("no second", "compare --first {target} --second {nowhere} --texts {texts} --out {tmp}/o --metrics {tmp}/m", "{nowhere}: no such folder, and not a hub name of the form owner/name or owner/name@revision"),
    ("neurons of another", "neurons --attribution {scores} --model {source} --out {tmp}/o", "{scores}: made from target, {source} is another model"),
    ("no report params", "report --params {nowhere} --results {data} --html {tmp}/h --figures {tmp}/f --table {tmp}/t --out {tmp}/o", "{nowhere}: no such params file"),
    ("no selection", "align --target {target} --selection {data} --extract {examples} --align {examples} --out {tmp}/o --metrics {tmp}/m", "{data}/selection.safetensors: no such file; expected a selection artifact, made by `pkt select`"),
    ("no mapping", "inject --target {target} --selection {data} --mapping {data} --out {tmp}/o", "{data}/chosen.json: no such file; expected a folder of `pkt align`"),
    ("no prompts", "generate --source {source} --train {nowhere} --out {tmp}/o --metrics {tmp}/m", "{nowhere}: no such file of examples"),
    ("no row", "export --model {target} --delta {nowhere} --out {tmp}/o", "{nowhere}: no such file or folder; expected a row's folder, a PEFT adapter or a delta"),
    ("no profile", "code --params {typo} --out {tmp}/o", "{typo}: section 'made_by' is missing"),
    ("nothing to adopt", "adopt --task gsm8k --metrics-in {nowhere} --out {tmp}/o", "{nowhere}: no such metrics; run the profile that makes them"),
    ("no file", "inspect {nowhere}", "{nowhere}: no such file; expected an artifact (.safetensors)"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    """Good and bad files by name."""
    from pkt_stages.models.changes import write_changes
    from pkt_stages.models.inject import SparseDelta

    folder = tmp_path_factory.mktemp("world")
    made = {"source": source_folder, "target": target_folder, "nowhere": folder / "nowhere", "data": folder / "data"}
    made["data"].mkdir()
    for split in ("train", "test"):
        (made["data"] / f"{split}.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    made["examples"] = write_examples(folder / "examples.jsonl", ["It is 1.", "It is 2."])
    made["useless"] = write_examples(folder / "useless.jsonl", ["..."])
    made["long"] = write_examples(folder / "long.jsonl", ["x" * 400])
    for name, text in (("empty", "\n"), ("broken", "{}\n{\n"), ("rows", '{"question": "1?"}\n')):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text(text)
    made["texts"] = folder / "texts.jsonl"
    made["texts"].write_text('{"text": "a"}\n{"text": "b"}\n')
    made["typo"] = folder / "typo.yaml"
    made["typo"].write_text("attribute: {norm: rms}\n")
    for name in ("opt", "pickled", "truncated", "nan"):
        made[name] = make_model(folder / name, seed=3)
    config = json.loads((made["opt"] / "config.json").read_text())
    (made["opt"] / "config.json").write_text(json.dumps(config | {"model_type": "opt"}))
    weights = {name: made[name] / "model.safetensors" for name in ("pickled", "truncated", "nan")}
    torch.save(load_file(weights["pickled"]), made["pickled"] / "pytorch_model.bin")
    weights["pickled"].unlink()
    weights["truncated"].write_bytes(weights["truncated"].read_bytes()[:-100])
    broken = load_file(weights["nan"])
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, weights["nan"], metadata={"format": "pt"})
    made["weights"] = target_folder / "model.safetensors"
    rows = {"ffn_up": SparseDelta(torch.tensor([0]), torch.tensor([[1]]), torch.ones(1, 1, 64))}
    meta = {"command": "inject", "method": None, "target": {"name": "target"}, "source": None, "params": {}}
    write_changes(folder / "row", {"one": rows}, meta)
    made["delta"] = folder / "row/delta_0.safetensors"
    made["cut"] = folder / "cut.safetensors"
    made["cut"].write_bytes(made["delta"].read_bytes()[:50])
    made["scores"] = folder / "scores.safetensors"
    return made


@pytest.mark.parametrize(("line", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_one_line_and_status_two(pkt: Run, world: dict[str, Path], tmp_path: Path, line: str, message: str) -> None:
    if "{scores}" in line and not world["scores"].exists():
        made = ("--model", world["target"], "--extract", world["examples"], "--out", world["scores"])
        assert pkt("attribute", *made)[0] == 0
    status, _, err = pkt(*shlex.split(line.format(**world, tmp=tmp_path)))
    expected = "pkt: error: " + message.format(**world)
    last = err.splitlines()[-1]
    # A message that quotes a library ends in that library's words.
    assert (
        last.startswith(expected)
        if message.endswith((" (", "(expected ", "one of ", "found ", ": "))
        else last == expected
    )
    assert status == 2
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 26624 vs 26516"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_that_a_library_reports(pkt: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from pkt_stages import __main__

    def full(name: str) -> None:
        raise error

    monkeypatch.setattr(__main__, "application", full)
    line = "pkt: error: no space to write a file; free some and run again, it goes on where it was\n"
    assert pkt("prepare") == (2, "", line)


def test_the_table_is_long_enough_and_covers_the_commands() -> None:
    assert len(TABLE) >= 30
    assert len({row[1].split()[0] for row in TABLE}) >= 14
