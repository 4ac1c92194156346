"""Which layers and neurons of the source go where in the target? (paper 4.2; METHODS section 3)

Two attributions -> `selection`: layer pairs and neuron indices in score order; and, with the source's checkpoint,
`source_rows`: the rows at the selected neurons, and at as many random ones for a control. From there on no source
model is needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.artifacts import Artifact
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.sites import Geometry


@dataclass(frozen=True)
class SelectParams:
    """Settings of the selection."""

    max_rate: float = option(0.1, "Share of the target's neurons to select, 0..1; align may use any rate up to it.")
    layer_rule: Literal["neuron_sum", "block_gain"] = option(
        "neuron_sum", "Layer score: sum of its neurons' scores (paper) or gain of the block (authors' code)."
    )
    norm: Literal["rms", "reference_code"] = option("rms", "Which stored norm of the lens to use.")
    coefficient: Literal["all_positions", "last_position"] = option(
        "all_positions", "Which stored attention coefficient to use."
    )
    scores_of: Literal["example", "extract_mean"] = option(
        "example", "Select per example (paper), or once from the mean over the extract set."
    )
    seed: int = option(0, "Seed of the random neurons that a control uses.")
    code_version: int = option(1, "Raised by the developers when the selection's meaning changes.")

    def __post_init__(self) -> None:
        if not 0 < self.max_rate <= 1:
            raise ValueError(f"max_rate must be above 0 and at most 1, found {self.max_rate}")


def run(source: Artifact, target: Artifact, params: SelectParams) -> dict[str, Tensor]:
    """The tensors of a `selection` artifact from the attributions of both models on the same examples."""
    import torch

    from pkt_stages.core.selection import num_selected, pair_layers, top_neurons

    sizes = {"ffn": target.meta["geometry"]["d_ff"], "attn": target.meta["geometry"]["d_model"]}
    extract = torch.tensor([example["set"] == "extract" for example in source.meta["examples"]])
    tensors = {}
    for module, size in sizes.items():
        suffix = f".{params.coefficient}" if module == "attn" else ""
        layers, scores = {}, {}
        for side, artifact in (("source", source), ("target", target)):
            found = artifact[f"{module}_scores.{params.norm}{suffix}"]
            gain = artifact[f"{module}_gain.{params.norm}"]
            if params.scores_of == "extract_mean":
                if not bool(extract.any()):
                    raise UserError(f"{artifact.path}: scores_of extract_mean needs examples from extract.jsonl")
                found = found[extract].double().mean(0, keepdim=True).float().expand_as(found)
                gain = gain[extract].double().mean(0, keepdim=True).float().expand_as(gain)
            scores[side] = found
            layers[side] = found.double().sum(-1).float() if params.layer_rule == "neuron_sum" else gain
        count = num_selected(params.max_rate, size)
        if count < 1:
            raise UserError(f"max_rate {params.max_rate} of {size} {module} neurons selects none; raise it")
        pairs = pair_layers(layers["source"], layers["target"])
        tensors[f"{module}_layers"] = pairs
        for index, side in enumerate(("source", "target")):
            try:
                tensors[f"{module}_{side}_neurons"] = top_neurons(scores[side], pairs[..., index], count)
            except ValueError as error:
                raise UserError(
                    f"{module} at max_rate {params.max_rate}, the {side}: {error}; lower max_rate"
                ) from None
        _, num_layers, num_neurons = source.shapes[f"{module}_scores.{params.norm}{suffix}"]
        generator = torch.Generator().manual_seed(params.seed)
        drawn = [torch.randperm(num_neurons, generator=generator)[:count] for _ in range(num_layers)]
        tensors[f"{module}_random_neurons"] = torch.stack(drawn)
    return tensors


def extract_rows(checkpoint: Checkpoint, sizes: Geometry, selection: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `source_rows` artifact: each layer's rows once, at all its selected and random neurons."""
    import torch

    from pkt_stages.models.sites import MODULE_OF_SITE, SITES

    tensors = {}
    for layer in track(range(sizes.num_layers), "reading rows"):
        for module in ("ffn", "attn"):
            here = selection[f"{module}_layers"][..., 0] == layer
            if not bool(here.any()):
                continue
            selected = selection[f"{module}_source_neurons"][here].flatten()
            neurons = torch.cat([selected, selection[f"{module}_random_neurons"][layer]]).unique()
            tensors[f"neurons.{module}.{layer}"] = neurons
            for site in SITES:
                if MODULE_OF_SITE[site] == module:
                    tensors[f"{site}.{layer}"] = checkpoint.neuron_rows(sizes, layer, site, neurons)
    return tensors


