"""Every architecture against float64 loops that know nothing of the package's table: what neurons add and score, what
an injection does, what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pkt_stages.encoding import Encoded, Located
from pkt_stages.errors import UserError
from pkt_stages.models import lora
from pkt_stages.models.adapters import load_adapter, save_adapter
from pkt_stages.models.capture import capture, capture_all
from pkt_stages.models.inject import SparseDelta, injected
from pkt_stages.models.load import ModelRef, load_model
from pkt_stages.models.merge import merge, merged
from pkt_stages.models.rows import Checkpoint
from pkt_stages.models.sites import SITES, geometry
from pkt_stages.stages.attribute import AttributeParams, run
from tests.conftest import save_tokenizer
from tests.families import CASES, Case, make, save

CONTEXTS = [[0, 50, 60, 70, 80, 90, 61], [0, 9, 8, 7], [0, 200, 100, 150, 40, 50, 60, 70, 80]]
PREDICTED = [77, 12, 200]


def seen(model: Any, case: Case, context: list[int]) -> dict[str, list[Tensor]]:
    """By name and layer what stock modules take and give at the last position, float64."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Any) -> None:
        found.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value)[0, -1])

    handles = []
    base = getattr(model, case.base)
    for layer in base.layers:
        attn, ffn = getattr(layer, case.attn), getattr(layer, case.ffn)
        for name, module in (("stream", layer), ("a", getattr(attn, case.o)), ("c", getattr(ffn, case.down))):
            handles.append(module.register_forward_pre_hook(lambda _m, given, name=name: keep(name, given)))
        for name, module in (("attn", attn), ("ffn", ffn)):
            handles.append(module.register_forward_hook(lambda _m, _i, given, name=name: keep(name, given)))
    handles.append(getattr(base, case.norm).register_forward_pre_hook(lambda _m, given: keep("stream", given)))
    with torch.no_grad():
        found["logits"] = [model(torch.tensor([context])).logits[0, -1]]
    for handle in handles:
        handle.remove()
    return found


def added(model: Any, case: Case, kept: dict[str, list[Tensor]], layer: int, sublayer: str) -> tuple[Tensor, Tensor]:
    """What every neuron of a block adds to the stream [neuron, d], and what its bias does [d]: the formula."""
    config, module = model.config, getattr(model, case.base).layers[layer]
    block = getattr(module, case.attn if sublayer == "attn" else case.ffn)
    linear = getattr(block, case.o if sublayer == "attn" else case.down)
    coefficients = kept["a" if sublayer == "attn" else "c"][layer]
    rows = torch.stack([coefficients[n] * linear.weight[:, n] for n in range(len(coefficients))])
    bias = linear.bias if linear.bias is not None else torch.zeros_like(rows[0])
    if case.behind is not None:
        norm = getattr(module, case.behind[0 if sublayer == "attn" else 1])
        output = kept[sublayer][layer]
        factor = (case.offset + norm.weight) / (output.square().mean() + config.rms_norm_eps).sqrt()
        rows, bias = rows * factor, bias * factor
    multiplier = getattr(config, "residual_multiplier", 1.0)
    return rows * multiplier, bias * multiplier


