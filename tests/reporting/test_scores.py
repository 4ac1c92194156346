"""What is taken away: DVC's flat metrics, the CSV file, the LaTeX table."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas
import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.profile import Profile
from pkt_stages.reporting.measure import POINTS
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.result import Result, result
from pkt_stages.reporting.scores import COLUMNS, flat, latex, tidy
from tests.reporting.metrics import metrics, profile

MADE_BY = {"align": {"laten": {}}, "finetune": {"postpkt_random": {}}, "control": {"control_random_delta": {}}}
ALIGNMENT = {"params": {}, "selection": {}, "chosen_step": 1, "steps": [], "validation_loss_without_delta": 2.0}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Profile, list[Result]]:
    found = profile(tmp_path, made_by=MADE_BY)
    write_json(tmp_path / "analysis/align/laten/s/gsm8k.json", ALIGNMENT)
    rows = {
        "s-chat": metrics([1, 1, 1, 1]),
        "t": metrics([0, 0, 0, 0]),
        "laten/s": metrics([1, 1, 0, 1], [1, 0, 0, 1]),
        "postpkt_random": metrics([1, 1, 0, 1], answered=False),
        "control_random_delta/s": metrics([0, 0, 0, 1]),
    }
    for row, one in rows.items():
        write_json(tmp_path / f"evaluate/{row}/gsm8k.json", one)
    names = {"laten": "LaTen, 50 % & more_", "postpkt_random": "LoRA", "control_random_delta": "random"}
    folders = Folder(tmp_path / "evaluate"), Folder(tmp_path / "analysis")
    return found, [result(*folders, found, "s", names, [])]


def test_dvc_sees_a_score_per_row_source_and_task(made: tuple[Profile, list[Result]]) -> None:
    assert flat(*made) == {
        "s-chat": {"gsm8k": 100.0},
        "t": {"gsm8k": 0.0},
        "laten": {"s": {"gsm8k": 62.5}},
        "postpkt_random": {"gsm8k_nats": -1.25},
        "control_random_delta": {"s": {"gsm8k": 25.0}},
    }


def test_pandas_reads_the_csv_file_without_options(made: tuple[Profile, list[Result]]) -> None:
    found, results = made
    frame = pandas.read_csv(io.StringIO(tidy(results, found.tasks)))
    assert list(frame.columns) == COLUMNS
    laten = frame[frame.method == "laten"].set_index("run")
    assert list(laten.index) == ["mean", "seed_0", "seed_1"]
    assert list(laten.points) == [62.5, 75.0, 50.0] and list(laten.nats) == [-1.375, -1.25, -1.5]
    mean, cell = laten.loc["mean"], results[0].named["laten"].cells["gsm8k"]
    versus = cell.versus
    assert versus is not None
    assert (mean.points_difference, mean.points_test, mean.n) == (62.5, "sign_flip", 4)
    for name, value in {
        "low": versus.low,
        "high": versus.high,
        "p": versus.p_value,
        "p_holm": versus.adjusted_p,
    }.items():
        assert mean[f"points_{name}"] == pytest.approx(value, rel=1e-5)
    assert laten.loc["seed_0"][["points_difference", "nats_p"]].isna().all()
    # A row without scores has likelihoods alone, and the target has nothing to be compared with.
    lora, target = (frame[(frame.method == name) & (frame.run == "mean")].iloc[0] for name in ("postpkt_random", "t"))
    assert pandas.isna(lora.points) and lora.nats == -1.25 and pandas.isna(target.points_difference)
    assert len(frame) == 5 + 4 * 1 + 2


def test_the_latex_table_is_well_formed(made: tuple[Profile, list[Result]]) -> None:
    text = latex(made[1], {"gsm8k": "GSM8K"})
    code = re.sub(r"(?<!\\)%.*", "", text)
    assert text.isascii()
    # Every brace, environment and dollar is closed, and every row has a cell per column.
    unescaped = code.replace("\\{", "").replace("\\}", "").replace("\\$", "")
    assert unescaped.count("{") == unescaped.count("}") and unescaped.count("$") % 2 == 0
    assert re.findall(r"\\(begin|end)\{(\w+)\}", code) == [("begin", "tabular"), ("end", "tabular")]
    assert [rule for rule in ("top", "bottom") if code.count(f"\\{rule}rule") == 1] == ["top", "bottom"]
    rows = [line for line in code.splitlines() if line.endswith("\\\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows if "multicolumn" not in row} == {1}
    assert "LaTen, 50 \\% \\& more\\_ & $62.5 \\pm 23.9$ \\\\" in rows
    assert "target: t & $0.0$ [$\\leq 49.0$] \\\\" in rows and "LoRA & -- \\\\" in rows


def test_wilson_s_bound_stands_where_all_or_none_are_right(made: tuple[Profile, list[Result]]) -> None:
    named = made[1][0].named
    # 3.8415 / (4 + 3.8415): with z squared, the bound of none of four.
    assert named["target"].cells["gsm8k"].bounds == pytest.approx((0, 100 * 3.8415 / 7.8415), abs=0.01)
    assert named["source"].cells["gsm8k"].text() == "100.0 ≥51.0"
    assert named["laten"].cells["gsm8k"].bounds is None
    assert POINTS.name == "points"
