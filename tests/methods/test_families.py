"""Transports of other architectures: what a norm behind a block, a gain's offset or a multiplier does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pkt_stages.models.changes import read_changes
from tests.families import CASES, save
from tests.methods.test_transport import change, texts, trained

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", ["smollm3", "granite", "gemma", "gemma2", "gemma3"])
def test_a_model_as_its_own_source(pkt: Run, tmp_path: Path, name: str) -> None:
    """Matched finds that nothing is to be mapped, and all that training added inside the layers is recovered: the
    projections with the gains before and behind them, as `own` says."""
    base = save(CASES[name], tmp_path / "base", head_dim=12)
    tuned = trained(tmp_path / "tuned", base)
    pair = ("--source", base, "--target", base, "--texts", texts(tmp_path / "t.jsonl"), "--num-texts", 24)
    status, _, err = pkt("correlate", *pair, "--layer-pairs", "proportional", "--out", tmp_path / "sums")
    assert status == 0, err
    given = ("--target", base, "--source", tuned, "--set", "vocabulary=false")
    more = ("--base", base, "--correlation", tmp_path / "sums")
    for code, inputs in (("own", ()), ("matched", more)):
        status, _, err = pkt("derive", "--code", code, *given, *inputs, "--out", tmp_path / code)
        assert status == 0, err
    expected, found = change(tmp_path / "own"), change(tmp_path / "matched")
    assert expected.keys() == found.keys() and len(found) >= 14
    for weight, value in expected.items():
        torch.testing.assert_close(found[weight], value, rtol=0, atol=2e-5, msg=weight)


def test_theseus_between_architectures(pkt: Run, tmp_path: Path) -> None:
    """From Gemma 3 to Llama; Ariadne has no use for a target with norms behind its blocks."""
    base, target = save(CASES["gemma3"], tmp_path / "base"), save(CASES["llama"], tmp_path / "target", seed=1)
    tuned, read = trained(tmp_path / "tuned", base), texts(tmp_path / "t.jsonl")
    given = ("--texts", read, "--num-texts", 24, "--layer-pairs", "proportional")
    for source, to, out in ((base, target, "there"), (target, base, "back")):
        status, _, err = pkt("correlate", "--source", source, "--target", to, *given, "--out", tmp_path / out)
        assert status == 0, err
    models = ("--target", target, "--source", tuned, "--base", base, "--correlation", tmp_path / "there")
    status, _, err = pkt("derive", "--code", "theseus", *models, "--out", tmp_path / "row")
    assert status == 0, err
    assert all(bool(weight.isfinite().all()) and bool(weight.any()) for weight in change(tmp_path / "row").values())
    models = ("--target", base, "--source", target, "--base", target, "--correlation", tmp_path / "back")
    status, _, err = pkt("derive", "--code", "ariadne", *models, "--texts", read, "--out", tmp_path / "ariadne")
    said = "a norm behind each block keeps what down_proj adds from being linear in it; take another target, or another"
    assert (status, err) == (2, f"pkt: error: {base}: {said} transport\n")


def test_tokenizers_without_a_common_vocabulary(pkt: Run, tmp_path: Path) -> None:
    """Layers alone are carried over, which is said and recorded."""
    from tests import tokenizers

    base, target = save(CASES["llama"], tmp_path / "base", vocab_size=400), tmp_path / "target"
    save(CASES["llama"], target, seed=1, vocab_size=400)
    for folder, kind in ((base, "metaspace"), (target, "bytes")):
        tokenizers.save(folder, kind)
    tuned = trained(tmp_path / "tuned", base)
    given = ("--texts", texts(tmp_path / "t.jsonl"), "--num-texts", 24, "--layer-pairs", "proportional")
    status, _, err = pkt("correlate", "--source", base, "--target", target, *given, "--out", tmp_path / "sums")
    assert status == 0, err
    models = ("--target", target, "--source", tuned, "--base", base, "--correlation", tmp_path / "sums")
    status, _, err = pkt("derive", "--code", "matched", *models, "--out", tmp_path / "row")
    assert status == 0
    assert err.startswith(
        "pkt: warning: vocabulary: embedding and head stay as they are, for moving them takes a common vocabulary:"
    )
    assert len(err.splitlines()) == 1
    assert all(".layers." in weight for weight in change(tmp_path / "row"))
    assert read_changes(tmp_path / "row").meta["vocabulary"] is False
    status, _, err = pkt("derive", "--code", "grid", "--target", target, "--source", base, "--out", tmp_path / "grid")
    assert status == 2 and err.startswith("pkt: error: width embedding needs one vocabulary: token '")
    assert err.endswith("; use pca or whitening\n")
