from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.methods.seeking import Params, derive
from pkt_stages.models.changes import DenseDelta
from pkt_stages.models.derivation import Inputs
from pkt_stages.models.load import identity, load_model, resolve
from pkt_stages.models.merge import merged
from tests.conftest import make_model, write_examples

Run = Callable[..., tuple[int, str, str]]


def sought(pkt: Run, source: Path, target: Path, tmp_path: Path, *more: object) -> Path:
    examples = write_examples(tmp_path / "e.jsonl", ["It is 1."])
    arguments = ("--extract", examples, "--out", tmp_path / "b.safetensors", "--metrics", tmp_path / "b.json", *more)
    assert pkt("seek", "--source", source, "--target", target, *arguments)[0] == 0
    return tmp_path / "b.safetensors"


def weights_with(target: Path, change: object) -> dict[str, torch.Tensor]:
    model = load_model(resolve(str(target)))
    with merged(model, change):  # type: ignore[arg-type]
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_submatrices_whole_and_at_low_rank(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    path, target = sought(pkt, source_folder, target_folder, tmp_path), resolve(str(target_folder))
    inputs = Inputs(target=target, submatrices=path)
    found = artifacts.load(path, artifacts.SUBMATRICES)
    made = [derive(inputs, Params(rank)) for rank in (4, None)]
    for derived in made:
        assert derived.target == identity(target) and derived.source == identity(resolve(str(source_folder)))
        assert list(derived.changes) == ["delta"]
    before = load_file(target_folder / "model.safetensors")
    low, whole = (weights_with(target_folder, derived.changes["delta"]) for derived in made)
    names = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    for weight, name in (names | {"attn_o": "self_attn.o_proj"}).items():
        for layer in range(3):
            key = f"model.layers.{layer}.{name}.weight"
            part = found[f"{weight}.submatrix.{layer}"]
            torch.testing.assert_close(whole[key] - before[key], part, rtol=0, atol=1e-6)
            u, s, vh = torch.linalg.svd(part.double(), full_matrices=False)
            nearest = (u[:, :4] * s[:4] @ vh[:4]).float()
            torch.testing.assert_close(low[key] - before[key], nearest, rtol=0, atol=1e-5)
    for after in (low, whole):
        assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_every_weight_of_seekings_repository(
    pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    """Embedding and head too: PEFT adds B A of the sub-matrix to each, and at full rank that is the sub-matrix."""
    from peft import PeftModel

    path = sought(pkt, source_folder, target_folder, tmp_path, "--sites", "all")
    given = ("--code", "seeking", "--target", target_folder, "--submatrices", path, "--set", "rank=32")
    status, _, err = pkt("derive", *given, "--out", tmp_path / "out")
    assert status == 0, err
    before = load_file(target_folder / "model.safetensors")
    model = PeftModel.from_pretrained(load_model(resolve(str(target_folder))), str(tmp_path / "out" / "delta"))
    after = model.merge_and_unload().state_dict()
    found = artifacts.load(path, artifacts.SUBMATRICES)
    whole = derive(Inputs(target=resolve(str(target_folder)), submatrices=path), Params(None)).changes["delta"]
    assert isinstance(whole, DenseDelta) and len(whole.weights) == 3 * 7 + 2
    for weight, key in (
        ("embedding", "model.embed_tokens.weight"),
        ("head", "lm_head.weight"),
        ("ffn_gate", "model.layers.0.mlp.gate_proj.weight"),
        ("attn_q", "model.layers.0.self_attn.q_proj.weight"),
        ("attn_k", "model.layers.0.self_attn.k_proj.weight"),
        ("attn_v", "model.layers.0.self_attn.v_proj.weight"),
    ):
        part = found[f"{weight}.submatrix.0"]
        assert torch.equal(whole.weights[key], part)
        u, s, vh = torch.linalg.svd(part.double(), full_matrices=False)
        expected = part if weight in ("attn_k", "attn_v") else (u[:, :32] * s[:32] @ vh[:32]).float()
        torch.testing.assert_close(after[key] - before[key], expected, rtol=0, atol=1e-5)


def test_bad_input(pkt: Run, source_folder: Path, target_folder: Path, tmp_path: Path) -> None:
    path, target = sought(pkt, source_folder, target_folder, tmp_path), resolve(str(target_folder))
    other = resolve(str(make_model(tmp_path / "other", seed=9)))
    ours, theirs = identity(other)["revision"], identity(target)["revision"]
    for inputs, rank, message in (
        (Inputs(target=target), 4, "the method takes --target and --submatrices, nothing else; found --target"),
        (
            Inputs(target=target, source=other, submatrices=path),
            4,
            "the method takes --target and --submatrices, nothing else; found --target and --source and --submatrices",
        ),
        (
            Inputs(target=other, submatrices=path),
            4,
            f"{path}: made for the target target at {theirs}, found {other.location} at {ours};"
            " run `pkt seek` for this target",
        ),
        (
            Inputs(target=target, submatrices=path),
            40,
            "model.layers.0.self_attn.v_proj: rank 40 of a 32x64 matrix; use 1 to 32",
        ),
    ):
        with pytest.raises(UserError) as error:
            derive(inputs, Params(rank))
        assert str(error.value) == message
