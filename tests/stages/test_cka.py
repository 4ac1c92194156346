from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.models.adapters import Adapter, save_adapter
from pkt_stages.models.features import features
from pkt_stages.models.load import load_model, resolve
from pkt_stages.models.sites import SITES
from pkt_stages.stages.cka import CkaParams, run
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]
MODULES = {"ffn_up": "up_proj", "ffn_down": "down_proj", "attn_v": "v_proj", "attn_o": "o_proj"}
REDUCTIONS = {"mean": "meantok_unbiased", "all": "flat_unbiased", "per_sequence": "persequence_minibatch"}


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_maps_of_the_authors_library(golden: Path, reduction: str) -> None:
    recorded = load_file(golden / "cka" / "F_cka.safetensors")
    models = [load_model(resolve(str(golden / "reference_models" / side))) for side in ("source", "target")]
    texts = recorded["seqs"].tolist()
    params = CkaParams(reduction=reduction, num_texts=32)
    found = run(models, [texts, texts], params, micro_batch_size=5)
    for site, module in MODULES.items():
        expected = recorded[f"heatmap.{module}.{REDUCTIONS[reduction]}"]
        torch.testing.assert_close(found[site], expected, rtol=0, atol=2e-6)


def test_padding_is_left_out(target_folder: Path) -> None:
    model = load_model(resolve(str(target_folder)))
    texts = [[0, *range(70, 70 + length)] for length in (3, 9, 5, 1)]
    for tokens in ("mean", "last", "all"):
        together = features(model, texts, tokens=tokens, micro_batch_size=4)
        alone = features(model, texts, tokens=tokens, micro_batch_size=1)
        for site in SITES:
            for one, other in zip(together[site], alone[site], strict=True):
                assert one.shape[0] == (sum(map(len, texts)) if tokens == "all" else 4)
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [f"A text, number {i}: {'abcdefgh'[i] * (i + 2)}." for i in range(8)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def cka(pkt: Run, tmp_path: Path, first: Path, second: Path, texts: Path, *more: object) -> tuple[int, str, str]:
    models = ("--first", first, "--second", second, "--texts", texts)
    return pkt("cka", *models, "--out", tmp_path / "c.safetensors", "--metrics", tmp_path / "c.json", *more)


def test_a_model_with_itself_and_with_an_adapter_in_it(
    pkt: Run, target_folder: Path, texts: Path, tmp_path: Path
) -> None:
    status, printed, err = cka(pkt, tmp_path, target_folder, target_folder, texts, "--num-texts", 8)
    assert status == 0, err
    assert printed.startswith("cka: mean over layer pairs: ffn_up 0.")
    found = artifacts.load(tmp_path / "c.safetensors", "cka")
    for site in SITES:
        torch.testing.assert_close(found[f"cka.{site}"].diagonal(), torch.ones(3, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    factors = (torch.randn(2, 64, generator=draw), torch.randn(96, 2, generator=draw))
    save_adapter(tmp_path / "runs" / "seed_3", Adapter({"model.layers.1.mlp.up_proj": factors}, 2.0), "target")
    given = ("--num-texts", 8, "--delta", tmp_path / "runs")
    assert cka(pkt, tmp_path, target_folder, target_folder, texts, *given)[0] == 0
    metrics = json.loads((tmp_path / "c.json").read_text())
    assert metrics["run"] == "seed_3"
    diagonal = torch.tensor(metrics["cka"]["ffn_up"]).diagonal().tolist()
    # Only what comes after the adapter changes.
    assert diagonal[0] == pytest.approx(1) and diagonal[1] < 0.99
    status, _, err = cka(pkt, tmp_path, target_folder, target_folder, texts, *given, "--run", 1)
    assert (status, err) == (2, f"pkt: error: {tmp_path / 'runs'}: has 1 runs, no number 1 (from 0)\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--num-texts", 9), "{texts}: 8 texts, 9 wanted (num_texts)"),
        (
            ("--num-texts", 3),
            "options of `cka`: num_texts must be at least 4, which unbiased HSIC needs, found 3",
        ),
        (
            ("--reduction", "per_sequence", "--max-tokens", 3, "--num-texts", 8),
            "text 1: 3 samples; unbiased HSIC needs at least 4; use longer texts, or more per minibatch",
        ),
        (
            ("--max-tokens", 1, "--num-texts", 8),
            "ffn_up: first layer 0: its features do not vary, CKA is undefined; use other texts",
        ),
    ],
)
def test_bad_input(
    pkt: Run, target_folder: Path, texts: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    status, _, err = cka(pkt, tmp_path, target_folder, target_folder, texts, *extra)
    assert (status, err) == (2, f"pkt: error: {message.format(texts=texts)}\n")
    assert not (tmp_path / "c.safetensors").exists()


def test_a_text_longer_than_the_context(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": "x" * (10 + 300 * (i == 2))}) + "\n" for i in range(4)))
    status, _, err = cka(pkt, tmp_path, target_folder, target_folder, long, "--num-texts", 4)
    expected = f"pkt: error: {long}: text 3 has 311 tokens, {target_folder} takes 256; set max_tokens to cut it\n"
    assert (status, err) == (2, expected)


def test_tokens_as_samples_need_one_tokenisation(pkt: Run, target_folder: Path, texts: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {**tokenizer["model"]["vocab"], "te": 261}
    tokenizer["model"]["merges"] = [["t", "e"]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, _, err = cka(pkt, tmp_path, target_folder, other, texts, "--num-texts", 8, "--reduction", "all")
    assert status == 2
    assert err.startswith(f"pkt: error: {texts}: text 1 has ") and "must be the same; use mean or last" in err


def test_equal_runs_write_equal_bytes(pkt: Run, source_folder: Path, target_folder: Path, texts: Path, tmp_path: Path):
    for name in ("a", "b"):
        assert cka(pkt, tmp_path / name, source_folder, target_folder, texts, "--num-texts", 8)[0] == 0
    for file in ("c.safetensors", "c.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert artifacts.load(tmp_path / "a" / "c.safetensors", "cka").shapes["cka.attn_o"] == (4, 3)
