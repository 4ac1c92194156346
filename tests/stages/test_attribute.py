from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_stages import artifacts
from tests.conftest import write_examples

Run = Callable[..., tuple[int, str, str]]


def test_one_pass_stores_every_variant(
    pkt: Run, target_folder: Path, extract_file: Path, transfer_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    status, printed, err = pkt(
        *("attribute", "--model", target_folder, "--extract", extract_file, "--transfer", transfer_file),
        *("--out", out),
    )
    assert status == 0, err
    assert "attribute: 480 neurons on 5 examples ->" in printed
    made = artifacts.load(out, artifacts.ATTRIBUTION)
    assert made.shapes["ffn_scores.rms"] == (5, 3, 96)
    assert made.shapes["attn_scores.reference_code.last_position"] == (5, 3, 64)
    assert [e["set"] for e in made.meta["examples"]] == ["extract"] * 3 + ["transfer"] * 2
    assert made.meta["predicted"] == ["1", "2", "3", "1", "2"]
    assert made.meta["model"]["revision"].startswith("sha256:")

    alone = tmp_path / "b.safetensors"
    given = ("--out", alone, "--norms", "reference_code", "--coefficients", "all_positions")
    assert pkt("attribute", "--model", target_folder, "--extract", extract_file, *given)[0] == 0
    found = artifacts.load(alone, artifacts.ATTRIBUTION)
    assert {name for name in found.shapes if name.startswith("attn_scores")} == {
        "attn_scores.reference_code.all_positions"
    }
    variant = found["ffn_scores.reference_code"]
    assert torch.allclose(variant, made["ffn_scores.reference_code"][:3], atol=1e-6)

    where, tokens = made["top_neurons.ffn"], made["top_tokens.ffn"]
    assert tokens.shape == (5, 10, 10)
    layer, neuron = where[2, 0].tolist()
    assert made["ffn_scores.rms"][2, layer, neuron] == made["ffn_scores.rms"][2].max()


def test_equal_bytes_from_two_processes(target_folder: Path, extract_file: Path, tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.safetensors"
        command = [
            sys.executable,
            "-m",
            "pkt_stages",
            "attribute",
            "--model",
            target_folder,
            "--extract",
            extract_file,
        ]
        subprocess.run([*command, "--out", out], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        written.append(out.read_bytes())
    assert written[0] == written[1]


def changed_model(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def nan_model(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def truncated_model(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "nowhere"}, "nowhere: no such folder, and not a hub name of the form owner/name"),
        ({"--extract": "none.jsonl"}, "none.jsonl: no such file of examples"),
        ({"--device": "tpu0"}, "device 'tpu0' cannot be used here"),
        ({"--device": "cuda"}, "device 'cuda' cannot be used here"),
        ({"--num-top": "0"}, "options of `attribute`: num_top must be at least 1, found 0"),
        ({"--tolerance-nats": "-1"}, "options of `attribute`: tolerance_nats must be at least 0, found -1.0"),
        ({"--norms": "l2"}, "options of `attribute`: norms: expected one of rms, reference_code, found 'l2'"),
        ({"--norms": "rms,rms"}, "options of `attribute`: norms and coefficients may not repeat an entry"),
        ({"--params": "none.yaml"}, "none.yaml: no such params file"),
    ],
)
def test_bad_options(
    pkt: Run, target_folder: Path, extract_file: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    given = {"--model": target_folder, "--extract": extract_file, "--out": tmp_path / "a.safetensors"} | options
    status, _, err = pkt("attribute", *(part for pair in given.items() for part in pair))
    assert status == 2
    assert err.startswith(f"pkt: error: {message}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f, t: changed_model(f, t, model_type="gpt2"),
            "architecture 'gpt2' is not supported: its weights are stored transposed",
        ),
        (
            lambda f, t: changed_model(f, t, model_type="mixtral"),
            "architecture 'mixtral' is not supported: its FFN is a mix",
        ),
        (lambda f, t: changed_model(f, t, max_position_embeddings=8), "example toy_0: "),
        (nan_model, "weight model.layers.1.mlp.up_proj.weight holds NaN or infinity; the checkpoint is broken"),
        (truncated_model, "model.safetensors: not a readable safetensors file ("),
    ],
)
def test_bad_models(
    pkt: Run,
    target_folder: Path,
    extract_file: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    message: str,
) -> None:
    model = make(target_folder, tmp_path / "model")
    status, _, err = pkt("attribute", "--model", model, "--extract", extract_file, "--out", tmp_path / "a.safetensors")
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("pkt: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "a.safetensors").exists()


def test_an_answer_with_no_useful_token_is_named(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "extract.jsonl", ["It is 1.", "..."])
    status, _, err = pkt("attribute", "--model", target_folder, "--extract", examples, "--out", tmp_path / "a")
    assert (status, err) == (2, "pkt: error: example toy_1: its answer '...' holds no useful token\n")


@pytest.mark.parametrize("start", [2, 0])
def test_an_id_in_both_files(pkt: Run, target_folder: Path, extract_file: Path, tmp_path: Path, start: int) -> None:
    """Of another example, or of the same file given twice."""
    other = write_examples(tmp_path / "transfer.jsonl", ["It is 3."], start=start) if start else extract_file
    out = tmp_path / "o.safetensors"
    options = ("--extract", extract_file, "--transfer", other, "--out", out)
    status, _, err = pkt("attribute", "--model", target_folder, *options)
    where = f"transfer {other}: id 'toy_{start}' is in extract {extract_file}, too"
    assert (status, err) == (2, f"pkt: error: {where}; give each example one of its own\n")
    assert not out.exists()
