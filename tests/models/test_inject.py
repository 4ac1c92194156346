from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.inject import SparseDelta, delta_tensors, injected, load_delta, merge, merged
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.sites import SITES, geometry, weight_name

SITE_OF = {"up_proj": "ffn_up", "down_proj": "ffn_down", "v_proj": "attn_v", "o_proj": "attn_o"}
IDS = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])


def random_delta(model: Any, *, k: int, scale: float, seed: int = 0) -> dict[str, SparseDelta]:
    sizes, generator = geometry(model.config), torch.Generator().manual_seed(seed)
    layers = torch.tensor([0, sizes.num_layers - 1])
    return {
        site: SparseDelta(
            layers,
            torch.stack([torch.randperm(sizes.num_neurons(site), generator=generator)[:k] for _ in layers]),
            torch.randn(len(layers), k, sizes.d_model, generator=generator) * scale,
        )
        for site in SITES
    }


def dense(model: Any, delta: dict[str, SparseDelta]) -> dict[str, Tensor]:
    """The oracle: one dense matrix per weight, filled entry by entry from the definition of the sites."""
    config = model.config
    d_head = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    found = {}
    for site, part in delta.items():
        for layer, neurons, rows in zip(part.layers.tolist(), part.neurons.tolist(), part.rows, strict=True):
            name = weight_name(layer, site)
            matrix = torch.zeros_like(model.get_parameter(name), dtype=torch.float64)
            for neuron, row in zip(neurons, rows.double(), strict=True):
                if site == "attn_v":
                    head, place = divmod(neuron, d_head)
                    matrix[head // group * d_head + place] += row
                elif site == "ffn_up":
                    matrix[neuron] += row
                else:
                    matrix[:, neuron] += row
            found[name] = matrix
    return found


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.fixture
def model(target_folder: Path) -> Any:
    return load_model(resolve(str(target_folder)))


def reference_delta(fixture: dict[str, Tensor], size: str) -> dict[str, SparseDelta]:
    delta = {}
    for name, site in SITE_OF.items():
        module = "ffn" if site.startswith("ffn") else "attn"
        rows = fixture[f"translated.{size}.{name}"]
        rows = rows.mT if name in ("down_proj", "o_proj") else rows
        delta[site] = SparseDelta(fixture[f"target_{module}_layers"], fixture[f"target_{module}_topk"], rows)
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


def test_dense_deltas_agree_with_the_published_code(golden: Path, reference: dict[str, Tensor]) -> None:
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
    for name, matrix in dense(model, delta).items():
        expected[name] = expected[name] + matrix
    report = merge(model, delta)
    for name, weight in model.named_parameters():
        assert float((weight.double() - expected[name]).abs().max()) < 1e-6
    assert report.changed == tuple(sorted(dense(model, delta)))
    assert report.changed_weights == sum(int((m != 0).sum()) for m in dense(model, delta).values())


def test_injected_equals_merged(model: Any) -> None:
    delta = random_delta(model, k=20, scale=0.1)
    plain = logits_of(model)
    with injected(model, delta):
        hooked = logits_of(model)
    with merged(model, delta):
        added = logits_of(model)
    assert float((hooked - added).abs().max()) < 1e-5
    assert float((hooked - plain).abs().max()) > 0.1


@pytest.mark.parametrize("how", [injected, merged])
def test_taking_out_is_bitwise(model: Any, how: Any) -> None:
    before, plain = weights_hash(model.state_dict()), logits_of(model)
    with pytest.raises(RuntimeError, match="on the way"), how(model, random_delta(model, k=20, scale=0.3)):  # noqa: PT012
        inside = weights_hash(model.state_dict())
        raise RuntimeError("on the way")
    assert (inside != before) is (how is merged)
    assert weights_hash(model.state_dict()) == before
    assert torch.equal(logits_of(model), plain)


def test_gradients_reach_the_rows_and_equal_finite_differences(model: Any) -> None:
    delta = random_delta(model, k=40, scale=0.1)
    model.double()

    def loss(rows: dict[str, Tensor]) -> Tensor:
        moved = {s: SparseDelta(p.layers, p.neurons, rows[s]) for s, p in delta.items()}
        with injected(model, moved):
            found: Tensor = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[0, -1, 5]
        return found

    rows = {site: part.rows.clone().requires_grad_() for site, part in delta.items()}
    loss(rows).backward()
    for site, part in rows.items():
        direction = torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-3
        with torch.no_grad():
            up, down = (loss({**rows, site: part + sign * step * direction}) for sign in (1, -1))
        assert float((part.grad * direction).sum()) == pytest.approx(float(up - down) / (2 * step), rel=2e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_passes_the_gradient_of_a_young_delta(target_folder: Path) -> None:
    """Deltas of 1e-9 are zero in float16; their gradient must not be."""
    exact = load_model(resolve(str(target_folder)), dtype="float32")
    half = load_model(resolve(str(target_folder)), dtype="float16")
    gradients = []
    for model in (exact, half):
        part = random_delta(exact, k=4, scale=1e-9)["ffn_up"]
        rows = part.rows.clone().requires_grad_()
        with injected(model, {"ffn_up": SparseDelta(part.layers, part.neurons, rows)}):
            model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)[0, -1, 5].backward()
        gradients.append(rows.grad)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05


def test_rounding_loss_is_what_the_dtype_loses(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)), dtype="bfloat16")
    delta = random_delta(model, k=5, scale=1e-3)
    before = {n: w.detach().double().clone() for n, w in model.named_parameters()}
    report = merge(model, delta)
    lost = total = 0.0
    for name, matrix in dense(model, delta).items():
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
        " of the delta's norm (limit 50%); choose a wider dtype (--dtype float32), or pass --allow-rounding-loss"
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


def test_an_unknown_site(model: Any) -> None:
    part = random_delta(model, k=4, scale=1.0)["ffn_up"]
    with (
        pytest.raises(UserError, match="unknown site 'ffn_gate'; expected one of ffn_up, ffn_down, attn_v, attn_o"),
        injected(model, {"ffn_gate": part}),
    ):
        raise AssertionError("not reached")


def test_a_delta_survives_its_file(model: Any, tmp_path: Path) -> None:
    delta = random_delta(model, k=6, scale=0.1)
    path = tmp_path / "delta.safetensors"
    artifacts.save(path, "delta", delta_tensors(delta), {})
    read = load_delta(path)
    assert set(read) == set(SITES)
    for site, part in delta.items():
        assert all(torch.equal(vars(part)[name], vars(read[site])[name]) for name in ("layers", "neurons", "rows"))
