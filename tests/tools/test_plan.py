from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pkt_stages.errors import UserError
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import Geometry, geometry
from pkt_stages.tools import plan
from pkt_stages.tools.graph import Graph, _below, open_repo
from pkt_stages.tools.plan import Estimator, Machine, Need, num_parameters, selected_bytes
from pkt_stages.tools.sweep import read_times

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
PARAMS = "--params profiles/llama2/params.yaml"
LARGE = "data/models/llama2-13b-chat"
NAMES = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "d_head", "vocab_size")
SIZES = dict.fromkeys(NAMES, 8)


def repository(folder: Path) -> None:
    """DVC's, without git."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = True\n    analytics = false\n    check_update = false\n")


@pytest.fixture
def estimator() -> Estimator:
    return Estimator(ROOT, tokens=256)


def test_parameters_are_counted(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    sizes = geometry(model.config)
    tied = sizes.vocab_size * sizes.d_model * model.config.tie_word_embeddings
    assert num_parameters(sizes) == sum(p.numel() for p in model.parameters()) - vectors + tied


def test_attribution_of_a_13b_model(estimator: Estimator) -> None:
    """METHODS section 2 and the issue: 248 TFLOP for the directions, about 6 for 32 examples' moments."""
    need = estimator.need(f"pkt attribute --model {LARGE} --extract e --transfer t --out o {PARAMS}")
    directions, moments = 2 * 32000 * 5120 * 757_760, 2 * 32000 * 757_760 * 4 * 35 * 2
    forward = 2 * 12.84e9 * 35 * 256
    assert need.flops == pytest.approx(directions + moments + forward, rel=0.02)
    assert need.memory == pytest.approx(2 * 13.0e9 + 2 * 655e6, rel=0.02)
    # Two norms, FFN scores once and attention scores for two coefficients.
    assert need.disk == 4 * 35 * 2 * 40 * (13824 + 2 * 5120)


def test_rows_of_one_task_at_the_papers_settings(estimator: Estimator) -> None:
    """13B to 7B: of an example 32 layers, 1100 FFN and 409 attention neurons, two rows of 5120 in float16 each."""
    example = 32 * (1100 + 409) * 2 * 5120 * 2
    how = f"{PARAMS} --source {LARGE} --target-scores s --out o"
    random = 40 * (1100 + 409) * 2 * 5120 * 2  # the profile has LaTen's control on random neurons
    for task, steps in (("mmlu", 2), ("humaneval", 3), ("gsm8k", 4)):
        assert estimator.need(f"pkt select --task {task} {how}").disk == (steps + 3) * example + random
    large, small = (Geometry(**dict(resolve(str(ROOT / f"data/models/llama2-{n}b-chat")).sizes)) for n in (13, 7))
    assert selected_bytes(large, small, 2 + 1, 0.1, random=False) == 3 * example < 3 * 2**30
    # Never more than all rows of the four sites.
    assert selected_bytes(large, small, 100, 0.2, random=True) == 40 * (13824 + 5120) * 2 * 5120 * 2


def test_every_stage_has_an_estimate_or_needs_no_model(estimator: Estimator) -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    stages = [stage.get("do", stage) for stage in graph.values()]
    commands = {str(stage["cmd"]).split()[1] for stage in stages}
    without = {"code", "prepare", "texts", "neurons", "adopt"}
    assert {name for name in commands if hasattr(estimator, f"_{name}")} == commands - without


def test_a_machine_computes_and_reads() -> None:
    assert Machine(2e12, 1e9).seconds(Need(flops=4e12, moved=3e9, host=5)) == 10 + 2 + 3 + 5


