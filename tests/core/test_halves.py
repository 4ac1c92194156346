"""The GPU's powers against float64, by Triton's interpreter, in a process of its own: its variable counts at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
from pkt_stages.core import attribution, halves

halves.VOCABULARY_TILE, halves.SPAN, halves.COLUMNS, halves.ROWS, halves.PART = 128, 64, 32, 32, 16
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(301, 40, generator=g) * 0.02 + 0.01).to(dtype)
    weight[7] *= 2.0**-20  # a token that is never seen in training
    gamma = torch.rand(40, generator=g) * 3 + 0.5
    rows = (torch.randn(70, 40, generator=g) * 0.02 * torch.logspace(-6, 2, 70)[:, None]).half().float()
    rows[3] = 0
    rest = torch.rand(301, 5, generator=g)
    rest /= rest.sum(0)
    wide = weight.double() * gamma.double()
    exact = rows.double() @ (wide - wide.mean(0)).T
    sums, high, low = halves.HalvedPowers(weight, gamma)(rows, rest)
    oracle = attribution.powers(rows, attribution.centred(weight.float() * gamma), rest)
    scale = exact.abs().amax(1)
    for k, power in enumerate((2, 3, 4)):
        want = exact**power @ rest.double()
        size = (exact.abs() ** power @ rest.double()).clamp_min(1e-300)
        for found in (sums, oracle[0]):
            assert ((found[k].double() - want).abs() <= attribution.ROUNDING * size + 1e-37).all(), (dtype, power)
    for found, want in ((high, exact.amax(1)), (low, exact.amin(1))):
        assert ((found.double() - want).abs() <= 2e-6 * scale).all(), dtype
print("equal")
"""


def test_powers_of_halves_equal_float64_within_the_rounding_that_the_bound_allows() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]
