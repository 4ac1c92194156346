"""Maps and pairings on cases done by hand, on known isometries, and against the numbers of Theseus' own code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core import transport

GOLDEN = Path(__file__).parents[1] / "golden/transport"


@pytest.fixture(scope="module")
def theseus() -> dict[str, Tensor]:
    return load_file(GOLDEN / "I_theseus.safetensors")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_polar_by_hand() -> None:
    """Turning by 90 degrees and stretching: the map is the turn."""
    found = transport.polar(torch.tensor([[0.0, -3.0], [0.5, 0.0]]))
    assert torch.equal(found.map.round(decimals=12), torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double())
    assert (found.rank, found.full_rank) == (2, 2)
    # What the data do not determine stays zero: one direction only.
    found = transport.polar(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(found.map.abs(), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).double())
    assert (found.rank, found.full_rank) == (1, 2)


@pytest.mark.parametrize("case", ["narrow", "mixed", "few", "iso_wide", "iso_narrow"])
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("centre", [False, True])
def test_theseus(theseus: dict[str, Tensor], case: str, power: float, centre: bool) -> None:
    """Maps and transported changes of weight and bias equal those of the authors' code to 1e-8."""
    maps = {}
    for side in ("in", "out"):
        a, b = theseus[f"{case}.A_{side}"], theseus[f"{case}.B_{side}"]
        sums, grams, cross = (a.sum(0), b.sum(0)), (a.mT @ a, b.mT @ b), a.mT @ b
        if centre:
            cross = transport.centred(cross, *sums, len(a))
            grams = (
                transport.centred(grams[0], sums[0], sums[0], len(a)),
                transport.centred(grams[1], sums[1], sums[1], len(a)),
            )
        maps[side] = transport.polar(transport.whitened(cross, *grams, power), tolerance=1e-7).map
    key = f"{case}.p{100 * power:02.0f}.{'cent' if centre else 'raw'}"
    det = "_det" if case == "few" else ""
    for side, found in maps.items():
        assert torch.allclose(found, theseus[f"{key}.T_{side}{det}"], atol=1e-8)
    change = maps["out"].mT @ theseus[f"{case}.dW"] @ maps["in"]
    assert torch.allclose(change, theseus[f"{key}.dW_t{det}"], atol=1e-8)
    assert torch.allclose(theseus[f"{case}.db"] @ maps["out"], theseus[f"{key}.db_t{det}"], atol=1e-8)


@pytest.mark.parametrize(
    ("case", "num_source", "pairs"),
    [("q6to4", 6, [[0, 1], [2], [3, 4], [5]]), ("kv2to8", 2, [[0]] * 4 + [[1]] * 4)],
)
def test_theseus_by_heads(theseus: dict[str, Tensor], case: str, num_source: int, pairs: list[list[int]]) -> None:
    """With the code's own pairs; several source heads for one are added."""
    a, b = theseus[f"gqa.{case}.A"], theseus[f"gqa.{case}.B"]
    for name, cross in (("raw", a.mT @ b), ("cent", transport.centred(a.mT @ b, a.sum(0), b.sum(0), len(a)))):
        found = transport.head_map(cross, pairs, num_source)
        assert torch.allclose(found.map.float(), theseus[f"gqa.{case}.{name}.T_out"], atol=1e-6)
        outside = theseus[f"gqa.{case}.{name}.dW_t_outside"]
        assert torch.allclose(found.map.mT @ theseus[f"gqa.{case}.dW"], outside, atol=1e-5)


def test_a_head_without_partner_gets_no_map() -> None:
    found = transport.head_map(drawn(4, 6), [[1], [], [0]], 2)
    assert found.map.shape == (4, 6) and (found.rank, found.full_rank) == (4, 4)
    assert not found.map[:, 2:4].any() and not found.map[:2, :2].any() and not found.map[2:, 4:].any()


@pytest.mark.parametrize(("d_source", "d_target"), [(5, 3), (3, 5), (4, 4)])
def test_a_random_isometry_is_one_and_depends_on_the_seed(d_source: int, d_target: int) -> None:
    made = [transport.random_isometry(d_source, d_target, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    small = made[0].mT @ made[0] if d_source >= d_target else made[0] @ made[0].mT
    assert torch.allclose(small, torch.eye(min(d_source, d_target)).double())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_correlation_is_pearsons_and_zero_for_constants() -> None:
    a, b = drawn(50, 3), drawn(50, 2, seed=1)
    a[:, 2] = 7.0
    found = transport.correlation(a.mT @ b, (a.sum(0), b.sum(0)), (a.square().sum(0), b.square().sum(0)), len(a))
    expected = torch.corrcoef(torch.cat([a[:, :2], b], 1).mT)[:2, 2:]
    assert torch.allclose(found[:2], expected) and not found[2].any()


def test_assignment_leaves_over_what_has_no_partner() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.8, 0.1, 0.0]])
    assert transport.assignment(similarity).tolist() == [1, 0, -1]  # 1.6, not 1.0
    assert transport.assignment(similarity.mT).tolist() == [1, 0]


