"""`pkt check` on a copy of this repository's data: every kind of mistake, one line each, all at once."""

# ruff: noqa: E501
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pkt_stages.examples import write_jsonl
from pkt_stages.tools.check import problems
from tests.conftest import make_model
from tests.profiles import add_row, one_source, rows

Run = Callable[..., tuple[int, str, str]]
Edit = Callable[[dict[str, Any]], None]
ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("profiles/*/params.yaml"))]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_the_profiles_that_are_here(path: Path) -> None:
    """Those of real models have what can be known without them; what git ignores is made or fetched by a command."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/data/")]
    assert [line for line in problems(path) if not any(folder in line for folder in ignored)] == []


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small random models and a task of the messages' and the benchmark's rows."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / ".dvc").mkdir()
    make_model(folder / "data/tiny/source-chat", seed=1, hidden_size=96, intermediate_size=128, num_hidden_layers=4)
    make_model(folder / "data/tiny/target-chat", seed=2)
    for split, count in (("train", 20), ("test", 5)):
        lines = [{"question": f"{split} {i}?", "answer": f"One.\n#### {i}"} for i in range(count)]
        write_jsonl(folder / f"data/tiny/gsm8k/{split}.jsonl", lines)
    write_jsonl(folder / "data/tiny/texts/texts.jsonl", [{"text": f"Text {i}."} for i in range(6)])
    return folder


def plain(params: dict[str, Any]) -> None:
    """A profile of these models in which nothing is wrong."""
    one_source(params)
    parts: dict[str, Any] = {part: {} for part in params["task"]["gsm8k"]}
    params |= {"task": {"gsm8k": parts | {"evaluate": {"max_new_tokens": 4}}}, "prepared_task": {"gsm8k": {}}}
    params["compare"] = {"num_texts": 6, "batch_size": 6}
    params["prepare"] = {"extract": 4, "align": 8, "train": 5, "transfer": 2}
    params["align"] = {"batch_size": 4, "validation_size": 3, "max_length": 256}
    rows(
        params,
        align={"laten": {"init_std": 0.02}},
        unaligned={"unaligned_seeking": {"code": "seeking"}},
        finetune={"postpkt_random": {"init": "random"}},
    )


def found(project: Path, edit: Edit = lambda params: None) -> list[str]:
    """What is wrong with the profile after an edit, without the file's name."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    plain(params)
    edit(params)
    path = project / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    before = {file: file.stat().st_mtime_ns for file in project.rglob("*")}
    lines = problems(path)
    assert before == {file: file.stat().st_mtime_ns for file in project.rglob("*")}  # it writes nothing
    assert lines == sorted(lines) and all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_nothing_is_wrong(project: Path) -> None:
    assert found(project) == []


def rename(old: str, new: str) -> Edit:
    return lambda params: params.update({new: params.pop(old)})


def swap(params: dict[str, Any]) -> None:
    params |= {"source": ["target"], "target": "source-chat", "seek_source": ["target"], "teacher": []}
    params["selected"] = {"trained": ["target"], "with_base": []}


def entry(group: str, name: str, **changes: Any) -> Edit:
    return lambda params: add_row(params, group, name, {**params["made_by"][group].get(name, {}), **changes})


def update(section: str, **changes: Any) -> Edit:
    return lambda params: params[section].update(changes)