@with_params("select", SelectParams)
def select(
    params: SelectParams,
    source_scores: Annotated[Path, typer.Option(help="The source's attribution.")],
    target_scores: Annotated[Path, typer.Option(help="The target's attribution, on the same examples.")],
    source: Annotated[str, typer.Option(help="The source's model folder or hub name, to read the rows from.")],
    out: Annotated[Path, typer.Option(help="Where to write layer pairs and neuron indices (.safetensors).")],
    rows_out: Annotated[Path, typer.Option(help="Where to write the source's rows (.safetensors).")],
    method: Annotated[str | None, typer.Option(help="Entry of `methods` in the params to use.")] = None,
    revision: Annotated[str | None, typer.Option(help="The source's hub revision.")] = None,
) -> None:
    """Pair layers, choose neurons of source and target, and take the source's rows at them."""
    from pkt_stages.models.load import identity, load_config, resolve
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.sites import geometry

    watch = Stopwatch()
    paths = {"source": source_scores, "target": target_scores}
    found = {side: artifacts.load(path, "attribution") for side, path in paths.items()}
    _check_same_examples(found["source"], found["target"])
    ref = resolve(source, revision)
    model = identity(ref)
    if model != found["source"].meta["model"]:
        raise UserError(
            f"{source}: not the model that {source_scores} was made from"
            f" (expected {_named(found['source'].meta['model'])}, found {_named(model)}); run `pkt attribute` again"
        )
    sizes = geometry(load_config(ref))
    _warn_if_narrower(found["source"].meta["geometry"], found["target"].meta["geometry"])
    tensors = run(found["source"], found["target"], params)
    rows = extract_rows(Checkpoint(ref), sizes, tensors)
    meta = {
        side: {"model": artifact.meta["model"], "geometry": artifact.meta["geometry"]}
        for side, artifact in found.items()
    }
    meta |= {"examples": found["source"].meta["examples"], "params": asdict(params)}
    artifacts.save(rows_out, "source_rows", rows, meta)
    artifacts.save(out, "selection", tensors, meta)
    count = {m: tensors[f"{m}_source_neurons"].shape for m in ("ffn", "attn")}
    what = f"{count['ffn'][1]} layer pairs, {count['ffn'][2]} FFN and {count['attn'][2]} attention neurons each"
    watch.summary("select", f"{what}, {count['ffn'][0]} examples", out)


def _check_same_examples(source: Artifact, target: Artifact) -> None:
    if source.meta["examples"] != target.meta["examples"]:
        raise UserError(
            f"{source.path} and {target.path}: attributed on different examples; run `pkt attribute` on the same files"
        )


def _warn_if_narrower(source: dict[str, Any], target: dict[str, Any]) -> None:
    narrower = [k for k in ("d_model", "d_ff", "num_layers") if source[k] < target[k]]
    if narrower:
        sizes = ", ".join(f"{k} {source[k]} < {target[k]}" for k in narrower)
        typer.echo(
            f"warning: the source is smaller than the target ({sizes}): LaTen can map it, Seeking cannot cut a"
            " sub-matrix from it; swap the two if that was not meant",
            err=True,
        )


def _named(model: dict[str, Any]) -> str:
    return f"{model['name']} at {model['revision']}"