def test_sizes_of_the_hub_folders() -> None:
    for pointer in sorted(ROOT.glob("data/models/*/hub.yaml")):
        sizes = Geometry(**dict(resolve(str(pointer.parent)).sizes))
        billions = num_parameters(sizes) / 1e9
        named = pointer.parent.name
        expected = {"13b": 13.0, "7b": 6.7, "3b": 3.4, "1_5b": 1.8, "360m": 0.41, "135m": 0.163}
        assert billions == pytest.approx(next(v for k, v in expected.items() if k in named.split("-")), rel=0.02), named


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 2}, "key 'd_model' is missing"),
        (
            SIZES | {"layers": 2},
            f"unknown key 'layers' (did you mean 'num_layers'?); expected one of {', '.join(NAMES)}",
        ),
        (SIZES | {"d_ff": "many"}, "d_ff: expected int, found 'many'"),
        (SIZES | {"d_ff": 8.5}, "d_ff: expected int, found 8.5"),
        (SIZES | {"d_ff": 0}, "d_ff: expected a number above 0, found 0"),
        ([7], "expected a mapping, found [7]"),
    ],
)
def test_sizes_that_are_not_those_of_a_model(tmp_path: Path, sizes: Any, message: str) -> None:
    file = tmp_path / "model/hub.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({"repo": "o/m", "revision": "main", "sizes": sizes}))
    with pytest.raises(UserError) as error:
        Estimator(tmp_path, tokens=256).need("pkt select --source model")
    assert str(error.value) == f"{file}: sizes: {message}"


def test_a_plan_with_a_model_of_wrong_sizes_is_one_line(
    pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path)
    (tmp_path / "hub.yaml").write_text("repo: o/m\nrevision: main\nsizes: {num_layers: 2}\n")
    (tmp_path / "dvc.yaml").write_text("stages: {select: {cmd: pkt select --source ., outs: [selection]}}\n")
    monkeypatch.chdir(tmp_path)
    message = f"pkt: error: {tmp_path}/hub.yaml: sizes: key 'd_model' is missing\n"
    status, _, err = pkt("plan")
    assert (status, err) == (2, message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("align --target {model} --method laten --task new", "no task 'new' in `task`; found mmlu, "),
        ("finetune --target {model} --method new --task mmlu", "unknown method 'new'; `made_by` has matched, "),
    ],
)
def test_what_the_params_lack_is_one_line(estimator: Estimator, command: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        estimator.need(f"pkt {command.format(model=LARGE)} {PARAMS}")
    assert str(error.value).startswith(f"{ROOT}/profiles/llama2/params.yaml: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("select: {}", "params.yaml: section 'align' is missing"),
        ("align: 5", "params.yaml: section 'align': expected a mapping, found int"),
        ("align: {rate: many}", "params.yaml: align: rate: expected float, found 'many'"),
        ("align: {steps: 0}", "params.yaml: align: steps must be at least 1, found 0"),
        ("[", "params.yaml: not readable YAML ("),
    ],
)
def test_a_malformed_params_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/hub.yaml").write_text(yaml.safe_dump({"repo": "o/m", "revision": "main", "sizes": SIZES}))
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        Estimator(tmp_path, tokens=256).need("pkt align --target model --params params.yaml")
    assert str(error.value).startswith(f"{tmp_path}/{message}") and "\n" not in str(error.value)


def test_a_command_without_what_its_estimate_needs(estimator: Estimator) -> None:
    with pytest.raises(UserError, match=r"^a stage's command lacks --target, which its estimate needs; see dvc\.yaml$"):
        estimator.need(f"pkt align {PARAMS}")
    assert estimator.need("make all") == estimator.need("true") == Need()


def test_settings_are_those_of_task_and_method(estimator: Estimator) -> None:
    """Defaults, changed by section, task and method: HumanEval takes 20 samples and SeqKD's part of an entry counts."""
    evaluations = [
        estimator.need(f"pkt evaluate --model {LARGE} --task {task} {PARAMS}") for task in ("humaneval", "gsm8k")
    ]
    assert [need.disk for need in evaluations] == [164 * 20 * 1000, 1319 * 1000]
    (generated, few) = (
        estimator.need(f"pkt {command} {LARGE} --method seqkd --task mmlu {PARAMS}")
        for command in ("generate --source", "finetune --target")
    )
    assert generated.disk == 80 * 1000
    tokens = 1000 * 256 * 5 * 3
    assert few.flops == pytest.approx(4 * 13.0e9 * tokens, rel=0.02)


