"""PEFT's files, written and read; merged into weights and out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import CONFIG, WEIGHTS, Adapter, load_adapter, save_adapter
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.merge import merged
from tests.conftest import make_model

IDS = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])
SHAPES = {
    "model.layers.0.mlp.up_proj": (96, 64),
    "model.layers.2.mlp.down_proj": (64, 96),
    "model.layers.1.self_attn.v_proj": (32, 64),
}


def adapter(seed: int = 0, rank: int = 4, shapes: dict[str, tuple[int, int]] = SHAPES) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: (torch.randn(rank, in_, generator=generator), 0.1 * torch.randn(out, rank, generator=generator))
        for module, (out, in_) in shapes.items()
    }
    return Adapter(factors, alpha=2.0 * rank)


def test_peft_reads_what_was_written(target_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    embedding = {"model.embed_tokens": (64, 264), "lm_head": (264, 64)}
    written = adapter(shapes={**SHAPES, **embedding})
    save_adapter(tmp_path / "a", written, "target")
    save_adapter(tmp_path / "b", written, "target")
    model = load_model(resolve(str(target_folder)))
    before = weights_hash(model.state_dict())
    with torch.no_grad():
        plain = model(IDS).logits
        with merged(model, load_adapter(tmp_path / "a")):
            ours = model(IDS).logits
        assert weights_hash(model.state_dict()) == before
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "a"))(IDS).logits
    assert (ours - plain).abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == "target"


def test_the_update_is_alpha_over_r_times_b_a() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])
    expected = torch.tensor([[4.0, 8.0, 12.0], [-4.0, -8.0, -12.0]])
    assert torch.equal(Adapter({"m": (a, b)}, alpha=4.0).delta("m"), expected)
    assert torch.equal(Adapter({"x.embed_tokens": (a, b)}, alpha=4.0).delta("x.embed_tokens"), expected.T)


def test_minus_has_the_difference_of_the_updates() -> None:
    first, second = adapter(1), adapter(2)
    difference = first.minus(second)
    assert difference.rank == 8
    for module in SHAPES:
        torch.testing.assert_close(difference.delta(module), first.delta(module) - second.delta(module))


def test_an_older_adapter_is_replaced_whole(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", adapter(), "target")
    (tmp_path / "a" / "README.md").write_text("old")
    save_adapter(tmp_path / "a", adapter(1), "target")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [CONFIG, WEIGHTS]


def test_bad_files(tmp_path: Path) -> None:
    folder = tmp_path / "a"

    def message() -> str:
        with pytest.raises(UserError) as caught:
            load_adapter(folder)
        return str(caught.value)

    save_adapter(folder, adapter(), "target")
    config = json.loads((folder / CONFIG).read_text())
    for key, value, expected in (
        ("peft_type", "LOHA", "expected a LoRA adapter, found 'LOHA'"),
        (
            "use_dora",
            True,
            "its use_dora (True) is not supported; expected plain LoRA: W + (lora_alpha / r) B A of the"
            " original weights",
        ),
        ("r", 5, "the factors of model.layers.0.mlp.up_proj are not A [5, in] and B [out, 5]"),
    ):
        (folder / CONFIG).write_text(json.dumps({**config, key: value}))
        assert message() == f"{folder}: {expected}"
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "extra": torch.zeros(2)}, folder / WEIGHTS)
    assert message() == f"{folder}: unexpected tensor extra of shape [2] in a LoRA adapter"
    (folder / WEIGHTS).write_bytes(b"cut")
    assert message().startswith(f"{folder}: not a readable PEFT adapter (")
    (folder / WEIGHTS).unlink()
    assert message() == f"{folder}: expected a PEFT adapter, {WEIGHTS} is missing"


def test_an_adapter_of_another_model(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    for shapes, expected in (
        (
            {"model.layers.9.mlp.up_proj": (96, 64)},
            "adapter: the model has no weight model.layers.9.mlp.up_proj.weight",
        ),
        (
            {"model.layers.0.mlp.up_proj": (96, 65)},
            "adapter: model.layers.0.mlp.up_proj.weight is [96, 64] in the model, [96, 65] in the adapter",
        ),
    ):
        with pytest.raises(UserError) as caught, merged(model, adapter(shapes=shapes)):
            pass
        assert str(caught.value).startswith(expected)


# --- adapters that PEFT has written -----------------------------------------------------------------------------------

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANY = {"r": 4, "lora_alpha": 6, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}


def by_peft(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Write an adapter as PEFT does, trained so far that it moves the logits; these, as PEFT reads it again."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**ANY, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    made.save_pretrained(folder, save_embedding_layers=False)
    read: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    with torch.no_grad():
        return read(IDS).logits


def ours(base: Path, folder: Path) -> torch.Tensor:
    model = load_model(resolve(str(base)))
    with torch.no_grad(), merged(model, load_adapter(folder)):
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "eva"},
        {"lora_dropout": 0.1},
        {"r": 1, "lora_alpha": 32},
        {"lora_alpha": 0.5},
        {"target_modules": ["lm_head", "embed_tokens", "up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.[01]\..*(q|v)_proj"},
        {"task_type": None},
        {"eva_config": {"rho": 1.0}},
        {"loftq_config": {"loftq_bits": 4}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_taken_equals_peft(target_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = by_peft(target_folder, tmp_path / "adapter", **settings)
    assert (theirs - by_base(target_folder)).abs().max() > 0.1
    torch.testing.assert_close(ours(target_folder, tmp_path / "adapter"), theirs, rtol=1e-4, atol=1e-4)


def by_base(base: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(resolve(str(base)))(IDS).logits
    return logits


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_an_initialisation_that_changes_the_base(target_folder: Path, tmp_path: Path, init: str) -> None:
    """Refused as it is; plain LoRA once PEFT has converted it, as it says."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(**{**ANY, "init_lora_weights": init})
    made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(target_folder), config)
    made.peft_config["default"].init_lora_weights = True
    made.save_pretrained(tmp_path / "first")
    made.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        trained = made(IDS).logits
    made.save_pretrained(tmp_path / "as_it_is")
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "as_it_is")
    assert str(caught.value) == (
        f"{tmp_path}/as_it_is: its init_lora_weights ({init!r}) is not supported; such a start changes the base"
        " weights, to which alone the factors belong; save the adapter with PEFT's"
        " path_initial_model_for_weight_conversion, which makes plain LoRA of it"
    )
    made.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    torch.testing.assert_close(ours(target_folder, tmp_path / "plain"), trained, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(target_folder)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "plain"))(IDS).logits
    torch.testing.assert_close(ours(target_folder, tmp_path / "plain"), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"trainable_token_indices": [1, 2]},
        {"alora_invocation_tokens": [70, 80]},
        {"layers_to_transform": [0, 2]},
        {"exclude_modules": ["k_proj"]},
        {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]},
        {"velora_config": {"num_groups": 8}},
        {"monteclora_config": {}, "target_modules": ["q_proj"]},
        {"kasa_config": {}},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore")
