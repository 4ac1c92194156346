from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.artifacts import write_json
from pkt_stages.errors import UserError
from pkt_stages.stages.report import Cell, markdown, run, summarise

Run = Callable[..., tuple[int, str, str]]


def metrics(*runs: list[float], ids: str = "abcd") -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "ids": list(ids),
        "runs": [{"label": str(i), "score": 25.0 * sum(r), "stderr": 0.0, "correct": r} for i, r in enumerate(runs)],
        "settings": {"backend": "hf", "template": "chat"},
    }


def test_one_run() -> None:
    cell = summarise(metrics([1, 0, 1, 1]), None)
    assert (cell.score, cell.n, cell.num_runs, cell.spread, cell.gain) == (75.0, 4, 1, None, None)
    assert cell.stderr == pytest.approx(100 * (0.1875 / 3) ** 0.5)  # sqrt(p (1 - p) / (n - 1))


def test_several_runs_and_the_paired_difference() -> None:
    cell = summarise(metrics([1, 1, 0, 1], [1, 0, 0, 1]), metrics([1, 0, 0, 0]))
    assert cell.score == 62.5
    assert cell.spread == pytest.approx(17.677669)
    assert cell.gain == pytest.approx(37.5)
    # Per-example differences 0, 0.5, 0, 1.
    assert cell.gain_stderr == pytest.approx(100 * (0.6875 / 3 / 4) ** 0.5)


def test_other_examples_than_the_targets_are_refused() -> None:
    with pytest.raises(UserError, match="task gsm8k: evaluated on other examples than the target; evaluate again"):
        summarise(metrics([1, 0, 1, 1]), metrics([1, 0, 1, 1], ids="abce"))


def test_the_table() -> None:
    found = {"s": {"gsm8k": metrics([1, 1, 1, 1])}, "t": {"gsm8k": metrics([1, 0, 0, 1])}}
    rows = run(found, "t", {"s": "source: s", "t": "target: t"})
    assert rows[1].cells["gsm8k"].gain is None
    assert markdown(rows, ["gsm8k"]) == (
        "| | GSM8K |\n|---|---|\n| source: s | 100.0 ± 0.0 (n 4) |\n| target: t | 50.0 ± 28.9 (n 4) |\n"
    )
    assert Cell(50, 1, 4, 3, 2.0, 1.5, 1.0).text() == "50.0 ± 1.0 (n 4, sd 2.0 over 3)"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    params = {"profile": "p", "source": ["s"], "target": ["t"], "task": ["gsm8k"], "transfer_method": ["laten"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    write_json(tmp_path / "e/s/gsm8k.json", metrics([1, 1, 1, 1]))
    write_json(tmp_path / "e/t/gsm8k.json", metrics([1, 0, 0, 1]))
    write_json(tmp_path / "e/laten/s-t/gsm8k.json", metrics([1, 1, 0, 1], [1, 0, 0, 1]))
    steps = [{"validation_loss": 1.5}, {"validation_loss": 1.25}]
    write_json(tmp_path / "a/s-t/gsm8k.json", {"chosen_step": 2, "validation_loss_without_delta": 2.0, "steps": steps})
    return tmp_path


def report(pkt: Run, folder: Path) -> tuple[int, str, str]:
    return pkt(
        *("report", "--params", folder / "params.yaml", "--evaluations", folder / "e", "--alignments", folder / "a"),
        *("--html", folder / "r.html", "--table", folder / "r.md", "--out", folder / "r.json"),
    )


def test_the_page_is_self_contained(pkt: Run, inputs: Path) -> None:
    status, printed, err = report(pkt, inputs)
    assert status == 0, err
    assert "report: 3 rows on 1 tasks ->" in printed
    page = (inputs / "r.html").read_text()
    assert "target + LaTen" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("data:image/png;base64,") == 1
    assert "target + LaTen | 62.5 ± 23.9 (n 4, sd 17.7 over 2)" in (inputs / "r.md").read_text()
    assert json.loads((inputs / "r.json").read_text())[0]["rows"][2]["cells"]["gsm8k"]["gain"] == 12.5

    first = {name: (inputs / name).read_bytes() for name in ("r.html", "r.md", "r.json")}
    report(pkt, inputs)
    assert first == {name: (inputs / name).read_bytes() for name in first}


def test_a_listed_row_without_metrics_is_an_error(pkt: Run, inputs: Path) -> None:
    (inputs / "e/laten/s-t/gsm8k.json").unlink()
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert "e/laten/s-t/gsm8k.json: no such metrics; the params list this row, run `dvc repro`" in err
    assert not (inputs / "r.html").exists()


def test_metrics_that_are_not_listed_are_named_and_left_out(pkt: Run, inputs: Path) -> None:
    write_json(inputs / "e/old/s-t/gsm8k.json", metrics([0, 0, 0, 0]))
    status, _, err = report(pkt, inputs)
    assert status == 0
    assert "warning: old/s-t/gsm8k.json: not listed in" in err
    assert "old" not in (inputs / "r.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: []", "source: expected a list with at least one name, found None"),
        ("[", "not readable YAML"),
    ],
)
def test_bad_params(pkt: Run, inputs: Path, text: str, message: str) -> None:
    (inputs / "params.yaml").write_text(text)
    status, _, err = report(pkt, inputs)
    assert status == 2
    assert message in err
