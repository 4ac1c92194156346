from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, DenseDelta
from pkt_stages.models.inject import SparseDelta, injected
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.merge import check, merge, merged
from pkt_stages.models.sites import SUBLAYER_OF_SITE, geometry
from tests.models.deltas import logits_of, oracle, random_delta

SITE_OF = {"up_proj": "ffn_up", "down_proj": "ffn_down", "v_proj": "attn_v", "o_proj": "attn_o"}


@pytest.fixture
def model(target_folder: Path) -> Any:
    return load_model(resolve(str(target_folder)))


def reference_delta(fixture: dict[str, Tensor], size: str) -> dict[str, SparseDelta]:
    delta = {}
    for name, site in SITE_OF.items():
        sublayer = SUBLAYER_OF_SITE[site]
        rows = fixture[f"translated.{size}.{name}"]
        rows = rows.mT if name in ("down_proj", "o_proj") else rows
        delta[site] = SparseDelta(fixture[f"target_{sublayer}_layers"], fixture[f"target_{sublayer}_topk"], rows)
    return delta


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "laten" / "C_extract_translate_inject.safetensors") | load_file(
        golden / "A_models_and_tokens.safetensors"
    )


@pytest.mark.parametrize("how", [injected, merged])
@pytest.mark.parametrize("size", ["small", "big"])
def test_edited_logits_agree_with_the_published_code(
    golden: Path, reference: dict[str, Tensor], size: str, how: Any
) -> None:
    model = load_model(resolve(str(golden / "reference_models" / "target")))
    # The authors' initial deltas, 1e-9 on weights of 0.02, are lost to float32 rounding when merged.
    options = {"allow_rounding_loss": True} if how is merged else {}
    with how(model, reference_delta(reference, size), **options):
        for seq in ("seq1", "seq2", "seq3"):
            found, expected = logits_of(model, reference[seq][None])[0], reference[f"edited_logits.{size}.{seq}"]
            assert float((found - expected).norm() / expected.norm()) < 1e-5
            assert float((found - expected).abs().max()) < 2e-5


def test_merged_weights_agree_with_the_published_code(golden: Path, reference: dict[str, Tensor]) -> None:
    folder = golden / "reference_models" / "target"
    before = load_file(folder / "model.safetensors")
    model = load_model(resolve(str(folder)))
    merge(model, reference_delta(reference, "big"))
    changed = 0
    for name, weight in model.named_parameters():
        expected = reference.get("delta.big." + name.removesuffix(".weight") + ".delta", torch.zeros(()))
        assert float((weight - before[name] - expected).abs().max()) < 1e-6
        changed += bool(expected.any())
    assert changed == 16


def test_merged_weights_equal_a_dense_oracle_with_shared_v_rows_summed(model: Any) -> None:
    delta = random_delta(model, k=40, scale=0.1)  # 40 of 64 attention neurons on 32 v rows: some must be shared
    v_rows = geometry(model.config).weight_index("attn_v", delta["attn_v"].neurons[0])
    assert len(v_rows.unique()) < len(v_rows)
    expected = {n: w.detach().double() for n, w in model.named_parameters()}
    for name, matrix in oracle(model, delta).items():
        expected[name] = expected[name] + matrix
    report = merge(model, delta)
    for name, weight in model.named_parameters():
        assert float((weight.double() - expected[name]).abs().max()) < 1e-6
    assert report.changed == tuple(sorted(oracle(model, delta)))
    assert report.changed_weights == sum(int((m != 0).sum()) for m in oracle(model, delta).values())


def test_injected_equals_merged(model: Any) -> None:
    delta = random_delta(model, k=20, scale=0.1)
    plain = logits_of(model)
    with injected(model, delta):
        hooked = logits_of(model)
    with merged(model, delta):
        added = logits_of(model)
    assert float((hooked - added).abs().max()) < 1e-5
    assert float((hooked - plain).abs().max()) > 0.1