def test_other_arithmetic_is_refused_by_name(target_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """As PEFT itself writes it."""
    from peft.tuners.lora.config import KasaConfig, MontecloraConfig

    nested: dict[str, Any] = {"monteclora_config": MontecloraConfig, "kasa_config": KasaConfig}
    name = next(iter(settings))
    given = {key: nested[key](**value) if key in nested else value for key, value in settings.items()}
    by_peft(target_folder, tmp_path / "adapter", **given)
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "adapter")
    assert str(caught.value).startswith(f"{tmp_path}/adapter: its {name} (")
    assert str(caught.value).endswith("is not supported; expected plain LoRA: W + (lora_alpha / r) B A of the original"
                                      " weights")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_lora_weights", init) for init in ("loftq", "corda", "lora_ga", "PiSSA", "of_next_year", None, 3)),
        ("task_type", "SEQ_CLS"),
        ("bias", None),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 1}),
        ("arrow_config", {"top_k": 2}),
        ("ensure_weight_tying", True),
        ("layers_pattern", "layers"),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("rank_pattern", {"up_proj": 8}),
        ("of_next_year", True),
        ("of_next_year", 1),
        ("of_next_year", 0),
        ("of_next_year", "no"),
        ("of_next_year", [None]),
    ],
)
def test_settings_that_are_not_known_to_be_harmless(tmp_path: Path, name: str, value: Any) -> None:
    save_adapter(tmp_path / "a", adapter(), "target")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path}/a: its {name} (")


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=str)
def test_a_setting_of_next_year_that_is_off(tmp_path: Path, value: Any) -> None:
    save_adapter(tmp_path / "a", adapter(), "target")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, "of_next_year": value}))
    assert load_adapter(tmp_path / "a").alpha == 8