def lens_of(model: Any, case: Case, final: Tensor, x: Tensor) -> Tensor:
    """log p of x [.., d] through the final norm, whose size is that of `final`, and the head."""
    config, norm = model.config, getattr(getattr(model, case.base), case.norm)
    if hasattr(norm, "bias"):
        size = (final.var(unbiased=False) + config.layer_norm_eps).sqrt()
        normed = (x - x.mean(-1, keepdim=True)) / size * norm.weight + norm.bias
    else:
        normed = x / (final.square().mean() + config.rms_norm_eps).sqrt() * (case.offset + norm.weight)
    logits = normed @ model.get_output_embeddings().weight.mT / getattr(config, "logits_scaling", 1.0)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * (logits / cap).tanh()
    return logits.log_softmax(-1)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_scores_and_gains(case: Case) -> None:
    """Neurons add up to the stream, the lens at the end is the model's own distribution, and every score is the
    definition's to 1e-5 nats, of contexts that ran in one padded batch."""
    model = make(case)
    located = [Located(context, token) for context, token in zip(CONTEXTS, PREDICTED, strict=True)]
    params = AttributeParams(norms=("rms",))
    found, plain = run(model, located, params)
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        assert plain == {"ffn": 1.0, "attn": 1.0}
    exact = make(case).double()
    exact.set_attn_implementation("eager")  # torch's own knows no softcap
    parallel = getattr(model.config, "use_parallel_residual", False)
    with torch.no_grad():
        for i, (context, w) in enumerate(zip(CONTEXTS, PREDICTED, strict=True)):
            kept = seen(exact, case, context)
            stream = kept["stream"]
            assert len(stream) == 3
            final = lens_of(exact, case, stream[-1], stream[-1])
            assert torch.allclose(final, kept["logits"][0].log_softmax(-1), atol=1e-6)
            for layer in range(2):
                h, wholes = stream[layer], {}
                for sublayer in ("attn", "ffn"):
                    rows, bias = added(exact, case, kept, layer, sublayer)
                    wholes[sublayer] = rows.sum(0) + bias
                    base = lens_of(exact, case, stream[-1], h)[w]
                    name = "ffn_scores.rms" if sublayer == "ffn" else "attn_scores.rms.all_positions"
                    expected = lens_of(exact, case, stream[-1], h + rows)[:, w] - base
                    assert torch.allclose(found[name][i, layer].double(), expected, atol=1e-5), (sublayer, layer)
                    gain = lens_of(exact, case, stream[-1], h + wholes[sublayer])[w] - base
                    assert abs(float(found[f"{sublayer}_gain.rms"][i, layer]) - float(gain)) < 1e-5
                    h = h if parallel else h + wholes[sublayer]
                assert torch.allclose(stream[layer] + wholes["attn"] + wholes["ffn"], stream[layer + 1], atol=1e-6)


def test_last_position(case: Case) -> None:
    """Of a context of one token both kinds of coefficient are one; of a longer one the position's own value times its
    attention to itself is left of the head's output, so that the rest is the other positions' attention."""
    model = make(case)
    kept = capture(model, [77])
    assert torch.allclose(kept.attn_coefficients, kept.attn_coefficients_last, atol=1e-6)
    longer = capture_all(model, [[0, 77, 78], [0, 77]])
    assert not torch.allclose(longer[0].attn_coefficients, longer[0].attn_coefficients_last, atol=1e-3)


