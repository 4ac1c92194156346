"""Fitting rows of the source's width into the target's, in closed form (paper appendix B.1; METHODS section 6)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def pca(rows: Float[Tensor, "n d"], width: int) -> Float64[Tensor, "d width"]:
    """The `width` directions of largest variance of the rows, as columns; each with its largest entry positive.

    Raises:
        ValueError: there are fewer rows or columns than directions are wanted.
    """
    directions, _ = _principal(rows, width)
    return directions


def whitening(rows: Float[Tensor, "n d"], width: int) -> Float64[Tensor, "d width"]:
    """As `pca`, each direction divided by the rows' standard deviation along it (n - 1; Su 2021).

    A direction along which the rows do not vary becomes zero, as in the pseudo-inverse: under grouped-query attention
    v_proj has fewer rows than the width.

    Raises:
        ValueError: as `pca`.
    """
    directions, variances = _principal(rows, width)
    return directions * torch.where(variances > variances[0] * 1e-12, variances, torch.inf).rsqrt()


def _principal(rows: Float[Tensor, "n d"], width: int) -> tuple[Float64[Tensor, "d width"], Float64[Tensor, " width"]]:
    """Eigenvectors of the rows' covariance (n - 1) and their variances, in falling order."""
    if width > min(rows.shape):
        raise ValueError(f"{width} directions of {rows.shape[0]} rows of width {rows.shape[1]}")
    covariance = torch.cov(rows.double().mT)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:width], directions.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0), variances


def embedding_transform(
    source: Float[Tensor, "vocab d_source"], target: Float[Tensor, "vocab d_target"]
) -> Float64[Tensor, "d_source d_target"]:
    """W = argmin ||E_source W - E_target||_F = (E_s^T E_s)^-1 E_s^T E_t (eq. 13), by least squares."""
    return torch.linalg.lstsq(source.double(), target.double(), driver="gelsd").solution


def importance(rows: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """Mean absolute weight of each row (Bowen et al. 2024)."""
    return rows.double().abs().mean(1)
