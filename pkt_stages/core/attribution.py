"""Neuron attribution: how much one neuron raises the log-probability of a token (paper A.2, eq. 12; METHODS section 2).

    score(n) = log p(w | base + c_n v_n) - log p(w | base),     p = softmax(U (.) / rms)

with U = W_U * gamma, v_n the neuron's subvalue, c_n its coefficient, and rms that of the final layer's output. The
logits are linear in the neuron: x = (c_n / rms) G_n with G_n = U v_n, and G does not depend on the example. So with
p = softmax(U base / rms)

    score(n) = x[w] - log E_p[e^x].

G is computed once for all examples, tile by tile. Most exponentials are avoided: E_p[G^k], k = 1..4, are matrix
products for all examples at once, and

    log E_p[e^x] = m1 + log1p(mu2 / 2 + mu3 / 6 + mu4 / 24) + r,   |r| <= a mu4 e^a / 120,   a = max_v |x - m1|

with m1 the mean and mu_k the central moments of x under p. Pairs of example and neuron whose bound exceeds the
tolerance take the plain path, a log-sum-exp over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Neurons and vocabulary entries of one tile of G: a CPU's tile stays in its cache, a GPU's fills its multiprocessors.
TILES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
PLAIN_TILE = {"cpu": 2**22, "cuda": 2**28}  # entries of G held at a time on the plain path


@dataclass(frozen=True)
class Scores:
    """Scores in nats, float32 [variant, example, neuron], and how many pairs took the plain path."""

    values: Float[Tensor, "variant example neuron"]
    num_plain: int


def lens_divisor(final: Float[Tensor, "*batch d_model"], eps: float, norm: str) -> Float[Tensor, "*batch"]:
    """What the logit lens divides by, from the final layer's output.

    Args:
        norm: `rms` is sqrt(mean(h^2) + eps) (Yu & Ananiadou 2024). `reference_code` is what LaTen's published code
            divides by, a fourth root of the variance: sqrt(sqrt(var(h) + 1e-5) + 1e-6).
    """
    final = final.double()
    if norm == "rms":
        return (final.square().mean(-1) + eps).sqrt().float()
    if norm == "reference_code":
        return ((final.var(-1, unbiased=False) + 1e-5).sqrt() + 1e-6).sqrt().float()
    raise ValueError(f"norm must be rms or reference_code, found {norm!r}")


def log_probabilities(
    unembedding: Float[Tensor, "vocab d_model"],
    residual: Float[Tensor, "example d_model"],
    divisor: Float[Tensor, " example"],
) -> Float[Tensor, "example vocab"]:
    """log softmax of the logit lens, float32 from float64 sums."""
    logits = residual @ unembedding.mT / divisor[:, None]
    return torch.log_softmax(logits.double(), dim=-1).float()


def block_gain(
    before: Float[Tensor, "example vocab"], after: Float[Tensor, "example vocab"], token: Int[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """log p(token) after a whole block was added, minus before; nats."""
    return (after - before).gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def neuron_scores(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    log_p: Float[Tensor, "example vocab"],
    coefficients: Float[Tensor, "variant example neuron"],
    token: Int[Tensor, " example"],
    *,
    tolerance: float = 1e-6,
) -> Scores:
    """Scores of all neurons of one module of one layer, for all examples at once.

    Args:
        subvalues: the neurons' subvalues v_n.
        unembedding: U = W_U * gamma, centred over the vocabulary (`centred`); the shift cancels in the score.
        log_p: log p(. | base) of each example.
        coefficients: c_n / rms per example; variants share the base (kinds of attention coefficient).
        token: w of each example.
        tolerance: the largest error in nats that the moments may make; pairs above it take the plain path.
    """
    scores, plain = [], 0
    tile, _ = TILES[subvalues.device.type]
    for start in range(0, len(subvalues), tile):
        part = slice(start, start + tile)
        c = coefficients[..., part]
        values, needs_plain = _by_moments(subvalues[part], unembedding, log_p, c, token, tolerance)
        if bool(needs_plain.any()):
            plain += int(needs_plain.sum())
            _replace_plain(values, needs_plain, subvalues[part], unembedding, log_p, c, token)
        scores.append(values)
    return Scores(torch.cat(scores, dim=-1), plain)


def centred(unembedding: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "vocab d_model"]:
    """Subtract the mean row: adds the same to all logits, so no probability changes, and moments stay small."""
    return (unembedding - unembedding.double().mean(0)).float()


def _by_moments(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    log_p: Float[Tensor, "example vocab"],
    coefficients: Float[Tensor, "variant example neuron"],
    token: Int[Tensor, " example"],
    tolerance: float,
) -> tuple[Float[Tensor, "variant example neuron"], Bool[Tensor, "variant example neuron"]]:
    num_neurons, num_examples = len(subvalues), len(log_p)
    p = log_p.exp().mT.contiguous()
    moments = subvalues.new_zeros(4, num_neurons, num_examples)
    high = subvalues.new_full((num_neurons,), -torch.inf)
    low = subvalues.new_full((num_neurons,), torch.inf)
    _, tile = TILES[subvalues.device.type]
    for start in range(0, len(unembedding), tile):
        part = slice(start, start + tile)
        g = subvalues @ unembedding[part].mT
        # Two reductions: aminmax over a dimension is thirty times slower on a CPU.
        high, low = torch.maximum(high, g.amax(1)), torch.minimum(low, g.amin(1))
        power = g.clone()
        for k in range(4):
            if k:
                power.mul_(g)
            moments[k].addmm_(power, p[part])

    # Central moments of G under p, combined in float64; then those of x = c G.
    mass = p.sum(0, dtype=torch.float64)
    e1, e2, e3, e4 = (moments.double() / mass).unbind(0)
    v2 = e2 - e1**2
    v3 = e3 - 3 * e1 * e2 + 2 * e1**3
    v4 = e4 - 4 * e1 * e3 + 6 * e1**2 * e2 - 3 * e1**4
    c = coefficients.double()
    g_token = (subvalues @ unembedding[token].mT).double()
    spread = torch.maximum(high.double()[:, None] - e1, e1 - low.double()[:, None]).clamp_min(0)
    mean, v2, v3, v4, spread, g_token = (t.mT for t in (e1, v2, v3, v4, spread, g_token))
    mu4 = c**4 * v4.clamp_min(0)
    log_mean_exp = c * mean + torch.log1p((c**2 * v2.clamp_min(0) / 2 + c**3 * v3 / 6 + mu4 / 24).clamp_min(0))
    a = c.abs() * spread
    bound = a * mu4 * torch.exp(a) / 120
    return (c * g_token - log_mean_exp).float(), ~(bound <= tolerance)


def _replace_plain(
    values: Float[Tensor, "variant example neuron"],
    chosen: Bool[Tensor, "variant example neuron"],
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    log_p: Float[Tensor, "example vocab"],
    coefficients: Float[Tensor, "variant example neuron"],
    token: Int[Tensor, " example"],
) -> None:
    """Overwrite the chosen pairs' scores by a log-sum-exp over the vocabulary."""
    neurons = chosen.any(0).any(0).nonzero()[:, 0]
    columns = max(1, PLAIN_TILE[subvalues.device.type] // len(unembedding))
    for some in neurons.split(columns):
        g = subvalues[some] @ unembedding.mT
        for variant, example in chosen[:, :, some].any(-1).nonzero().tolist():
            here = chosen[variant, example, some]
            x = coefficients[variant, example, some[here]][:, None] * g[here]
            at_token = x[:, token[example]].clone()
            values[variant, example, some[here]] = at_token - torch.logsumexp(x.add_(log_p[example]), dim=-1)


@torch.no_grad()
def plain_neuron_scores(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    residual: Float[Tensor, "example d_model"],
    divisor: Float[Tensor, " example"],
    coefficients: Float[Tensor, "variant example neuron"],
    token: Int[Tensor, " example"],
) -> Float[Tensor, "variant example neuron"]:
    """The definition, one example at a time, in the dtype given: the oracle of `neuron_scores`.

    Args:
        coefficients: c_n, not divided by rms.
    """
    scores = torch.empty_like(coefficients)
    for example, w in enumerate(token.tolist()):
        base = torch.log_softmax(unembedding @ residual[example] / divisor[example], dim=-1)[w]
        for variant in range(len(coefficients)):
            moved = residual[example] + coefficients[variant, example][:, None] * subvalues
            log_p = torch.log_softmax(moved @ unembedding.mT / divisor[example], dim=-1)
            scores[variant, example] = log_p[:, w] - base
    return scores


@torch.no_grad()
def lens_tokens(
    vectors: Float[Tensor, "vector d_model"], unembedding: Float[Tensor, "vocab d_model"], num_tokens: int
) -> Int[Tensor, "vector lens_token"]:
    """The tokens that each vector raises most when added to the residual stream, best first."""
    return (vectors @ unembedding.mT).topk(num_tokens, dim=-1).indices
