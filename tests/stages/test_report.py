from __future__ import annotations

import base64
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.artifacts import write_json
from pkt_stages.errors import UserError
from pkt_stages.stages.report import Difference, group_of, in_order, markdown, run, summarise, title_of

Run = Callable[..., tuple[int, str, str]]


def metrics(*runs: list[float], ids: str = "abcd", **settings: Any) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "ids": list(ids),
        "runs": [
            {"label": f"seed_{i}", "score": 100 * sum(r) / len(r), "stderr": 0.0, "correct": r}
            for i, r in enumerate(runs)
        ],
        "settings": {"backend": "hf", "template": "chat", **settings},
    }


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


def test_rows_come_in_groups() -> None:
    given = ["kd", "new", "control_random_rows", "postpkt_seeking_few", "postpkt_seeking", "unaligned_top_pca_random"]
    given += ["postpkt_random_few", "postpkt_random", "control_random_delta", "unaligned_seeking", "laten", "seqkd"]
    assert in_order(given) == [
        *("laten", "unaligned_seeking", "unaligned_top_pca_random"),
        *("postpkt_random", "postpkt_seeking", "postpkt_random_few", "postpkt_seeking_few"),
        *("seqkd", "kd", "control_random_delta", "control_random_rows", "new"),
    ]
    assert [group_of(m) for m in ("laten", "gkd", "new", "control_x")] == [
        "PrePKT",
        "Distillation",
        "Other",
        "Controls",
    ]


def test_titles() -> None:
    assert title_of("unaligned_top_pca_importance") == "grid top/PCA/importance"
    assert title_of("postpkt_pissa_few") == "LoRA, PiSSA init, align set"
    assert title_of("new_method") == "new_method"


def test_holm_runs_over_the_rows_of_a_task_and_decides_the_marks() -> None:
    """One row better on eight of eight examples (p 2/256), one equal, one unsure: three rows compared."""
    ids = "abcdefgh"
    found = {
        "s": {"gsm8k": metrics([1.0] * 8, ids=ids)},
        "t": {"gsm8k": metrics([0.0] * 8, ids=ids)},
        "kd": {"gsm8k": metrics([0.0] * 8, ids=ids)},
        "laten": {"gsm8k": metrics([1.0] * 2 + [0.0] * 6, ids=ids)},
    }
    rows = {row.slug: row.cells["gsm8k"].versus for row in run(found, "s", "t")}
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
    text = markdown(run(found, "s", "t"), ["gsm8k"])
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
    tasks = ["mmlu", "gsm8k", "humaneval", "mbpp"]
    draw = random.Random(0)

    def results(share: float, runs: int) -> dict[str, Any]:
        drawn = [[float(draw.random() < share) for _ in range(100)] for _ in range(runs)]
        return dict.fromkeys(tasks, metrics(*drawn, ids="x" * 100))

    names = ["postpkt_seeking_few", "control_random_neurons", "unaligned_random_embedding_importance", "kd"]
    found = {"source-chat": results(0.9, 1), "target-chat": results(0.4, 1)} | {n: results(0.6, 3) for n in names}
    text = markdown(run(found, "source-chat", "target-chat"), tasks)
    assert "▲" in text
    assert max(map(len, text.splitlines())) <= 120


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
    assert "report: 6 rows on 1 tasks ->" in printed
    page = (inputs / "r.html").read_text()
    labels = re.findall(r'<th scope="row">(.*?)</th>', page)
    methods = ["LaTen", "grid top/PCA/random", "LoRA, random init", "LaTen on random rows"]
    # Scores, differences, and LaTen's alignment (not its controls').
    assert labels == ["source: s", "target: t", *methods, "source: s", *methods, "GSM8K"]
    table = (inputs / "r.md").read_text()
    assert "| LaTen                | 2    | 62.5 ±23.9 (17.7) |" in table
    numbers = json.loads((inputs / "r.json").read_text())["s-t"]
    assert numbers["order"] == ["s", "t", "laten", "unaligned_top_pca_random", "postpkt_random", "control_random_rows"]
    assert numbers["rows"]["laten"]["cells"]["gsm8k"]["versus"]["difference"] == 12.5
    assert numbers["rows"]["t"]["cells"]["gsm8k"]["versus"] is None
    assert numbers["alignments"]["laten"]["gsm8k"]["validation_loss"] == [1.5, 1.25]

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
