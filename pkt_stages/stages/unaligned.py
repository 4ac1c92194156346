"""What happens when the source's parameters are added without alignment? (paper section 3, appendix B.1; METHODS 6)

the source's sub-matrices, or its weights fitted by closed forms -> whole matrices added to the target: an adapter of
low rank, or a delta. Nothing is trained and no example is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.adapters import Adapter
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.load import ModelRef
    from pkt_stages.models.sites import Geometry

LOW_RANK, DELTA = "low_rank", "delta_0.safetensors"


@dataclass(frozen=True)
class UnalignedParams:
    """What to add."""

    approach: Literal["seeking", "grid"] = option("seeking", "Seeking's sub-matrices, or the grid of closed forms.")
    rank: int | None = option(16, "seeking: keep so many singular values (an adapter); None: the whole matrices.")
    layers: Literal["top", "bottom", "random"] = option("top", "grid: the source layers nearest the output, ...")
    width: Literal["pca", "whitening", "embedding"] = option("embedding", "grid: how rows are made narrower.")
    neurons: Literal["random", "importance"] = option("importance", "grid: which neurons, as many as the target has.")
    seed: int = option(0, "grid: seed of what is random.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")


@dataclass(frozen=True)
class Inputs:
    """What an approach may use; each refuses what it has no use for."""

    target: ModelRef
    source: ModelRef | None
    submatrices: Path | None


Made = tuple["Adapter | Mapping[str, SparseDelta]", dict[str, Any]]


def seeking(inputs: Inputs, params: UnalignedParams) -> Made:
    """Seeking's sub-matrices as they are: their best approximation of rank r (published code), or whole.

    Raises:
        UserError: no sub-matrices, those of another target, or a rank above a matrix's side.
    """
    import torch

    from pkt_stages.core.delta import low_rank_factors
    from pkt_stages.models.adapters import Adapter
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.load import identity, load_config
    from pkt_stages.models.sites import SITES, geometry, module_name

    if inputs.submatrices is None or inputs.source is not None:
        raise UserError("approach seeking takes --submatrices, and no --source")
    found = artifacts.load(inputs.submatrices, "submatrices")
    model = identity(inputs.target)
    if found.meta["target"]["model"] != model:
        raise UserError(f"{inputs.submatrices}: made for another target than {model['name']}; run `pkt seek` for it")
    meta = {"source": found.meta["source"], "target": found.meta["target"]}
    blocks = [name.split(".") for name in found.shapes if ".block." in name]
    if params.rank is not None:
        factors = {}
        for weight, _, layer in blocks:
            block = found[f"{weight}.block.{layer}"]
            try:
                pair = low_rank_factors(block.mT if weight == "embedding" else block, params.rank)
            except ValueError as error:
                raise UserError(f"{weight}: {error}") from None
            factors[module_name(weight, int(layer))] = pair
        return Adapter(factors, alpha=params.rank), meta
    others = {weight for weight, _, _ in blocks} - set(SITES)
    if others:
        raise UserError(f"rank none adds the four sites only, {inputs.submatrices} holds {min(others)}; give a rank")
    sizes = geometry(load_config(inputs.target))
    delta = {}
    for site in SITES:
        neurons = own_neurons(sizes, site)
        rows = [rows_of(found[f"{site}.block.{layer}"].float(), sizes, site) for layer in range(sizes.num_layers)]
        layers = torch.arange(sizes.num_layers)
        delta[site] = SparseDelta(layers, neurons.expand(sizes.num_layers, -1), torch.stack(rows))
    return delta, meta


def grid(inputs: Inputs, params: UnalignedParams) -> Made:
    """Whole source layers fitted into the target: which layers, how their rows get narrower, which neurons.

    The same neurons serve both sites of a module. Importance is the mean absolute weight over subkey and subvalue. PCA
    and whitening are fitted on all rows of a site's matrix in a layer and applied to the rows as they are, so that the
    mean is kept.

    Raises:
        UserError: no source, one that is smaller than the target, or vocabularies that differ (width embedding).
    """
    import torch

    from pkt_stages.core.reduction import embedding_transform, importance, pca, whitening
    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.load import identity, load_config
    from pkt_stages.models.rows import Checkpoint
    from pkt_stages.models.sites import MODULE_OF_SITE, SITES, geometry, module_name
    from pkt_stages.progress import track

    if inputs.source is None or inputs.submatrices is not None:
        raise UserError("approach grid takes --source, and no --submatrices")
    refs = {"source": inputs.source, "target": inputs.target}
    sizes = {side: geometry(load_config(ref)) for side, ref in refs.items()}
    checkpoints = {side: Checkpoint(ref) for side, ref in refs.items()}
    small = sizes["target"]
    generator = torch.Generator().manual_seed(params.seed)
    layers = source_layers(params.layers, sizes["source"].num_layers, small.num_layers, generator)
    if params.width == "embedding":
        name = f"{module_name('embedding', 0)}.weight"
        tables = {side: checkpoint.weight(name) for side, checkpoint in checkpoints.items()}
        if len(tables["source"]) != len(tables["target"]):
            counts = " and ".join(str(len(table)) for table in tables.values())
            raise UserError(f"width embedding needs one vocabulary, found {counts} tokens; use pca or whitening")
        transform = embedding_transform(tables["source"], tables["target"])
    rows: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for layer in track(layers, "source layers"):
        every = {
            site: checkpoints["source"]
            .neuron_rows(sizes["source"], layer, site, torch.arange(sizes["source"].num_neurons(site)))
            .float()
            for site in SITES
        }
        for module in ("ffn", "attn"):
            sites = [site for site in SITES if MODULE_OF_SITE[site] == module]
            have, count = sizes["source"].num_neurons(sites[0]), small.num_neurons(sites[0])
            if count > have:
                raise UserError(f"the source has {have} {module} neurons a layer, the target {count}; swap the two")
            if params.neurons == "random":
                order = torch.randperm(have, generator=generator)
            else:
                weight = sum(importance(every[site]) for site in sites)
                assert isinstance(weight, torch.Tensor)
                order = weight.sort(descending=True, stable=True).indices
            chosen = order[:count]
            for site in sites:
                try:
                    matrix = (
                        transform
                        if params.width == "embedding"
                        else {"pca": pca, "whitening": whitening}[params.width](every[site], small.d_model)
                    )
                except ValueError as error:
                    raise UserError(f"{site} of source layer {layer}: {error}") from None
                reduced = (every[site][chosen].double() @ matrix).float()
                rows[site].append(reduced[own_neurons(small, site)])
    places = torch.arange(small.num_layers)
    delta = {
        site: SparseDelta(places, own_neurons(small, site).expand(small.num_layers, -1), torch.stack(found))
        for site, found in rows.items()
    }
    meta: dict[str, Any] = {
        side: {"model": identity(ref), "geometry": asdict(sizes[side])} for side, ref in refs.items()
    }
    return delta, meta | {"layers": layers}


APPROACHES: dict[str, Callable[[Inputs, UnalignedParams], Made]] = {"seeking": seeking, "grid": grid}


def source_layers(rule: str, num_source: int, num_target: int, generator: Any) -> list[int]:
    """As many source layers as the target has, in depth order: the last, the first, or random ones.

    Raises:
        UserError: the source has fewer.
    """
    import torch

    if num_source < num_target:
        raise UserError(f"the source has {num_source} layers, the target {num_target}; swap the two")
    if rule == "top":
        return list(range(num_source - num_target, num_source))
    if rule == "bottom":
        return list(range(num_target))
    drawn: list[int] = torch.randperm(num_source, generator=generator)[:num_target].sort().values.tolist()
    return drawn


def own_neurons(sizes: Geometry, site: str) -> Tensor:
    """Neurons that stand for every weight row of a site once; under GQA the first of those that share a v row."""
    import torch

    every = torch.arange(sizes.num_neurons(site))
    rows, belongs = sizes.weight_index(site, every).unique(return_inverse=True)
    return torch.full_like(rows, len(every)).scatter_reduce(0, belongs, every, "amin")


def rows_of(weight: Tensor, sizes: Geometry, site: str) -> Tensor:
    """A stored weight as rows `[neuron, d_model]`, in the order of `own_neurons`."""
    from pkt_stages.models.sites import as_rows

    return as_rows(weight, site)[sizes.weight_index(site, own_neurons(sizes, site))]


@with_params("unaligned", UnalignedParams)
def unaligned(
    params: UnalignedParams,
    method: Annotated[str, typer.Option(help="The method's name: its part of `methods` in the params file.")],
    target: Annotated[str, typer.Option(help="The target's model folder or hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter or the delta.")],
    submatrices: Annotated[Path | None, typer.Option(help="From `pkt seek`, for approach seeking.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The source's model folder or hub name, for approach grid.")
    ] = None,
    source_revision: Annotated[str | None, typer.Option(help="The source's hub revision (commit hash).")] = None,
    revision: Annotated[str | None, typer.Option(help="The target's hub revision (commit hash).")] = None,
) -> None:
    """Turn the source's parameters into something to add to the target, without any training."""
    from pkt_stages.models.adapters import Adapter, save_adapter
    from pkt_stages.models.inject import delta_tensors
    from pkt_stages.models.load import identity, resolve

    watch = Stopwatch()
    ref = resolve(target, revision)
    inputs = Inputs(ref, resolve(source, source_revision) if source is not None else None, submatrices)
    check_out(out)
    made, meta = APPROACHES[params.approach](inputs, params)
    if isinstance(made, Adapter):
        save_adapter(out / LOW_RANK, made, base_model=str(identity(ref)["name"]))
        (out / DELTA).unlink(missing_ok=True)
        what = f"rank {made.rank} on {len(made.factors)} weights"
    else:
        artifacts.save(out / DELTA, "delta", delta_tensors(made), {**meta, "params": asdict(params)})
        if (out / LOW_RANK).exists():
            shutil.rmtree(out / LOW_RANK)
        what = f"whole matrices at {len(made)} sites"
    watch.summary("unaligned", f"{method}, {what}", out)


def check_out(out: Path) -> None:
    """Raise UserError if `out` holds anything but what this command writes; hidden files are of killed runs."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    others = [name for name in names if name not in (LOW_RANK, DELTA) and not name.startswith(".")]
    if others:
        raise UserError(f"{out}: holds {others[0]}, which is neither adapter nor delta; give a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder")