def task(**parts: Any) -> Edit:
    return lambda params: params["task"]["gsm8k"].update(parts)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (update("select", ratee=0.05), ["select: unknown key 'ratee' (did you mean 'max_rate'?); expected one of "]),
        (update("align", stps=2), ["align: unknown key 'stps' (did you mean 'steps'?); expected one of "]),
        (update("finetune", epochs="many"), ["finetune: epochs: expected int, found 'many'"]),
        (update("finetune", dropout=1.5), ["finetune: dropout must be at least 0 and below 1, found 1.5"]),
        (
            rename("select", "selekt"),
            [
                "select: section is missing; `select: {}` takes the defaults",
                "selekt: no list and no section of a command (did you mean 'select'?); take it out",
            ],
        ),
        (task(align={"step": 2}), ["task.gsm8k.align: unknown key 'step' (did you mean 'steps'?); expected one of "]),
        (
            task(evaluate={"num_samples": 5}),
            ["task.gsm8k.evaluate: num_samples 5 with temperature 0 would repeat one answer; set a temperature"],
        ),
        (
            entry("align", "laten", init_sdt=1),
            ["made_by.align.laten: unknown key 'init_sdt' (did you mean 'init_std'?); expected one of given, "],
        ),
        (entry("align", "laten", init_std="x"), ["made_by.align.laten: init_std: expected float, found 'x'"]),
        (entry("finetune", "postpkt_random", init="lora"), ["made_by.finetune.postpkt_random: init: expected one of "]),
        (
            entry("unaligned", "unaligned_seeking", code="sekking"),
            ["made_by.unaligned.unaligned_seeking: code 'sekking': no such file in pkt_stages/methods (did you mean"],
        ),
        (
            entry("finetune_answers", "seqkd", generat={}, finetune={}),
            [
                "made_by.finetune_answers.seqkd: a part for 'generat' (did you mean 'generate'?); expected parts for",
                "made_by.finetune_answers.seqkd: has no part for 'generate'; it has generat, finetune",
            ],
        ),
        (
            lambda p: p.update(no_change={**p["no_change"], "prepre": {}}),
            [
                "no_change.prepre: no command has settings that a task changes (did you mean 'prepare'?)",
                "task.gsm8k: 'prepre' is missing; a task has the parts of `no_change`: ",
            ],
        ),
        (
            update("evaluate", sandbox_floor="rlimits"),
            ["evaluate.sandbox_floor: does not belong there; expected in `task.<task>.evaluate` of the tasks of"],
        ),
        (
            task(evaluate={"max_new_tokens": 4, "sandbox_floor": "rlimits"}),
            ["task.gsm8k.evaluate: sandbox_floor has no effect: no generated code is run; take it out"],
        ),
        (lambda p: p.update(teacher=["sourse"]), ["teacher: 'sourse' is not in `source` (did you mean 'source'?)"]),
        (
            lambda p: p["task"].update(chess=p["task"]["gsm8k"]),
            ["task: unknown task 'chess'; expected one of gsm8k, humaneval, mbpp, mmlu"],
        ),
        (lambda p: p.update(prepared_task=3), ["prepared_task: expected a mapping or a list, found 3"]),
        (
            lambda p: p["prepared_task"].update(mmlu={}) or p["task"].update(mmlu=p["task"]["gsm8k"]),
            ["data_dir: task mmlu: no folder {folder}/data/tiny/mmlu; put train.jsonl and test.jsonl there, own splits,"],
        ),
        (
            swap,
            [
                "seek_source: target: the source has 3 layers, the target 4; Seeking needs as many",
                "source: target-chat has 92,160 parameters in its layers, the target source-chat",
            ],
        ),
        (task(align={"steps": 9}), ["made_by.align.laten: task gsm8k: 9 steps need as many extract examples, found 4"]),
        (
            update("align", validation_size=7),
            ["made_by.align.laten: task gsm8k: 7 held out (validation_size) and 3 in a step (batch_size - 1) need 10"],
        ),
        (update("align", rate=0.5), ["made_by.align.laten: rate 0.5 is above `select.max_rate` 0.1; raise that, or"]),
        (update("align", rate=0.001), ["made_by.align.laten: rate 0.001 selects no ffn neuron of the target; raise it"]),
        (
            update("select", max_rate=0.001),
            [
                "made_by.align.laten: rate 0.1 is above `select.max_rate` 0.001; raise that, or lower it",
                "select.max_rate: 0.001 of 64 attn neurons are 0; source-chat and target-chat have 64 a layer, expected",
                "select.max_rate: 0.001 of 96 ffn neurons are 0; source-chat and target-chat have 96 a layer, expected",
            ],
        ),
        (
            entry("align", "laten", variant="last"),
            ["made_by.align.laten: variant 'last' is none of `select.variants`; expected one of default"],
        ),
        (
            update("select", norm="reference_code"),
            [],
        ),
        (
            lambda p: p.update(attribute={"norms": ["rms"]}, select={"norm": "reference_code"}),
            ["select: norm reference_code is not among `attribute.norms` (rms)"],
        ),
        (
            entry("unaligned", "unaligned_seeking", block="random"),
            ["made_by.unaligned.unaligned_seeking: block random is not among `seek.more_blocks` (none)"],
        ),
        (
            update("prepare", train=50),
            ["prepare, task gsm8k: 64 examples wanted (extract 4, align 8, train 50, transfer 2), the pool holds 20"],
        ),
        (update("prepare", test=50), ["prepare, task gsm8k: 50 test examples wanted, there are 5; lower `prepare.test`"]),
        (
            update("finetune", num_examples=9),
            ["made_by.finetune.postpkt_random: task gsm8k: num_examples 9, the train set has 5; lower it, or raise"],
        ),
        (
            task(evaluate={"max_new_tokens": 250}),
            [
                "evaluate, task gsm8k, model source-chat: example gsm8k_test_1: 62 tokens of prompt and 250 new ones, the",
                "evaluate, task gsm8k, model target-chat: example gsm8k_test_1: 62 tokens of prompt and 250 new ones, the",
            ],
        ),
        (
            update("finetune", max_length=20),
            ["made_by.finetune.postpkt_random, task gsm8k: example gsm8k_train_1"],
        ),
        (update("compare", num_texts=7), ["compare.num_texts: 7 texts wanted, {folder}/data/tiny/texts/texts.jsonl holds 6"]),
        (
            lambda p: p.update(params_file="profiles/x/params.yaml", here="artifacts/x"),
            [
                "here: expected a folder that is called like the profile, tiny, found artifacts/x",
                "params_file: expected params.yaml, this file as seen from `root`, found profiles/x/params.yaml",
            ],
        ),
        (
            lambda p: p.update(
                source=["sourse"], models=["sourse-chat", "target-chat"], selected={"trained": ["sourse"], "with_base": []}
            ),
            [
                "attributed: 'sourse-chat' is missing; LaTen selects its neurons, too",
                "seek_source: 'source' is not in `source` (did you mean 'sourse'?)",
                "source, models: 'sourse-chat': no folder {folder}/data/tiny/sourse-chat (did you mean 'source-chat'?); put",
                "teacher: 'source' is not in `source` (did you mean 'sourse'?)",
            ],
        ),
        (
            lambda p: p.update(reexpressed={"big": {"of": "target-chat", "like": "source-chat", "how": {"sed": 0}}}),
            ["reexpressed.big.how: unknown key 'sed' (did you mean 'seed'?); expected one of num_layers, "],
        ),
        (
            lambda p: p.update(
                reexpressed={"big": {"of": "target-chat", "like": "source-chat", "how": {"seed": 0, "num-heads": 3}}}
            ),
            ["reexpressed.big: num_heads 3 is smaller than the model's 4; a model can be written again in a shape that"],
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_a_line(project: Path, edit: Edit, expected: list[str]) -> None:
    lines = found(project, edit)
    starts = [text.replace("{folder}", _seen(project)) for text in expected]
    assert len(lines) == len(starts), lines
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def _seen(project: Path) -> str:
    return os.path.relpath(project)


def test_all_of_them_at_once(pkt: Run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `pkt check`, `plan` and `sweep` alike; exit status 1."""

    def edit(params: dict[str, Any]) -> None:
        rename("select", "selekt")(params)
        params["align"] |= {"stps": 2, "rate": "x"}
        params["teacher"] = ["sourse"]

    assert len(found(project, edit)) == 5
    monkeypatch.chdir(project)
    (project / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n    check_update = false\n")
    said = [pkt(command) for command in ("check", "plan", "sweep")]
    for status, printed, err in said:
        assert (status, printed) == (1, "")
        lines = err.splitlines()
        assert len(lines) == 5 and all(line.startswith("pkt: error: params.yaml: ") for line in lines)
    found(project)
    status, printed, err = pkt("check", "params.yaml", ".")
    assert (status, err) == (0, "")
    assert printed == "check: params.yaml: nothing wrong (3 methods, 1 tasks, 1 sources)\n"
    assert pkt("check", "none")[0] == 2


@pytest.fixture
def own(project: Path, tmp_path: Path) -> Path:
    """A project of one's own, whose files a test may break."""
    return Path(shutil.copytree(project, tmp_path / "own"))


def test_a_model_without_weights_or_with_others(own: Path) -> None:
    source = own / "data/tiny/source-chat"
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    at = f"{_seen(own)}/data/tiny/source-chat"
    where = "source, models, attributed, pairs.pair: "
    assert found(own) == [
        f"{where}{at}: holds no safetensors weights (model.safetensors, or model.safetensors.index.json);"
        " `pkt convert` makes some of a pickled checkpoint"
    ]
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, source / "model.safetensors", metadata={"format": "pt"})
    assert found(own) == [f"{where}{at}: not the weights that its config.json describes; it lacks {lost}"]
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-5])
    assert found(own)[0].startswith(f"{where}{at}/model.safetensors: not a readable safetensors file")
    (source / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert found(own)[0].endswith("names model-00001-of-00001.safetensors, which is not there; fetch the model again")


def test_a_team_without_the_source_model(own: Path) -> None:
    shutil.rmtree(own / "data/tiny/source-chat")
    assert len(found(own)) == 1
    assert problems(own / "params.yaml", allow_missing=True) == []


def test_teachers_share_the_vocabulary(own: Path) -> None:
    file = own / "data/tiny/source-chat/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    lines = found(own, entry("distill", "kd", objective="kd"))
    assert len(lines) == 1 and lines[0].startswith("teacher: source and target must share their vocabulary: token ")


def test_a_small_model_with_a_large_vocabulary_is_a_source(own: Path) -> None:
    """As Gemma-3-270M, most of which is its embedding."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1}
    make_model(own / "data/tiny/source-chat", seed=1, **sizes)
    (line,) = [line for line in found(own) if line.startswith("source: ")]
    assert line.startswith("source: source-chat has 64,512 parameters in its layers, the target target-chat 92,160")
    make_model(own / "data/tiny/source-chat", seed=1, **sizes, vocab_size=1024)
    assert not any(line.startswith("source: ") for line in found(own))


def test_a_vocabulary_is_not_moved_into_one_weight(own: Path) -> None:
    """A tied target has one change for embedding and head; another's tokens never get that far."""
    make_model(own / "data/tiny/target-chat", seed=2, tie_word_embeddings=True)
    shutil.copytree(own / "data/tiny/source-chat", own / "data/tiny/source-base")

    def moved(params: dict[str, Any]) -> None:
        params |= {"transport_source": ["source"], "correlate": {"num_texts": 6}}
        add_row(params, "transport", "matched", {"code": "matched"})

    assert found(own, moved) == [
        "made_by.transport.matched: target-chat: its head is its embedding, which get different changes;"
        " set vocabulary: false"
    ]
    assert (
        found(own, lambda p: moved(p) or add_row(p, "transport", "matched", {"code": "matched", "vocabulary": False}))
        == []
    )
    file = own / "data/tiny/source-base/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    assert not any("its head is its embedding" in line for line in found(own, moved))


def test_own_splits_are_taken_as_they_are(own: Path) -> None:
    """And all that are too short are told at once."""
    for name, count in (("extract", 3), ("align", 7), ("train", 5)):
        lines = [
            {"messages": [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": "One."}]}
            for i in range(count)
        ]
        write_jsonl(own / f"data/tiny/gsm8k/{name}.jsonl", lines)
    assert found(own, lambda p: p.update(prepare={}) or task(align={"steps": 3})(p)) == []
    assert found(own, lambda p: p.update(prepare={})) == [
        "made_by.align.laten: task gsm8k: 4 steps need as many extract examples, found 3; lower steps"
    ]
    (line,) = found(own, task(align={"steps": 3}))
    assert line == (
        "prepare, task gsm8k: extract: 4 examples wanted, the file holds 3, align: 8 examples wanted, the file holds 7,"
        " train: 5 examples wanted, the file holds 3 beside the transfer examples; set `prepare.extract`,"
        " `prepare.align`, `prepare.train`"
    )


def test_pools_are_tables_or_missing(own: Path) -> None:
    """A table is read like JSON lines; a pool that is nowhere is one line beside all others."""
    data = own / "data/tiny/gsm8k"
    for pool, count in (("train", 20), ("test", 5)):
        (data / f"{pool}.jsonl").unlink()
        rows = [f'"{pool} {i}?","One.\n#### {i}"' for i in range(count)]
        (data / f"{pool}.csv").write_text("\n".join(["question,answer", *rows]) + "\n")
    assert found(own) == []
    (line,) = found(own, lambda p: p["prepare"].update(train=50))
    assert line.startswith(
        "prepare, task gsm8k: 64 examples wanted (extract 4, align 8, train 50, transfer 2), the pool"
    )
    (data / "train.csv").unlink()
    (line,) = found(own)
    assert line.startswith(f"prepare, task gsm8k: {_seen(own)}/data/tiny/gsm8k/train.jsonl: no such file")


def test_another_graph_beside_the_params(own: Path) -> None:
    (own / "profiles/mine").mkdir(parents=True)
    (own / "profiles/mine/dvc.yaml").write_text((own / "dvc.yaml").read_text() + "# mine\n")
    found(own)
    params = yaml.safe_load((own / "params.yaml").read_text())
    params |= {"profile": "mine", "root": "../..", "params_file": "profiles/mine/params.yaml"}
    params |= {"here": "artifacts/mine", "told": "results/mine"}
    path = own / "profiles/mine/params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    (line,) = problems(path)
    assert line.startswith(f"{path}: dvc.yaml: expected a copy of ") and "; cp " in line


def test_a_new_profile(pkt: Run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(own)  # writes its params.yaml
    monkeypatch.chdir(own)
    asked = ("new-profile", "mine", "--source", "source", "--target", "target-chat", "--task", "gsm8k")
    status, printed, err = pkt(*asked)
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "new-profile: profiles/mine/params.yaml with 1 tasks and 6 rows"
    # What is too much for so small data is told exactly, and nothing else.
    assert [line for line in lines if "missing" in line] == [
        f"still missing: {p}" for p in problems(Path("profiles/mine/params.yaml"))
    ]
    assert (own / "profiles/mine/dvc.yaml").read_bytes() == (own / "dvc.yaml").read_bytes()
    made = yaml.safe_load((own / "profiles/mine/params.yaml").read_text())
    assert (made["source"], made["target"], made["models_dir"]) == (["source"], "target-chat", "data/tiny")
    assert made["align"] == made["evaluate"] == {}
    before = (own / "profiles/mine/params.yaml").read_bytes()
    status, _, err = pkt(*asked)
    there = "profiles/mine: is there already; give another name, edit it, or remove the folder first"
    assert (status, err) == (2, f"pkt: error: {there}\n")
    assert (own / "profiles/mine/params.yaml").read_bytes() == before
    status, printed, err = pkt(
        "new-profile", "other", "--source", "absent-7b", "--target", "target-chat", "--task", "gsm8k"
    )
    assert status == 0, err
    assert "'absent-7b-chat': no folder data/tiny/absent-7b-chat; put its weights there, or a hub.yaml" in printed
    assert "if a model's name is mistyped: rm -r profiles/other, and once more" in printed
    assert pkt("new-profile", "a b", "--source", "s", "--target", "t")[0] == 2
    monkeypatch.chdir(own / "data")
    assert pkt("check")[2] == (
        "pkt: error: dvc.yaml: no profile (params.yaml beside a dvc.yaml); run this in the project's folder, ..\n"
    )
