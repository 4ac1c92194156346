from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.errors import UserError
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import Geometry, geometry
from pkt_stages.tools.plan import Estimator, Machine, Need, num_parameters

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
PARAMS = "--params profiles/llama2/params.yaml"
LARGE = "data/models/llama2-13b-chat"
NAMES = ("num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "d_head", "vocab_size")
SIZES = dict.fromkeys(NAMES, 8)


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
    need = estimator.need(f"pkt attribute --model {LARGE} --examples e --out o {PARAMS}")
    directions, moments = 2 * 32000 * 5120 * 757_760, 2 * 32000 * 757_760 * 4 * 35 * 2
    forward = 2 * 12.84e9 * 35 * 256
    assert need.flops == pytest.approx(directions + moments + forward, rel=0.02)
    assert need.memory == pytest.approx(2 * 13.0e9 + 2 * 655e6, rel=0.02)
    # Two norms, FFN scores once and attention scores for two coefficients.
    assert need.disk == 4 * 35 * 2 * 40 * (13824 + 2 * 5120)


def test_every_stage_has_an_estimate_or_needs_no_model(estimator: Estimator) -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    commands = {str(stage["cmd"]).split()[1] for stage in graph.values()}
    without = {"prepare", "texts", "control", "similarity", "deltas", "neurons", "adopt", "report"}
    assert {name for name in commands if hasattr(estimator, f"_{name}")} == commands - without


def test_a_machine_computes_and_reads() -> None:
    assert Machine(2e12, 1e9).seconds(Need(flops=4e12, moved=3e9)) == 10 + 2 + 3


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
        (SIZES | {"layers": 2}, f"unknown key 'layers'; expected one of {', '.join(NAMES)}"),
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
    from dvc.repo import Repo

    Repo.init(tmp_path, no_scm=True).close()
    (tmp_path / "hub.yaml").write_text("repo: o/m\nrevision: main\nsizes: {num_layers: 2}\n")
    (tmp_path / "dvc.yaml").write_text("stages: {select: {cmd: pkt select --source ., outs: [selection]}}\n")
    monkeypatch.chdir(tmp_path)
    message = f"pkt: error: {tmp_path}/hub.yaml: sizes: key 'd_model' is missing\n"
    status, _, err = pkt("plan")
    assert (status, err) == (2, message)
