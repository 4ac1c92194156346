"""Which neurons of a model raise the answer's last useful token most? (paper A.2; METHODS section 2)

Model + examples -> `attribution`: scores [example, layer, neuron] and a sublayer's gains [example, layer] in nats, for
each variant of lens norm and attention coefficient; the best neurons' top tokens through the lens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import Cut, Located, PromptParams, locate
from pkt_stages.errors import UserError
from pkt_stages.examples import check_ids, read_examples
from pkt_stages.options import SCRATCH, Device, DType, Model, Scratch, Stopwatch, option, with_params
from pkt_stages.parallel import Group, joined
from pkt_stages.progress import track
from pkt_stages.scratch import Shards, Units, fingerprint
from pkt_stages.templates import dated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttributeParams(PromptParams):
    """Settings of the attribution; every listed variant is stored, and `select` picks some."""

    norms: tuple[Literal["rms", "reference_code"], ...] = option(
        ("rms", "reference_code"), "Norms of the logit lens to store: rms, reference_code."
    )
    coefficients: tuple[Literal["all_positions", "last_position"], ...] = option(
        ("all_positions", "last_position"), "Attention coefficients to store: all_positions, last_position."
    )
    cut: Cut = option(
        "token",
        "Before what examples are cut: the last useful token (paper), or the last useful word, which is the same for"
        " models with different tokenizers.",
    )
    tolerance_nats: float = option(1e-6, "Largest error of a score by moments, nats; else the plain path.", ge=0)
    num_top: int = option(10, "Best neurons per example and sublayer whose lens tokens are stored.", ge=1)
    num_lens_tokens: int = option(10, "Lens tokens stored for each of them.", ge=1)
    dtype: DType = option("auto", "Weights' dtype; auto: the checkpoint's.")

    def __post_init__(self) -> None:
        if not self.norms or not self.coefficients:
            raise ValueError("norms and coefficients need at least one entry each")
        if len(set(self.norms)) < len(self.norms) or len(set(self.coefficients)) < len(self.coefficients):
            raise ValueError("norms and coefficients may not repeat an entry")


def run(
    model: Any, located: list[Located], params: AttributeParams, units: Units | None = None, group: Group | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Attribute on a loaded model: forward passes of a few examples, then layer by layer all examples at once.

    Args:
        units: examples and layers that are done already, and where to put the others.
        group: the processes that divide examples and layers; they share `units`.

    Returns:
        The tensors of an `attribution` artifact, and the share of pairs that took the plain path, per sublayer; nothing
        in a process that is not the group's first.
    """
    from pkt_stages.models.attribution import collected, on_lens, score_layer
    from pkt_stages.models.capture import batches, capture_all
    from pkt_stages.models.sites import geometry

    units = {} if units is None else units
    group = group or Group()

    def kept(name: str) -> dict[str, Tensor]:
        found = units.get(name)
        if found is None:
            raise UserError(f"scratch: {name} was removed or changed while this ran; run again")
        return found

    contexts = [item.context for item in located]
    for batch in track(group.share(batches(contexts)), "forward passes"):
        if any(units.get(f"example_{i}") is None for i in batch):
            for i, found in zip(batch, capture_all(model, [contexts[i] for i in batch]), strict=True):
                units[f"example_{i}"] = vars(found)
    group.wait()
    captured = [kept(f"example_{i}") for i in range(len(located))]
    predicted = [item.predicted for item in located]
    examples = on_lens(model, captured, predicted, params.norms, params.coefficients)
    num_layers = geometry(model.config).num_layers
    for layer in track(group.share(range(num_layers)), "layers"):
        if units.get(f"layer_{layer}") is None:
            units[f"layer_{layer}"] = score_layer(examples, layer, params.tolerance_nats)
    group.wait()
    if not group.is_first:
        return {}, {}
    layers = [kept(f"layer_{layer}") for layer in range(num_layers)]
    return collected(examples, layers, params.num_top, params.num_lens_tokens)


@with_params("attribute", AttributeParams)
def attribute(
    params: AttributeParams,
    model: Model,
    extract: Annotated[
        list[Path],
        typer.Option(
            "--extract", "--examples", help="Examples to locate neurons with, in the messages format (.jsonl)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the attribution (.safetensors).")],
    transfer: Annotated[Path | None, typer.Option(help="Examples that the final deltas are for.")] = None,
    device: Device = "cpu",
    scratch: Scratch = SCRATCH,
) -> None:
    """Score every FFN and attention neuron of a model by how much it raises the answer's last token (nats).

    Several processes (torchrun) divide examples and layers, each with the whole model; the bytes are the same.
    """
    from pkt_stages.models.load import check_device, identity, load_config, load_model, load_tokenizer, resolve
    from pkt_stages.models.sites import context_length, geometry

    watch = Stopwatch()
    ref = resolve(model)
    with joined() as group:
        device = group.device(device)
        check_device(device)
        config, tokenizer, named = load_config(ref), load_tokenizer(ref), identity(ref)
        if len(extract) > 1:  # as scripts may have it, from when a set was called by its file's name
            raise UserError(
                f"--extract {extract[1]}: a second file; give the examples that deltas are for as --transfer"
            )
        files = {"extract": extract[0]} | ({"transfer": transfer} if transfer is not None else {})
        read = {name: read_examples(path) for name, path in files.items()}
        check_ids({f"{name} {files[name]}": examples for name, examples in read.items()})
        sets = [(name, example) for name, examples in read.items() for example in examples]
        limit = context_length(config) or 2**31
        located = [
            locate(tokenizer, example, template=params.template, max_length=limit, cut=params.cut)
            for _, example in sets
        ]
        facts = [named, [vars(item) for item in located], asdict(params), device.split(":")[0]]
        shards = Shards(scratch, f"attribute-{fingerprint(facts, [])}")
        tensors, plain_share = run(load_model(ref, dtype=params.dtype, device=device), located, params, shards, group)
        group.wait()
        if not group.is_first:
            return
    for name, tensor in tensors.items():
        if not artifacts.is_finite(tensor):
            bad = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(f"{model}: {name} of example {sets[bad][1].id} is NaN or infinite; try --dtype float32")
    sizes = geometry(config)
    meta = {
        "model": named,
        "geometry": asdict(sizes),
        "examples": [{"set": name, "id": example.id} for name, example in sets],
        "predicted": [tokenizer.decode([item.predicted]) for item in located],
        "params": asdict(params),
        **dated(tokenizer, params.template),
        "plain_share": plain_share,
        "units": {"scores": "nats", "gain": "nats"},
    }
    artifacts.save(out, artifacts.ATTRIBUTION, tensors, meta)
    shards.remove()
    neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
    watch.summary("attribute", f"{neurons:,} neurons on {len(located)} examples", out)
