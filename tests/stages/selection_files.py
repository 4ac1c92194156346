"""A selection and source rows between two small models, with neurons drawn at random instead of attributed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pkt_stages import artifacts
from pkt_stages.models.load import identity, load_config, resolve
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.selection import BASE_ROWS, INDICES, ROWS, extract_rows
from pkt_stages.models.sites import Geometry, geometry
from tests.conftest import write_examples

NUM_EXTRACT, NUM_TRANSFER = 3, 2


def write_selection(
    folder: Path,
    source: Path,
    target: Path,
    selection: Mapping[str, Tensor] | None = None,
    *,
    examples: list[dict[str, str]] | None = None,
    max_rate: float = 0.25,
    base: Path | None = None,
) -> Path:
    """Write the folder of `pkt select`; a random selection over all target layers if none is given.

    Args:
        base: the source's base model, whose rows are kept, too.
    """
    refs = {side: resolve(str(model)) for side, model in (("source", source), ("target", target))}
    sizes = {side: geometry(load_config(ref)) for side, ref in refs.items()}
    if examples is None:
        examples = [{"set": "extract", "id": f"toy_{i}"} for i in range(NUM_EXTRACT)]
        examples += [{"set": "transfer", "id": f"toy_{10 + i}"} for i in range(NUM_TRANSFER)]
    if selection is None:
        selection = random_selection(sizes["source"], sizes["target"], len(examples), max_rate)
    selection = {f"default.{name}": tensor for name, tensor in selection.items() if "random" not in name}
    selection |= random_neurons(sizes["source"], selection)
    meta = {side: {"model": identity(ref), "geometry": asdict(sizes[side])} for side, ref in refs.items()}
    meta |= {"examples": examples, "params": {"max_rate": max_rate, "steps": NUM_EXTRACT}}
    artifacts.save(folder / INDICES, artifacts.SELECTION, selection, meta)
    rows = extract_rows(Checkpoint(refs["source"]), sizes["source"], selection, range(len(examples)))
    artifacts.save(folder / ROWS, artifacts.SOURCE_ROWS, rows, meta)
    if base is not None:
        rows = extract_rows(Checkpoint(resolve(str(base))), sizes["source"], selection, range(len(examples)))
        artifacts.save(folder / BASE_ROWS, artifacts.SOURCE_ROWS, rows, meta)
    return folder


def random_selection(source: Geometry, target: Geometry, num_examples: int, max_rate: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (num_examples, target.num_layers)
    sizes = {
        "ffn": (source.d_ff, target.d_ff, int(max_rate * target.d_ff)),
        "attn": (source.num_attn_neurons, target.num_attn_neurons, int(max_rate * target.d_model)),
    }
    found = {}
    for sublayer, (from_size, to_size, k) in sizes.items():
        chosen = [
            torch.randperm(source.num_layers, generator=generator)[: shape[1]].sort().values for _ in range(shape[0])
        ]
        found[f"{sublayer}_layers"] = torch.stack([torch.stack(chosen), torch.arange(shape[1]).expand(shape)], dim=-1)
        for side, size in (("source", from_size), ("target", to_size)):
            order = torch.rand(*shape, size, generator=generator).argsort(-1)
            found[f"{sublayer}_{side}_neurons"] = order[..., :k]
    return found


def random_neurons(source: Geometry, selection: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many neurons of every source layer as a layer pair has, for the control."""
    generator = torch.Generator().manual_seed(8)
    found = {}
    for sublayer, size in (("ffn", source.d_ff), ("attn", source.num_attn_neurons)):
        k = selection[f"default.{sublayer}_source_neurons"].shape[-1]
        layers = [torch.randperm(size, generator=generator)[:k] for _ in range(source.num_layers)]
        found[f"{sublayer}_random_neurons"] = torch.stack(layers)
    return found


def write_inputs(folder: Path, source: Path, target: Path) -> dict[str, Path]:
    """Selection, and the extract and align examples that go with it."""
    paths = {"selection": write_selection(folder / "selection", source, target)}
    paths["extract"] = write_examples(folder / "extract.jsonl", ["It is 1.", "It is 2.", "It is 3."])
    answers = [f"The answer is {i}{' of course' * (i % 3)}." for i in range(12)]
    paths["align"] = write_examples(folder / "align.jsonl", answers, start=100)
    return paths


def options(**paths: Path) -> list[str]:
    return [text for name, path in paths.items() for text in (f"--{name.replace('_', '-')}", str(path))]
