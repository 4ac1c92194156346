from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.artifacts import write_json
from tests.reporting.metrics import metrics

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    params = {
        "profile": "p",
        "source": ["s"],
        "target": ["t"],
        "models": ["s", "t"],
        "task": ["gsm8k"],
        "pair_methods": ["laten", "control_random_rows"],
        "grid_methods": ["unaligned_top_pca_random"],
        "target_methods": ["postpkt_random"],
        "aligned_methods": ["laten", "control_random_rows"],
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    write_json(tmp_path / "e/s/gsm8k.json", metrics([1, 1, 1, 1]))
    write_json(tmp_path / "e/t/gsm8k.json", metrics([1, 0, 0, 1]))
    write_json(tmp_path / "e/laten/s-t/gsm8k.json", metrics([1, 1, 0, 1], [1, 0, 0, 1]))
    write_json(tmp_path / "e/control_random_rows/s-t/gsm8k.json", metrics([1, 0, 0, 1], [1, 0, 0, 1]))
    write_json(tmp_path / "e/unaligned_top_pca_random/s-t/gsm8k.json", metrics([0, 0, 0, 0]))
    write_json(tmp_path / "e/postpkt_random/t/gsm8k.json", metrics([1, 1, 0, 1], [1, 0, 1, 1]))
    steps = [{"validation_loss": 1.5}, {"validation_loss": 1.25}]
    alignment = {"chosen_step": 2, "validation_loss_without_delta": 2.0, "steps": steps}
    write_json(tmp_path / "a/laten/s-t/gsm8k.json", alignment)
    write_json(tmp_path / "a/control_random_rows/s-t/gsm8k.json", alignment)
    return tmp_path


def report(pkt: Run, folder: Path) -> tuple[int, str, str]:
    return pkt(
        *("report", "--params", folder / "params.yaml", "--evaluations", folder / "e", "--alignments", folder / "a"),
        *("--html", folder / "r.html", "--table", folder / "r.md", "--out", folder / "r.json"),
    )


def test_tables_numbers_and_page(pkt: Run, inputs: Path) -> None:
    status, printed, err = report(pkt, inputs)
    assert status == 0, err
    assert "report: 6 rows on 1 tasks, 2 figures ->" in printed
    page = (inputs / "r.html").read_text()
    labels = re.findall(r'<th scope="row">(.*?)</th>', page)
    methods = ["LaTen", "grid top/PCA/random", "LoRA, random init", "LaTen on random rows"]
    claims = ["LaTen improves the target", "LaTen beats itself on random rows"]
    # Scores, differences, claims, and LaTen's alignment (not its controls').
    assert labels == ["source: s", "target: t", *methods, "source: s", *methods, *claims, "LaTen, GSM8K"]
    table = (inputs / "r.md").read_text()
    assert "| LaTen                | 2    | 62.5 ±23.9 (17.7) |" in table
    numbers = json.loads((inputs / "r.json").read_text())["s-t"]
    assert numbers["order"] == ["s", "t", "laten", "unaligned_top_pca_random", "postpkt_random", "control_random_rows"]
    assert numbers["rows"]["laten"]["cells"]["gsm8k"]["versus"]["difference"] == 12.5
    assert numbers["rows"]["t"]["cells"]["gsm8k"]["versus"] is None
    assert numbers["alignments"]["laten"]["gsm8k"]["validation_loss"] == [1.5, 1.25]
    (claim,), (control,) = numbers["claims"], numbers["controls"]
    assert claim["claim"] == "LaTen improves the target" and control["claim"] == "LaTen beats itself on random rows"
    assert (claim["tasks"]["gsm8k"]["difference"], claim["tasks"]["gsm8k"]["verdict"]) == (12.5, "not shown")

    first = {name: (inputs / name).read_bytes() for name in ("r.html", "r.md", "r.json")}
    report(pkt, inputs)
    assert first == {name: (inputs / name).read_bytes() for name in first}


def test_the_page_is_self_contained(pkt: Run, inputs: Path) -> None:
    assert report(pkt, inputs)[0] == 0
    page = (inputs / "r.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)|@import|url\(|<script|<link|https?://', page) == []
    images = re.findall(r'<img [^>]*alt="[^"]+"\s+src="data:image/png;base64,([^"]*)"', page)
    assert len(images) == page.count("<img") == 2  # the differences and LaTen's losses
    for image in images:
        data = base64.b64decode(image, validate=True)
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert width > 300 and height > 300


def test_a_second_source_has_its_own_table(pkt: Run, inputs: Path) -> None:
    params = yaml.safe_load((inputs / "params.yaml").read_text())
    params |= {"source": ["s", "t"], "target": ["t2"], "models": ["s", "t", "t2"]}
    params |= {"pair_methods": [], "aligned_methods": [], "grid_methods": []}
    (inputs / "params.yaml").write_text(yaml.safe_dump(params))
    for old in ("e/laten", "e/control_random_rows", "e/unaligned_top_pca_random", "a/laten", "a/control_random_rows"):
        (inputs / old / "s-t/gsm8k.json").unlink()
    (inputs / "e/postpkt_random/t").rename(inputs / "e/postpkt_random/t2")
    write_json(inputs / "e/t2/gsm8k.json", metrics([1, 0, 0, 0]))
    status, _, err = report(pkt, inputs)
    assert status == 0, err
    table = (inputs / "r.md").read_text()
    assert table.count("| LoRA, random init") == 4
    assert "### s to t2, in percent" in table and "### t to t2, in percent" in table


@pytest.mark.parametrize(
    "missing", ["e/laten/s-t/gsm8k.json", "e/postpkt_random/t/gsm8k.json", "e/s/gsm8k.json", "a/laten/s-t/gsm8k.json"]
)
def test_a_listed_row_without_metrics_is_an_error(pkt: Run, inputs: Path, missing: str) -> None:
    (inputs / missing).unlink()
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert f"{missing}: no such metrics; the params list this row, run `dvc repro`" in err
    assert not (inputs / "r.html").exists()


def test_metrics_that_are_not_listed_are_an_error(pkt: Run, inputs: Path) -> None:
    for path in ("e/old one/s-t/gsm8k.json", "e/old one/s-t/mmlu.json", "e/laten/s2-t/gsm8k.json", "e/s/mmlu.json"):
        write_json(inputs / path, metrics([0, 0, 0, 0]))
    status, _, err = report(pkt, inputs)
    assert status == 2
    e = inputs / "e"
    assert (
        f"{e}: holds metrics that {inputs}/params.yaml does not list; list their rows (again) or delete them:"
        f" rm -r {e}/laten/s2-t '{e}/old one' {e}/s/mmlu.json" in err
    )
    assert not (inputs / "r.html").exists()


def test_a_stale_alignment_is_an_error(pkt: Run, inputs: Path) -> None:
    write_json(inputs / "a/s-t/gsm8k.json", {})
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert f"rm -r {inputs}/a/s-t\n" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "source: expected a list with at least one name, found None"),
        ({"task": []}, "task: expected a list with at least one name, found []"),
        ({"pair_methods": "laten"}, "pair_methods: expected a list of names, found 'laten'"),
        ({"target_methods": ["laten"]}, "target_methods: laten is in pair_methods, too; list it once"),
    ],
)
def test_bad_params(pkt: Run, inputs: Path, change: dict[str, Any], message: str) -> None:
    params = yaml.safe_load((inputs / "params.yaml").read_text())
    (inputs / "params.yaml").write_text(yaml.safe_dump(params | change))
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert f"{inputs}/params.yaml: {message}" in err


@pytest.mark.parametrize(("text", "message"), [("[", "not readable YAML"), ("[]", "expected a mapping of params")])
def test_unreadable_params(pkt: Run, inputs: Path, text: str, message: str) -> None:
    (inputs / "params.yaml").write_text(text)
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert message in err
