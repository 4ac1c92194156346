"""Which part of the source's weights matters most for a task? (Seeking, Zhong et al. 2023; appendix B.2; METHODS 5)

extract examples + the source + the target's sizes -> `submatrices`: for each of the target's weights the sub-matrix of
the source's weight of the same shape with the largest sensitivity. From there on no source model is needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages.encoding import EncodingParams, Labels
from pkt_stages.errors import UserError
from pkt_stages.options import SCRATCH, Device, DType, Scratch, Source, Stopwatch, Target, option, with_params
from pkt_stages.parallel import joined
from pkt_stages.scratch import Shards, fingerprint
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pkt_stages.models.sensitivity import Sensitivity
    from pkt_stages.models.sites import Geometry
    from pkt_stages.models.submatrices import Submatrix


@dataclass(frozen=True)
class SeekParams(EncodingParams):
    """Settings of the extraction."""

    sites: Literal["paper", "all"] = option(
        "paper", "Weights to extract: up, down, v, o (paper), or all projections, embeddings and head (Seeking's code)."
    )
    labels: Labels = option("answer", "Tokens whose loss counts: answer, all or reference_code.")
    dtype: DType = option("auto", "The source's dtype; auto: stored.")
    more_blocks: tuple[Literal["random", "uniform", "subclone"], ...] = option(
        (),
        "Other parts of the source's weights to keep: random placements, uniform (weight selection), subclone (weight"
        " subcloning, whose layers are its own).",
    )
    seed: int = option(0, "Seed of random placements.")


def run(sums: Sensitivity, weights: Sequence[str], target: Geometry) -> tuple[Tensor, list[Submatrix]]:
    """The source layers that the target's take, in depth order, and the sub-matrix of each of the target's weights."""
    from pkt_stages.core.sensitivity import top_layers
    from pkt_stages.models.submatrices import densest

    layers = top_layers(sums.layers, target.num_layers)
    return layers, densest(sums.weights, layers.tolist(), weights, target)


@with_params("seek", SeekParams)
def seek(
    params: SeekParams,
    source: Source,
    target: Target,
    extract: Annotated[Path, typer.Option(help="Extract examples (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Where to write the sub-matrices (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write layer sensitivities and placements (JSON).")],
    device: Device = "cpu",
    scratch: Scratch = SCRATCH,
) -> None:
    """Find the source's most sensitive layers, and in each weight the part that the target's weight takes.

    Of the target only its sizes are used. Several processes (torchrun) divide the examples, each with the whole model.
    """
    import torch

    from pkt_stages import artifacts
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models import load
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.sensitivity import resumed
    from pkt_stages.models.sites import OTHER_WEIGHTS, SITES, check_whole_matrices, geometry, module_name
    from pkt_stages.models.subcloning import Importance, check_heads, importance, kept_layers, subclone
    from pkt_stages.models.submatrices import check_sizes, other_block

    watch = Stopwatch()
    refs = {"source": load.resolve(source), "target": load.resolve(target)}
    configs = {side: load.load_config(ref) for side, ref in refs.items()}
    sizes = {side: geometry(config) for side, config in configs.items()}
    for config in configs.values():
        check_whole_matrices(config, "Seeking")
    weights = [*SITES, *(OTHER_WEIGHTS if params.sites == "all" else ())]
    if params.sites == "all" and any(config.tie_word_embeddings for config in configs.values()):
        raise UserError("sites all: embedding and head are one weight in one of the models; use sites paper")
    check_sizes(sizes["source"], sizes["target"], weights)
    if params.sites == "all" and (odd := load.vocabulary_difference(refs["source"], refs["target"])):
        raise UserError(f"sites all: embedding and head take one vocabulary: {odd}; use sites paper")
    if "subclone" in params.more_blocks:
        check_heads(sizes["source"], sizes["target"])
    tokenizer = load.load_tokenizer(refs["source"])
    encoded = [
        (e.id, encode(tokenizer, e, template=params.template, max_length=params.max_length, labels=params.labels))
        for e in read_examples(extract)
    ]
    # Which layers count is known in the end only, so the sums of all of them are kept: one copy of these weights.
    wanted = {
        f"{module_name(weight, layer)}.weight" for weight in weights for layer in range(sizes["source"].num_layers)
    }
    models = {side: {"model": load.identity(ref), "geometry": asdict(sizes[side])} for side, ref in refs.items()}
    run_of = [models["source"], [vars(e) for _, e in encoded], sorted(wanted), asdict(params), device]
    with joined() as group:
        shards = Shards(scratch, f"seek-{fingerprint([*run_of, group.size], [])}")
        model = load.load_model(refs["source"], dtype=params.dtype, device=group.device(device))
        sums = resumed(model, encoded, wanted, shards, group)
        active: Importance | None = None
        if "subclone" in params.more_blocks and group.is_first:
            active = importance(model, [example for _, example in encoded])
        del model  # makes room for the search
        group.wait()
        if not group.is_first:
            return
    layers, found = run(sums, weights, sizes["target"])
    checkpoint = Checkpoint(refs["source"])
    tensors = {"layers": layers, "layer_sensitivity": sums.layers}
    ends = kept_layers(sizes["target"].num_layers, sizes["source"].num_layers)
    for part in found:
        (row, column), (height, width) = part.corner, sizes["target"].weight_shape(part.weight)
        values = checkpoint.weight(part.name)[row : row + height, column : column + width]
        tensors[f"{part.weight}.submatrix.{part.layer}"] = values
        if active is not None:
            layer = ends[part.layer]
            whole = checkpoint.weight(f"{module_name(part.weight, layer)}.weight")
            made = subclone(whole, part.weight, layer, active, sizes["source"], sizes["target"])
            tensors[f"{part.weight}.subclone.{part.layer}"] = made
        for block in (block for block in params.more_blocks if block != "subclone"):
            rows, columns = other_block(block, part, checkpoint.weight(part.name).shape, (height, width), params.seed)
            tensors[f"{part.weight}.{block}.{part.layer}"] = checkpoint.weight(part.name)[rows][:, columns]
    for weight in weights:
        tensors[f"{weight}.corner"] = torch.tensor([part.corner for part in found if part.weight == weight])
    facts: dict[str, Any] = {"examples": [id for id, _ in encoded], "params": asdict(params), **models}
    facts |= dated(tokenizer, params.template)
    artifacts.save(out, artifacts.SUBMATRICES, tensors, facts)
    measured = {
        "layers": layers.tolist(),
        "layer_sensitivity": sums.layers.tolist(),
        "submatrices": [asdict(part) for part in found],
        **({"subclone_layers": ends} if active is not None else {}),
        "units": {"layer_sensitivity": "nats, sum over examples and parameters"},
    }
    artifacts.write_json(metrics, measured | facts)
    shards.remove()
    share = sum(part.share for part in found) / len(found)
    what = f"source layers {layers.tolist()}, {len(found)} sub-matrices with {share:.0%} of their weights' sensitivity"
    watch.summary("seek", what, out)
