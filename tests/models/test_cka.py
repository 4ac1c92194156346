from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages.models.batches import Batch
from pkt_stages.models.cka import cka
from pkt_stages.models.features import features
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import SITES

PROJECTIONS = {"ffn_up": "up_proj", "ffn_down": "down_proj", "attn_v": "v_proj", "attn_o": "o_proj"}
REDUCTIONS = {"mean": "meantok_unbiased", "all": "flat_unbiased", "per_sequence": "persequence_minibatch"}


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_maps_of_the_authors_library(golden: Path, reduction: str) -> None:
    recorded = load_file(golden / "cka" / "F_cka.safetensors")
    models = [load_model(resolve(str(golden / "reference_models" / side))) for side in ("source", "target")]
    texts = Batch(recorded["seqs"].tolist())
    found = cka(models, [texts, texts], reduction=reduction, batch_size=200, micro_batch_size=5)
    for site, projection in PROJECTIONS.items():
        expected = recorded[f"heatmap.{projection}.{REDUCTIONS[reduction]}"]
        torch.testing.assert_close(found[site], expected, rtol=0, atol=2e-6)


def test_padding_is_left_out(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    texts = [[0, *range(70, 70 + length)] for length in (3, 9, 5, 1)]
    for tokens in ("mean", "last", "all"):
        together = features(model, Batch(texts), tokens=tokens, micro_batch_size=4)
        alone = features(model, Batch(texts), tokens=tokens, micro_batch_size=1)
        for site in SITES:
            for one, other in zip(together[site], alone[site], strict=True):
                assert one.shape[0] == (sum(map(len, texts)) if tokens == "all" else 4)
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())
