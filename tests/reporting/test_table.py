from __future__ import annotations

import random
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.reporting.measure import NATS, POINTS
from pkt_stages.reporting.paper import titles
from pkt_stages.reporting.table import MODELS, Difference, Head, markdown, summarise, table
from tests.reporting.metrics import TASKS, metrics

HEADS = [Head("s", MODELS, "source: s"), Head("t", MODELS, "target: t"), Head("laten", "PrePKT", "LaTen")]


def test_one_run() -> None:
    cell = summarise("laten", metrics([1, 0, 1, 1]), None, POINTS)
    assert (cell.mean, cell.n, cell.runs, cell.spread, cell.versus) == (75.0, 4, {"seed_0": 75.0}, None, None)
    assert cell.stderr == pytest.approx(100 * (0.1875 / 3) ** 0.5)  # sqrt(p (1 - p) / (n - 1))
    assert cell.text() == "75.0 ±25.0"


def test_a_likelihood_is_measured_in_nats_with_three_digits() -> None:
    found = metrics([1, 0, 1, 1], nats=[[-0.5, -1.0, -0.25, -0.25]])
    cell = summarise("laten", found, None, NATS)
    assert (cell.mean, cell.n, cell.runs, cell.spread) == (-0.5, 4, {"seed_0": -0.5}, None)
    assert cell.stderr == pytest.approx((0.375 / 3 / 4) ** 0.5)
    assert cell.text() == "-.500 ±.177"
    versus = summarise("laten", found, metrics([0, 0, 0, 0], nats=[[-1.0, -1.0, -1.0, -1.0]]), NATS).versus
    assert versus is not None
    # Differences 0.5, 0, 0.75, 0.75.
    assert (versus.difference, versus.test) == (0.5, "sign_flip")
    assert versus.text().startswith("+.500 ±.177 ")


def test_several_runs_and_the_paired_difference() -> None:
    cell = summarise("laten", metrics([1, 1, 0, 1], [1, 0, 0, 1]), metrics([1, 0, 0, 0]), POINTS)
    assert cell.mean == 62.5
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
        summarise("kd", one, metrics([1, 0, 1, 1], ids="abce"), POINTS)
    with pytest.raises(
        UserError,
        match=r"^row kd, task gsm8k: evaluated with backend hf, the target with vllm; evaluate both with",
    ):
        summarise("kd", one, metrics([1, 0, 1, 1], backend="vllm"), POINTS)


def test_code_that_ran_in_another_sandbox_is_shown_but_not_compared() -> None:
    """Its likelihood is, which no sandbox changes."""
    target = metrics([1, 0, 1, 1], sandbox="sandlock")
    found = {name: {"gsm8k": metrics([1, 1, 1, 1], sandbox=level)} for name, level in
             (("s", "sandlock"), ("laten", "rlimits"))} | {"t": {"gsm8k": target}}  # fmt: skip
    points, nats = (table(HEADS, found, "t", measure) for measure in (POINTS, NATS))
    assert [row.versus("gsm8k") is not None for row in points] == [True, False, False]
    assert [row.cells["gsm8k"].sandbox for row in points] == [None, None, "rlimits"]
    assert [row.versus("gsm8k") is not None for row in nats] == [True, False, True]
    text = markdown(points, nats, {"gsm8k": "GSM8K"})
    assert "| LaTen      | 1    | 100.0 ≥51.0 [rlimits] |\n" in text
    assert text.count("[level]: its generated code ran in a sandbox of another level than the target's") == 1
    for rows in (points, nats):
        del rows[2]
    assert "[level]" not in markdown(points, nats, {"gsm8k": "GSM8K"})


def test_how_answers_were_generated_matters_for_points_alone() -> None:
    """A likelihood is of the reference answer, which nobody generates; what computes it matters for both."""
    one, other = metrics([1, 0, 1, 1], max_new_tokens=8), metrics([1, 0, 1, 1], max_new_tokens=9)
    with pytest.raises(UserError, match=r"evaluated with max_new_tokens 8, the target with 9; evaluate both with"):
        summarise("kd", one, other, POINTS)
    assert summarise("kd", one, other, NATS).versus is not None
    for name, value in (("backend", "vllm"), ("template", "tulu"), ("dtype", "float16")):
        with pytest.raises(UserError, match=f"^row kd, task gsm8k: evaluated with {name} "):
            summarise("kd", one, metrics([1, 0, 1, 1], **{name: value}), NATS)
    with pytest.raises(UserError, match="evaluated on other examples than the target"):
        summarise("kd", one, metrics([1, 0, 1, 1], ids="abce"), NATS)


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
        row.slug: row.versus("gsm8k") for row in table([*HEADS, Head("kd", "Distillation", "KD")], found, "t", POINTS)
    }
    assert list(rows) == ["s", "t", "laten", "kd"]
    source, laten, kd = rows["s"], rows["laten"], rows["kd"]
    assert source is not None and laten is not None and kd is not None
    assert rows["t"] is None
    assert source.adjusted_p == pytest.approx(3 * 2 / 256)
    assert (laten.p_value, laten.adjusted_p, kd.adjusted_p) == (0.5, 1.0, 1.0)
    # Of eight examples only seven or eight wins and no loss are shown at .05 / 3, the strictest of Holm's levels:
    # d^8 + 8 d^7 (1 - d) = 0.8 at d = 0.8956.
    assert (source.text(), laten.text(), kd.text()) == (
        "+100.0 ±0.0 .023▲",
        "+25.0 ±16.4 ≥89.6",
        "+0.0 ±0.0 ≥89.6",
    )


