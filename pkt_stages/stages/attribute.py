"""Which neurons of a model raise the answer's last useful token most? (paper A.2; METHODS section 2)

Model + examples -> `attribution`: scores [example, layer, neuron] and block gains [example, layer] in nats, for each
variant of lens norm and attention coefficient; the best neurons' top tokens through the lens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import Located, Template, locate
from pkt_stages.errors import UserError
from pkt_stages.examples import read_examples
from pkt_stages.options import Stopwatch, option, with_params
from pkt_stages.parallel import Group, joined
from pkt_stages.progress import track
from pkt_stages.scratch import Shards, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["rms", "reference_code"]
Coefficient = Literal["all_positions", "last_position"]


@dataclass(frozen=True)
class AttributeParams:
    """Settings of the attribution; every listed variant is stored, and `select` picks one."""

    norms: tuple[Norm, ...] = option(("rms",), "Norms of the logit lens to store: rms, reference_code.")
    coefficients: tuple[Coefficient, ...] = option(
        ("all_positions",), "Attention coefficients to store: all_positions, last_position."
    )
    template: Template = option("chat", "Prompt format: chat (the tokenizer's own), tulu, llama2 or none.")
    tolerance_nats: float = option(1e-6, "Largest error of a score by moments, nats; else the plain path.")
    num_top: int = option(10, "Best neurons per example and module whose lens tokens are stored.")
    num_lens_tokens: int = option(10, "Lens tokens stored for each of them.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "Weights' dtype; auto: the checkpoint's.")
    code_version: int = option(1, "Raised by the developers when the scores' meaning changes.")

    def __post_init__(self) -> None:
        if not self.norms or not self.coefficients:
            raise ValueError("norms and coefficients need at least one entry each")
        if len(set(self.norms)) < len(self.norms) or len(set(self.coefficients)) < len(self.coefficients):
            raise ValueError("norms and coefficients may not repeat an entry")
        if self.tolerance_nats < 0:
            raise ValueError(f"tolerance_nats must not be negative, found {self.tolerance_nats}")
        if self.num_top < 1 or self.num_lens_tokens < 1:
            raise ValueError("num_top and num_lens_tokens must be at least 1")


class Units(Protocol):
    """Finished parts of the work by name, each some tensors: a dict, or files that outlive a killed process."""

    def get(self, name: str) -> dict[str, Tensor] | None: ...

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None: ...


def run(
    model: Any, located: list[Located], params: AttributeParams, units: Units | None = None, group: Group | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Attribute on a loaded model: a forward pass per example, then layer by layer all examples at once.

    Args:
        units: examples and layers that are done already, and where to put the others.
        group: the processes that divide examples and layers; they share `units`.

    Returns:
        The tensors of an `attribution` artifact, and the share of pairs that took the plain path, per module.
    """
    import torch

    from pkt_stages.core import attribution as core
    from pkt_stages.models.capture import Captured, capture, lens
    from pkt_stages.models.sites import as_rows, geometry, weight_name

    units = {} if units is None else units
    group = group or Group()

    def kept(name: str) -> dict[str, Tensor]:
        found = units.get(name)
        assert found is not None, name
        return found

    for i in track(group.share(range(len(located))), "forward passes"):
        if units.get(f"example_{i}") is None:
            units[f"example_{i}"] = vars(capture(model, located[i].context))
    group.wait()
    sizes = geometry(model.config)
    unembedding, eps = lens(model)
    home = unembedding.device
    captured = [Captured(**{k: t.to(home) for k, t in kept(f"example_{i}").items()}) for i in range(len(located))]
    token = torch.tensor([item.predicted for item in located], device=home)
    centred = core.centred(unembedding)
    final = torch.stack([c.final for c in captured])
    # The norms differ only in the divisor, so they ride along as further examples.
    divisor = torch.cat([core.lens_divisor(final, eps, norm) for norm in params.norms])
    repeated = token.repeat(len(params.norms))

    def stacked(name: str, layer: int) -> Tensor:
        return torch.stack([getattr(c, name)[layer] for c in captured])

    def log_p(residual: Tensor) -> Tensor:
        return core.log_probabilities(unembedding, residual.repeat(len(params.norms), 1), divisor)

    kinds = {"all_positions": "attn_coefficients", "last_position": "attn_coefficients_last"}
    for layer in track(group.share(range(sizes.num_layers)), "layers"):
        if units.get(f"layer_{layer}") is not None:
            continue
        before = stacked("layer_input", layer)
        between = before + stacked("attn_output", layer)
        p_before, p_between = log_p(before), log_p(between)
        p_after = log_p(between + stacked("ffn_output", layer))
        made = {
            "attn_gain": core.block_gain(p_before, p_between, repeated),
            "ffn_gain": core.block_gain(p_between, p_after, repeated),
        }
        for module, site, base, names in (
            ("attn", "attn_o", p_before, [kinds[c] for c in params.coefficients]),
            ("ffn", "ffn_down", p_between, ["ffn_coefficients"]),
        ):
            rows = as_rows(model.get_parameter(weight_name(layer, site)), site)
            subvalues = rows.to(base.device).float().contiguous()
            c = torch.stack([stacked(name, layer).repeat(len(params.norms), 1) / divisor[:, None] for name in names])
            found = core.neuron_scores(subvalues, centred, base, c, repeated, tolerance=params.tolerance_nats)
            made[module] = found.values
            made[f"{module}_plain"] = torch.tensor([found.num_plain])
        units[f"layer_{layer}"] = {name: tensor.cpu() for name, tensor in made.items()}
    group.wait()
    if not group.is_first:
        return {}, {}

    layers = [kept(f"layer_{layer}") for layer in range(sizes.num_layers)]
    # [variant, norm * example, layer, neuron] -> one [example, layer, neuron] per variant.
    scores = {
        module: torch.stack([layer[module] for layer in layers], dim=2).unflatten(1, (len(params.norms), -1))
        for module in ("ffn", "attn")
    }
    tensors: dict[str, Tensor] = {"predicted_token": token}
    for n, norm in enumerate(params.norms):
        tensors[f"ffn_scores.{norm}"] = scores["ffn"][0, n]
        for c_index, coefficient in enumerate(params.coefficients):
            tensors[f"attn_scores.{norm}.{coefficient}"] = scores["attn"][c_index, n]
        for module in ("ffn", "attn"):
            gain = torch.stack([layer[f"{module}_gain"] for layer in layers], dim=1)
            tensors[f"{module}_gain.{norm}"] = gain.unflatten(0, (len(params.norms), -1))[n]
    for module, site, name in (
        ("ffn", "ffn_down", "ffn_coefficients"),
        ("attn", "attn_o", kinds[params.coefficients[0]]),
    ):
        values = scores[module][0, 0]
        count = min(params.num_top, values[0].numel())
        best = values.flatten(1).sort(descending=True, stable=True).indices[:, :count]
        where = torch.stack([best // values.shape[-1], best % values.shape[-1]], dim=-1)
        tensors[f"top_neurons.{module}"] = where
        tokens = []
        for example, pairs in enumerate(where.tolist()):
            vectors = torch.stack(
                [
                    as_rows(model.get_parameter(weight_name(layer, site)), site)[neuron].to(centred.device).float()
                    * getattr(captured[example], name)[layer, neuron]
                    for layer, neuron in pairs
                ]
            )
            tokens.append(core.lens_tokens(vectors, centred, min(params.num_lens_tokens, len(centred))))
        tensors[f"top_tokens.{module}"] = torch.stack(tokens)
    share = {m: sum(int(layer[f"{m}_plain"]) for layer in layers) / scores[m].numel() for m in ("ffn", "attn")}
    return tensors, share


@with_params("attribute", AttributeParams)
def attribute(
    params: AttributeParams,
    model: Annotated[str, typer.Option(help="Model folder or hub name (owner/name).")],
    examples: Annotated[list[Path], typer.Option(help="Examples in the messages format (.jsonl); may be repeated.")],
    out: Annotated[Path, typer.Option(help="Where to write the attribution (.safetensors).")],
    revision: Annotated[str | None, typer.Option(help="Hub revision (commit hash).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    scratch: Annotated[
        Path, typer.Option(help="Folder for finished examples and layers, to go on after a kill.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
) -> None:
    """Score every FFN and attention neuron of a model by how much it raises the answer's last token (nats).

    Several processes (torchrun) divide examples and layers, each with the whole model; the bytes are the same.
    """
    from dataclasses import asdict

    from pkt_stages.models.load import check_device, identity, load_config, load_model, load_tokenizer, resolve
    from pkt_stages.models.sites import geometry

    watch = Stopwatch()
    ref = resolve(model, revision)
    with joined() as group:
        device = group.device(device)
        check_device(device)
        config = load_config(ref)
        tokenizer = load_tokenizer(ref)
        sets = [(path.stem, example) for path in examples for example in read_examples(path)]
        limit = getattr(config, "max_position_embeddings", None) or 2**31
        located = [locate(tokenizer, example, template=params.template, max_length=limit) for _, example in sets]
        named = identity(ref)
        facts = [named, [vars(item) for item in located], asdict(params), device.split(":")[0]]
        shards = Shards(scratch, f"attribute-{fingerprint(facts, [])}")
        tensors, plain_share = run(load_model(ref, dtype=params.dtype, device=device), located, params, shards, group)
        group.wait()
        if not group.is_first:
            return
    meta = {
        "model": named,
        "geometry": asdict(geometry(config)),
        "examples": [{"set": name, "id": example.id} for name, example in sets],
        "predicted": [tokenizer.decode([item.predicted]) for item in located],
        "params": asdict(params),
        "plain_share": plain_share,
        "units": {"scores": "nats", "gain": "nats"},
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(f"{model}: {name} of example {sets[bad][1].id} is NaN or infinite; try --dtype float32")
    artifacts.save(out, "attribution", tensors, meta)
    shards.remove()
    sizes = geometry(config)
    neurons = sizes.num_layers * (sizes.d_ff + sizes.num_attn_neurons)
    watch.summary("attribute", f"{neurons:,} neurons on {len(located)} examples", out)
