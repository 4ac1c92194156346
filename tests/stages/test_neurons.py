from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pkt_stages import artifacts

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
