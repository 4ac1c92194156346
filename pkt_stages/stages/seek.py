"""Which part of the source's weights matters most for a task? (Seeking, Zhong et al. 2023; appendix B.2; METHODS 5)

extract examples + the source + the target's sizes -> `submatrices`: for each of the target's weights the block of the
source's weight of the same shape with the largest sensitivity. From there on no source model is needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages.encoding import Encoded, Labels, Template
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.parallel import Group, joined
from pkt_stages.scratch import Seldom, Shards, fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from torch import Tensor

    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.sensitivity import Sensitivity
    from pkt_stages.models.sites import Geometry


@dataclass(frozen=True)
class SeekParams:
    """Settings of the extraction."""

    sites: Literal["paper", "all"] = option(
        "paper", "Weights to extract: up, down, v, o (paper), or all projections, embeddings and head (Seeking's code)."
    )
    labels: Labels = option("answer", "Tokens whose loss counts: answer, all or reference_code.")
    template: Template = option("chat", "Prompt format: chat (the tokenizer's own), tulu, llama2 or none.")
    max_length: int = option(1024, "Longest example, tokens; a longer one is an error.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "The source's dtype; auto: stored.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, found {self.max_length}")


@dataclass(frozen=True)
class Block:
    """Where one weight of the target comes from.

    Attributes:
        weight, layer: of the target; 0 for embedding and head.
        name: the source's parameter.
        corner: row and column of the source's weight where the block begins.
        share: part of the weight's sensitivity that lies in the block, 0 .. 1.
        margin: (best - second best placement) / best; 0 is a tie.
    """

    weight: str
    layer: int
    name: str
    corner: tuple[int, int]
    share: float
    margin: float


def run(sums: Mapping[str, Tensor], layers: Sequence[int], weights: Sequence[str], target: Geometry) -> list[Block]:
    """The best block for every weight of the target, from the sensitivity of the source's parameters by name."""
    from pkt_stages.core.sensitivity import block_sums
    from pkt_stages.models.sites import module_name
    from pkt_stages.progress import track

    places = [(w, place, layer) for w in weights for place, layer in enumerate(layers) if place == 0 or _layered(w)]
    found = []
    for weight, place, layer in track(places, "sub-matrices"):
        name = f"{module_name(weight, layer)}.weight"
        placements = block_sums(sums[name], target.weight_shape(weight))
        best = placements.flatten().topk(min(2, placements.numel())).values.tolist()
        corner = divmod(int(placements.argmax()), placements.shape[1])
        total = float(sums[name].double().sum())
        margin = (best[0] - best[1]) / best[0] if len(best) > 1 and best[0] > 0 else 0.0
        found.append(Block(weight, place, name, corner, best[0] / total if total else 0.0, margin))
    return found


def _layered(weight: str) -> bool:
    return weight not in ("embedding", "head")


