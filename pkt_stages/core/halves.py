"""Powers of G on a GPU from products of 16-bit halves, without the error of 16 bits.

G = U v with U = W_U * gamma centred over the vocabulary. Weights stored in 16 bits are exact in float16 once scaled by
a power of two, so W_U (gamma * v), with gamma * v split into a high and a low float16 part, is two products on tensor
cores that accumulate in float32 and keep 22 bits of every factor. A W_U of 32 bits is split likewise, and the product
of both low parts dropped. What W_U's mean row adds is subtracted where G is read: once, by a kernel that forms its
powers, their sums and its extremes from tiles. `attribution.powers` is the oracle.

The library's product and a kernel that reads G take 5.3 ms for 4096 neurons of a 13B model on an H200; both in one
kernel, which never writes G to memory, took 6.5 (docs/benchmarks.md).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VOCABULARY_TILE = 16384  # entries of G by neuron that are in memory at a time
SPAN = 2048  # of them, what one program goes over
# Neurons, vocabulary entries and examples of a program's tile, and its warps.
ROWS, COLUMNS, PART, NUM_WARPS = 64, 64, 32, 4


class HalvedPowers:
    """The powers and extremes of `attribution.powers` for one model's lens.

    Args:
        weight: [vocab, d_model] W_U as stored.
        gamma: [d_model] of the final norm, float32.
    """

    def __init__(self, weight: Tensor, gamma: Tensor) -> None:
        self.gamma = gamma
        self.exponent = _exponent(weight.abs().amax().float())
        high, low = _halves(weight, self.exponent)
        self.is_exact = weight.dtype in (torch.float16, torch.bfloat16)
        self.parts = torch.cat([high, high] if self.is_exact else [high, high, low], dim=1)
        # In pieces: no second copy of a large matrix.
        total = sum(some.sum(0, dtype=torch.float64) for some in weight.split(8192))
        self.mean = total / len(weight) * gamma

    def __call__(self, subvalues: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the vocabulary of q G^k, [power, neuron, example] float64, and G's largest and smallest entries.

        Args:
            subvalues: [neuron, d_model].
            rest: [vocab, example] q.
        """
        scaled = subvalues * self.gamma
        exponents = _exponent(scaled.abs().amax(1))
        high, low = _halves(scaled, exponents[:, None])
        factors = torch.cat([high, low] if self.is_exact else [high, low, high], dim=1)
        scale = torch.ldexp(torch.ones_like(scaled[:, 0]), -(exponents + self.exponent))
        mean = (subvalues.double() @ self.mean).float()
        num_examples = rest.shape[1]
        rest = torch.nn.functional.pad(rest, (0, -num_examples % PART))
        found = [
            _summed(_product(factors, u), scale, mean, q.contiguous())
            for u, q in zip(self.parts.split(VOCABULARY_TILE), rest.split(VOCABULARY_TILE), strict=True)
        ]
        sums, largest, smallest = (list(parts) for parts in zip(*found, strict=True))
        return (
            torch.stack(sums).sum(0)[..., :num_examples],
            torch.stack(largest).amax(0),
            torch.stack(smallest).amin(0),
        )


def _exponent(largest: Tensor) -> Tensor:
    """e such that 2^e times the largest entry is near 2^14, the upper end of float16."""
    return 14 - torch.frexp(largest).exponent


def _halves(values: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent times the values as a sum of two float16 parts; the second is 0 where 16 bits hold a value."""
    scaled = torch.ldexp(values.float(), exponent)
    high = scaled.half()
    return high, (scaled - high.float()).half()


def _product(factors: Tensor, parts: Tensor) -> Tensor:
    """[neuron, vocab], accumulated and kept in float32."""
    if factors.is_cuda:
        return torch.mm(factors, parts.mT, out_dtype=torch.float32)
    return factors.float() @ parts.float().mT


def _summed(products: Tensor, scale: Tensor, mean: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums and extremes of G = scale * products - mean over these columns."""
    num_neurons, columns = products.shape
    spans = triton.cdiv(columns, SPAN)
    sums = products.new_empty(spans, 3, num_neurons, rest.shape[1])
    largest, smallest = products.new_empty(spans, num_neurons), products.new_empty(spans, num_neurons)
    _kernel[(triton.cdiv(num_neurons, ROWS), spans, rest.shape[1] // PART)](
        *(products, scale, mean, rest, sums, largest, smallest, num_neurons, columns, rest.shape[1]),
        SPAN=SPAN,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        PART=PART,
        num_warps=NUM_WARPS,
    )
    return sums.sum(0, dtype=torch.float64), largest.amax(0), smallest.amin(0)


@triton.jit
def _kernel(
    products,
    scale,
    mean,
    rest,
    sums,
    largest,
    smallest,
    num_neurons,
    columns,
    examples,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Some neurons and examples over one span of the vocabulary.

    products [neuron, column], rest [column, example]; sums [span, power, neuron, example], largest and smallest
    [span, neuron].
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(1)
    e = tl.program_id(2) * PART + tl.arange(0, PART)
    here = n < num_neurons
    factor, shift = tl.load(scale + n, here, 0.0)[:, None], tl.load(mean + n, here, 0.0)[:, None]
    second = tl.zeros((ROWS, PART), dtype=tl.float32)
    third = tl.zeros((ROWS, PART), dtype=tl.float32)
    fourth = tl.zeros((ROWS, PART), dtype=tl.float32)
    high = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    low = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    row = products + n.to(tl.int64)[:, None] * columns
    for start in range(0, SPAN, COLUMNS):
        v = span * SPAN + start + tl.arange(0, COLUMNS)
        inside = v < columns
        g = tl.load(row + v[None, :], here[:, None] & inside[None, :], 0.0) * factor - shift
        q = tl.load(rest + v.to(tl.int64)[:, None] * examples + e[None, :], inside[:, None], 0.0)
        high = tl.maximum(high, tl.max(tl.where(inside[None, :], g, float("-inf")), 1))
        low = tl.minimum(low, tl.min(tl.where(inside[None, :], g, float("inf")), 1))
        square = g * g
        second = tl.dot(square, q, second, input_precision="tf32x3")
        third = tl.dot(square * g, q, third, input_precision="tf32x3")
        fourth = tl.dot(square * square, q, fourth, input_precision="tf32x3")
    tl.store(largest + span * num_neurons + n, high, here)
    tl.store(smallest + span * num_neurons + n, low, here)
    place = (span * 3 * num_neurons + n).to(tl.int64)
    tl.store(sums + place[:, None] * examples + e[None, :], second, here[:, None])
    tl.store(sums + (place + num_neurons)[:, None] * examples + e[None, :], third, here[:, None])
    tl.store(sums + (place + 2 * num_neurons)[:, None] * examples + e[None, :], fourth, here[:, None])
