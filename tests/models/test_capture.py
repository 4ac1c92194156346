"""What is captured adds up to what the model computes."""

from __future__ import annotations

from pathlib import Path

import torch

from pkt_stages.core import attribution as core
from pkt_stages.models.capture import capture, lens
from pkt_stages.models.load import ModelRef, load_model
from pkt_stages.models.sites import as_rows, weight_name


def test_contributions_sum_to_the_sublayers_and_the_stream(target_folder: Path) -> None:
    """Grouped-query attention: neurons times subvalues give A_l and F_l, and the stream adds up to the next layer."""
    model = load_model(ModelRef(str(target_folder)))
    kept = capture(model, [0, 50, 60, 70, 80])
    for layer in range(3):
        o = as_rows(model.get_parameter(weight_name(layer, "attn_o")), "attn_o")
        down = as_rows(model.get_parameter(weight_name(layer, "ffn_down")), "ffn_down")
        assert torch.allclose(kept.attn_coefficients[layer] @ o, kept.attn_output[layer], atol=1e-6)
        assert torch.allclose(kept.ffn_coefficients[layer] @ down, kept.ffn_output[layer], atol=1e-6)
        after = kept.layer_input[layer] + kept.attn_output[layer] + kept.ffn_output[layer]
        following = kept.layer_input[layer + 1] if layer < 2 else kept.final
        assert torch.allclose(after, following, atol=1e-5)


def test_last_position_is_all_positions_for_a_single_token(target_folder: Path) -> None:
    """With one token in the context attention can only look at itself: both coefficients are equal, under GQA too."""
    model = load_model(ModelRef(str(target_folder)))
    kept = capture(model, [77])
    assert torch.allclose(kept.attn_coefficients, kept.attn_coefficients_last, atol=1e-6)
    longer = capture(model, [0, 77, 78])
    assert not torch.allclose(longer.attn_coefficients, longer.attn_coefficients_last, atol=1e-3)


def test_capture_leaves_no_hook_and_the_attention_as_it_was(target_folder: Path) -> None:
    model = load_model(ModelRef(str(target_folder)))
    before = model.config._attn_implementation
    capture(model, [0, 5])
    assert model.config._attn_implementation == before != "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_lens_at_the_last_layer_is_the_models_own_distribution(target_folder: Path) -> None:
    model = load_model(ModelRef(str(target_folder)))
    kept = capture(model, [0, 9, 8, 7])
    own = lens(model)
    unembedding, eps = own.unembedding, own.eps
    divisor = core.lens_divisor(kept.final[None], eps, "rms")
    log_p = core.log_softmax(core.logits(unembedding, kept.final[None], divisor))
    logits = model(torch.tensor([[0, 9, 8, 7]])).logits[0, -1]
    assert torch.allclose(log_p[0], logits.double().log_softmax(-1), atol=1e-5)
