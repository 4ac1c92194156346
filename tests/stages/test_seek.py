from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.core.sensitivity import evenly_spaced
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]


def seek(pkt: Run, source: Path, target: Path, examples: Path, out: Path, *more: object) -> tuple[int, str, str]:
    paths = ("--out", out / "submatrices.safetensors", "--metrics", out / "seek.json")
    return pkt("seek", "--source", source, "--target", target, "--extract", examples, *paths, *more)


def test_submatrices_are_parts_of_the_sources_weights(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        status, printed, err = seek(pkt, source_folder, target_folder, extract_file, tmp_path / folder)
        assert status == 0, err
        assert printed.startswith("seek: source layers [")
    for name in ("submatrices.safetensors", "seek.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    found = artifacts.load(tmp_path / "a" / "submatrices.safetensors", artifacts.SUBMATRICES)
    metrics = json.loads((tmp_path / "a" / "seek.json").read_text())
    weights = load_file(source_folder / "model.safetensors")
    layers = found["layers"].tolist()
    assert layers == metrics["layers"] == sorted(set(layers)) and len(layers) == 3 and max(layers) < 4
    assert set(metrics["layer_sensitivity"]) == set(found["layer_sensitivity"].tolist())
    assert len(metrics["submatrices"]) == 12
    shapes = {"ffn_up": (96, 64), "ffn_down": (64, 96), "attn_v": (32, 64), "attn_o": (64, 64)}
    for part in metrics["submatrices"]:
        row, column = part["corner"]
        height, width = shapes[part["weight"]]
        expected = weights[part["name"]][row : row + height, column : column + width]
        assert torch.equal(found[f"{part['weight']}.submatrix.{part['layer']}"], expected)
        assert found[f"{part['weight']}.corner"][part["layer"]].tolist() == part["corner"]
        assert f".{layers[part['layer']]}." in part["name"]
        # The densest sub-matrix holds more than its part of the area.
        assert height * width / weights[part["name"]].numel() < part["share"] <= 1 and 0 <= part["margin"] < 1


def test_other_blocks_for_controls(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    """Random places, which a seed fixes, and evenly spaced rows and columns; the densest stay as they are."""
    both = ("--more-blocks", "random,uniform")
    for name, more in (("plain", ()), ("both", both), ("again", both), ("other", (*both, "--seed", "1"))):
        assert seek(pkt, source_folder, target_folder, extract_file, tmp_path / name, *more)[0] == 0
    plain, found, again, other = (
        load_file(tmp_path / name / "submatrices.safetensors") for name in ("plain", "both", "again", "other")
    )
    weights = load_file(source_folder / "model.safetensors")
    parts = json.loads((tmp_path / "both/seek.json").read_text())["submatrices"]
    moved = 0
    for part in parts:
        name, layer, whole = part["weight"], part["layer"], weights[part["name"]]
        densest, random, uniform = (found[f"{name}.{b}.{layer}"] for b in ("submatrix", "random", "uniform"))
        assert torch.equal(densest, plain[f"{name}.submatrix.{layer}"])
        assert densest.shape == random.shape == uniform.shape
        rows, columns = (evenly_spaced(m, n) for m, n in zip(uniform.shape, whole.shape, strict=True))
        assert torch.equal(uniform, whole[rows][:, columns])
        windows = whole.unfold(0, random.shape[0], 1).unfold(1, random.shape[1], 1)
        assert (windows == random).all(-1).all(-1).any()
        assert torch.equal(random, again[f"{name}.random.{layer}"])
        moved += not torch.equal(random, other[f"{name}.random.{layer}"])
    assert moved > len(parts) / 2
    submatrices = ("--submatrices", tmp_path / "both/submatrices.safetensors", "--target", target_folder)
    for block in ("random", "uniform"):
        out = tmp_path / f"row_{block}"
        command = ("derive", "--code", "seeking", *submatrices, "--out", out, "--set=rank=null", f"--set=block={block}")
        assert pkt(*command)[0] == 0
        row = load_file(out / "delta_0.safetensors")
        assert torch.equal(row["model.layers.1.mlp.up_proj.weight"], found[f"ffn_up.{block}.1"].float())
    lacking = ("--submatrices", tmp_path / "plain/submatrices.safetensors", "--target", target_folder)
    _, _, err = pkt("derive", "--code", "seeking", *lacking, "--out", tmp_path / "x", "--set=block=random")
    assert "holds no random blocks; run `pkt seek` with more_blocks: [random]" in err


def test_evenly_spaced_are_those_of_weight_selection(golden: Path) -> None:
    """The authors' own index lists, and tensors cut along every dimension."""
    recorded = load_file(golden / "transport/M_weight_selection.safetensors")
    lists = [name for name in recorded if name.startswith("idx.")]
    assert len(lists) == 6
    for name in lists:
        among, count = map(int, name.removeprefix("idx.").split("to"))
        assert evenly_spaced(count, among).tolist() == recorded[name].tolist(), name
    for name in ("c0", "c1", "c2", "c3", "c4", "c5", "c6"):
        found, expected = recorded[f"{name}.W"], recorded[f"{name}.out"]
        for dim in range(found.dim()):
            found = found.index_select(dim, evenly_spaced(expected.shape[dim], found.shape[dim]))
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="5 wanted, there are 4"):
        evenly_spaced(5, 4)


def test_all_weights_on_request(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    status, _, err = seek(pkt, source_folder, target_folder, extract_file, tmp_path, "--sites", "all")
    assert status == 0, err
    found = artifacts.load(tmp_path / "submatrices.safetensors", artifacts.SUBMATRICES)
    assert found.shapes["embedding.submatrix.0"] == found.shapes["head.submatrix.0"] == (264, 64)
    assert found.shapes["attn_k.submatrix.2"] == (32, 64) and found.shapes["ffn_gate.submatrix.2"] == (96, 64)
    assert "head.submatrix.1" not in found.shapes


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path) -> None:
    few = make_model(tmp_path / "few", seed=3, num_hidden_layers=2, hidden_size=96, intermediate_size=128)
    narrow = make_model(tmp_path / "narrow", seed=4, hidden_size=48, num_hidden_layers=4)
    other = make_model(tmp_path / "other", seed=5, vocab_size=300)
    for source, more, message in (
        (few, (), "the source has 2 layers, the target 3; Seeking needs as many"),
        (
            narrow,
            (),
            "ffn_up: the source's 96x48 holds no sub-matrix of the target's 96x64; swap the two if that was not meant",
        ),
        (other, ("--sites", "all"), "embedding: vocabularies of 300 and 264 tokens; use sites paper"),
        (source_folder, ("--max-length", 5), "example toy_0: 34 tokens, more than the 5 that are allowed"),
    ):
        status, _, err = seek(pkt, source, target_folder, extract_file, tmp_path / "out", *more)
        assert (status, err) == (2, f"pkt: error: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [("--max-length", 0), ("--sites", "some")])
def test_bad_settings(
    pkt: Run, setting: tuple[str, object], source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    status, _, err = seek(pkt, source_folder, target_folder, extract_file, tmp_path, *setting)
    assert status == 2 and err.startswith("pkt: error: options of `seek`: ") and err.count("\n") == 1
