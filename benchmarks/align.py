"""One step of LaTen's alignment: the mapping evaluated once, against once per micro-batch, and its share of the step.

The plain step maps the rows anew for every micro-batch and goes back through the mapping each time, as a training loop
does that treats the mapping as part of the model. Both take the same examples and must agree on the gradient.

    python -m benchmarks.align                      # a random target of 12 layers, d 576 -> 384, on a CPU
    python -m benchmarks.align --full --device cuda # 13B -> 7B sizes: d 5120 -> 4096, 32 layers, float16
"""

from __future__ import annotations

import functools
import resource
from collections.abc import Mapping
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.cka import FULL, clock, random_model
from pkt_stages.core.hypernetwork import Hypernetwork, draw_weights
from pkt_stages.core.losses import backward, mean_square
from pkt_stages.encoding import Encoded
from pkt_stages.models.inject import SparseDelta, injected
from pkt_stages.models.losses import example_losses, micro_batches
from pkt_stages.models.sites import SITES, geometry

SMALL = (384, 1024, 12, 6)
D_SOURCE = {"small": 576, "full": FULL[0][0]}
PENALTY = 1000.0


def measure(
    model: Any, d_source: int, *, examples: int, tokens: int, micro_batch: int, rate: float, turns: int = 5
) -> dict[str, float]:
    """Seconds of a step (the mapping once, per micro-batch, not at all), the gradients' error, the mapping's TFLOP."""
    device = str(model.device)
    model.requires_grad_(False)
    sizes = geometry(model.config)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (examples, tokens), generator=draw).tolist()
    batches = micro_batches([Encoded(row, row) for row in ids], micro_batch)
    counts = {site: int(rate * (sizes.d_ff if site.startswith("ffn") else sizes.d_model)) for site in SITES}
    layers = torch.arange(sizes.num_layers)
    rows = {
        site: (torch.randn(sizes.num_layers, count, d_source, generator=draw) * 0.02).to(device)
        for site, count in counts.items()
    }
    network = Hypernetwork(SITES, d_source=d_source, d_hidden=d_source, d_target=sizes.d_model)
    draw_weights(network, std=1e-3, generator=draw)
    network.to(device)

    def losses(part: list[Encoded], deltas: Mapping[str, Tensor]) -> Tensor:
        delta = {
            site: SparseDelta(layers, torch.arange(counts[site]).repeat(sizes.num_layers, 1), deltas[site])
            for site in SITES
        }
        with injected(model, delta):
            return example_losses(model, part)

    def once() -> None:
        parts = [functools.partial(losses, part) for part in batches]
        backward(network, rows, parts, penalty_weight=PENALTY, reduction="mean")

    def per_micro_batch() -> None:
        network.zero_grad(set_to_none=True)
        for part in batches:
            deltas = network(rows)
            (losses(part, deltas).sum() + PENALTY * mean_square(deltas) * len(part)).backward()
        for weight in network.parameters():  # afterwards, as `backward` does: float16 has no room for small gradients
            weight.grad = weight.grad / examples if weight.grad is not None else None

    def model_only() -> None:
        fixed = {site: part.detach().requires_grad_() for site, part in network(rows).items()}
        for part in batches:
            losses(part, fixed).sum().backward()

    seconds: dict[str, float] = {}
    gradients = {}
    for turn in range(turns):  # in turns, and the fastest counts: a shared machine slows down for seconds at a time
        for name, step in (("once", once), ("per_micro_batch", per_micro_batch), ("model_only", model_only)):
            start = clock(device)
            step()
            taken = clock(device) - start
            if turn > 0:  # the first one allocates
                seconds[name] = min(taken, seconds.get(name, taken))
            gradients[name] = torch.cat([w.grad.flatten().cpu() for w in network.parameters() if w.grad is not None])
    difference = (gradients["once"] - gradients["per_micro_batch"]).norm(dtype=torch.float64)
    error = float(difference / gradients["per_micro_batch"].norm(dtype=torch.float64))
    mapping = 3 * 2 * (d_source**2 + d_source * sizes.d_model) * sum(counts.values()) * sizes.num_layers
    return {**seconds, "gradient_error": error, "mapping_tflop": mapping / 1e12, "micro_batches": len(batches)}


def main(
    examples: int = 16,
    tokens: int = 128,
    micro_batch: int = 4,
    rate: float = 0.1,
    full: bool = False,
    device: str = "cpu",
) -> None:
    torch.set_num_threads(1)
    model = random_model(FULL[1] if full else SMALL, device, torch.float16 if full else torch.float32)
    d_source = D_SOURCE["full" if full else "small"]
    found = measure(model, d_source, examples=examples, tokens=tokens, micro_batch=micro_batch, rate=rate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**30
    batches = f"{found['micro_batches']} micro-batches"
    print(f"torch {torch.__version__}, {device}, {examples} examples of {tokens} tokens, {batches}")
    print(f"step with the mapping once {found['once']:.3f} s, per micro-batch {found['per_micro_batch']:.3f} s:")
    ratio = found["per_micro_batch"] / found["once"]
    print(f"  ratio {ratio:.2f}, gradients agree to {found['gradient_error']:.1e}")
    print(f"outside the target's own passes: {1 - found['model_only'] / found['once']:.0%} of the step")
    print(f"mapping: {found['mapping_tflop']:.3f} TFLOP forward and back; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
