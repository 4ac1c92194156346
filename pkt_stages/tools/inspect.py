"""Where does a tensor come from, and is it whole? Prints what a stage made: metadata, stage, shapes, ranges, checks.

An artifact says itself which models and params it is of, a row of the table in its list of changes. A single adapter in
PEFT's format, another folder or a page cannot: for these the stage in dvc.lock says it, and whether this is still the
file that the stage made. Of a model's folder: what its config and its files say; the weights are not read but to hash.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError, printable
from pkt_stages.hub import POINTER
from pkt_stages.tools.provenance import Origin, origin

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 120
KINDS = [kind for kind in vars(artifacts).values() if isinstance(kind, artifacts.Kind)]
FIRST = 3  # of a long list
MODEL = "config.json"


def inspect(
    file: Annotated[Path, typer.Argument(help="An artifact (.safetensors), a row, an adapter, or a model's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for scripts.")] = False,
) -> None:
    """Show what it is: kind, stage, models, revisions, params, changes or tensors with shapes and ranges; check it."""
    found = run(file)
    typer.echo(json.dumps(found, indent=2, sort_keys=True) if as_json else "\n".join(map(printable, lines(found))))
    if bad := [name for name, tensor in found.get("tensors", {}).items() if not tensor["finite"]]:
        raise UserError(f"{file}: tensor {bad[0]} holds NaN or infinity; make the file again")


def run(file: Path) -> dict[str, Any]:
    """Everything about a file or folder as JSON values.

    Raises:
        UserError: it is not here, it is no artifact, row, adapter or model and no stage has made it, or its tensors
            are not those of its kind.
    """
    from pkt_stages.models import adapters, changes

    if file.name in (adapters.CONFIG, adapters.WEIGHTS) and adapters.is_adapter(file.parent):
        file = file.parent
    if file.name == changes.LIST:
        file = file.parent
    stage = origin(file)
    if stage is not None and not file.exists():
        raise UserError(f"{file}: not here; fetch it with: dvc pull {stage.stage}")
    if (file / changes.LIST).is_file():
        return about(file, stage) | row(file)
    if adapters.is_adapter(file):
        return about(file, stage) | adapter(file, stage)
    if (file / MODEL).is_file() or (file / POINTER).is_file():
        return about(file, stage) | model(file, stage)
    if stage is None and file.exists() and (file.is_dir() or file.suffix != ".safetensors"):
        raise UserError(
            f"{file}: expected an artifact (.safetensors), the folder of a row, a LoRA adapter or a model, or what a"
            " stage in dvc.lock made"
        )
    if stage is None or file.suffix == ".safetensors":
        return about(file, stage) | artifact(file)
    inside = sorted(p.relative_to(file).as_posix() for p in file.rglob("*") if p.is_file()) if file.is_dir() else []
    return about(file, stage) | {
        "what": "folder" if file.is_dir() else "file",
        "made_by": stage.command,
        "files": inside,
    }


def about(file: Path, stage: Origin | None) -> dict[str, Any]:
    """What every kind of file has: a name, a size, and the stage in dvc.lock."""
    found: dict[str, Any] = {"file": file.name}
    if file.is_file():
        found |= {"bytes": file.stat().st_size, "sha256": artifacts.content_hash(file)}
    if stage is not None:
        found["stage"] = {"name": stage.stage, "is_current": stage.is_current}
        # What says nothing about itself is explained by its stage.
        if file.is_dir() or file.suffix != ".safetensors":
            found["stage"] |= {"params": dict(stage.params), "inputs": dict(stage.inputs)}
    return found


def artifact(file: Path) -> dict[str, Any]:
    kind = artifacts.kind_of(file, KINDS)
    opened = artifacts.load(file, kind)
    meta = dict(opened.meta)
    return {
        "what": f"{kind.name} artifact",
        "made_by": f"pkt {meta['command']}" if "command" in meta else kind.made_by,
        "meta": meta,
        "tensors": {name: describe(opened[name]) for name in sorted(opened.shapes)},
    }


def row(folder: Path) -> dict[str, Any]:
    """A row of the table: what made it, and its changes."""
    from pkt_stages.models.changes import read_changes

    opened = read_changes(folder)
    count = len(opened.items)
    return {
        "what": f"row of the table with {count} change{'s' if count > 1 else ''}",
        "made_by": f"pkt {opened.meta['command']}",
        "meta": dict(opened.meta),
        "changes": [
            {"label": label, "kind": stored.kind, "file": stored.path.name, **stored.facts}
            for label, stored in opened.items.items()
        ],
    }


def adapter(folder: Path, stage: Origin | None) -> dict[str, Any]:
    from pkt_stages.models import adapters, changes

    made = changes.read_changes(folder.parent).meta if (folder.parent / changes.LIST).is_file() else {}
    opened = adapters.load_adapter(folder)
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    weights = folder / adapters.WEIGHTS
    return {
        "what": "LoRA adapter (PEFT)",
        "made_by": f"pkt {made['command']}" if made else stage.command if stage else None,
        "bytes": weights.stat().st_size,
        "sha256": artifacts.content_hash(weights),
        "meta": {"target": config.get("base_model_name_or_path"), **made, "rank": opened.rank, "alpha": opened.alpha},
        "tensors": {
            f"{module}.{letter}": describe(factor)
            for module, pair in sorted(opened.factors.items())
            for letter, factor in zip("AB", pair, strict=True)
        },
    }


def model(folder: Path, stage: Origin | None) -> dict[str, Any]:
    """A model: what its config, its tokenizer and the headers of its files say.

    Raises:
        UserError: as `Checkpoint` and `load_tokenizer`.
    """
    from pkt_stages.models.load import identity, load_tokenizer, resolve
    from pkt_stages.models.rows import Checkpoint, weight_files
    from pkt_stages.models.sites import SITES, context_length, geometry

    ref = resolve(str(folder))
    checkpoint, tokenizer = Checkpoint(ref), load_tokenizer(ref)
    config, sizes = checkpoint.config, geometry(checkpoint.config)
    shapes = {name: list(weight.get_shape()) for name, weight in checkpoint.weights.items()}
    sites = {
        site: f"{sizes.num_neurons(site)} neurons a layer in {checkpoint.family.weight(site, 0)}" for site in SITES
    }
    specials = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad")}
    return {
        "what": f"model of architecture {config.model_type}",
        "made_by": stage.command if stage else None,
        "meta": {
            "identity": identity(ref),
            "parameters": sum(math.prod(shape) for shape in shapes.values()),
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "sizes": asdict(sizes) | {"context": context_length(config)},
            "sites": sites,
            "ties": "embedding and head are one weight" if checkpoint.tied else "embedding and head are two weights",
            "tokenizer": {
                "class": type(tokenizer).__name__,
                "tokens": len(tokenizer),
                "chat_template": tokenizer.chat_template is not None,
                **specials,
            },
            "weight_files": [path.name for path in weight_files(ref)],
        },
        "shapes": dict(sorted(shapes.items())),
    }


def layers_together(shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Weights with their shapes, a line for those that differ in the layer alone."""
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, shape in shapes.items():
        number = re.search(r"\.(\d+)\.", name)
        plain = name if number is None else name.replace(number[0], ".{}.", 1)
        found.setdefault((plain, tuple(shape)), []).extend([int(number[1])] if number is not None else [])
    for (name, shape), layers in found.items():
        numbers = sorted(layers)
        whole = numbers == list(range(len(numbers)))
        span = f"0..{len(numbers) - 1}" if whole and len(numbers) > 1 else ",".join(map(str, numbers))
        yield f"{name.format(f'{{{span}}}' if len(numbers) > 1 else span)}  {list(shape)}"


