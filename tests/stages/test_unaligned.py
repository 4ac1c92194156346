from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.core.reduction import embedding_transform
from pkt_stages.models.inject import load_delta, merged
from pkt_stages.models.load import load_model, resolve
from tests.conftest import make_model, write_examples

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def blocks(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> Path:
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    arguments = ("--examples", examples, "--out", tmp_path / "b.safetensors", "--metrics", tmp_path / "b.json")
    assert pkt("seek", "--source", source_folder, "--target", target_folder, *arguments)[0] == 0
    return tmp_path / "b.safetensors"


def unaligned(pkt: Run, target: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return pkt("unaligned", "--method", "m", "--target", target, "--out", out, *more)


def weights_with(target: Path, change: object) -> dict[str, torch.Tensor]:
    model = load_model(resolve(str(target)))
    with merged(model, change):  # type: ignore[arg-type]
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_seekings_blocks_whole_and_at_low_rank(pkt: Run, target_folder: Path, blocks: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    before = load_file(target_folder / "model.safetensors")
    found = artifacts.load(blocks, "submatrices")
    status, printed, err = unaligned(pkt, target_folder, tmp_path / "out", "--submatrices", blocks, "--rank", 4)
    assert status == 0, err
    assert printed.startswith("unaligned: m, rank 4 on 12 weights -> ")
    model = PeftModel.from_pretrained(load_model(resolve(str(target_folder))), str(tmp_path / "out" / "low_rank"))
    low = model.merge_and_unload().state_dict()
    # Whole matrices: params.yaml says `rank: null`.
    params = tmp_path / "params.yaml"
    params.write_text("unaligned: {}\nmethods: {m: {rank: null}}\n")
    given = ("--submatrices", blocks, "--params", params)
    assert unaligned(pkt, target_folder, tmp_path / "out", *given)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["delta_0.safetensors"]
    whole = weights_with(target_folder, load_delta(tmp_path / "out" / "delta_0.safetensors"))
    names = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    for weight, name in (names | {"attn_o": "self_attn.o_proj"}).items():
        for layer in range(3):
            key = f"model.layers.{layer}.{name}.weight"
            block = found[f"{weight}.block.{layer}"]
            torch.testing.assert_close(whole[key] - before[key], block, rtol=0, atol=1e-6)
            u, s, vh = torch.linalg.svd(block.double(), full_matrices=False)
            nearest = (u[:, :4] * s[:4] @ vh[:4]).float()
            torch.testing.assert_close(low[key] - before[key], nearest, rtol=0, atol=1e-5)
    assert torch.equal(whole["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("layers", "width", "neurons"),
    product(("top", "bottom", "random"), ("pca", "whitening", "embedding"), ("random", "importance")),
)
def test_every_cell_of_the_grid(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path, layers: str, width: str, neurons: str
) -> None:
    choice = ("--approach", "grid", "--layers", layers, "--width", width, "--neurons", neurons)
    for out in ("a", "b"):
        status, _, err = unaligned(pkt, target_folder, tmp_path / out, "--source", source_folder, *choice)
        assert status == 0, err
    assert (tmp_path / "a/delta_0.safetensors").read_bytes() == (tmp_path / "b/delta_0.safetensors").read_bytes()
    made = load_delta(tmp_path / "a" / "delta_0.safetensors")
    # 4 heads of width 16 share 2 key/value heads: each v row is written once.
    shapes = {"ffn_up": (3, 96, 64), "ffn_down": (3, 96, 64), "attn_v": (3, 32, 64), "attn_o": (3, 64, 64)}
    assert {site: tuple(part.rows.shape) for site, part in made.items()} == shapes
    chosen = artifacts.load(tmp_path / "a" / "delta_0.safetensors", "delta").meta["layers"]
    assert {"top": [1, 2, 3], "bottom": [0, 1, 2]}.get(layers, chosen) == chosen == sorted(set(chosen))


def test_a_cell_by_hand(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    """Top layers, embedding transform, importance: the largest FFN neurons, made narrower by least squares."""
    choice = ("--approach", "grid", "--layers", "top", "--width", "embedding", "--neurons", "importance")
    assert unaligned(pkt, target_folder, tmp_path / "out", "--source", source_folder, *choice)[0] == 0
    made = load_delta(tmp_path / "out" / "delta_0.safetensors")
    source, target = (load_file(folder / "model.safetensors") for folder in (source_folder, target_folder))
    matrix = embedding_transform(source["model.embed_tokens.weight"], target["model.embed_tokens.weight"])
    for place, layer in enumerate((1, 2, 3)):
        up, down = (source[f"model.layers.{layer}.mlp.{x}_proj.weight"].double() for x in ("up", "down"))
        weight = up.abs().mean(1) + down.T.abs().mean(1)
        best = sorted(range(128), key=lambda n: (-weight[n].item(), n))[:96]
        torch.testing.assert_close(made["ffn_up"].rows[place].double(), up[best] @ matrix, rtol=0, atol=1e-6)
        torch.testing.assert_close(made["ffn_down"].rows[place].double(), down.T[best] @ matrix, rtol=0, atol=1e-6)


def test_attention_and_pca_by_hand(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    """Under grouped-query attention on both sides; rows are projected as they are, so their mean stays."""
    choice = ("--approach", "grid", "--layers", "bottom", "--width", "pca", "--neurons", "importance")
    assert unaligned(pkt, target_folder, tmp_path / "out", "--source", source_folder, *choice)[0] == 0
    made = load_delta(tmp_path / "out" / "delta_0.safetensors")
    source = load_file(source_folder / "model.safetensors")
    # 4 heads of width 24 over 2 key/value heads in the source; 4 of width 16 over 2 in the target.
    v_row = [j // 24 // 2 * 24 + j % 24 for j in range(96)]
    for layer in range(3):
        v, o = (source[f"model.layers.{layer}.self_attn.{x}_proj.weight"].double() for x in "vo")
        v, o = v[v_row], o.T
        weight = v.abs().mean(1) + o.abs().mean(1)
        best = torch.tensor(sorted(range(96), key=lambda n: (-weight[n].item(), n))[:64])
        first_of_its_v_row = [j for j in range(64) if j // 16 % 2 == 0]
        for site, rows, taken in (("attn_v", v, best[first_of_its_v_row]), ("attn_o", o, best)):
            covariance = torch.cov(rows.T)
            directions = torch.linalg.eigh(covariance).eigenvectors[:, -64:]
            found, expected = made[site].rows[layer].double(), rows[taken] @ directions
            # The signs of directions are arbitrary, inner products of rows are not.
            torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-4)


def test_every_weight_of_seekings_repository_as_an_adapter(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    """Embedding and head too: PEFT adds B A of the block to each, and at full rank that is the block."""
    from peft import PeftModel

    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    blocks = tmp_path / "b.safetensors"
    arguments = ("--examples", examples, "--out", blocks, "--metrics", tmp_path / "b.json", "--sites", "all")
    assert pkt("seek", "--source", source_folder, "--target", target_folder, *arguments)[0] == 0
    given = ("--submatrices", blocks, "--rank", 32)
    status, printed, err = unaligned(pkt, target_folder, tmp_path / "out", *given)
    assert status == 0, err
    assert printed.startswith("unaligned: m, rank 32 on 23 weights -> ")
    before = load_file(target_folder / "model.safetensors")
    model = PeftModel.from_pretrained(load_model(resolve(str(target_folder))), str(tmp_path / "out" / "low_rank"))
    after = model.merge_and_unload().state_dict()
    found = artifacts.load(blocks, "submatrices")
    for weight, key in (
        ("embedding", "model.embed_tokens.weight"),
        ("head", "lm_head.weight"),
        ("ffn_gate", "model.layers.0.mlp.gate_proj.weight"),
        ("attn_q", "model.layers.0.self_attn.q_proj.weight"),
        ("attn_k", "model.layers.0.self_attn.k_proj.weight"),
        ("attn_v", "model.layers.0.self_attn.v_proj.weight"),
    ):
        block = found[f"{weight}.block.0"]
        u, s, vh = torch.linalg.svd(block.double(), full_matrices=False)
        expected = block if weight in ("attn_k", "attn_v") else (u[:, :32] * s[:32] @ vh[:32]).float()
        torch.testing.assert_close(after[key] - before[key], expected, rtol=0, atol=1e-5)

    params = tmp_path / "params.yaml"
    params.write_text("unaligned: {}\nmethods: {m: {rank: null}}\n")
    given = ("--submatrices", blocks, "--params", params)
    status, _, err = unaligned(pkt, target_folder, tmp_path / "whole", *given)
    message = f"rank none adds the four sites only, {blocks} holds attn_k; give a rank"
    assert (status, err) == (2, f"pkt: error: {message}\n")


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, blocks: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=9)
    small = make_model(tmp_path / "small", seed=9, num_hidden_layers=2)
    words = make_model(tmp_path / "words", seed=9, num_hidden_layers=4, vocab_size=300)
    grid = ("--approach", "grid", "--width", "embedding")
    for target, more, message in (
        (target_folder, (), "approach seeking takes --submatrices, and no --source"),
        (target_folder, grid, "approach grid takes --source, and no --submatrices"),
        (
            target_folder,
            ("--submatrices", blocks, "--source", small),
            "approach seeking takes --submatrices, and no --source",
        ),
        (
            target_folder,
            (*grid, "--submatrices", blocks, "--source", small),
            "approach grid takes --source, and no --submatrices",
        ),
        (other, ("--submatrices", blocks), f"{blocks}: made for another target than other; run `pkt seek` for it"),
        (
            target_folder,
            ("--submatrices", blocks, "--rank", 40),
            "attn_v: rank 40 of a 32x64 matrix; use 1 to 32",
        ),
        (target_folder, (*grid, "--source", small), "the source has 2 layers, the target 3; swap the two"),
        (
            target_folder,
            (*grid, "--source", words),
            "width embedding needs one vocabulary, found 300 and 264 tokens; use pca or whitening",
        ),
    ):
        status, _, err = unaligned(pkt, target, tmp_path / "out", *more)
        assert (status, err) == (2, f"pkt: error: {message}\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    _, _, err = unaligned(pkt, target_folder, tmp_path / "out", "--submatrices", blocks)
    assert "holds notes.txt, which is neither adapter nor delta; give a new folder" in err
