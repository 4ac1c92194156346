from __future__ import annotations

import random
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.reporting.paper import titles
from pkt_stages.reporting.table import MODELS, Difference, Head, markdown, summarise, table
from tests.reporting.metrics import TASKS, metrics

HEADS = [Head("s", MODELS, "source: s"), Head("t", MODELS, "target: t"), Head("laten", "PrePKT", "LaTen")]


def test_one_run() -> None:
    cell = summarise("laten", metrics([1, 0, 1, 1]), None)
    assert (cell.score, cell.n, cell.runs, cell.spread, cell.versus) == (75.0, 4, {"seed_0": 75.0}, None, None)
    assert cell.stderr == pytest.approx(100 * (0.1875 / 3) ** 0.5)  # sqrt(p (1 - p) / (n - 1))
    assert cell.text() == "75.0 ±25.0"


def test_several_runs_and_the_paired_difference() -> None:
    cell = summarise("laten", metrics([1, 1, 0, 1], [1, 0, 0, 1]), metrics([1, 0, 0, 0]))
    assert cell.score == 62.5
    assert cell.spread == pytest.approx(17.677669)
    assert cell.text() == "62.5 ±23.9 (17.7)"
    assert cell.versus is not None
    assert cell.versus.difference == pytest.approx(37.5)
    # Per-example differences 0, 0.5, 0, 1.
    assert cell.versus.stderr == pytest.approx(100 * (0.6875 / 3 / 4) ** 0.5)
    assert cell.versus.test == "sign_flip"


def test_what_cannot_be_compared_is_refused() -> None:
    one = metrics([1, 0, 1, 1])
    with pytest.raises(
        UserError, match=r"^row kd, task gsm8k: evaluated on other examples than the target; evaluate again$"
    ):
        summarise("kd", one, metrics([1, 0, 1, 1], ids="abce"))
    with pytest.raises(
        UserError,
        match=r"^row kd, task gsm8k: evaluated with backend hf, the target with vllm; evaluate both with",
    ):
        summarise("kd", one, metrics([1, 0, 1, 1], backend="vllm"))
    assert summarise("kd", one, metrics([1, 0, 1, 1], sandbox="rlimits")).versus is not None


def test_holm_runs_over_the_rows_of_a_task_and_decides_the_marks() -> None:
    """One row better on eight of eight examples (p 2/256), one equal, one unsure: three rows compared."""
    ids = "abcdefgh"
    found = {
        "s": {"gsm8k": metrics([1.0] * 8, ids=ids)},
        "t": {"gsm8k": metrics([0.0] * 8, ids=ids)},
        "kd": {"gsm8k": metrics([0.0] * 8, ids=ids)},
        "laten": {"gsm8k": metrics([1.0] * 2 + [0.0] * 6, ids=ids)},
    }
    rows = {
        row.slug: row.cells["gsm8k"].versus for row in table([*HEADS, Head("kd", "Distillation", "KD")], found, "t")
    }
    assert list(rows) == ["s", "t", "laten", "kd"]
    source, laten, kd = rows["s"], rows["laten"], rows["kd"]
    assert source is not None and laten is not None and kd is not None
    assert rows["t"] is None
    assert source.adjusted_p == pytest.approx(3 * 2 / 256)
    assert (laten.p_value, laten.adjusted_p, kd.adjusted_p) == (0.5, 1.0, 1.0)
    assert (source.text(), laten.text(), kd.text()) == (
        "+100.0 ±0.0 .023▲",
        "+25.0 ±16.4 1.000",
        "+0.0 ±0.0 1.000",
    )


def test_marks() -> None:
    def difference(points: float, adjusted_p: float) -> str:
        return Difference(points, 1.0, 0, 0, 1, "mcnemar", 0.0, adjusted_p).text()

    assert difference(-2.04, 0.0004) == "-2.0 ±1.0 <.001▼"
    assert difference(2.0, 0.049) == "+2.0 ±1.0 .049▲"
    assert difference(2.0, 0.05) == "+2.0 ±1.0 .050"
    assert difference(-0.01, 1) == "+0.0 ±1.0 1.000"


def test_the_tables() -> None:
    found = {
        "s": {"gsm8k": metrics([1, 1, 1, 1])},
        "t": {"gsm8k": metrics([1, 0, 0, 1])},
        "laten": {"gsm8k": metrics([1, 1, 0, 1], [1, 0, 0, 1])},
    }
    text = markdown(table(HEADS, found, "t"), TASKS)
    assert text.startswith(
        "| score      | runs | GSM8K (n 4)       |\n"
        "|------------|------|-------------------|\n"
        "| source: s  | 1    | 100.0 ±0.0        |\n"
        "| target: t  | 1    | 50.0 ±28.9        |\n"
        "| **PrePKT** |      |                   |\n"
        "| LaTen      | 2    | 62.5 ±23.9 (17.7) |\n"
        "\nScore ± standard error over test examples (standard deviation over runs).\n"
        "\n| difference to the target | GSM8K             |\n"
    )
    assert "| LaTen                    | +12.5 ±12.5 1.000 |\n" in text


def test_the_tables_fit_a_terminal() -> None:
    tasks = {"mmlu": "MMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval", "mbpp": "MBPP"}
    draw = random.Random(0)

    def results(share: float, runs: int) -> dict[str, Any]:
        drawn = [[float(draw.random() < share) for _ in range(100)] for _ in range(runs)]
        return dict.fromkeys(tasks, metrics(*drawn, ids="x" * 100))

    names = ["postpkt_seeking_few", "control_random_neurons", "unaligned_random_embedding_importance", "kd"]
    found = {"source-chat": results(0.9, 1), "target-chat": results(0.4, 1)} | {n: results(0.6, 3) for n in names}
    heads = [Head(model, MODELS, f"source: {model}") for model in ("source-chat", "target-chat")]
    heads += [Head(name, "any", title) for name, title in titles(names).items()]
    text = markdown(table(heads, found, "target-chat"), tasks)
    assert "▲" in text
    assert max(map(len, text.splitlines())) <= 120
