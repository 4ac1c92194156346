from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkt_stages.core.hypernetwork import Hypernetwork, draw_weights

SITE_OF = {"up_proj": "ffn_up", "down_proj": "ffn_down", "v_proj": "attn_v", "o_proj": "attn_o"}
COLUMNS = ("down_proj", "o_proj")


def as_rows(name: str, knowledge: Tensor) -> Tensor:
    return knowledge.mT if name in COLUMNS else knowledge


def with_weights(weights: dict[str, Tensor]) -> Hypernetwork:
    sites = list(dict.fromkeys(name.split(".")[0] for name in weights))
    d_hidden, d_source = weights[f"{sites[0]}.0.weight"].shape
    d_target = weights[f"{sites[0]}.2.weight"].shape[0]
    network = Hypernetwork(sites, d_source=d_source, d_hidden=d_hidden, d_target=d_target)
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize("size", ["small", "big"])
def test_forward_agrees_with_the_published_code(golden: Path, size: str) -> None:
    fixture = load_file(golden / "laten" / "C_extract_translate_inject.safetensors")
    for name, site in SITE_OF.items():
        weights = {
            f"{site}.{place}.weight": fixture[f"translator.{size}.network.{name}.{place}.weight"] for place in (0, 2)
        }
        mapped = (
            with_weights(weights)({site: as_rows(name, fixture[f"teacher_knowledge.{name}"])})[site].detach().double()
        )
        expected = as_rows(name, fixture[f"translated.{size}.{name}"]).double()
        assert float((mapped - expected).norm() / expected.norm()) < 1e-6


def test_forward_by_hand() -> None:
    network = with_weights(
        {"ffn_up.0.weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "ffn_up.2.weight": torch.eye(2) * 3}
    )
    mapped = network({"ffn_up": torch.tensor([[[2.0, 5.0], [-1.0, -4.0]]])})
    assert mapped["ffn_up"].tolist() == [[[6.0, 0.0], [0.0, 12.0]]]


def test_initial_weights_are_seeded_normal_and_small() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        network = Hypernetwork(["a", "b"], d_source=60, d_hidden=50, d_target=40)
        draw_weights(network, std=1e-5, generator=torch.Generator().manual_seed(seed))
        return network.state_dict()

    first, again, other = made(0), made(0), made(1)
    assert {name: tuple(w.shape) for name, w in first.items()} == {
        "a.0.weight": (50, 60),
        "a.2.weight": (40, 50),
        "b.0.weight": (50, 60),
        "b.2.weight": (40, 50),
    }
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    everything = torch.cat([w.flatten() for w in first.values()])
    assert everything.dtype == torch.float32
    assert float(everything.std()) == pytest.approx(1e-5, rel=0.03)


def test_making_one_touches_no_global_random_numbers() -> None:
    before = torch.random.get_rng_state()
    Hypernetwork(["a"], d_source=6, d_hidden=5, d_target=4)
    assert torch.equal(torch.random.get_rng_state(), before)
