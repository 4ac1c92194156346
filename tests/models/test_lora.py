from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models.adapters import load_adapter, save_adapter
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.lora import (
    INITIALISATIONS,
    Lora,
    adapter_of,
    check_sizes,
    logits_of,
    site_modules,
    started,
    unchanged_error,
)
from pkt_stages.models.recipe import Init
from tests.conftest import make_model

EXAMPLES = [Encoded(list(range(5, 45)), list(range(5, 45))), Encoded([0, 9, 8, 7], [-100, 9, 8, 7])]


MODULES = site_modules(LlamaConfig(num_hidden_layers=3))


def lora(rank: int = 4, alpha: float = 8.0, **given: Any) -> Lora:
    return Lora(**{"modules": MODULES, "rank": rank, "alpha": alpha, "dropout": 0.0, **given})


def submatrices(model: Any, modules: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: 0.1 * torch.randn(model.get_submodule(name).weight.shape, generator=generator) for name in modules}


def loaded(folder: Path) -> Any:
    return load_model(resolve(str(folder)))


def disturb(peft_model: Any) -> None:
    """Stand in for a training: move every factor."""
    generator = torch.Generator().manual_seed(6)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("init", sorted(INITIALISATIONS))
def test_the_model_is_unchanged_and_its_training_fits_the_untouched_target(
    init: Init, target_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = loaded(target_folder)
    before = logits_of(model, EXAMPLES)
    torch.manual_seed(0)
    peft_model = INITIALISATIONS[init](model, lora(), submatrices(model, MODULES))
    assert unchanged_error(before, logits_of(peft_model, EXAMPLES), "float32") < 2e-5
    first = adapter_of(peft_model, 8.0)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(MODULES) and all("lora_" in name for name in trainable)

    disturb(peft_model)
    trained = adapter_of(peft_model, 8.0)
    result = trained if init == "random" else trained.minus(first)
    save_adapter(tmp_path / "adapter", result, base_model="target")
    after = logits_of(peft_model, EXAMPLES)
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 0.1
    anew = PeftModel.from_pretrained(loaded(target_folder), tmp_path / "adapter")
    for ours, theirs in zip(after, logits_of(anew, EXAMPLES), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert load_adapter(tmp_path / "adapter").rank == (4 if init == "random" else 8)


def test_random_is_a_gaussian_of_deviation_one_over_r(target_folder: Path) -> None:
    torch.manual_seed(0)
    found = adapter_of(INITIALISATIONS["random"](loaded(target_folder), lora(), {}), 8.0)
    a = torch.cat([a.flatten() for a, _ in found.factors.values()])
    assert abs(float(a.std()) - 1 / 4) < 0.01
    assert all(not b.any() for _, b in found.factors.values())


def test_pissa_agrees_with_the_recorded_values(golden: Path, tmp_path: Path) -> None:
    recorded = load_file(golden / "pissa" / "G_pissa.safetensors")
    model = loaded(make_model(tmp_path / "model", seed=0, intermediate_size=160, num_hidden_layers=1))
    names = {"model.layers.0.mlp.up_proj": "in64_out160", "model.layers.0.mlp.down_proj": "in160_out64"}
    for module, name in names.items():
        model.get_submodule(module).weight.data.copy_(recorded[f"{name}.W"])
    peft_model = INITIALISATIONS["pissa"](model, lora(alpha=4.0, modules=tuple(names)), {})
    found = adapter_of(peft_model, 4.0)
    for module, name in names.items():
        assert torch.allclose(found.delta(module), recorded[f"{name}.pissa.BA"], atol=1e-5)
        base = peft_model.get_submodule(f"base_model.model.{module}").get_base_layer().weight
        assert torch.allclose(base, recorded[f"{name}.pissa.residual"], atol=1e-5)
        for ours, letter in zip(found.factors[module], "AB", strict=True):
            assert torch.allclose(ours.abs(), recorded[f"{name}.pissa.{letter}"].abs(), atol=1e-4)


def test_pissa_agrees_with_pefts_own_conversion(target_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(MODULES), init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(loaded(target_folder), config)
    # peft's way: keep the initial adapter, and let it be subtracted when the trained one is saved.
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = INITIALISATIONS["pissa"](loaded(target_folder), lora(), {})
    first = adapter_of(ours, 8.0)
    disturb(ours)
    mine, converted = adapter_of(ours, 8.0).minus(first), load_adapter(tmp_path / "converted")
    assert mine.factors.keys() == converted.factors.keys()
    for module in mine.factors:
        assert torch.allclose(mine.delta(module), converted.delta(module), atol=1e-6)


def test_seeking_reduces_the_base_by_the_sub_matrixs_best_approximation(target_folder: Path) -> None:
    model = loaded(target_folder)
    given = submatrices(model, MODULES)
    weights = {name: model.get_submodule(name).weight.detach().double() for name in given}
    peft_model = INITIALISATIONS["seeking"](model, lora(), given)
    found = adapter_of(peft_model, 8.0)
    for name, values in given.items():
        u, s, v = torch.linalg.svd(values.double(), full_matrices=False)
        product = (u[:, :4] * s[:4]) @ v[:4]
        a, b = found.factors[name]
        assert torch.allclose((b @ a).double(), product, atol=1e-5)
        base = peft_model.get_submodule(f"base_model.model.{name}").get_base_layer().weight
        assert torch.allclose(base.double(), weights[name] - 2.0 * product, atol=1e-5)


def test_seeking_moves_embedding_and_head_too(target_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = loaded(target_folder)
    modules = ("model.embed_tokens", "lm_head", "model.layers.1.self_attn.q_proj")
    before = logits_of(model, EXAMPLES)
    peft_model = INITIALISATIONS["seeking"](model, lora(modules=modules), submatrices(model, modules))
    assert unchanged_error(before, logits_of(peft_model, EXAMPLES), "float32") < 2e-5
    first = adapter_of(peft_model, 8.0)
    disturb(peft_model)
    save_adapter(tmp_path / "adapter", adapter_of(peft_model, 8.0).minus(first), base_model="target")
    anew = PeftModel.from_pretrained(loaded(target_folder), tmp_path / "adapter")
    for ours, theirs in zip(logits_of(peft_model, EXAMPLES), logits_of(anew, EXAMPLES), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_changed_model_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        unchanged_error([torch.ones(2, 3)], [torch.full((2, 3), 1.5)], "float32")
    assert str(caught.value) == (
        "the initialisation changed the target's logits by 5.0e-01 (relative; at most 1e-03 in float32);"
        " use dtype float32"
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            lora(rank=33),
            "rank 33 is larger than a side of model.layers.0.self_attn.v_proj [32, 64]; use at most 32",
        ),
        (
            lora(modules=("model.layers.3.mlp.up_proj",)),
            "the target has no module model.layers.3.mlp.up_proj; expected a model with that weight",
        ),
    ],
)
def test_sizes_that_do_not_fit(sizes: Lora, message: str, target_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_sizes(loaded(target_folder), sizes)
    assert str(caught.value) == message


@pytest.mark.parametrize("init", sorted(INITIALISATIONS))
def test_a_start_says_what_it_did(init: Init, target_folder: Path) -> None:
    model = loaded(target_folder)
    torch.manual_seed(0)
    start = started(model, lora(), init, submatrices(model, MODULES), EXAMPLES)
    assert 0 <= start.error < 2e-5 and start.alpha == 8.0
    assert (start.subtracted is None) == (init == "random")
    if start.subtracted is not None:
        first = adapter_of(start.model, 8.0)
        assert all(torch.equal(start.subtracted.delta(name), first.delta(name)) for name in MODULES)


def test_a_sub_matrix_of_another_shape(target_folder: Path) -> None:
    model = loaded(target_folder)
    given = submatrices(model, MODULES) | {"model.layers.1.self_attn.v_proj": torch.ones(64, 32)}
    with pytest.raises(UserError) as caught:
        started(model, lora(), "seeking", given, EXAMPLES)
    assert str(caught.value) == (
        "model.layers.1.self_attn.v_proj: expected a sub-matrix of shape [32, 64], found [64, 32]"
    )


def test_tied_embeddings_are_refused(tmp_path: Path) -> None:
    model = loaded(make_model(tmp_path / "tied", seed=0, tie_word_embeddings=True))
    with pytest.raises(UserError) as caught:
        check_sizes(model, lora(modules=("lm_head",)))
    assert str(caught.value) == ("lm_head: the target's embedding and head are one weight; leave both out of the sites")


def test_vllm_answers_as_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from peft import PeftModel

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    folder = make_model(tmp_path / "model", seed=8, num_attention_heads=2, num_key_value_heads=1)
    peft_model = INITIALISATIONS["pissa"](loaded(folder), lora(rank=16, alpha=16.0), {})
    first = adapter_of(peft_model, 16.0)
    disturb(peft_model)
    save_adapter(tmp_path / "adapter", adapter_of(peft_model, 16.0).minus(first), base_model="target")
    anew = PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter")
    prompts = [[0, *range(20, 40)], [0, 99, 98, 97]]
    expected = []
    for model in (loaded(folder), anew):
        made = [
            model.generate(input_ids=torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None)
            for p in prompts
        ]
        expected.append([ids[0, len(p) :].tolist() for ids, p in zip(made, prompts, strict=True)])
    assert expected[0] != expected[1]
    llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=32, max_loras=1)
    asked = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    given: Any = [{"prompt_token_ids": p} for p in prompts]
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    outputs = llm.generate(given, asked, lora_request=request, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected[1]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
