"""Are the formulas of `pkt plan` right? What they predict of a profile beside what `pkt sweep` measured of it here.

    python -m benchmarks.plan [profiles/NAME/dvc.yaml] [--tokens 128]

By kind of stage: seconds by the formulas with this machine's own speeds (measured first), seconds that they took in the
last sweep, and their ratio; and what reading and estimating itself takes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from pkt_stages.tools.graph import Graph, open_repo
from pkt_stages.tools.plan import Estimator, Machine
from pkt_stages.tools.sweep import read_times

WIDTH, COPIED, REPEATS = 2048, 2**28, 5


def speeds() -> Machine:
    """What long products in float32 and reads of memory reach, on the threads that are allowed."""
    a = torch.randn(WIDTH, WIDTH)
    b = torch.randn(COPIED // 4)
    products, copies = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        a @ a
        products.append(time.perf_counter() - start)
        start = time.perf_counter()
        b.sum()
        copies.append(time.perf_counter() - start)
    return Machine(flops=2 * WIDTH**3 / min(products), bandwidth=COPIED / min(copies))


def main(
    target: Annotated[str, typer.Argument()] = "dvc.yaml",
    tokens: Annotated[int, typer.Option(help="Of an example, as for `pkt plan`.")] = 128,
) -> None:
    machine = speeds()
    print(f"this machine: {machine.flops / 1e9:.0f} GFLOP/s in products, {machine.bandwidth / 1e9:.1f} GB/s")
    started = time.process_time()
    with open_repo() as repo:
        times = read_times(Path(repo.root_dir) / ".scratch")
        graph = Graph(repo, [target], glob=False, allow_missing=True)
        estimator = Estimator(Path(repo.root_dir), tokens)
        for stage in graph.stages:
            estimator.learn(str(stage.cmd))
        kinds: dict[str, list[tuple[float, float]]] = {}
        for stage in graph.stages:
            if (taken := times.get(stage.addressing)) is not None:
                kind = stage.addressing.split(":")[-1].split("@")[0]
                kinds.setdefault(kind, []).append((machine.seconds(estimator.need(str(stage.cmd))), taken))
    print(f"read and estimated in {time.process_time() - started:.1f} s of CPU")
    print(f"{'stage':20} {'number':>6} {'predicted':>10} {'measured':>9} {'measured / predicted':>21}")
    for kind, pairs in kinds.items():
        predicted, measured = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        print(f"{kind:20} {len(pairs):6} {predicted:10.1f} {measured:9.1f} {measured / predicted:21.2f}")


if __name__ == "__main__":
    typer.run(main)
