"""Do the delta's directions matter, or only its size? (METHODS section 6, controls)

Each delta of a folder -> a Gaussian delta of the same norm, per site and layer, at the same neurons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pkt_stages.models.inject import SparseDelta


@dataclass(frozen=True)
class ControlParams:
    """Settings of the random delta."""

    seed: int = option(0, "Seed of the random rows; every delta of a folder gets other ones.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")


def run(delta: Mapping[str, SparseDelta], generator: torch.Generator) -> dict[str, SparseDelta]:
    """A delta of the same shape: Gaussian rows, scaled to the norm that each site and layer has in `delta`."""
    import torch

    from pkt_stages.models.inject import SparseDelta

    made = {}
    for site, part in delta.items():
        random = torch.randn(part.rows.shape, generator=generator)
        scale = part.rows.double().norm(dim=(1, 2), keepdim=True) / random.double().norm(dim=(1, 2), keepdim=True)
        made[site] = SparseDelta(part.layers, part.neurons, (scale * random).float())
    return made


@with_params("control", ControlParams)
def control(
    params: ControlParams,
    delta: Annotated[Path, typer.Option(help="Folder of deltas, from `pkt inject`.")],
    out: Annotated[Path, typer.Option(help="Folder for as many random ones, under the same names.")],
    method: Annotated[str | None, typer.Option(help="Entry of `methods` in the params to use.")] = None,
) -> None:
    """Replace each delta by a random one of the same norm at the same neurons."""
    import torch

    from pkt_stages.models.inject import delta_tensors, load_delta

    watch = Stopwatch()
    files = sorted(delta.glob("delta_*.safetensors"))
    if not files:
        raise UserError(f"{delta}: a folder without delta_*.safetensors; make some with `pkt inject`")
    generator = torch.Generator().manual_seed(params.seed)
    found = {path.name: (run(load_delta(path), generator), artifacts.load(path, "delta").meta) for path in files}
    for name, (made, meta) in found.items():
        kept = {key: meta[key] for key in ("example", "source", "target") if key in meta}
        settings = {**meta.get("params", {}), "control": asdict(params)}
        artifacts.save(out / name, "delta", delta_tensors(made), {**kept, "params": settings})
    for path in out.glob("delta_*.safetensors"):
        if path.name not in found:
            path.unlink()
    watch.summary("control", f"{len(found)} random deltas", out)
