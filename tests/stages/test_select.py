from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scored(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, transfer_file: Path, tmp_path: Path
) -> dict[str, Path]:
    made = {}
    for side, folder in (("source", source_folder), ("target", target_folder)):
        made[side] = tmp_path / f"{side}.safetensors"
        status, _, err = pkt(
            *("attribute", "--model", folder, "--extract", extract_file, "--transfer", transfer_file),
            *("--out", made[side]),
        )
        assert status == 0, err
    return made


def select(pkt: Run, scored: dict[str, Path], source: Path, out: Path, *options: object) -> tuple[int, str, str]:
    return pkt(
        *("select", "--source-scores", scored["source"], "--target-scores", scored["target"], "--source", source),
        *("--out", out / "selected", *options),
    )


def test_rows_are_the_sources_weights_at_the_selected_neurons(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    status, printed, err = select(pkt, scored, source_folder, tmp_path, "--max-rate", "0.25")
    assert status == 0, err
    assert "select: 3 layer pairs, 24 FFN and 16 attention neurons each, 5 examples, rows of 5 (" in printed
    selection = artifacts.load(tmp_path / "selected/selection.safetensors", artifacts.SELECTION)
    rows = artifacts.load(tmp_path / "selected/rows.safetensors", artifacts.SOURCE_ROWS)
    weights = load_file(source_folder / "model.safetensors")
    scores = artifacts.load(scored["source"], artifacts.ATTRIBUTION)
    for example in range(5):
        for pair in range(3):
            layer = int(selection["default.ffn_layers"][example, pair, 0])
            neurons = selection["default.ffn_source_neurons"][example, pair]
            ranked = scores["ffn_scores.rms"][example, layer]
            assert torch.equal(ranked[neurons], ranked.sort(descending=True).values[:24])
            at = torch.searchsorted(rows[f"neurons.ffn.{layer}"], neurons)
            down = weights[f"model.layers.{layer}.mlp.down_proj.weight"]
            assert torch.equal(rows[f"ffn_down.{layer}"][at], down[:, neurons].T)

            layer = int(selection["default.attn_layers"][example, pair, 0])
            neurons = selection["default.attn_source_neurons"][example, pair]
            at = torch.searchsorted(rows[f"neurons.attn.{layer}"], neurons)
            v = weights[f"model.layers.{layer}.self_attn.v_proj.weight"]
            shared = (neurons // 24 // 2) * 24 + neurons % 24  # 4 heads of width 24 share 2 key/value heads
            assert torch.equal(rows[f"attn_v.{layer}"][at], v[shared])


def stored(folder: Path) -> dict[int, set[int]]:
    rows = artifacts.load(folder / "selected/rows.safetensors", artifacts.SOURCE_ROWS)
    prefix = "neurons.ffn."
    return {int(n.removeprefix(prefix)): set(rows[n].tolist()) for n in rows.shapes if n.startswith(prefix)}


def test_rows_of_the_examples_that_the_alignment_uses_and_of_no_other(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    """Of three extract and two transfer examples: one step's, from an option or the align settings of the task."""
    params = tmp_path / "params.yaml"
    params.write_text("{select: {}, align: {steps: 3}, task: {easy: {align: {steps: 1}}, long: {}}}")
    for name, options in {
        "one": ("--steps", 1),
        "easy": ("--params", params, "--task", "easy"),
        "all": ("--params", params, "--task", "long"),
        "more": ("--steps", 9),
    }.items():
        assert select(pkt, scored, source_folder, tmp_path / name, *options)[0] == 0
    chosen = artifacts.load(tmp_path / "one/selected/selection.safetensors", artifacts.SELECTION)
    layers, neurons = chosen["default.ffn_layers"][..., 0], chosen["default.ffn_source_neurons"]
    for name, kept in (("one", [0, 3, 4]), ("all", range(5))):
        expected: dict[int, set[int]] = {}
        for example in kept:
            for layer, some in zip(layers[example].tolist(), neurons[example].tolist(), strict=True):
                expected.setdefault(layer, set()).update(some)
        assert stored(tmp_path / name) == expected
    assert stored(tmp_path / "easy") == stored(tmp_path / "one")
    assert stored(tmp_path / "more") == stored(tmp_path / "all")


def test_as_many_random_neurons_of_every_layer_for_the_control(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    for seed in (0, 0, 1):
        options = ("--max-rate", "0.25", "--random-neurons", "--seed", seed)
        assert select(pkt, scored, source_folder, tmp_path / str(seed), *options)[0] == 0
    drawn = [
        artifacts.load(tmp_path / str(seed) / "selected/selection.safetensors", artifacts.SELECTION) for seed in (0, 1)
    ]
    rows = artifacts.load(tmp_path / "0" / "selected/rows.safetensors", artifacts.SOURCE_ROWS)
    weights = load_file(source_folder / "model.safetensors")
    assert drawn[0].shapes["ffn_random_neurons"] == (4, 24) and drawn[0].shapes["attn_random_neurons"] == (4, 16)
    assert not torch.equal(drawn[0]["ffn_random_neurons"], drawn[1]["ffn_random_neurons"])
    for layer in drawn[0]["default.ffn_layers"][..., 0].unique().tolist():
        neurons = drawn[0]["ffn_random_neurons"][layer]
        assert len(neurons.unique()) == 24 and int(neurons.max()) < 128
        at = torch.searchsorted(rows[f"neurons.ffn.{layer}"], neurons)
        assert torch.equal(rows[f"ffn_up.{layer}"][at], weights[f"model.layers.{layer}.mlp.up_proj.weight"][neurons])


def test_a_lower_rate_is_a_slice(pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path) -> None:
    for rate in ("0.25", "0.125"):
        assert select(pkt, scored, source_folder, tmp_path / rate, "--max-rate", rate)[0] == 0
    wide = artifacts.load(tmp_path / "0.25" / "selected/selection.safetensors", artifacts.SELECTION)
    narrow = artifacts.load(tmp_path / "0.125" / "selected/selection.safetensors", artifacts.SELECTION)
    for name in narrow.shapes:
        last = narrow.shapes[name][-1]
        assert torch.equal(wide[name][..., :last], narrow[name])


def test_one_selection_for_all_from_the_mean_score(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    assert select(pkt, scored, source_folder, tmp_path, "--scores-of", "extract_mean")[0] == 0
    selection = artifacts.load(tmp_path / "selected/selection.safetensors", artifacts.SELECTION)
    for name in selection.shapes:
        if not name.endswith("random_neurons"):
            assert torch.equal(selection[name], selection[name][:1].expand_as(selection[name]))
    scores = artifacts.load(scored["source"], artifacts.ATTRIBUTION)["ffn_scores.rms"][:3].mean(0)
    layer = int(selection["default.ffn_layers"][0, 0, 0])
    assert selection["default.ffn_source_neurons"][0, 0, 0] == scores[layer].argmax()


def test_the_layer_rules_use_what_they_say(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path
) -> None:
    scores = artifacts.load(scored["source"], artifacts.ATTRIBUTION)
    by_rule = {"neuron_sum": scores["ffn_scores.rms"].sum(-1), "block_gain": scores["ffn_gain.rms"]}
    for rule, layer_scores in by_rule.items():
        assert select(pkt, scored, source_folder, tmp_path / rule, "--layer-rule", rule)[0] == 0
        pairs = artifacts.load(tmp_path / rule / "selected/selection.safetensors", artifacts.SELECTION)[
            "default.ffn_layers"
        ]
        dropped = [min(range(4), key=lambda layer: float(row[layer])) for row in layer_scores]
        assert [set(range(4)) - set(p[:, 0].tolist()) for p in pairs] == [{layer} for layer in dropped]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-rate", "0"), "max_rate must be above 0 and at most 1, found 0.0"),
        (("--max-rate", "0.001"), "max_rate 0.001 of 96 ffn neurons selects none; raise it"),
    ],
)
def test_bad_settings(
    pkt: Run, scored: dict[str, Path], source_folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    status, _, err = select(pkt, scored, source_folder, tmp_path, *options)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "selected/selection.safetensors").exists()


def test_another_source_than_the_one_attributed(
    pkt: Run, scored: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    status, _, err = select(pkt, scored, target_folder, tmp_path)
    assert status == 2
    assert "not the model that" in err
    assert "run `pkt attribute` again" in err


def test_swapped_models_are_told_what_is_possible(
    pkt: Run, scored: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    swapped = {"source": scored["target"], "target": scored["source"]}
    status, _, err = select(pkt, swapped, target_folder, tmp_path)
    assert status == 0
    assert "warning: the source is smaller than the target (d_model 64 < 96, d_ff 96 < 128, num_layers 3 < 4)" in err
    pairs = artifacts.load(tmp_path / "selected/selection.safetensors", artifacts.SELECTION)["default.ffn_layers"]
    assert pairs.shape == (5, 3, 2)


def test_attributions_of_different_examples(
    pkt: Run, scored: dict[str, Path], source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    pkt("attribute", "--model", target_folder, "--extract", extract_file, "--out", other)
    status, _, err = select(pkt, scored | {"target": other}, source_folder, tmp_path)
    assert status == 2
    assert "attributed on different examples; run `pkt attribute` on the same files" in err


def test_more_neurons_than_the_source_has(pkt: Run, target_folder: Path, extract_file: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", seed=3, intermediate_size=32)
    scored = {}
    for side, folder in (("source", small), ("target", target_folder)):
        scored[side] = tmp_path / f"{side}.safetensors"
        pkt("attribute", "--model", folder, "--extract", extract_file, "--out", scored[side])
    status, _, err = select(pkt, scored, small, tmp_path, "--max-rate", "0.5")
    assert status == 2
    assert "ffn at max_rate 0.5, the source: 48 neurons wanted, a layer has 32; lower max_rate" in err


def test_the_base_models_rows_beside_the_trained_ones(
    pkt: Run, scored: dict[str, Path], source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    """At the same neurons, in a file of their own, so that all else is as without; a model of another shape is none."""
    base = make_model(tmp_path / "base", seed=3, hidden_size=96, intermediate_size=128, num_hidden_layers=4)
    assert select(pkt, scored, source_folder, tmp_path / "without")[0] == 0
    status, _, err = select(pkt, scored, source_folder, tmp_path, "--base", base)
    assert status == 0, err
    for name in ("selection.safetensors", "rows.safetensors"):
        assert (tmp_path / "selected" / name).read_bytes() == (tmp_path / "without/selected" / name).read_bytes()
    rows, of_base = (load_file(tmp_path / "selected" / name) for name in ("rows.safetensors", "base_rows.safetensors"))
    weights = load_file(base / "model.safetensors")
    assert rows.keys() == of_base.keys()
    neurons = rows["neurons.ffn.1"]
    assert torch.equal(neurons, of_base["neurons.ffn.1"])
    assert torch.equal(of_base["ffn_up.1"], weights["model.layers.1.mlp.up_proj.weight"][neurons])
    # Selected again without it, nothing of it stays.
    assert select(pkt, scored, source_folder, tmp_path)[0] == 0
    assert not (tmp_path / "selected/base_rows.safetensors").exists()
    status, _, err = select(pkt, scored, source_folder, tmp_path, "--base", target_folder)
    assert (status, err) == (
        2,
        f"pkt: error: {source_folder}: num_layers 4, its base model {target_folder} has 3; what training added is the"
        " difference of two models of one shape\n",
    )