def change_of(kind: str, model: Any) -> Change:
    """A change of some weights by about a tenth of their size."""
    delta = random_delta(model, k=20, scale=0.01)
    if kind == "sparse":
        return delta
    if kind == "dense":
        return DenseDelta({name: matrix.float() for name, matrix in oracle(model, delta).items()})
    generator = torch.Generator().manual_seed(3)
    shapes = {"model.layers.0.mlp.up_proj": (96, 64), "lm_head": (264, 64), "model.embed_tokens": (64, 264)}
    return Adapter(
        {
            name: (torch.randn(4, in_, generator=generator), 0.01 * torch.randn(out, 4, generator=generator))
            for name, (out, in_) in shapes.items()
        },
        alpha=4.0,
    )


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taking_out_is_bitwise(target_folder: Path, kind: str, dtype: str) -> None:
    model = load_model(resolve(str(target_folder)), dtype=dtype)
    before, plain = weights_hash(model.state_dict()), logits_of(model)
    change = change_of(kind, model)
    with pytest.raises(RuntimeError, match="on the way"), merged(model, change):  # noqa: PT012
        inside = weights_hash(model.state_dict())
        raise RuntimeError("on the way")
    assert weights_hash(model.state_dict()) == before
    assert torch.equal(logits_of(model), plain)
    merge(model, change)
    assert before != inside == weights_hash(model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_delta_is_added_to_whole_weights_and_rounded_once(target_folder: Path, dtype: str) -> None:
    models = [load_model(resolve(str(target_folder)), dtype=dtype) for _ in range(2)]
    before = dict(models[0].named_parameters())
    dense = change_of("dense", models[0])
    assert isinstance(dense, DenseDelta)
    expected = {
        name: (before[name].detach().float() + matrix).to(before[name].dtype) for name, matrix in dense.weights.items()
    }
    reports = [
        merge(model, change_of(kind, models[1])) for model, kind in zip(models, ("dense", "sparse"), strict=True)
    ]
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)  # the same delta, stored as rows
        assert name not in expected or torch.equal(one, expected[name])
    assert reports[0].changed == reports[1].changed == tuple(sorted(expected))
    assert reports[0].changed_weights == reports[1].changed_weights
    assert reports[0].rounding_loss == pytest.approx(reports[1].rounding_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", (96, 65),
         "delta: model.layers.0.mlp.up_proj.weight is [96, 64] in the model, [96, 65] in the delta"),
        ("model.layers.0.mlp.up_proj", (96, 64),
         "delta: the model has no weight model.layers.0.mlp.up_proj; it belongs to another target"),
        ("../../x", (96, 64), "delta: the model has no weight ../../x; it belongs to another target"),
    ],
)  # fmt: skip
def test_dense_deltas_that_do_not_fit(model: Any, name: str, shape: tuple[int, int], message: str) -> None:
    before = weights_hash(model.state_dict())
    change = DenseDelta({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64), name: torch.ones(shape)})
    for use in (merge, check):
        with pytest.raises(UserError) as refused:
            use(model, change)
        assert str(refused.value) == message
    assert weights_hash(model.state_dict()) == before


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "dense"])
def test_whether_a_change_fits_is_known_from_the_config(model: Any, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    check(empty, change_of(kind, model))
    with pytest.raises(UserError, match="the model has no weight nowhere; it belongs to another target"):
        check(empty, DenseDelta({"nowhere": torch.ones(2, 2)}))


def test_rounding_loss_is_what_the_dtype_loses(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)), dtype="bfloat16")
    delta = random_delta(model, k=5, scale=1e-3)
    before = {n: w.detach().double().clone() for n, w in model.named_parameters()}
    report = merge(model, delta)
    lost = total = 0.0
    for name, matrix in oracle(model, delta).items():
        lost += float((model.get_parameter(name).double() - before[name] - matrix).square().sum())
        total += float(matrix.square().sum())
    assert report.rounding_loss == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert 0.01 < report.rounding_loss < 0.5


def test_losing_most_of_the_delta_is_refused_and_changes_nothing(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)), dtype="float16")
    before, delta = weights_hash(model.state_dict()), random_delta(model, k=20, scale=1e-5)
    with pytest.raises(UserError) as refused:
        merge(model, delta)
    assert str(refused.value).startswith("rounding to float16 would lose ")
    assert str(refused.value).endswith(
        " of the delta's norm (limit 50%); choose a wider dtype (--dtype float32); inject and export take"
        " --allow-rounding-loss, too"
    )
    assert weights_hash(model.state_dict()) == before
    assert merge(model, delta, allow_rounding_loss=True).rounding_loss > 0.5
    assert weights_hash(model.state_dict()) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": torch.tensor([0, 3])}, "delta at ffn_up: layer 3 in a model with 3"),
        ({"layers": torch.tensor([1, 1])}, "delta at ffn_up: a layer stands twice in [1, 1]"),
        ({"neurons": torch.full((2, 4), 96)}, "delta at ffn_up: neuron 96 in a model with 96"),
        ({"neurons": torch.full((2, 4), -1)}, "delta at ffn_up: neuron -1 in a model with 96"),
        ({"rows": torch.ones(2, 4, 63)}, "delta at ffn_up: rows of width 63, the model's is 64"),
        ({"rows": torch.zeros(2, 4, 64)}, "injecting the delta would change no weight: it is zero"),
        (
            {"rows": torch.full((2, 4, 64), 1e-30)},
            "injecting the delta would change no weight: all of it was lost to rounding to float32",
        ),
        ({"rows": torch.full((2, 4, 64), float("nan"))}, "the delta holds NaN or infinity; nothing was injected"),
    ],
)
def test_deltas_that_do_not_fit(model: Any, change: dict[str, Tensor], message: str) -> None:
    part = random_delta(model, k=4, scale=1.0)["ffn_up"]
    before = weights_hash(model.state_dict())
    with pytest.raises(UserError) as refused:
        merge(model, {"ffn_up": SparseDelta(**{**vars(part), **change})}, allow_rounding_loss=True)
    assert str(refused.value) == message
    assert weights_hash(model.state_dict()) == before
