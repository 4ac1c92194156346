"""How large are deltas? Their ranges, of fine-tuning and of transfer (paper sections 3.2 and C.2; METHODS section 7).

Chat - base, or a method's delta or adapter -> `delta_ranges`: per weight minimum, maximum, root mean square, the share
of entries within 0.002 and beyond 0.005, and a histogram of signed logarithmic bins. Streamed weight by weight from
disk: no model is loaded, let alone two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.load import ModelRef

# The paper's marks: fine-tuning stays within the first, Seeking's extraction goes beyond the second.
WITHIN, BEYOND = 0.002, 0.005
SMALLEST, LARGEST, PER_DECADE = 1e-8, 10.0, 8
STATISTICS = ("num_entries", "min", "max", "rms", "share_within", "share_beyond")


def describe(values: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """`STATISTICS` as float64, and the histogram's counts."""
    import torch

    from pkt_stages.core.similarity import histogram

    exact = values.double()
    size = exact.abs()
    found: list[Any] = [
        exact.numel(),
        exact.min(),
        exact.max(),
        exact.square().mean().sqrt(),
        (size <= WITHIN).double().mean(),
        (size > BEYOND).double().mean(),
    ]
    return torch.tensor([float(x) for x in found], dtype=torch.float64), histogram(exact, edges)


def of_models(model: ModelRef, base: ModelRef) -> Iterator[tuple[str, Tensor]]:
    """Differences of two checkpoints, weight by weight, float32: names, and model - base.

    Raises:
        UserError: a weight that only one has, or of different shapes.
    """
    from pkt_stages.models.rows import Checkpoint

    checkpoints = [Checkpoint(ref) for ref in (model, base)]
    names = [checkpoint.names() for checkpoint in checkpoints]
    if different := sorted(set(names[0]) ^ set(names[1])):
        has = model if different[0] in names[0] else base
        raise UserError(f"{model.location} and {base.location}: only {has.location} has {different[0]}")
    for name in names[0]:
        weight, other = (checkpoint.weight(name) for checkpoint in checkpoints)
        if weight.shape != other.shape:
            raise UserError(f"{name}: {list(weight.shape)} in {model.location}, {list(other.shape)} in {base.location}")
        yield name, weight.float() - other.float()


def of_run(path: Path) -> Iterator[tuple[str, Tensor]]:
    """What a run adds: an adapter's whole updates, or a sparse delta's rows alone (the rest is zero)."""
    from pkt_stages.models.adapters import Adapter
    from pkt_stages.models.runs import load_run
    from pkt_stages.models.sites import weight_name

    change = load_run(path)
    if isinstance(change, Adapter):
        for module in change.factors:
            yield f"{module}.weight", change.delta(module)
        return
    for site, part in change.items():
        for pair, layer in enumerate(part.layers.tolist()):
            yield weight_name(layer, site), part.rows[pair]


def deltas(
    out: Annotated[Path, typer.Option(help="Where to write ranges and histograms (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write them for the report (JSON).")],
    model: Annotated[str | None, typer.Option(help="A fine-tuned model's folder or hub name; with --base.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that it was fine-tuned from.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Delta, PEFT adapter, or a folder of them.")] = None,
    run_number: Annotated[int, typer.Option("--run", min=0, help="Which one of a folder, from 0.")] = 0,
    revision: Annotated[str | None, typer.Option(help="The model's hub revision (commit hash).")] = None,
    base_revision: Annotated[str | None, typer.Option(help="The base's hub revision (commit hash).")] = None,
) -> None:
    """Measure the range of deltas: of a model to its base, or of what a method adds."""
    import torch

    from pkt_stages import artifacts
    from pkt_stages.core.similarity import bin_edges
    from pkt_stages.models import load
    from pkt_stages.models.runs import labelled
    from pkt_stages.progress import track

    watch = Stopwatch()
    if (model is None) != (base is None) or (model is None) == (delta is None):
        raise UserError("give either --model and --base, or --delta")
    meta: dict[str, Any] = {"within": WITHIN, "beyond": BEYOND, "statistics": list(STATISTICS)}
    if model is not None and base is not None:
        refs = load.resolve(model, revision), load.resolve(base, base_revision)
        meta |= {"model": load.identity(refs[0]), "base": load.identity(refs[1])}
        changes = of_models(*refs)
    else:
        assert delta is not None
        runs = labelled([delta])
        if run_number >= len(runs):
            raise UserError(f"{delta}: has {len(runs)} runs, no number {run_number} (from 0)")
        meta |= {"run": list(runs)[run_number]}
        changes = of_run(list(runs.values())[run_number])
    edges = bin_edges(SMALLEST, LARGEST, PER_DECADE)
    names, found = [], []
    for name, values in track(changes, "weights"):
        if not bool(values.isfinite().all()):
            raise UserError(f"{name}: the delta holds NaN or infinity")
        names.append(name)
        found.append(describe(values, edges))
    statistics, counts = (torch.stack(part) for part in zip(*found, strict=True))
    meta["weights"] = names
    artifacts.save(out, "delta_ranges", {"edges": edges, "statistics": statistics, "counts": counts}, meta)
    whole = dict(zip(STATISTICS, overall(statistics).tolist(), strict=True))
    by_weight = {n: dict(zip(STATISTICS, row.tolist(), strict=True)) for n, row in zip(names, statistics, strict=True)}
    facts = {"edges": edges.tolist(), "counts": counts.sum(0).tolist(), "overall": whole, "by_weight": by_weight}
    artifacts.write_json(metrics, {**facts, **meta})
    what = f"{len(names)} weights, {whole['min']:+.4f} .. {whole['max']:+.4f}, within {WITHIN}: "
    watch.summary("deltas", what + f"{whole['share_within']:.1%}, beyond {BEYOND}: {whole['share_beyond']:.1%}", out)


def overall(statistics: Tensor) -> Tensor:
    """The statistics [weight, statistic] over all weights together."""
    import torch

    count, low, high, rms, within, beyond = statistics.unbind(1)
    total = count.sum()
    mean_square, *shares = ((part * count).sum() / total for part in (rms.square(), within, beyond))
    return torch.stack([total, low.min(), high.max(), mean_square.sqrt(), *shares])