def test_what_the_host_takes_does_not_depend_on_the_width(estimator: Estimator) -> None:
    """By hand, a layer and the head 1 ms a pass, a way back 2 ms; a micro-batch 20 ms more."""
    small, large = "data/models/llama2-7b-chat", LARGE

    def host(command: str) -> float:
        return estimator.need(f"pkt {command} {PARAMS}").host

    steps = 1000 * 5 * 3 / 4
    assert host(f"finetune --target {small} --method postpkt_random --task mmlu") == pytest.approx(
        steps * (0.02 + 3 * 0.033)
    )
    taught = 80 * 5 * 3 / 4
    assert host(f"distill --target {small} --source {large} --method kd --task mmlu") == pytest.approx(
        taught * (0.02 + 3 * 0.033 + 0.041)
    )
    writing = f"pkt evaluate --model {small} --task gsm8k"
    assert estimator.need(writing).host == pytest.approx(1319 * 150 / 64 * 0.033)
    assert estimator.need(f"{writing} {PARAMS}").host == 0  # the profile writes with vLLM
    assert host("report") > 0.3


def test_every_change_of_a_row_is_scaled(tmp_path: Path) -> None:
    """A row of random maps has a change per seed, each tried at seven factors; the likelihood without is asked once."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/hub.yaml").write_text(yaml.safe_dump({"repo": "o/m", "revision": "main", "sizes": SIZES}))
    row = {"code": "matched", "maps": "random", "seeds": [0, 1, 2]}
    made = {"transport": {"fitted": {"code": "matched"}, "random": row}}
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"made_by": made, "prepare": {"align": 64}, "scale": {}, "derive": {}})
    )
    command = "pkt scale --params params.yaml --model model --examples e --delta artifacts/x/transfer/{}/source"
    one, three = (Estimator(tmp_path, tokens=256).need(command.format(name)) for name in ("fitted", "random"))
    assert three.flops / one.flops == three.host / one.host == 22 / 8


def test_rows_are_those_of_the_test_set_and_runs_those_of_the_row(estimator: Estimator, tmp_path: Path) -> None:
    """Three unseen examples, three seeds, one change; 1319 questions, or as many as there are."""
    command = f"pkt evaluate --model {LARGE} --task gsm8k {PARAMS} --delta artifacts/llama2/transfer"
    rows = {"laten/s/gsm8k": 3, "control_random_delta/s/gsm8k": 3, "postpkt_pissa/gsm8k": 3, "unaligned_seeking/s": 1}
    assert {row: estimator.need(f"{command}/{row}").disk / 1319000 for row in rows} == rows
    test = tmp_path / "test.jsonl"
    test.write_text("{}\n" * 7)
    assert estimator.need(f"pkt evaluate --model {LARGE} --task gsm8k {PARAMS} --test {test}").disk == 7000


def test_gradients_of_13b_and_7b(estimator: Estimator) -> None:
    """By hand: nine products a pair, of which gate and up are wide; four passes over 320 examples."""
    models = "--source data/models/llama2-13b-base --target data/models/llama2-7b-base"
    need = estimator.need(f"pkt gradients {models} --examples e --correlation c --out o {PARAMS}")
    pair = 7 * 5120 * 4096 + 2 * 13824 * 11008
    tokens = 4 * 80 * 256
    assert need.disk == 32 * 8 * pair
    assert need.memory == pytest.approx(4 * (13.0e9 + 6.74e9) + 8 * 8 * pair, rel=0.01)
    assert need.flops == pytest.approx(2 * tokens * (4 * 2 * (13.0e9 + 6.74e9) + 32 * pair), rel=0.01)


def test_a_source_beside_a_training_comes_before_it(estimator: Estimator) -> None:
    """Its layers' importance (a pass and its way back) and states (a pass), in float32; never beside the target."""
    command = f"pkt finetune --target data/models/llama2-7b-chat --task mmlu {PARAMS} --method"
    beside = estimator.need(f"{command} semalign --source {LARGE}")
    alone = estimator.need(f"{command} postpkt_random")
    assert beside.flops - alone.flops == pytest.approx(6 * 13.0e9 * 1000 * 256, rel=0.02)
    assert beside.memory == pytest.approx(4 * 13.0e9 + 4 * 256 * 40 * 34 * 5120 * 4, rel=0.02)
    assert alone.memory < beside.memory