def test_head_likeness_is_linear_cka() -> None:
    """A head turned and scaled is alike, an unrelated one hardly, one without output not at all."""
    a = drawn(200, 6)
    a[:, 4:] = 0
    turn = transport.random_isometry(2, 2, torch.Generator().manual_seed(5))
    b = torch.cat([drawn(200, 2, seed=9), 3 * a[:, :2] @ turn], 1)

    def grams(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, 2)).transpose(0, 1)
        return blocks.mT @ blocks

    found = transport.head_likeness(a.mT @ b, (a.sum(0), b.sum(0)), (grams(a), grams(b)), len(a))
    assert found.shape == (3, 2)
    assert found[0, 1] == pytest.approx(1) and found[1, 0] < 0.1 and not found[2].any()


def test_heads_are_matched_within_matched_groups() -> None:
    """Two groups of two heads: the second target group is like the first source group, its heads swapped."""
    likeness = torch.zeros(4, 4)
    likeness[0, 3] = likeness[1, 2] = 0.6
    likeness[2, 0] = likeness[3, 1] = 0.5
    likeness[2, 3] = 1.0  # alone: its group is a worse whole
    assert transport.matched_heads(likeness, 2, 2).tolist() == [2, 3, 1, 0]
    # A target with one key/value head a query head, from a source whose groups are larger, and with fewer of them.
    assert transport.matched_heads(torch.eye(4)[:2], 1, 4).tolist() == [0, -1, -1, -1]


def test_proportional_pairs_are_theseus() -> None:
    for name, sources in json.loads((GOLDEN / "pairs.json").read_text()).items():
        num_source, num_target = map(int, name.split("->"))
        assert transport.proportional_pairs(num_source, num_target) == [(s, t) for t, s in enumerate(sources)]


@pytest.mark.parametrize(("num_source", "num_target"), [(5, 3), (3, 5), (4, 4), (6, 1)])
def test_order_preserving_pairs_are_the_best_of_all(num_source: int, num_target: int) -> None:
    similarity = drawn(num_source, num_target, seed=num_source)
    few = min(num_source, num_target)
    every = itertools.product(
        itertools.combinations(range(num_source), few), itertools.combinations(range(num_target), few)
    )
    best = max(float(sum(similarity[i, j] for i, j in zip(*chosen, strict=True))) for chosen in every)
    pairs = transport.order_preserving_pairs(similarity)
    assert sum(float(similarity[i, j]) for i, j in pairs) == pytest.approx(best)
    assert len(pairs) == few and pairs == sorted(pairs) and len({j for _, j in pairs}) == few


def test_equal_layers_take_the_earliest() -> None:
    assert transport.order_preserving_pairs(torch.zeros(4, 2)) == [(0, 0), (1, 1)]


def test_singular_map_of_equal_weights_is_the_projection() -> None:
    """A change of a weight comes out as what of it lies between the weight's own leading singular vectors."""
    weight, change = drawn(7, 5), drawn(7, 5, seed=1)
    output, into = transport.singular_map(weight, weight, rank=3)
    u, _, vh = torch.linalg.svd(weight)
    expected = u[:, :3] @ u[:, :3].mT @ change @ vh[:3].mT @ vh[:3]
    torch.testing.assert_close(output.map.mT @ change @ into.map, expected)
    assert (output.rank, output.full_rank) == (3, 5)


@pytest.mark.parametrize("padding", [0, 4])
def test_singular_map_knows_permuted_and_padded_units(padding: int) -> None:
    weight, change = drawn(9, 6), drawn(9, 6, seed=1)
    rows = torch.randperm(9 + padding, generator=torch.Generator().manual_seed(2))
    columns = torch.randperm(6 + padding, generator=torch.Generator().manual_seed(3))

    def elsewhere(matrix: Tensor) -> Tensor:
        return torch.nn.functional.pad(matrix, (0, padding, 0, padding))[rows][:, columns]

    output, into = transport.singular_map(elsewhere(weight), weight)
    own = weight @ torch.linalg.pinv(weight)  # what its 6 columns span of its 9 rows
    torch.testing.assert_close(output.map.mT @ elsewhere(change) @ into.map, own @ change)
    assert output.rank == 6


def test_masks_are_gradfix() -> None:
    """The authors' own results (golden/transport/J_gradfix.json), at 1e-12; nothing is kept where there is no sign."""
    recorded = load_file(GOLDEN / "J_gradfix.safetensors")
    for name in ("w", "b"):
        delta, descent = recorded[f"mask.delta.{name}"], recorded[f"mask.signs.{name}"]
        assert torch.equal(descent, -recorded[f"mask.grad.{name}"].sign())
        for mode, theirs in (("keep", "normal"), ("force", "force")):
            found = transport.masked(delta, descent, mode)
            torch.testing.assert_close(found, recorded[f"mask.{theirs}.{name}"], rtol=0, atol=1e-12)
            torch.testing.assert_close(found, recorded[f"own.{theirs}.signs.{name}"], rtol=0, atol=1e-12)
        assert not transport.masked(delta, torch.zeros_like(delta), "keep").any()
    with pytest.raises(ValueError, match="mode must be keep or force, found 'soft'"):
        transport.masked(delta, descent, "soft")


