"""How alike two models are: CKA of what they compute, cosine similarity of what they are (METHODS section 7).

Linear CKA compares features of the same samples in two models. With the unbiased estimate of HSIC (Song et al. 2012) it
can be summed over minibatches (Nguyen et al. 2021): `CkaSums` holds three sums whatever the number of samples.

    K = X X^T without its diagonal, U-centred           [sample, sample], for each layer of a model
    HSIC(X, Y) = <K_X, K_Y> / (n (n - 3))
    CKA(X, Y)  = sum HSIC(X, Y) / sqrt(sum HSIC(X, X) sum HSIC(Y, Y)),  sums over minibatches
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

MIN_SAMPLES = 4
ROUNDING = 1e-7


def centred_gram(features: Float[Tensor, "*layer sample d"]) -> Float64[Tensor, "*layer sample sample"]:
    """U-centred Gram matrices: the diagonal is zero and every row sums to zero over the others (Szekely & Rizzo 2014).

    Raises:
        ValueError: there are fewer than 4 samples, for which unbiased HSIC does not exist.
    """
    n = features.shape[-2]
    if n < MIN_SAMPLES:
        raise ValueError(f"{n} samples; unbiased HSIC needs at least {MIN_SAMPLES}")
    features = features.double()
    centred = features - features.mean(-2, keepdim=True)
    # What is left of constant features is rounding.
    constant = centred.abs().amax((-2, -1)) <= ROUNDING * features.abs().amax((-2, -1))
    centred = torch.where(constant[..., None, None], 0.0, centred)
    gram = centred @ centred.mT
    off = ~torch.eye(n, dtype=torch.bool, device=gram.device)
    gram = gram * off
    rows = gram.sum(-1) / (n - 2)
    total = gram.sum((-2, -1)) / ((n - 1) * (n - 2))
    return (gram - rows[..., None] - rows[..., None, :] + total[..., None, None]) * off


def hsic(
    first: Float64[Tensor, "first_layer sample sample"], second: Float64[Tensor, "second_layer sample sample"]
) -> Float64[Tensor, "first_layer second_layer"]:
    """Unbiased HSIC of every layer of one model with every layer of another, from `centred_gram`: one product."""
    n = first.shape[-1]
    return first.flatten(1) @ second.flatten(1).mT / (n * (n - 3))


class CkaSums:
    """HSIC summed over minibatches, each with equal weight: cross terms, and each model's own."""

    def __init__(self) -> None:
        self.cross: Tensor | None = None
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(
        self,
        first: Float64[Tensor, "first_layer sample sample"],
        second: Float64[Tensor, "second_layer sample sample"],
    ) -> None:
        """Add a minibatch, given as `centred_gram` of either model's layers on the same samples."""
        n = first.shape[-1]
        cross = hsic(first, second)
        own = [grams.square().sum((-2, -1)) / (n * (n - 3)) for grams in (first, second)]
        if self.cross is None or self.first is None or self.second is None:
            self.cross, (self.first, self.second) = cross, own
        else:
            self.cross, self.first, self.second = self.cross + cross, self.first + own[0], self.second + own[1]

    def cka(self, without: float | None = None) -> Float64[Tensor, "first_layer second_layer"]:
        """The similarity of every pair of layers; 1 for equal features, about 0 for unrelated ones.

        Args:
            without: what a pair with a layer whose features do not vary gets; None: that is an error.

        Raises:
            ValueError: naming a model (`first` or `second`) and a layer whose features do not vary.
        """
        assert self.cross is not None and self.first is not None and self.second is not None
        if without is not None:
            scale = (self.first[:, None] * self.second).sqrt()
            varies = (self.first[:, None] > 0) & (self.second > 0)
            return torch.where(varies, self.cross / torch.where(varies, scale, 1.0), without)
        for name, own in (("first", self.first), ("second", self.second)):
            constant = (~(own > 0)).nonzero().flatten().tolist()
            if constant:
                raise ValueError(f"{name} layer {constant[0]}: its features do not vary, CKA is undefined")
        return self.cross / (self.first[:, None] * self.second).sqrt()


def minibatches(count: int, size: int) -> list[range]:
    """Consecutive samples, `size` at a time; a last minibatch of under 4 joins the one before.

    Raises:
        ValueError: fewer than 4 samples, or minibatches of fewer than 4.
    """
    if min(count, size) < MIN_SAMPLES:
        raise ValueError(f"{min(count, size)} samples; unbiased HSIC needs at least {MIN_SAMPLES}")
    starts = list(range(0, count, size))
    if count - starts[-1] < MIN_SAMPLES:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def cosine(first: Float[Tensor, "row d"], second: Float[Tensor, "row d"]) -> tuple[float, float]:
    """Cosine similarity of two matrices: the mean over rows, and of the flattened ones (float64).

    Rows that are zero in either matrix have no direction and are left out.

    Raises:
        ValueError: all rows are left out.
    """
    a, b = first.double(), second.double()
    products, norms = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
    valid = norms > 0
    if not bool(valid.any()):
        raise ValueError("one of the matrices is zero, the cosine similarity is undefined")
    return float((products[valid] / norms[valid]).mean()), float(products.sum() / (a.norm() * b.norm()))


def bin_edges(smallest: float, largest: float, per_decade: int) -> Float64[Tensor, " edge"]:
    """Edges of histogram bins for values of either sign: logarithmic in their size, symmetric about zero.

    One bin in the middle holds what is smaller than `smallest`.
    """
    powers = torch.tensor([smallest, largest], dtype=torch.float64).log10()
    count = round(float(powers[1] - powers[0]) * per_decade)
    positive = torch.logspace(float(powers[0]), float(powers[1]), count + 1, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def histogram(values: Tensor, edges: Float64[Tensor, " edge"]) -> Tensor:
    """Number of values per bin, int64 [edge + 1]: the first and the last bin are open."""
    return torch.bincount(torch.bucketize(values.flatten().double(), edges), minlength=len(edges) + 1)
