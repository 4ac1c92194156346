"""What does an adapter resemble? Cosine similarity to the target's weights and the source's (METHODS section 7).

A fine-tuned adapter + what it was initialised with -> `similarity`: per site and layer the cosine between the LoRA
update (alpha / r) B A and the target's weight W, the base W - (alpha / r) B A that it was trained on, and, for Seeking,
the source's sub-matrix. At the start and after training; the mean over neuron rows, and flattened. The paper's
parametric similarity (section 5.3, figures 4 and 6). Weights are read one at a time; no model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.adapters import Adapter

# LoRA as the start of training has it: nothing, the weight's own leading part, or the sub-matrix's.
STARTS = ("random", "pissa", "seeking")


def run(
    weight: Callable[[str], Tensor],
    adapter: Adapter,
    blocks: Mapping[str, Tensor],
    *,
    init: str,
    rank: int,
    num_layers: int,
) -> dict[str, Tensor]:
    """Cosine similarities `{site}.{moment}.{against}`, float64 [layer, 2]: mean over neuron rows, and flattened.

    Args:
        weight: the target's original weight of a module.
        adapter: relative to the original weights, as stored: what training ended with minus what it began with.
        blocks: the source's sub-matrices by module; none unless init is `seeking`.
        init: one of `STARTS`.
        rank: of the initial update.

    Raises:
        UserError: the adapter lacks a site, or a comparison is undefined because a matrix is zero.
    """
    import torch

    from pkt_stages.core.delta import low_rank_factors
    from pkt_stages.core.similarity import cosine
    from pkt_stages.models.sites import SITES, as_rows, projection_name
    from pkt_stages.progress import track

    scale = adapter.alpha / adapter.rank
    found: dict[str, list[tuple[float, float]]] = {}
    for layer in track(range(num_layers), "layers"):
        for site in SITES:
            module = projection_name(layer, site)
            if module not in adapter.factors:
                raise UserError(f"the adapter has nothing at {module}; expected all of {', '.join(SITES)}")
            own = weight(module).float()
            start = torch.zeros_like(own)
            if init != "random":
                a, b = low_rank_factors(blocks[module] if init == "seeking" else own, rank)
                # PiSSA divides by alpha / r so that the update is the leading part itself; Seeking does not.
                start = b @ a if init == "pissa" else scale * (b @ a)
            updates = {"trained": adapter.delta(module) + start}
            if init != "random":
                updates["initial"] = start
            for moment, update in updates.items():
                against = {"weight": own, "reduced_base": own - start}
                if init == "seeking":
                    against["submatrix"] = blocks[module].float()
                for name, other in against.items():
                    try:
                        pair = cosine(as_rows(update, site), as_rows(other, site))
                    except ValueError as error:
                        raise UserError(f"{module}, {moment} update against {name}: {error}") from None
                    found.setdefault(f"{site}.{moment}.{name}", []).append(pair)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def similarity(
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    adapter: Annotated[Path, typer.Option(help="Adapter of `pkt finetune`, or the folder of its seeds.")],
    training: Annotated[Path, typer.Option(help="The metrics of `pkt finetune`, which name init, rank and alpha.")],
    out: Annotated[Path, typer.Option(help="Where to write the similarities (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write them for the report (JSON).")],
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`; for init seeking only.")] = None,
    run_number: Annotated[int, typer.Option("--run", min=0, help="Which seed of a folder, from 0.")] = 0,
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
) -> None:
    """Compare a fine-tuned adapter with the target's weights and the source's: cosine similarity by layer."""
    from pkt_stages import artifacts
    from pkt_stages.models import load
    from pkt_stages.models.adapters import load_adapter
    from pkt_stages.models.lora import read_blocks
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.runs import labelled

    watch = Stopwatch()
    ref = load.resolve(target, revision)
    identity = load.identity(ref)
    config = load.load_config(ref)
    trained = read_training(training, identity, target)
    init, rank = trained["params"]["init"], trained["params"]["rank"]
    if (submatrices is not None) != (init == "seeking"):
        needed = "needs --submatrices (from `pkt seek`)" if submatrices is None else "has no use for --submatrices"
        raise UserError(f"{training}: init {init} {needed}")
    blocks = {}
    if submatrices is not None:
        blocks = read_blocks(artifacts.load(submatrices, "submatrices"), identity, target)
    runs = labelled([adapter])
    if run_number >= len(runs):
        raise UserError(f"{adapter}: has {len(runs)} runs, no number {run_number} (from 0)")
    label = list(runs)[run_number]
    if not runs[label].is_dir():
        raise UserError(f"{runs[label]}: a sparse delta; parametric similarity is about adapters (a folder)")
    checkpoint = Checkpoint(ref)
    found = run(
        lambda module: checkpoint.weight(f"{module}.weight"),
        load_adapter(runs[label]),
        blocks,
        init=init,
        rank=rank,
        num_layers=config.num_hidden_layers,
    )
    meta: dict[str, Any] = {"target": identity, "run": label, "method": trained["method"], "init": init, "rank": rank}
    artifacts.save(out, "similarity", found, meta)
    artifacts.write_json(metrics, {"similarity": {name: value.tolist() for name, value in found.items()}, **meta})
    means = {
        name.removeprefix("ffn_up."): float(value[:, 0].mean()) for name, value in found.items() if "ffn_up" in name
    }
    watch.summary("similarity", "ffn_up " + ", ".join(f"{n} {v:+.3f}" for n, v in means.items()), out)


def read_training(path: Path, target: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The metrics of `pkt finetune`.

    Raises:
        UserError: missing, malformed, or of another target.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        init, rank, of = found["params"]["init"], found["params"]["rank"], found["target"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the metrics of `pkt finetune`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metrics of `pkt finetune` ({type(error).__name__}: {error})") from None
    if init not in STARTS or not isinstance(rank, int):
        raise UserError(f"{path}: expected init {', '.join(STARTS)} and a whole rank, found {init!r} and {rank!r}")
    if of != target:
        raise UserError(
            f"{path}: of the target {of['name']} at {of['revision']}, {model} is another; run `pkt finetune`"
        )
    return dict(found)
