"""Where does a tensor come from, and is it whole? Prints an artifact's metadata, shapes, ranges and checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 100


def inspect(
    file: Annotated[Path, typer.Argument(help="An artifact of a stage (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for scripts.")] = False,
) -> None:
    """Show what an artifact is: kind, models with their revisions, params, tensors with shapes and ranges; check it."""
    found = run(file)
    typer.echo(json.dumps(found, indent=2, sort_keys=True) if as_json else "\n".join(lines(found)))
    if found["not_finite"]:
        raise UserError(f"{file}: tensor {found['not_finite'][0]} holds NaN or infinity; make the file again")


def run(file: Path) -> dict[str, Any]:
    """Everything about an artifact as JSON values.

    Raises:
        UserError: it is no artifact, or its tensors are not those of its kind.
    """
    opened = artifacts.load(file, artifacts.kind_of(file))
    tensors = {name: describe(opened[name]) for name in sorted(opened.shapes)}
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": artifacts.content_hash(file),
        "made_by": artifacts.KINDS[opened.meta["kind"]].made_by,
        "meta": dict(opened.meta),
        "tensors": tensors,
        "not_finite": [name for name, tensor in tensors.items() if not tensor["finite"]],
    }


def describe(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape, range, and whether all values are finite."""
    finite = bool(tensor.isfinite().all()) if tensor.is_floating_point() else True
    about: dict[str, Any] = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "finite": finite,
    }
    if tensor.numel() and finite:
        about |= {"min": tensor.min().item(), "max": tensor.max().item()}
    return about


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The same for reading."""
    meta = dict(found["meta"])
    kind, schema = meta.pop("kind"), meta.pop("schema_version")
    yield f"{found['file']}: {kind} artifact (schema {schema}), made by `{found['made_by']}`"
    yield f"  {found['bytes']:,} bytes, sha256 {found['sha256']}"
    for name, value in sorted(meta.items()):
        text = json.dumps(value, sort_keys=True)
        yield f"  {name}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}"
    yield f"  {len(found['tensors'])} tensors:"
    for name, tensor in found["tensors"].items():
        span = f"  {tensor['min']:.6g} .. {tensor['max']:.6g}" if "min" in tensor else ""
        yield f"    {name}  {tensor['dtype']} {tensor['shape']}{span}{'' if tensor['finite'] else '  NOT FINITE'}"
    yield "  content: " + ("NOT FINITE" if found["not_finite"] else "as its kind declares, all values finite")