@pytest.mark.parametrize("targets", [["lm_head"], ["up_proj", "embed_tokens"]], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_embedding_and_head_that_are_one_weight(tmp_path: Path, targets: list[str]) -> None:
    """PEFT moves one of the two alone, which merged into their weight would move both."""
    base = make_model(tmp_path / "tied", seed=7, tie_word_embeddings=True)
    theirs = by_peft(base, tmp_path / "adapter", target_modules=targets)
    assert (theirs - by_base(base)).abs().max() > 0.1
    with pytest.raises(UserError) as caught:
        ours(base, tmp_path / "adapter")
    named = "lm_head" if targets == ["lm_head"] else "model.embed_tokens"
    assert str(caught.value) == (
        f"adapter: changes {named}, but embedding and head are one weight in the model, and an adapter's update is for"
        " one of the two alone; train it without"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": 10**400}, "expected numbers r above 0 and lora_alpha, found 4 and 1000"),
        ({"lora_alpha": float("inf")}, "expected numbers r above 0 and lora_alpha, found 4 and inf"),
        ({"lora_alpha": float("nan")}, "expected numbers r above 0 and lora_alpha, found 4 and nan"),
        ({"lora_alpha": True}, "expected numbers r above 0 and lora_alpha, found 4 and True"),
        ({"r": 4.0}, "expected numbers r above 0 and lora_alpha, found 4.0 and 8.0"),
        ({"r": -4}, "expected numbers r above 0 and lora_alpha, found -4 and 8.0"),
        ({"target_modules": ["down_proj", "v_proj"]}, "holds factors of model.layers.0.mlp.up_proj, which its"),
        ({"target_modules": ["roj"]}, "holds factors of model.layers."),
        ({"target_modules": "model.layers.0.*"}, "holds factors of model.layers."),
        ({"target_modules": None}, "holds factors of model.layers."),
        ({"target_modules": "("}, "holds factors of model.layers."),
        ({"target_modules": "(.*.*)*(.*.*)*(.*.*)*!"}, "holds factors of model.layers."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_and_targets(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save_adapter(tmp_path / "a", adapter(), "target")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path}/a: {said}")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(4, 64, dtype=torch.int8), "is int8; expected one of"),
        ("model.layers.0.mlp.up_proj.lora_A", torch.ones(4, 64), "unexpected tensor "),
        ("model.layers.0.mlp.up_proj.lora_embedding_A", torch.ones(4, 64), "unexpected tensor "),
        ("model.layers.0.mlp.up_proj.lora_A.default.weight", torch.ones(4, 64), "unexpected tensor "),
        ("model.embed_tokens.lora_A.weight", torch.ones(4, 64), "unexpected tensor "),
        ("lm_head.base_layer.weight", torch.ones(264, 64), "unexpected tensor "),
        ("model.layers.0.mlp.up_proj.lora_B.bias", torch.ones(96), "unexpected tensor "),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector.weight", torch.ones(96), "unexpected tensor "),
    ],
)
def test_tensors_that_peft_would_read_otherwise(tmp_path: Path, name: str, tensor: torch.Tensor, said: str) -> None:
    save_adapter(tmp_path / "a", adapter(), "target")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({**tensors, f"base_model.model.{name}": tensor}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(UserError) as caught:
        load_adapter(tmp_path / "a")
    assert said in str(caught.value) and name in str(caught.value)


def test_a_delta_of_a_tied_head(tmp_path: Path) -> None:
    from pkt_stages.models.changes import DenseDelta

    base = make_model(tmp_path / "tied", seed=7, tie_word_embeddings=True)
    model, added = load_model(resolve(str(base))), torch.full((264, 64), 0.5)
    with merged(model, DenseDelta({"model.embed_tokens.weight": added})):
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(UserError) as caught, merged(model, DenseDelta({"lm_head.weight": added})):
        pass
    assert str(caught.value) == (
        "delta: lm_head.weight is model.embed_tokens.weight in the model, one weight; name it so, once"
    )