def describe(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape, range, and whether all values are finite."""
    finite = artifacts.is_finite(tensor)
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
    meta = dict(found.get("meta", {}))
    kind, schema = meta.pop("kind", None), meta.pop("schema_version", None)
    version = f" (schema {schema})" if kind else ""
    by = f", made by `{found['made_by']}`" if found["made_by"] else "" if "shapes" in found else ", made by ?"
    yield f"{found['file']}: {found['what']}{version}{by}"
    if "bytes" in found:
        yield f"  {found['bytes']:,} bytes, sha256 {found['sha256']}"
    stage = found.get("stage")
    if stage is not None:
        yield f"  stage: {stage['name']}"
    elif kind is None and "params" not in meta and "shapes" not in found:
        yield "  stage: unknown, no dvc.lock around it names this; an adapter itself holds no revision and no params"
    for name, value in flat(meta):
        yield from wrapped(name, value)
    if stage is not None:
        for name, value in flat({"params": stage.get("params", {})}):
            yield from wrapped(name, value)
        yield from (f"  input: {name}, md5 {md5}" for name, md5 in sorted(stage.get("inputs", {}).items()))
    if found.get("files"):
        yield f"  {len(found['files'])} files, to be inspected one by one:"
        yield from (f"    {name}" for name in found["files"])
    if found.get("changes"):
        yield "  changes, to be inspected one by one:"
    for change in found.get("changes", ()):
        told = {key: value for key, value in change.items() if key != "label"}
        for name, value in flat({change["label"]: told}):
            yield from (f"  {line}" for line in wrapped(name, value))
    tensors = found.get("tensors", {})
    if tensors:
        yield f"  {len(tensors)} tensors:"
    for name, tensor in tensors.items():
        span = f"  {tensor['min']:.6g} .. {tensor['max']:.6g}" if "min" in tensor else ""
        yield f"    {name}  {tensor['dtype']} {tensor['shape']}{span}{'' if tensor['finite'] else '  NOT FINITE'}"
    if found.get("shapes"):
        yield f"  {len(found['shapes'])} weights:"
        yield from (f"    {line}" for line in layers_together(found["shapes"]))
    said = ["all that it names is there"] if found.get("changes") else []
    if found.get("shapes"):
        said.append("names and shapes are those of its config.json; values were not looked at")
    if tensors:
        finite = all(tensor["finite"] for tensor in tensors.values())
        said.append("as its kind declares, all values finite" if finite else "NOT FINITE")
    if stage is not None and stage["is_current"]:
        said.append("the bytes that its stage in dvc.lock made")
    elif stage is not None:
        said.append(
            f"NOT what dvc.lock names: older, edited or only partly here; `dvc pull {stage['name']}` fetches that"
        )
    yield f"  content: {'; '.join(said)}"


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as lines `name.below: key value, key value`, those with a model's revision first."""
    for name, value in sorted(values.items(), key=lambda item: ("revision" not in json.dumps(item[1]), item[0])):
        if not isinstance(value, dict):
            yield above + name, shown(value)
            continue
        plain = {key: v for key, v in value.items() if not isinstance(v, dict)}
        if plain:
            yield above + name, ", ".join(f"{key} {shown(v)}" for key, v in sorted(plain.items()))
        yield from flat({key: v for key, v in value.items() if key not in plain}, f"{above}{name}.")


def shown(value: Any) -> str:
    """A value as JSON; of a long list its length and the first ones."""
    if isinstance(value, list) and len(value) > 2 * FIRST:
        return f"{len(value)}: {', '.join(shown(v) for v in value[:FIRST])}, ..."
    if isinstance(value, str):
        return value if value.isprintable() and value.strip() == value != "" else json.dumps(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def wrapped(name: str, value: str) -> list[str]:
    return textwrap.wrap(
        f"{name}: {value}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )
