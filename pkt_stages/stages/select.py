"""Which layers and neurons of the source go where in the target? (paper 4.2; METHODS section 3)

Two attributions -> `selection`: layer pairs and neuron indices in score order, for the settings themselves and each
variant of them; and, with the source's checkpoint, `source_rows`: the rows that the settings can use, those of the
extract examples that `align` takes a step with and of the transfer examples; with its base model's
checkpoint those of that one, too, for what training changed. From there on no source model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.artifacts import Artifact
from pkt_stages.errors import UserError, shown
from pkt_stages.options import Source, Stopwatch, Task, option, with_params
from pkt_stages.params import build

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How to choose."""

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


@dataclass(frozen=True)
class SelectParams(Rule):
    """Settings of the selection."""

    max_rate: float = option(0.1, "Share of the target's neurons to select; align takes any up to it.", gt=0, le=1)
    steps: int = option(
        4, "Rows are stored of the first so many extract examples: one per step of align, whose number is taken.", ge=1
    )
    random_neurons: bool = option(False, "Store as many random neurons' rows of every layer, too, for a control.")
    seed: int = option(0, "Seed of the random neurons that a control uses.")
    variants: dict[str, dict[str, str]] | None = option(
        None, "Further selections by name, each with what it changes of layer_rule, norm, coefficient, scores_of."
    )

    def rules(self) -> dict[str, Rule]:
        """The settings' own rule as `default`, and the variants.

        Raises:
            ValueError: a variant that is called `default`, or not like a name.
        """
        own = {field.name: getattr(self, field.name) for field in fields(Rule)}
        for name in self.variants or {}:
            if name == "default" or not name.isidentifier():
                raise ValueError(f"variants: {name!r} is no name for a variant; choose another")
        changed = {
            name: build(Rule, own | change, f"variants.{name}") for name, change in (self.variants or {}).items()
        }
        return {"default": build(Rule, own, "select"), **changed}

    def __post_init__(self) -> None:
        self.rules()


def run(source: Artifact, target: Artifact, rule: Rule, max_rate: float) -> dict[str, Tensor]:
    """Layer pairs and neurons from the attributions of both models on the same examples, see `artifacts.SELECTION`.

    Raises:
        UserError: the rate selects no neuron, or more than a model has; no extract examples for their mean.
    """
    import torch

    from pkt_stages.core.selection import num_selected, pair_layers, top_neurons

    sizes = {"ffn": target.meta["geometry"]["d_ff"], "attn": target.meta["geometry"]["d_model"]}
    extract = torch.tensor([example["set"] == "extract" for example in source.meta["examples"]])
    tensors = {}
    for sublayer, size in sizes.items():
        suffix = f".{rule.coefficient}" if sublayer == "attn" else ""
        layers, scores = {}, {}
        for side, artifact in (("source", source), ("target", target)):
            found = artifact[f"{sublayer}_scores.{rule.norm}{suffix}"]
            gain = artifact[f"{sublayer}_gain.{rule.norm}"]
            if rule.scores_of == "extract_mean":
                if not bool(extract.any()):
                    raise UserError(f"{artifact.path}: scores_of extract_mean needs extract examples (--extract)")
                found = found[extract].double().mean(0, keepdim=True).float().expand_as(found)
                gain = gain[extract].double().mean(0, keepdim=True).float().expand_as(gain)
            scores[side] = found
            layers[side] = found.double().sum(-1).float() if rule.layer_rule == "neuron_sum" else gain
        count = num_selected(max_rate, size)
        if count < 1:
            raise UserError(f"max_rate {max_rate} of {size} {sublayer} neurons selects none; raise it")
        pairs = pair_layers(layers["source"], layers["target"])
        tensors[f"{sublayer}_layers"] = pairs
        for index, side in enumerate(("source", "target")):
            try:
                tensors[f"{sublayer}_{side}_neurons"] = top_neurons(scores[side], pairs[..., index], count)
            except ValueError as error:
                raise UserError(f"{sublayer} at max_rate {max_rate}, the {side}: {error}; lower max_rate") from None
    return tensors


