"""PEFT's files, written and read; merged into weights and out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_stages.errors import UserError
from pkt_stages.models.adapters import CONFIG, WEIGHTS, Adapter, load_adapter, save_adapter
from pkt_stages.models.load import load_model, resolve, weights_hash
from pkt_stages.models.merge import merged

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
        ("peft_type", "LOHA", "expected a LoRA adapter, found LOHA"),
        ("use_dora", True, "its use_dora is not supported; expected plain LoRA"),
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
