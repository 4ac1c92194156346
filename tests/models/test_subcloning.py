"""Weight subcloning: by hand, by brute force, and as a reordering where nothing is cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.encoding import Encoded
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import Geometry, geometry, module_name
from pkt_stages.models.subcloning import Importance, importance, kept_layers, subclone
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]
WEIGHTS = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")


def sizes(d_model: int, d_ff: int, num_heads: int, num_kv_heads: int) -> Geometry:
    return Geometry(1, d_model, d_ff, num_heads, num_kv_heads, 1, 5)


SOURCE, TARGET = sizes(3, 4, 6, 3), sizes(2, 2, 2, 2)
# The stream's order is 2, 0, 1; the FFN's 3, 1, 0, 2; the groups' 1 (heads 2, 3), 2, 0; inside them 3, 2 and 5, 4.
FOUND = Importance(
    stream=torch.tensor([2.0, 1.0, 3.0]),
    ffn=torch.tensor([[1.0, 2.0, 0.5, 4.0]]),
    heads=torch.tensor([[0.1, 0.1, 2.0, 3.0, 0.5, 0.6]]),
)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "columns", "scale"),
    [
        ("ffn_up", (4, 3), [3, 1], [2, 0], 3 / 2),
        ("ffn_gate", (4, 3), [3, 1], [2, 0], 3 / 2),
        ("ffn_down", (3, 4), [2, 0], [3, 1], 4 / 2),
        ("attn_q", (6, 3), [3, 5], [2, 0], 3 / 2),
        ("attn_k", (3, 3), [1, 2], [2, 0], 3 / 2),
        ("attn_v", (3, 3), [1, 2], [2, 0], 3 / 2),
        ("attn_o", (3, 6), [2, 0], [3, 5], 6 / 2),
        ("embedding", (5, 3), [0, 1, 2, 3, 4], [2, 0], 1),
        ("head", (5, 3), [0, 1, 2, 3, 4], [2, 0], 3 / 2),
    ],
)
def test_by_hand(name: str, shape: tuple[int, int], rows: list[int], columns: list[int], scale: float) -> None:
    """Rows and columns by rank, times the root of inputs before over inputs after."""
    weight = torch.arange(shape[0] * shape[1]).view(shape).float()
    found = subclone(weight, name, 0, FOUND, SOURCE, TARGET)
    expected = [[float(weight[row, column]) * scale**0.5 for column in columns] for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_middle_is_taken_out() -> None:
    assert [kept_layers(count, 5) for count in range(1, 6)] == [[0], [0, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


@pytest.fixture(scope="module")
def examples() -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 264, (length,), generator=draw).tolist() for length in (7, 12)]
    return [Encoded(one, one) for one in ids]


def test_importance_by_brute_force(target_folder: Path, examples: list[Encoded]) -> None:
    model = load_model(resolve(str(target_folder)), dtype="float32")
    found = importance(model, examples)
    streams: list[list[Tensor]] = [[] for _ in range(4)]
    ffn: list[list[Tensor]] = [[] for _ in range(3)]
    heads: list[list[Tensor]] = [[] for _ in range(3)]
    for example in examples:
        x = model.model.embed_tokens(torch.tensor([example.ids]))
        places = model.model.rotary_emb(x, torch.arange(len(example.ids))[None])
        streams[0].append(x[0])
        for n, layer in enumerate(model.model.layers):
            kept: list[Tensor] = []
            handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, i, kept=kept: kept.append(i[0]))
            after, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=places, attention_mask=None)
            handle.remove()
            heads[n].append(kept[0][0].unflatten(1, (4, 16)))
            normed = layer.post_attention_layernorm(x + after)
            coefficients = torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            ffn[n].append(coefficients[0])
            x = x + after + layer.mlp.down_proj(coefficients)
            streams[n + 1].append(x[0])
    expected = sum(torch.cat(one).abs().mean(0) for one in streams)
    torch.testing.assert_close(found.stream.float(), expected, rtol=1e-4, atol=1e-6)
    for n in range(3):
        torch.testing.assert_close(found.ffn[n].float(), torch.cat(ffn[n]).abs().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.heads[n].float(), torch.cat(heads[n]).abs().mean((0, 2)), rtol=1e-4, atol=1e-6)


def test_where_nothing_is_cut_off_the_model_is_the_same(
    target_folder: Path, examples: list[Encoded], tmp_path: Path
) -> None:
    """All weights reordered, and the gains by the stream's order: equal logits."""
    model = load_model(resolve(str(target_folder)), dtype="float32")
    found, same = importance(model, examples), geometry(model.config)
    weights = load_file(target_folder / "model.safetensors")
    order = found.stream.sort(descending=True, stable=True).indices
    made = {name: weight[order].contiguous() for name, weight in weights.items() if weight.ndim == 1}
    for layer in range(3):
        for name in WEIGHTS:
            whole = f"{module_name(name, layer)}.weight"
            made[whole] = subclone(weights[whole], name, layer, found, same, same).contiguous()
            assert not torch.equal(made[whole], weights[whole])
    for name in ("embedding", "head"):
        whole = f"{module_name(name, 0)}.weight"
        made[whole] = subclone(weights[whole], name, 0, found, same, same).contiguous()
    for file in target_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = load_model(resolve(str(tmp_path)), dtype="float32")
    ids = torch.tensor([examples[1].ids])
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_block_that_seek_keeps_and_rows_start_from(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    """First and last layers, by the source's own activity; all else that seek writes stays; whole heads or nothing."""
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3}
    source = make_model(tmp_path / "s", seed=1, hidden_size=96, intermediate_size=128, num_hidden_layers=5, **heads)
    paths = ("--extract", extract_file, "--target", target_folder, "--metrics", tmp_path / "seek.json")
    for name, more in (
        ("without", ()),
        ("with", ("--more-blocks", "subclone")),
        ("again", ("--more-blocks", "subclone")),
    ):
        out = tmp_path / f"{name}.safetensors"
        assert pkt("seek", "--source", source, *paths, "--out", out, *more)[0] == 0
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    without, found = load_file(tmp_path / "without.safetensors"), load_file(tmp_path / "with.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())
    assert json.loads((tmp_path / "seek.json").read_text())["subclone_layers"] == [0, 1, 4]
    weights = load_file(source / "model.safetensors")
    for layer, of in enumerate((0, 1, 4)):
        part, whole = found[f"ffn_up.subclone.{layer}"], weights[f"model.layers.{of}.mlp.up_proj.weight"]
        assert part.shape == (96, 64)
        # Each entry is one of the whole's, times the root of 96 / 64 inputs.
        entries = part.flatten().double() / 1.5**0.5
        assert float(torch.cdist(entries[:500, None], whole.flatten()[:, None].double()).min(1).values.max()) < 1e-6
    submatrices = ("--submatrices", tmp_path / "with.safetensors", "--target", target_folder)
    command = ("derive", "--code", "seeking", *submatrices, "--set=rank=null", "--set=block=subclone")
    assert pkt(*command, "--out", tmp_path / "row")[0] == 0
    row = load_file(tmp_path / "row/delta_0.safetensors")
    assert torch.equal(row["model.layers.2.mlp.up_proj.weight"], found["ffn_up.subclone.2"])
    # The fixture's source has heads of another width.
    out = ("--out", tmp_path / "no.safetensors", "--more-blocks", "subclone")
    status, _, err = pkt("seek", "--source", source_folder, *paths, *out)
    assert (status, err) == (
        2,
        "pkt: error: subclone: head width 24 in the source, 16 in the target; subcloning keeps whole heads, so leave it"
        " out of more_blocks for these two\n",
    )
    artifacts.load(tmp_path / "with.safetensors", artifacts.SUBMATRICES)