@with_params("select", SelectParams)
def select(
    params: SelectParams,
    source: Source,
    source_scores: Annotated[Path, typer.Option(help="The source's attribution.")],
    target_scores: Annotated[Path, typer.Option(help="The target's attribution, on the same examples.")],
    out: Annotated[Path, typer.Option(help="Folder for layer pairs and neurons, and the source's rows at them.")],
    base: Annotated[
        str | None, typer.Option(help="What the source's training began with: its rows are kept, too.")
    ] = None,
    task: Task = None,
) -> None:
    """Pair layers, choose neurons of source and target, and take the source's rows at them."""
    from pkt_stages.models.load import identity, is_same, load_config, resolve
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.selection import BASE_ROWS, INDICES, ROWS, extract_rows, random_neurons
    from pkt_stages.models.sites import check_same_shape, geometry

    watch = Stopwatch()
    paths = {"source": source_scores, "target": target_scores}
    found = {side: artifacts.load(path, artifacts.ATTRIBUTION) for side, path in paths.items()}
    if found["source"].meta["examples"] != found["target"].meta["examples"]:
        raise UserError(
            f"{source_scores} and {target_scores}: attributed on different examples; run `pkt attribute` on the same"
            " files"
        )
    ref = resolve(source)
    model, expected = identity(ref), found["source"].meta["model"]
    if not is_same(model, expected):
        raise UserError(
            f"{source}: not the model that {source_scores} was made from (expected {expected['name']} at"
            f" {expected['revision']}, found {model['name']} at {model['revision']}); run `pkt attribute` again"
        )
    sizes = geometry(load_config(ref))
    base_ref = resolve(base) if base is not None else None
    if base_ref is not None:
        check_same_shape(sizes, geometry(load_config(base_ref)), source, base_ref.location)
    _warn_if_narrower(found["source"].meta["geometry"], found["target"].meta["geometry"])
    _check_cuts(found["source"].meta, found["target"].meta)
    tensors: dict[str, Tensor] = {}
    for name, rule in params.rules().items():
        chosen = run(found["source"], found["target"], rule, params.max_rate)
        tensors |= {f"{name}.{key}": tensor for key, tensor in chosen.items()}
    counts = {s: tensors[f"default.{s}_source_neurons"].shape[2] for s in ("ffn", "attn")}
    drawn = counts if params.random_neurons else dict.fromkeys(counts, 0)
    tensors |= random_neurons(sizes, drawn, params.seed)
    sets = [example["set"] for example in found["source"].meta["examples"]]
    used = [n for n, name in enumerate(sets) if name == "transfer" or sets[:n].count("extract") < params.steps]
    rows = extract_rows(Checkpoint(ref), sizes, tensors, used)
    meta: dict[str, Any] = {
        side: {"model": artifact.meta["model"], "geometry": artifact.meta["geometry"]}
        for side, artifact in found.items()
    }
    meta |= {"examples": found["source"].meta["examples"], "params": asdict(params)}
    with artifacts.replaced_folder(out, INDICES) as folder:
        artifacts.save(folder / ROWS, artifacts.SOURCE_ROWS, rows, meta)
        if base_ref is not None:
            base_rows = extract_rows(Checkpoint(base_ref), sizes, tensors, used)
            artifacts.save(folder / BASE_ROWS, artifacts.SOURCE_ROWS, base_rows, meta | {"base": identity(base_ref)})
        artifacts.save(folder / INDICES, artifacts.SELECTION, tensors, meta)
    pairs = tensors["default.ffn_layers"].shape
    what = f"{pairs[1]} layer pairs, {counts['ffn']} FFN and {counts['attn']} attention neurons each"
    size = sum(tensor.numel() * tensor.element_size() for tensor in rows.values()) / 1e6
    watch.summary("select", f"{what}, {pairs[0]} examples, rows of {len(used)} ({size:,.1f} MB)", out)


def _check_cuts(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Say so if two tokenizers had the examples cut at different characters; UserError for two settings `cut`."""
    cuts = [meta["params"].get("cut", "token") for meta in (source, target)]  # older ones do not say
    if cuts[0] != cuts[1]:
        raise UserError(
            f"--source-scores is cut before the last {cuts[0]}, --target-scores before the last {cuts[1]};"
            " run `pkt attribute` with one --cut on both"
        )
    pairs = zip(source["examples"], source["predicted"], target["predicted"], strict=True)
    odd = [(example["id"], a, b) for example, a, b in pairs if a.strip() != b.strip()]
    if odd and cuts[0] == "token":
        typer.echo(
            f"warning: the tokenizers divide the last word of {len(odd)} of {len(source['examples'])} examples in"
            f" different ways (source and target predict {shown(odd[0][1])} and {shown(odd[0][2])} in {odd[0][0]});"
            " `pkt attribute --cut word` cuts both before that word",
            err=True,
        )


def _warn_if_narrower(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    narrower = [k for k in ("d_model", "d_ff", "num_layers") if source[k] < target[k]]
    if narrower:
        sizes = ", ".join(f"{k} {source[k]} < {target[k]}" for k in narrower)
        typer.echo(
            f"warning: the source is smaller than the target ({sizes}): LaTen can map it, Seeking cannot cut a"
            " sub-matrix from it; swap the two if that was not meant",
            err=True,
        )