def test_a_derived_row_takes_what_its_code_makes(estimator: Estimator) -> None:
    full, low, grid, random = (
        estimator.need(f"pkt derive {PARAMS} --method {method} {options}").disk
        for method, options in (
            ("unaligned_seeking_full", f"--target {LARGE}"),
            ("unaligned_seeking", f"--target {LARGE}"),
            ("unaligned_top_pca_random", f"--target {LARGE}"),
            ("control_random_delta", "--delta d"),
        )
    )
    assert full == grid > 20 * low > random == 0


def test_only_what_new_code_changes_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage `code` is stale, one of its hashes new; of the two stages that depend on one each, one follows."""
    repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    hashes = {"a": "old", "b": "old"}
    stages = {
        "code": {"cmd": "pkt code --params p.yaml --out code", "deps": ["source"], "outs": ["code"]},
        **{n: {"cmd": f"pkt {n}", "deps": [f"code/{n}", "source.txt"], "outs": [f"{n}.txt"]} for n in hashes},
        "after": {"cmd": "pkt after", "deps": ["b.txt"], "outs": ["after.txt"]},
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for name in ("source", "source.txt", "a.txt", "b.txt", "after.txt"):
        Path(name).write_text(name)
    Path("code").mkdir()
    for name, text in hashes.items():
        Path("code", name).write_text(f"{text}\n")

    def names() -> list[str]:
        with open_repo() as repo:
            return [stage.name for stage in plan.stale(Graph(repo, [], glob=False, allow_missing=False))]

    def would_be(**changed: str) -> None:
        md5 = {name: hashlib.md5(f"{text}\n".encode()).hexdigest() for name, text in (hashes | changed).items()}
        monkeypatch.setattr(plan, "code_hashes", lambda stage: {f"{tmp_path}/code/{n}": h for n, h in md5.items()})

    monkeypatch.setattr(plan, "code_hashes", lambda stage: pytest.fail("no stage has run, and none need be asked"))
    assert names() == ["code", "a", "b", "after"]
    would_be()
    with open_repo() as repo:
        repo.commit(force=True)
    assert names() == []
    Path("source").write_text("a comment")
    assert names() == ["code"]
    would_be(b="new")
    assert names() == ["code", "b", "after"]
    # What lies there is of another state in between.
    Path("code/a").write_text("between\n")
    assert names() == ["code", "b", "after"]
    Path("source.txt").write_text("new")
    assert names() == ["code", "a", "b", "after"]


def test_the_hashes_are_those_that_pkt_code_writes(pkt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = f"pkt code --params params.yaml --out {tmp_path}/code"
    status, _, err = pkt(*command.split()[1:])
    assert status == 0, err
    found = plan.code_hashes(SimpleNamespace(cmd=command, wdir=str(ROOT)))
    files = [path for path in (tmp_path / "code").rglob("*") if path.is_file()]
    assert found == {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_what_a_sweep_measured_takes_the_place_of_formulas(tmp_path: Path) -> None:
    assert read_times(tmp_path) == {}
    path = tmp_path / "sweep/times.json"
    path.parent.mkdir()
    path.write_text('{"a@x": 3, "b": 1.5}')
    assert read_times(tmp_path) == {"a@x": 3.0, "b": 1.5}
    for content in ("[1]", '{"a": null}', "{"):
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            read_times(tmp_path)
        assert str(caught.value) == f"{path}: expected seconds by stage, as `pkt sweep` writes them; remove it"


def test_keys_of_params_are_found_as_dpath_finds_them() -> None:
    import dpath

    content = {"a": {"b": {"c": 1}, "x-y": [{"d": 2}], "n": None}, "e": {"f*": 3}, "g": {1: 4}}
    for key in ("a", "a.b", "a.b.c", "a.x-y", "a.x-y.0.d", "a.n", "e.f*", "e.f[*]", "g.1"):
        assert _below(content, key) == dpath.get(content, key, separator="."), key
    for key in ("b", "a.c", "a.b.c.d", "a.x-y.1.d", "a.n.b"):
        with pytest.raises(KeyError):
            dpath.get(content, key, separator=".")
        with pytest.raises(KeyError):
            _below(content, key)
