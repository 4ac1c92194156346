"""Seeking's search for the best sub-matrix against a plain double loop, in one run at equal threads.

The loop sums every placement anew, as the published code does. It runs whole at the small size, where both must find
the same sub-matrix. At the size of a Llama-2 matrix (13B to 7B) it is timed on some placements and scaled to all: that
figure is an extrapolation and is printed as one.

    python benchmarks/submatrix.py
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from itertools import islice, product

import torch
import typer
from torch import Tensor

from pkt_stages.core.sensitivity import submatrix_sums


def placements(scores: Tensor, size: int) -> Iterable[tuple[int, int]]:
    """Rows and columns where a square sub-matrix may begin, in row-major order."""
    return product(range(scores.shape[0] - size + 1), range(scores.shape[1] - size + 1))


def plain_loop(scores: Tensor, size: int, corners: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The first of these corners whose sub-matrix has the largest sum; sums are float64, as in `submatrix_sums`."""
    best, where = -1.0, (0, 0)
    for row, column in corners:
        total = float(scores[row : row + size, column : column + size].sum(dtype=torch.float64))
        if total > best:
            best, where = total, (row, column)
    return where


def vectorised(scores: Tensor, size: int, repeats: int) -> tuple[float, tuple[int, int]]:
    """The fastest of some runs, seconds, and the corner found."""
    seconds, corner = float("inf"), (0, 0)
    for _ in range(repeats):
        start = time.perf_counter()
        sums = submatrix_sums(scores, (size, size))
        corner = divmod(int(sums.argmax()), sums.shape[1])
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, corner


def main(repeats: int = 5, sampled_placements: int = 50, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, threads {threads}, float32 scores; vectorised: fastest of {repeats} runs")

    scores = torch.rand(640, 640, generator=draw)
    ours, found = vectorised(scores, 512, repeats)
    start = time.perf_counter()
    expected = plain_loop(scores, 512, placements(scores, 512))
    loop = time.perf_counter() - start
    assert found == expected, f"found {found}, the loop {expected}"
    print(
        f"640x640 -> 512x512: loop {loop:.2f} s, vectorised {ours * 1e3:.1f} ms, ratio {loop / ours:.0f}x, same place"
    )

    scores = torch.rand(5120, 5120, generator=draw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, _ = vectorised(scores, 4096, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    plain_loop(scores, 4096, islice(placements(scores, 4096), sampled_placements))
    every = (time.perf_counter() - start) / sampled_placements * (5120 - 4096 + 1) ** 2
    print(f"5120x5120 -> 4096x4096: vectorised {ours:.2f} s, {peak / 2**20:.2f} GiB above what was held before")
    print(
        f"  loop, EXTRAPOLATED from {sampled_placements} of {(5120 - 4096 + 1) ** 2:,} placements:"
        f" {every / 3600:.1f} h, ratio {every / ours:,.0f}x"
    )


if __name__ == "__main__":
    typer.run(main)
