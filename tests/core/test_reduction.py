from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.core.reduction import embedding_transform, importance, pca, whitening


def test_agrees_with_the_recorded_closed_forms(golden: Path) -> None:
    recorded = load_file(golden / "unaligned" / "H_unaligned_blocks.safetensors")
    x = recorded["x"]
    centred = x - x.mean(0)
    torch.testing.assert_close(x.mean(0), recorded["mean"], rtol=0, atol=1e-14)
    torch.testing.assert_close(pca(x, 64), recorded["pca_W"], rtol=0, atol=1e-9)
    for name, matrix in (("pca", pca(x, 64)), ("whiten", whitening(x, 64))):
        reduced = centred @ matrix
        torch.testing.assert_close(
            (reduced @ reduced.mT)[:8, :8], recorded[f"{name}_gram_0_0_8"], rtol=1e-10, atol=1e-10
        )
    torch.testing.assert_close(
        embedding_transform(recorded["E_s"], recorded["E_t"]), recorded["emb_W"], rtol=0, atol=1e-12
    )
    found = importance(recorded["theta"])
    torch.testing.assert_close(found, recorded["importance"], rtol=1e-14, atol=0)
    assert found.sort(descending=True, stable=True).indices[:160].tolist() == recorded["importance_topk"].tolist()


def test_whitened_rows_have_unit_covariance() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 8)
    torch.testing.assert_close(torch.cov((rows @ whitening(rows, 5)).mT), torch.eye(5, dtype=torch.float64))


def test_pca_at_full_width_is_a_rotation() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = pca(rows, 4)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(4, dtype=torch.float64))


def test_directions_without_variance_become_zero() -> None:
    flat = torch.zeros(6, 3)
    flat[:, 0] = torch.arange(6)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0, 0] = 3.5**-0.5
    torch.testing.assert_close(whitening(flat, 2), expected)


def test_more_directions_than_rows() -> None:
    with pytest.raises(ValueError, match="5 directions of 3 rows of width 8"):
        pca(torch.ones(3, 8), 5)