@with_params("seek", SeekParams)
def seek(
    params: SeekParams,
    source: Annotated[str, typer.Option(help="The source's model folder or hub name.")],
    target: Annotated[str, typer.Option(help="The target's model folder or hub name; only its sizes are used.")],
    examples: Annotated[Path, typer.Option(help="Extract examples (.jsonl).")],
    out: Annotated[Path, typer.Option(help="Where to write the sub-matrices (.safetensors).")],
    metrics: Annotated[Path, typer.Option(help="Where to write layer sensitivities and placements (JSON).")],
    source_revision: Annotated[str | None, typer.Option(help="The source's hub revision (commit hash).")] = None,
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    scratch: Annotated[
        Path, typer.Option(help="Folder for the sums so far, to go on after a kill.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
) -> None:
    """Find the source's most sensitive layers, and in each weight the block that the target's weight takes.

    Several processes (torchrun) divide the examples, each with the whole model. The sums are saved so seldom that it
    costs about a tenth of the time.
    """
    import torch

    from pkt_stages import artifacts
    from pkt_stages.core.sensitivity import top_layers
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models import load
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.sites import OTHER_WEIGHTS, SITES, geometry, module_name

    watch = Stopwatch()
    refs = {"source": load.resolve(source, source_revision), "target": load.resolve(target, revision)}
    configs = {side: load.load_config(ref) for side, ref in refs.items()}
    sizes = {side: geometry(config) for side, config in configs.items()}
    weights = [*SITES, *(OTHER_WEIGHTS if params.sites == "all" else ())]
    if params.sites == "all" and any(config.tie_word_embeddings for config in configs.values()):
        raise UserError("sites all: embedding and head are one weight in one of the models; use sites paper")
    check_sizes(sizes["source"], sizes["target"], weights)
    tokenizer = load.load_tokenizer(refs["source"])
    encoded = [
        (e.id, encode(tokenizer, e, template=params.template, max_length=params.max_length, labels=params.labels))
        for e in read_examples(examples)
    ]
    # Which layers count is known in the end only, so the sums of all of them are kept: one copy of these weights.
    wanted = {
        f"{module_name(weight, layer)}.weight" for weight in weights for layer in range(sizes["source"].num_layers)
    }
    models = {side: {"model": load.identity(ref), "geometry": asdict(sizes[side])} for side, ref in refs.items()}
    run_of = [models["source"], [vars(e) for _, e in encoded], sorted(wanted), asdict(params), device]
    with joined() as group:
        shards = Shards(scratch, f"seek-{fingerprint([*run_of, group.size], [])}")
        found = sum_up(refs["source"], encoded, wanted, shards, group, dtype=params.dtype, device=device)
        group.wait()
        if not group.is_first:
            return
    layers = top_layers(found.layers, sizes["target"].num_layers)
    blocks = run(found.weights, layers.tolist(), weights, sizes["target"])
    checkpoint = Checkpoint(refs["source"])
    tensors = {"layers": layers, "layer_sensitivity": found.layers}
    for block in blocks:
        (row, column), (height, width) = block.corner, sizes["target"].weight_shape(block.weight)
        values = checkpoint.weight(block.name)[row : row + height, column : column + width]
        tensors[f"{block.weight}.block.{block.layer}"] = values
    for weight in weights:
        tensors[f"{weight}.corner"] = torch.tensor([b.corner for b in blocks if b.weight == weight])
    facts: dict[str, Any] = {"examples": [id for id, _ in encoded], "params": asdict(params), **models}
    artifacts.save(out, "submatrices", tensors, facts)
    artifacts.write_json(
        metrics,
        {
            "layers": layers.tolist(),
            "layer_sensitivity": found.layers.tolist(),
            "blocks": [asdict(block) for block in blocks],
            "units": {"layer_sensitivity": "nats, sum over examples and parameters"},
            **facts,
        },
    )
    shards.remove()
    mean_share = sum(block.share for block in blocks) / len(blocks)
    what = f"source layers {layers.tolist()}, {len(blocks)} blocks with {mean_share:.0%} of their weights' sensitivity"
    watch.summary("seek", what, out)


def sum_up(
    source: ModelRef,
    examples: Sequence[tuple[str, Encoded]],
    wanted: Set[str],
    shards: Shards,
    group: Group,
    *,
    dtype: str,
    device: str,
) -> Sensitivity:
    """The source's sensitivity over all examples, going on from the sums in `shards`."""
    import torch

    from pkt_stages.models.load import check_device, load_model
    from pkt_stages.models.sensitivity import Partial, Sensitivity, sensitivities

    device = group.device(device)
    check_device(device)
    seldom: Seldom | None = None
    name = f"sums_{group.rank}"

    def keep(partial: Partial) -> None:
        nonlocal seldom
        counts = {"done": torch.tensor([partial.done]), "layers": partial.sums.layers}
        seldom = seldom or Seldom(sum(sums.nbytes for sums in partial.sums.weights.values()))
        seldom(lambda: shards.__setitem__(name, partial.sums.weights | counts))

    saved = shards.get(name)
    begun = None
    if saved is not None:
        done, layers = int(saved.pop("done")), saved.pop("layers")
        begun = Partial(done, Sensitivity(saved, layers))
    return sensitivities(
        load_model(source, dtype=dtype, device=device), examples, wanted, begun=begun, keep=keep, group=group
    )


def check_sizes(source: Geometry, target: Geometry, weights: Sequence[str]) -> None:
    """Raise UserError unless every weight of the target fits into the source's."""
    if source.num_layers < target.num_layers:
        raise UserError(
            f"the source has {source.num_layers} layers, the target {target.num_layers}; Seeking needs as many"
        )
    for weight in weights:
        large, small = source.weight_shape(weight), target.weight_shape(weight)
        if not _layered(weight) and large[0] != small[0]:
            raise UserError(f"{weight}: vocabularies of {large[0]} and {small[0]} tokens; use sites paper")
        if large[0] < small[0] or large[1] < small[1]:
            raise UserError(
                f"{weight}: the source's {large[0]}x{large[1]} holds no block of the target's {small[0]}x{small[1]};"
                " swap the two if that was not meant"
            )
