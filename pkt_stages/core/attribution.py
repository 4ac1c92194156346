"""Neuron attribution: how much one neuron raises the log-probability of a token (paper A.2, eq. 12; METHODS section 2).

    score(n) = log p(w | base + c_n v_n) - log p(w | base),     p = softmax(U (.) / rms)

with U = W_U * gamma, v_n the neuron's subvalue, c_n its coefficient, and rms that of the final layer's output. The
logits are linear in the neuron: x = (c_n / rms) G_n with G_n = U v_n, and G does not depend on the example. So with
p = softmax(U base / rms)

    score(n) = x[w] - log E_p[e^x].

Most exponentials are avoided. The few tokens T that hold most of p are taken one by one, w among them. Over the rest,
q = p / p(not T), the powers E_q[G^k], k = 2..4, are matrix products for all examples at once, formed tile by tile of G,
and the mean is one product with U^T q. Then

    log E_q[e^x] = m1 + log1p(mu2 / 2 + mu3 / 6 + mu4 / 24) + r,   |r| <= a mu4 e^a / 120,   a = max_v |x - m1|

with m1 the mean and mu_k the central moments of x under q. Everything but the powers is float64; what rounding of them
can do to the moments is added to the bound, and a rest that holds little of E_p[e^x] matters by that share alone. Pairs
of example and neuron whose bound is not below the tolerance take the plain path, a log-sum-exp over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Neurons and vocabulary entries of one tile of G: large, so that a product takes little beside its arithmetic.
TILES = {"cpu": (1536, 512), "cuda": (16384, 8192)}
POWERS_TILE = {"cpu": 192, "cuda": 16384}  # of its neurons, those whose powers are formed at a time: a CPU's cache
PLAIN_TILE = {"cpu": 2**22, "cuda": 2**28}  # entries of G held at a time on the plain path
WIDE_TILE = 8192  # rows of U that are widened to float64 at a time on the plain path
MEAN_TILE = 256  # the same where all of U is gone over for a mean, so that they stay in a cache
LENS_TILE = 2**24  # logits of vectors that are held at a time
NUM_EXACT = 8  # tokens of each example that are taken one by one
# What rounding may do to E_q[G^k], relative to E_q[|G|^k]: float32 sums over a vocabulary, or a tensor core's.
ROUNDING = 2.0**-17

Powers = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # as `powers`, of subvalues and rest


@dataclass(frozen=True)
class Scores:
    """Scores in nats, float32 [variant, example, neuron], and how many pairs took the plain path."""

    values: Float[Tensor, "variant example neuron"]
    num_plain: int


def lens_divisor(final: Float[Tensor, "*batch d_model"], eps: float, norm: str) -> Float[Tensor, "*batch"]:
    """What the logit lens divides by, from the final layer's output; float64.

    Args:
        norm: `rms` is sqrt(mean(h^2) + eps) (Yu & Ananiadou 2024). `reference_code` is what LaTen's published code
            divides by, a fourth root of the variance: sqrt(sqrt(var(h) + 1e-5) + 1e-6).
    """
    final = final.double()
    if norm == "rms":
        return (final.square().mean(-1) + eps).sqrt()
    if norm == "reference_code":
        return ((final.var(-1, unbiased=False) + 1e-5).sqrt() + 1e-6).sqrt()
    raise ValueError(f"norm must be rms or reference_code, found {norm!r}")


@torch.no_grad()
def logits(
    unembedding: Float[Tensor, "vocab d_model"],
    residual: Float[Tensor, "*#batch d_model"],
    divisor: Float[Tensor, "*#batch"],
    shift: Float[Tensor, " vocab"] | None = None,
) -> Float[Tensor, "*batch vocab"]:
    """Logits of the lens, float64: `reference_code` divides by so little that float32 ones are 1e-5 nats off.

    Args:
        shift: what the final norm's bias adds.
    """
    rows = residual.double().flatten(0, -2)
    found = rows.new_empty(len(rows), len(unembedding))
    wide = rows.new_empty(min(MEAN_TILE, len(unembedding)), unembedding.shape[1])
    for some, u in zip(found.split(MEAN_TILE, 1), unembedding.split(MEAN_TILE), strict=True):
        some.copy_(rows @ wide[: len(u)].copy_(u).mT)
    found = found.unflatten(0, residual.shape[:-1]) / divisor[..., None]
    return found if shift is None else found + shift


def log_softmax(logits: Float[Tensor, "*batch vocab"], softcap: float | None = None) -> Float[Tensor, "*batch vocab"]:
    """log p of logits, or of softcap * tanh(logits / softcap)."""
    return torch.log_softmax(logits if softcap is None else softcap * (logits / softcap).tanh(), dim=-1)


def block_gain(
    before: Float[Tensor, "example vocab"], after: Float[Tensor, "example vocab"], token: Int[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """log p(token) after a whole block was added, minus before; nats."""
    return (after.gather(-1, token[:, None]) - before.gather(-1, token[:, None]))[:, 0].float()


@dataclass(frozen=True)
class Base:
    """The examples' distributions before a neuron is added: tokens that are taken one by one, and the rest.

    Attributes:
        log_p: [example, vocab] float64.
        token: [example] w.
        tokens: all that are taken one by one in some example.
        exact: [example, exact] where in `tokens` an example's own stand, w first.
        log_exact: [example, exact] their log p.
        log_rest: [example] log p of all others; -inf if there are none.
        rest: [vocab, example] float32 q, which sums to 1 over the others (0 if there are none).
        mean: [example, d_model] float64 U^T q.
    """

    log_p: Tensor
    token: Tensor
    tokens: Tensor
    exact: Tensor
    log_exact: Tensor
    log_rest: Tensor
    rest: Tensor
    mean: Tensor


@torch.no_grad()
def bases(
    log_p: Float[Tensor, "stream example vocab"],
    token: Int[Tensor, " example"],
    unembedding: Float[Tensor, "vocab d_model"],
) -> list[Base]:
    """The bases of several streams of the same examples: U is widened to float64 once for all of them.

    Args:
        log_p: log p(. | stream) of each example.
        token: w of each example.
        unembedding: U, centred over the vocabulary (`centred`).
    """
    own = token.expand(log_p.shape[:-1])[..., None]
    chosen = log_p.scatter(-1, own, torch.inf).topk(min(NUM_EXACT, log_p.shape[-1]), dim=-1).indices
    rest = log_p.scatter(-1, chosen, -torch.inf)
    largest = rest.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    rest.sub_(largest).exp_()
    total = rest.sum(-1, keepdim=True)
    log_rest = (largest + total.log())[..., 0]
    rest /= total.clamp_min(1.0)  # is at least 1, or 0 where there are no others
    mean = log_p.new_zeros(*log_p.shape[:-1], unembedding.shape[1])
    wide = log_p.new_empty(min(MEAN_TILE, len(unembedding)), unembedding.shape[1])
    for q, u in zip(rest.flatten(0, 1).split(MEAN_TILE, 1), unembedding.split(MEAN_TILE), strict=True):
        mean.flatten(0, 1).addmm_(q, wide[: len(u)].copy_(u))
    log_exact, rest = log_p.gather(-1, chosen), rest.float().mT.contiguous()
    found = []
    for p, taken, *others in zip(log_p, chosen, log_exact, log_rest, rest, mean, strict=True):
        tokens, exact = taken.unique(return_inverse=True)
        found.append(Base(p, token, tokens, exact, *others))
    return found


@torch.no_grad()
def neuron_scores(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    base: Base,
    coefficients: Float[Tensor, "variant example neuron"],
    *,
    tolerance: float = 1e-6,
    fused: Powers | None = None,
) -> Scores:
    """Scores of all neurons of one module of one layer, for all examples at once.

    Args:
        subvalues: the neurons' subvalues v_n.
        unembedding: U = W_U * gamma, centred over the vocabulary (`centred`); the shift cancels in the score.
        base: of the examples, from `bases`.
        coefficients: c_n / rms per example; variants share the base (kinds of attention coefficient).
        tolerance: the largest error in nats that the moments may make; pairs above it take the plain path, at 0 all.
        fused: takes the place of `powers` on a device that has a kernel for it; given subvalues and the rest.
    """
    form = fused or (lambda v, rest: powers(v, unembedding, rest))
    at_tokens = unembedding[base.tokens].double()
    scores, plain = [], 0
    tile, _ = TILES[subvalues.device.type]
    for v, part in zip(subvalues.split(tile), coefficients.split(tile, dim=-1), strict=True):
        c = part.double()
        values, bound = _by_moments(v, at_tokens, base, c, form)
        chosen = ~(bound < tolerance)
        if bool(chosen.any()):
            plain += int(chosen.sum())
            _replace_plain(values, chosen, v, unembedding, base, c)
        scores.append(values.float())
    return Scores(torch.cat(scores, dim=-1), plain)


def centred(unembedding: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "vocab d_model"]:
    """Subtract the mean row: adds the same to all logits, so no probability changes, and moments stay small."""
    total = torch.stack([some.double().sum(0) for some in unembedding.split(MEAN_TILE)]).sum(0)
    return unembedding - (total / len(unembedding)).float()


def powers(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    rest: Float[Tensor, "vocab example"],
) -> tuple[Float[Tensor, "power neuron example"], Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """Sums over the vocabulary of q G^k for k = 2, 3, 4, and the largest and smallest entry of G; float32."""
    sums = subvalues.new_zeros(3, len(subvalues), rest.shape[1])
    high = subvalues.new_full((len(subvalues),), -torch.inf)
    low = subvalues.new_full((len(subvalues),), torch.inf)
    tile, rows = min(TILES[subvalues.device.type][1], len(unembedding)), POWERS_TILE[subvalues.device.type]
    # Two tiles for all of the vocabulary: new memory costs more than what is done in it.
    direction, power = subvalues.new_empty(len(subvalues), tile), subvalues.new_empty(rows, tile)
    sums_of = list(zip(*(s.split(rows) for s in sums), strict=True))
    for u, q in zip(unembedding.split(tile), rest.split(tile), strict=True):
        g = torch.mm(subvalues, u.mT, out=direction[:, : len(u)])
        # Two reductions: aminmax over a dimension is thirty times slower on a CPU.
        torch.maximum(high, g.amax(1), out=high)
        torch.minimum(low, g.amin(1), out=low)
        for some, (second, third, fourth) in zip(g.split(rows), sums_of, strict=True):
            square = torch.mul(some, some, out=power[: len(some), : len(u)])
            second.addmm_(square, q)
            third.addmm_(some.mul_(square), q)
            fourth.addmm_(square.mul_(square), q)
    return sums, high, low


def _by_moments(subvalues: Tensor, at_tokens: Tensor, base: Base, c: Tensor, powers: Powers) -> tuple[Tensor, Tensor]:
    """Scores [variant, example, neuron] and a bound of their error in nats; float64.

    Args:
        at_tokens: [token, d_model] rows of U of the base's `tokens`, float64.
        c: coefficients / rms, float64.
    """
    sums, high, low = powers(subvalues, base.rest)
    exact = subvalues.double()
    # One product for means under q and G at tokens.
    mean, at_tokens = (torch.cat([base.mean, at_tokens]) @ exact.mT).tensor_split([len(base.mean)])
    e2, e3, e4 = sums.mT.contiguous().double()
    # Central moments of G under q, then those of x = c G.
    v2 = (e2 - mean**2).clamp_min(0)
    v3 = e3 - mean * (3 * e2 - 2 * mean**2)
    v4 = (e4 - mean * (4 * e3 - mean * (6 * e2 - 3 * mean**2))).clamp_min(0)
    c2 = c**2
    moments = torch.log1p((c2 * (v2 / 2 + c * (v3 / 6) + c2 * (v4 / 24))).clamp_min(0))
    log_rest = base.log_rest[:, None] + c * mean + moments
    spread = torch.maximum(high.double() - mean, mean - low.double()).clamp_min(0)
    size2 = e4.clamp_min(0).sqrt()  # E_q[|G|^k] <= size^k for k <= 4
    a, y, y2 = c.abs() * spread, c.abs() * size2.sqrt(), c2 * size2
    remainder = a * (c2**2 * v4 + 11 * ROUNDING * y2**2) * a.exp() / 120
    rounding = ROUNDING * y2 * (1 / 2 + 4 * y / 6 + 11 * y2 / 24)

    own = at_tokens[base.exact]  # G [example, exact, neuron]
    at_token = c * own[:, 0]
    relative = torch.addcmul(base.log_exact[..., None], c[:, :, None], own - own[:, :1])
    log_top = relative.logsumexp(2)
    log_rest = log_rest - at_token
    total = torch.logaddexp(log_top, log_rest)
    bound = (log_rest - total).exp() * torch.expm1(remainder + rounding)
    # A rest of nothing counts for nothing, however wrong it is.
    return -total, bound.where(base.log_rest[:, None] > -torch.inf, 0.0)


def _replace_plain(
    values: Tensor, chosen: Tensor, subvalues: Tensor, unembedding: Tensor, base: Base, c: Tensor
) -> None:
    """Overwrite the chosen pairs' scores by a log-sum-exp over the vocabulary; logits float64, exponentials float32."""
    columns = max(1, PLAIN_TILE[subvalues.device.type] // len(unembedding))
    for some in chosen.any(0).any(0).nonzero()[:, 0].split(columns):
        v = subvalues[some].double()
        g = torch.cat([v @ u.double().mT for u in unembedding.split(WIDE_TILE)], dim=1)
        for pairs in chosen[:, :, some].nonzero().split(columns):
            variant, example, neuron = pairs.unbind(1)
            moved = c[variant, example, some[neuron]][:, None] * g[neuron]
            moved -= moved.gather(1, base.token[example, None])
            values[variant, example, some[neuron]] = -moved.add_(base.log_p[example]).float().logsumexp(-1).double()


@torch.no_grad()
def capped_neuron_scores(
    subvalues: Float[Tensor, "neuron d_model"],
    unembedding: Float[Tensor, "vocab d_model"],
    logits: Float[Tensor, "example vocab"],
    coefficients: Float[Tensor, "variant example neuron"],
    token: Int[Tensor, " example"],
    softcap: float,
) -> Scores:
    """`neuron_scores` of a model that caps its logits: softcap * tanh(logits / softcap).

    Capped logits are not linear in the neuron, and the cap takes what is equal for all tokens for something else: every
    pair is a log-sum-exp over the vocabulary, and U is not centred.

    Args:
        logits: of each example before a neuron is added, not capped.
        coefficients: c_n / rms per example.
    """
    base = log_softmax(logits, softcap).gather(-1, token[:, None])  # [example, 1]
    scores = torch.empty(coefficients.shape, dtype=torch.float32, device=logits.device)
    columns = max(1, PLAIN_TILE[subvalues.device.type] // len(unembedding))
    for start in range(0, len(subvalues), columns):
        some = slice(start, start + columns)
        g = torch.cat([subvalues[some].double() @ u.double().mT for u in unembedding.split(WIDE_TILE)], dim=1)
        for variant in range(len(coefficients)):
            for example, own in enumerate(logits):
                moved = g * coefficients[variant, example, some, None].double() + own
                log_p = log_softmax(moved, softcap)[:, token[example]]
                scores[variant, example, some] = (log_p - base[example]).float()
    return Scores(scores, scores.numel())


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
    some = max(1, LENS_TILE // len(unembedding))
    return torch.cat([(v @ unembedding.mT).topk(num_tokens, dim=-1).indices for v in vectors.split(some)])
