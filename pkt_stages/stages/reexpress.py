"""Does a method recover what is there for certain? A model written again in another shape, as a positive control.

A model of a supported architecture and a larger shape -> a model folder with the same logits (models/reexpression.py
says how). Made of the target's base and trained model, it is a source from which a transfer that works must recover
all of the target's own training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.models.sites import SHAPE
from pkt_stages.options import DType, Model, Stopwatch, option, with_params

if TYPE_CHECKING:
    from torch import Tensor

    from pkt_stages.models.folding import Folded
    from pkt_stages.models.reexpression import Reexpression
    from pkt_stages.models.sites import Geometry

MARK = "reexpression.json"  # what a folder of this command holds beside the model
SHARD_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class ReexpressParams:
    """The new shape and what is random in it. A size that is not given is that of --like, or the model's own."""

    num_layers: int | None = option(None, "Layers.", ge=1)
    d_model: int | None = option(None, "Width of the residual stream.", ge=1)
    d_ff: int | None = option(None, "FFN neurons a layer.", ge=1)
    num_heads: int | None = option(None, "Attention heads.", ge=1)
    num_kv_heads: int | None = option(None, "Key/value heads.", ge=1)
    permute: bool = option(True, "Neurons, heads and layers go to random places; else they stay in front.")
    rotate: bool = option(True, "Random bases of the residual stream and inside heads; else only padded.")
    filler: Literal["zero", "random"] = option("random", "What reads in filler neurons, heads and layers.")
    dtype: DType = option("auto", "Dtype of the weights; auto: stored. 16 bits round what is rotated.")
    seed: int = option(0, "Seed of all random choices; base and trained model must share it.")


def run(model: Folded, params: ReexpressParams, like: Any) -> Reexpression:
    """How the model is written again.

    Args:
        like: sizes to take where the params give none.

    Raises:
        UserError: as `reexpression`.
    """
    from pkt_stages.models.reexpression import reexpression

    new = new_sizes(params, model.sizes, like)
    return reexpression(
        model.sizes, new, permute=params.permute, rotate=params.rotate, filler=params.filler, seed=params.seed
    )


def new_sizes(params: ReexpressParams, own: Geometry, like: Geometry) -> Geometry:
    """The new shape: the params', else that of `like`; the vocabulary stays."""
    given = {name: value for name in SHAPE if (value := getattr(params, name)) is not None}
    shape = {name: getattr(like, name) for name in (*SHAPE, "d_head")} | given
    return replace(own, **shape)


@with_params("reexpress", ReexpressParams)
def reexpress(
    params: ReexpressParams,
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder, for the model.")],
    like: Annotated[str | None, typer.Option(help="Model whose shape to take: folder or hub name.")] = None,
) -> None:
    """A positive control: write a model again in a larger shape, with the same logits, as a source with a known answer.

    Made of the target's base model and of its trained one (with one seed), the pair is a source from which a method
    that moves what training added must recover all of it; what recovers nothing there says nothing elsewhere. The shape
    may be larger in layers, width, FFN width and heads; head width and vocabulary stay. Works weight by weight: memory
    is that of two shards of 2 GiB and a few copies of the largest weight in float64, whatever the model's size.
    """
    from pkt_stages.models.folding import Folded
    from pkt_stages.models.load import identity, load_config, resolve, save_beside
    from pkt_stages.models.reexpression import check_family, new_config, weights
    from pkt_stages.models.sites import geometry

    watch = Stopwatch()
    artifacts.check_replaceable(out, MARK)
    ref = resolve(model)
    check_family(load_config(ref))
    folded = Folded(ref)
    sizes = geometry(load_config(resolve(like))) if like is not None else folded.sizes
    how = run(folded, params, sizes)
    dtype = params.dtype if params.dtype != "auto" else str(folded.checkpoint.dtype).removeprefix("torch.")
    config = new_config(folded.config, how, folded.tied)
    config.dtype = dtype
    with artifacts.replaced_folder(out, MARK) as folder:
        num_bytes = write_weights(folder, weights(folded, how), dtype)
        config.save_pretrained(folder)
        save_beside(ref, folder)
        artifacts.write_json(folder / MARK, {"of": identity(ref), "params": asdict(params), "sizes": asdict(how.new)})
    shown = f"{how.new.num_layers} x {how.new.d_model}, FFN {how.new.d_ff}, {how.new.num_heads} heads"
    watch.summary("reexpress", f"{Path(ref.location).name} as {shown}, {num_bytes / 1e6:,.1f} MB", out)


def write_weights(folder: Path, named: Iterator[tuple[str, Tensor]], dtype: str) -> int:
    """Write weights as a safetensors checkpoint, in shards if it is large; returns their bytes.

    Raises:
        UserError: a weight is not finite in this dtype.
    """
    import torch
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            shards.append(list(pending))
            save_file(pending, folder / f"{len(shards):05d}.safetensors", metadata={"format": "pt"})
            pending.clear()

    for name, weight in named:
        made = weight.to(getattr(torch, dtype)).contiguous()
        if not artifacts.is_finite(made):
            raise UserError(f"weight {name} is not finite in {dtype}; choose a wider dtype (--dtype float32)")
        size = made.numel() * made.element_size()
        if sum(w.numel() * w.element_size() for w in pending.values()) + size > SHARD_BYTES:
            flush()
        pending[name] = made
        total += size
    flush()
    if len(shards) == 1:
        (folder / "00001.safetensors").rename(folder / "model.safetensors")
        return total
    files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for number, file in enumerate(files):
        (folder / f"{number + 1:05d}.safetensors").rename(folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    artifacts.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total