def test_checkpoints_in_16_bits(case: Case, tmp_path: Path) -> None:
    """A stored model, in shards, is loaded as transformers loads it."""
    from transformers import AutoModelForCausalLM

    folder = save(case, tmp_path / "m", dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    ours, theirs = load_model(ModelRef(str(folder))), AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.bfloat16
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """Pythia's have masks and frequencies among their weights; anything else that the model lacks is refused."""
    folder = save(CASES["neox"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in weights  # as transformers writes it
    before = logits_of(load_model(ModelRef(str(folder))))
    for name, buffer in (("bias", torch.ones(1, 1, 4, 4).bool()), ("masked_bias", torch.tensor(-1e9))):
        weights[f"gpt_neox.layers.1.attention.{name}"] = buffer
    weights["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(load_model(ModelRef(str(folder)))), before)
    weights["gpt_neox.layers.1.attention.mask"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has gpt_neox\.layers\.1\.attention\.mask too many"):
        load_model(ModelRef(str(folder)))


def stored_rows(model: Any, case: Case, site: str, neuron: int) -> Tensor:
    """A view of what layer 1 stores of a neuron at a site, [d_model]."""
    config, layer = model.config, getattr(model, case.base).layers[1]
    attn, ffn = getattr(layer, case.attn), getattr(layer, case.ffn)
    if site == "ffn_down":
        return getattr(ffn, case.down).weight[:, neuron]
    if site == "attn_o":
        return getattr(attn, case.o).weight[:, neuron]
    if site == "ffn_up":
        if case.kind == "phi3":
            return ffn.gate_up_proj.weight[config.intermediate_size + neuron]
        return (ffn.dense_h_to_4h if case.kind == "gpt_neox" else ffn.up_proj).weight[neuron]
    num_heads, num_kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    d_head = getattr(attn, "head_dim", None) or attn.head_size
    head, inside = divmod(neuron, d_head)
    if case.kind == "gpt_neox":
        return attn.query_key_value.weight.view(num_heads, 3, d_head, -1)[head, 2, inside]
    row = head // (num_heads // num_kv) * d_head + inside
    return attn.qkv_proj.weight[(num_heads + num_kv) * d_head + row] if case.kind == "phi3" else attn.v_proj.weight[row]


def delta_of(model: Any) -> dict[str, SparseDelta]:
    """Random rows at some neurons of layer 1, among them the same entry of all heads."""
    sizes, found = geometry(model.config), {}
    for number, site in enumerate(SITES):
        generator = torch.Generator().manual_seed(number)
        every = torch.arange(3, sizes.num_neurons(site), sizes.d_head if site.startswith("attn") else 7)
        neurons = torch.cat([every, torch.tensor([0])])[None]
        rows = torch.randn(1, neurons.shape[1], sizes.d_model, generator=generator)
        found[site] = SparseDelta(torch.tensor([1]), neurons, 0.1 * rows)
    return found


def by_hand(model: Any, case: Case, delta: dict[str, SparseDelta]) -> Any:
    with torch.no_grad():
        for site, part in delta.items():
            for neuron, row in zip(part.neurons[0].tolist(), part.rows[0], strict=True):
                stored_rows(model, case, site, neuron).add_(row)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([CONTEXTS[0], CONTEXTS[0][::-1]])).logits
    return found


def test_injecting_merging_saving_and_reading(case: Case, tmp_path: Path) -> None:
    """A sparse delta through hooks and in the weights does what changing every neuron's row by hand does; the merged
    model is the same when it is loaded again; rows at neurons are read from where they are changed."""
    folder = save(case, tmp_path / "m")
    model, plain = load_model(ModelRef(str(folder))), load_model(ModelRef(str(folder)))
    delta = delta_of(model)
    expected = by_hand(load_model(ModelRef(str(folder))), case, delta)
    before = logits_of(plain)
    with injected(model, delta):
        assert torch.allclose(logits_of(model), logits_of(expected), atol=1e-4)
    assert torch.equal(logits_of(model), before)
    assert not torch.allclose(logits_of(expected), before, atol=1e-2)
    merge(model, delta)
    for name, weight in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], weight, atol=1e-6), name
    model.save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged")
    assert torch.equal(logits_of(load_model(ModelRef(str(tmp_path / "merged")))), logits_of(model))
    checkpoint, sizes = Checkpoint(ModelRef(str(folder))), geometry(model.config)
    for site in SITES:
        neurons = delta[site].neurons[0]
        rows = torch.stack([stored_rows(plain, case, site, n) for n in neurons.tolist()])
        assert torch.equal(checkpoint.neuron_rows(sizes, 1, site, neurons), rows)


@pytest.mark.parametrize("init", ["random", "pissa"])
def test_adapters(case: Case, tmp_path: Path, init: Any) -> None:
    """An adapter trained from either start, as PEFT reads it on stock weights and as it is merged here."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save(case, tmp_path / "m")
    model = load_model(ModelRef(str(folder)))
    sizes = lora.Lora(lora.site_modules(model.config), rank=2, alpha=4.0, dropout=0.0)
    start = lora.started(model, sizes, init, {}, [Encoded(CONTEXTS[0], CONTEXTS[0])])
    with torch.no_grad():
        for name, weight in start.model.named_parameters():
            if "lora_" in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    adapter = lora.adapter_of(start.model, start.alpha)
    adapter = adapter if start.subtracted is None else adapter.minus(start.subtracted)
    save_adapter(tmp_path / "adapter", adapter, "m")
    stock: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    plain = load_model(ModelRef(str(folder)))
    stock.base_model.model.set_attn_implementation(plain.config._attn_implementation)
    with merged(plain, load_adapter(tmp_path / "adapter")):
        assert torch.allclose(logits_of(plain), logits_of(stock), atol=1e-4)
        assert torch.allclose(logits_of(plain), logits_of(start.model), atol=1e-4)
