from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from pkt_stages import artifacts
from pkt_stages.models.attribution import _first

Run = Callable[..., tuple[int, str, str]]


def test_the_best_neurons_and_their_tokens(
    pkt: Run, source_folder: Path, target_folder: Path, extract_file: Path, tmp_path: Path
) -> None:
    scores, out = tmp_path / "scores.safetensors", tmp_path / "n.json"
    assert pkt("attribute", "--model", target_folder, "--extract", extract_file, "--out", scores)[0] == 0
    given = ("--attribution", scores, "--out", out)
    status, printed, err = pkt("neurons", "--model", target_folder, *given, "--num-neurons", 3)
    assert status == 0, err
    found = artifacts.load(scores, artifacts.ATTRIBUTION)
    table = json.loads(out.read_text())["examples"]
    assert [example["id"] for example in table] == ["toy_0", "toy_1"]
    for place, example in enumerate(table):
        assert [row["site"] for row in example["neurons"]] == ["ffn_down"] * 3 + ["attn_o"] * 3
        for rows, name in (
            (example["neurons"][:3], "ffn_scores.rms"),
            (example["neurons"][3:], "attn_scores.rms.all_positions"),
        ):
            values = found[name][place]
            best = values.flatten().sort(descending=True).values[:3].tolist()
            assert [row["score"] for row in rows] == best
            assert all(values[row["layer"], row["neuron"]].item() == row["score"] for row in rows)
            assert all(len(row["tokens"]) == 10 for row in rows)
    assert "toy_1, predicting '2':" in printed
    status, _, err = pkt("neurons", "--model", target_folder, *given, "--num-examples", 4)
    assert (status, err) == (2, f"pkt: error: {scores}: holds 3, num_examples asks for 4\n")
    status, _, err = pkt("neurons", "--model", source_folder, *given)
    assert (status, err) == (2, f"pkt: error: {scores}: made from target, {source_folder} is another model\n")


def test_the_first_of_equal_scores_is_the_better_one_and_nan_comes_before_all() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, torch.nan, 3.0, 3.0, -1.0]])
    assert _first(scores, 2).tolist() == [[1, 2], [1, 2]]
    ranked = scores.sort(descending=True, stable=True).indices
    for count in range(1, 6):
        assert torch.equal(_first(scores, count), ranked[:, :count])