def test_marks() -> None:
    def difference(points: float, adjusted_p: float, detectable: float | None = 4.44, digits: int = 1) -> str:
        return Difference(points, 1.0, 0, 0, 1, "mcnemar", 0.0, adjusted_p, detectable, digits).text()

    assert difference(-2.04, 0.0004) == "-2.0 ±1.0 <.001▼"
    assert difference(2.0, 0.049) == "+2.0 ±1.0 .049▲"
    assert difference(2.0, 0.05) == "+2.0 ±1.0 ≥4.4"
    assert difference(-0.01, 1) == "+0.0 ±1.0 ≥4.4"
    assert difference(2.0, 0.05, None) == "+2.0 ±1.0 none"
    assert difference(-0.0004, 1, 0.0444, 3) == "-4e-4 ±1.00 ≥.044"


def test_a_row_is_left_out_of_the_table_of_what_was_not_measured() -> None:
    found = {
        "s": {"gsm8k": metrics([1, 1, 1, 1])},
        "t": {"gsm8k": metrics([1, 0, 0, 1])},
        "laten": {"gsm8k": metrics([1, 1, 0, 1], answered=False)},
    }
    points, nats = ({row.slug: row for row in table(HEADS, found, "t", measure)} for measure in (POINTS, NATS))
    assert (points["laten"].cells, points["laten"].num_runs, points["laten"].versus("gsm8k")) == ({}, "", None)
    assert points["s"].cells and nats["laten"].cells["gsm8k"].mean == -1.25
    # Without an answer of the target nothing can be compared in points.
    found["t"] = {"gsm8k": metrics([1, 0, 0, 1], answered=False)}
    assert not any(row.cells for row in table(HEADS, found, "t", POINTS))
    text = markdown(table(HEADS, found, "t", POINTS), table(HEADS, found, "t", NATS), TASKS)
    assert "| score" not in text and "| log-likelihood |" in text


def test_the_tables() -> None:
    found = {
        "s": {"gsm8k": metrics([1, 1, 1, 1])},
        "t": {"gsm8k": metrics([1, 0, 0, 1])},
        "laten": {"gsm8k": metrics([1, 1, 0, 1], [1, 0, 0, 1])},
    }
    text = markdown(table(HEADS, found, "t", POINTS), table(HEADS, found, "t", NATS), TASKS)
    assert text.startswith(
        "| score      | runs | GSM8K (n 4)       |\n"
        "|------------|------|-------------------|\n"
        "| source: s  | 1    | 100.0 ≥51.0       |\n"
        "| target: t  | 1    | 50.0 ±28.9        |\n"
        "| **PrePKT** |      |                   |\n"
        "| LaTen      | 2    | 62.5 ±23.9 (17.7) |\n"
        "\nScore ± standard error over test examples (standard deviation over runs); where all or none are right,"
        "\nWilson's 95 % bound instead.\n"
        "\n| difference, in percent | GSM8K             |\n"
    )
    # Of four examples no test at .05 / 2 can show anything with right and wrong answers alone.
    assert "| source: s              | +50.0 ±28.9 none  |\n" in text
    assert "| LaTen                  | +12.5 ±12.5 ≥38.5 |\n" in text
    # The log-likelihoods of `metrics` are -1 and -2, so that their differences are those of the shares.
    assert (
        "| log-likelihood | GSM8K (n 4) |\n"
        "|----------------|-------------|\n"
        "| source: s      | -1.00 ±.000 |\n"
        "| target: t      | -1.50 ±.289 |\n"
        "| **PrePKT**     |             |\n"
        "| LaTen          | -1.38 ±.239 |\n"
    ) in text
    assert "| LaTen               | +.125 ±.125 ≥.385 |\n" in text


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
    points, nats = (table(heads, found, "target-chat", measure) for measure in (POINTS, NATS))
    text = markdown(points, nats, tasks)
    assert "▲" in text
    assert max(map(len, text.splitlines())) <= 120