@pytest.mark.parametrize("case", ["wide", "narrow", "fewrows"])
def test_stream_maps_and_regression_are_ariadnes(case: str) -> None:
    """The authors' own numbers (golden/transport/J_ariadne.json), at 1e-9, in the form for projections without bias."""
    recorded = load_file(GOLDEN / "J_ariadne.safetensors")
    s0, s1, t0, h = (recorded[f"{case}.{name}"] for name in ("S0", "S1", "T0", "H"))
    turn = transport.polar(transport.centred(s0.mT @ t0, s0.sum(0), t0.sum(0), len(s0)))
    torch.testing.assert_close(turn.map, recorded[f"{case}.Q"], rtol=0, atol=1e-9)
    torch.testing.assert_close((s1 - s0) @ turn.map, recorded[f"{case}.D_delta"], rtol=0, atol=1e-9)
    weight = transport.ridge(h.mT @ h, h.mT @ (s1 - s0) @ turn.map, 0.01).mT
    expected = recorded[f"{case}.delta.fixed_relative.noncentred.dW"]
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["narrow", "wide", "tinygrad"])
@pytest.mark.parametrize("key", ["p00.raw", "p00.cent", "p25.raw", "p50.raw", "p50.cent"])
def test_bico(case: str, key: str) -> None:
    """Maps, output maps from gradients, and what they carry over equal those of the authors' code to 1e-8."""
    recorded = load_file(GOLDEN / "J_bico.safetensors")
    power, centre = float(key[1:3]) / 100, key.endswith("cent")

    def fitted(a: Tensor, b: Tensor, relative: bool = False) -> Tensor:
        sums, cross, grams = (a.sum(0), b.sum(0)), a.mT @ b, [a.mT @ a, b.mT @ b]
        if centre:
            cross = transport.centred(cross, *sums, len(a))
            grams = [transport.centred(g, s, s, len(a)) for g, s in zip(grams, sums, strict=True)]
        return transport.polar(transport.whitened(cross, grams[0], grams[1], power, relative=relative)).map

    gradients = recorded[f"{case}.G_s"], recorded[f"{case}.G_t"]
    into, output = fitted(recorded[f"{case}.A_in"], recorded[f"{case}.B_in"]), fitted(*gradients)
    for name, found in (
        ("T_in", into),
        ("T_out", output),
        ("dW_t", output.mT @ recorded[f"{case}.dW"] @ into),
        ("db_t", recorded[f"{case}.db"] @ output),
    ):
        torch.testing.assert_close(found, recorded[f"{case}.{key}.{name}"], rtol=0, atol=1e-8)
    # With a relative floor the gradients' scale does not matter; with the published one whitening a small one does
    # nothing, as far as 5 digits show.
    scaled = fitted(1e3 * gradients[0], 1e-5 * gradients[1], relative=True)
    torch.testing.assert_close(fitted(*gradients, relative=True), scaled, rtol=0, atol=1e-10)
    if case == "tinygrad" and power:
        plain = recorded[f"tinygrad.p00.{'cent' if centre else 'raw'}.T_out"]
        assert float((output - plain).abs().max()) < 1e-4 < 0.05 < float((scaled - plain).abs().max())


def told(a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """What sums say of activations [token, d]."""
    return a.mT @ b, (a.sum(0), b.sum(0)), (a.square().sum(0), b.square().sum(0)), len(a)


def test_procrustes_residual_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    turned = 3 * a @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double() + torch.tensor([5.0, -2.0]).double()
    assert transport.procrustes_residual(*told(a, turned)) == pytest.approx(0, abs=1e-7)
    # Of two equal directions one is there: half of the square is left, in either order.
    assert transport.procrustes_residual(*told(a[:, :1], a)) == pytest.approx(0.5**0.5)
    assert transport.procrustes_residual(*told(a, a[:, :1])) == pytest.approx(0.5**0.5)
    # The source moves where the target does not: nothing is explained.
    still = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).double()
    assert transport.procrustes_residual(*told(a, still)) == 1
    with pytest.raises(ValueError, match="activations that do not vary have no Procrustes residual"):
        transport.procrustes_residual(*told(a, torch.ones(4, 1).double()))


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (4, 6)])
def test_procrustes_residual_is_what_the_best_map_leaves(sizes: tuple[int, int]) -> None:
    """Against the map itself, on padded and centred activations; scale and rotation by their own optima."""
    a, b = drawn(50, sizes[0]) + 2, drawn(50, sizes[1], seed=1)
    b[:, :3] += a[:, :3]
    x, y = (torch.nn.functional.pad(side - side.mean(0), (0, max(sizes) - side.shape[1])) for side in (a, b))
    u, values, vh = torch.linalg.svd(x.mT @ y)
    left = (values.sum() / x.square().sum()) * x @ u @ vh - y
    assert transport.procrustes_residual(*told(a, b)) == pytest.approx(float(left.norm() / y.norm()))
