"""What was recovered: shares of a known gap by row and source, in words, tables, a figure and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.core.statistics import Recovery
from pkt_stages.reporting.figures import Image, Line
from pkt_stages.reporting.ladder import Climb, Ladder, drawings, ladder, markdown, sentences
from pkt_stages.reporting.measure import NATS, POINTS
from pkt_stages.reporting.paper import titles
from pkt_stages.reporting.reading import Folder
from pkt_stages.reporting.result import result
from tests.reporting.metrics import metrics, params, profile

Run = Callable[..., tuple[int, str, str]]
EIGHT = "abcdefgh"
MADE_BY = {
    "oracle": {"own": {"code": "own"}},
    "transport": {"matched": {"code": "matched"}, "control_random_isometry": {"code": "matched", "maps": "random"}},
    "finetune": {"postpkt_random": {}},
}
CHANGES: dict[str, Any] = {
    "source": ["copy", "far"],
    "models": ["copy-chat", "far-chat", "t", "c"],
    "attributed": [],
    "oracle": "c",
    "seek_source": [],
    "teacher": [],
    "transport_source": ["copy", "far"],
    "selected": {"trained": ["copy", "far"], "with_base": []},
    "made_by": MADE_BY,
}
TARGET = [-2.0, -3.0, -2.5, -2.0, -3.0, -2.5, -2.0, -3.0]
ORACLE = [-1.0, -1.5, -0.5, -1.5, -1.0, -1.5, -1.0, -1.5]


def likely(*runs: list[float], scales: dict[str, float] | None = None, answered: bool = True) -> dict[str, Any]:
    """Metrics with these log-likelihoods; right where they are above -1.2."""
    made = metrics(*[[float(x > -1.2) for x in run] for run in runs], nats=list(runs), ids=EIGHT, answered=answered)
    if scales is not None:
        made |= {"scales": scales, "unscaled": likely(*runs, answered=False)}
    return made


def between(share: float) -> list[float]:
    return [t + share * (c - t) for t, c in zip(TARGET, ORACLE, strict=True)]


def write(folder: Path) -> Path:
    e = folder / "r/evaluate"
    rows = {
        "copy-chat": likely(ORACLE),
        "far-chat": likely([0.0] * 8),
        "t": likely(TARGET),
        "c": likely(ORACLE),
        "own": likely(ORACLE),
        "postpkt_random": likely(between(0.4)),
        "matched/copy": likely(ORACLE, scales={"delta": 1.0}),
        "matched/far": likely(between(-0.5), scales={"delta": 0.05}),
        "control_random_isometry/copy": likely(between(0.1), between(-0.1), scales={"seed_0": 0.05, "seed_1": 0.05}),
        "control_random_isometry/far": likely(between(-1), between(-1), scales={"seed_0": 0.05, "seed_1": 0.05}),
    }
    for row, made in rows.items():
        write_json(e / row / "gsm8k.json", made)
    for source, residual in (("copy", 0.0), ("far", 0.875)):
        alike = {"size_ratio": 2.5, "cka": 0.5, "procrustes": residual, "neurons": 0.75}
        write_json(folder / f"r/analysis/correlate/{source}.json", {"diagnostics": alike})
    return folder / "r"


def ladders(folder: Path) -> list[Ladder]:
    found, evaluated = profile(folder, **CHANGES), Folder(write(folder) / "evaluate")
    names = titles([method.name for method in found.methods])
    results = [result(evaluated, Folder(folder), found, source, names, []) for source in found.sources["source"]]
    oracle = evaluated.by_task(["gsm8k"], "c")
    made = [ladder(found, results, oracle, measure) for measure in (NATS, POINTS)]
    return [one for one in made if one is not None]


def test_shares_of_the_gap(tmp_path: Path) -> None:
    nats = ladders(tmp_path)[0]
    found = {climb.slug: climb for climb in nats.climbs}
    # Ceilings first, controls last.
    assert list(found) == ["own", "matched", "postpkt_random", "control_random_isometry"]
    shares = {slug: [climb.mean(source) for source in nats.sources] for slug, climb in found.items()}
    expected = {"own": (1, 1), "matched": (1, -0.5), "postpkt_random": (0.4, 0.4), "control_random_isometry": (0, -1)}
    for slug, values in expected.items():
        assert [one.share for one in shares[slug] if one is not None] == pytest.approx(values)
    # Exact shares have no error of their own; a control's is that of its seeds.
    assert shares["matched"][0] is not None and shares["matched"][0].stderr == pytest.approx(0, abs=1e-9)
    control = shares["control_random_isometry"][0]
    assert control is not None and control.stderr == pytest.approx(0.1)  # sd 0.141 over sqrt(2)
    numbers = nats.numbers()["matched"]
    assert numbers["scales"] == {"copy": {"delta": 1.0}, "far": {"delta": 0.05}}
    assert numbers["unscaled"]["copy"]["gsm8k"][0] == pytest.approx(1)


def test_words_tables_and_figure(tmp_path: Path) -> None:
    both = ladders(tmp_path)
    assert sentences(both[0]) == [
        (
            "copy",
            "matched transport 100 % (above 0 on 1 of 1 tasks). Controls: random isometries 0 % (above 0"
            " on 0 of 1 tasks).",
        ),
        (
            "far",
            "matched transport -50 % (above 0 on 0 of 1 tasks). Controls: random isometries -100 %"
            " (above 0 on 0 of 1 tasks).",
        ),
    ]
    assert both[0].grid()[1:3] == [
        ["ceiling: own training", "100.0 ±0.0", "100.0 ±0.0"],
        ["matched transport", "100.0 ±0.0", "-50.0 ±0.0"],
    ]
    assert both[1].grid("gsm8k", unscaled=True) == [["recovered, %", "copy", "far"]]  # no answers at factor 1
    text = markdown(both, sentences(both[0]))
    assert text.startswith(
        "### What was recovered\n\n- copy, in nats: matched transport 100 % (above 0 on 1 of 1 tasks)."
    )
    assert "\n\nRecovered gap, nats, mean over tasks\n\n| recovered, %" in text
    assert "Recovered gap, points, mean over tasks" in text
    (drawn,) = drawings(both)
    assert drawn.image.png.startswith(b"\x89PNG") and drawn.image == drawings(both)[0].image


def test_many_rows_stand_in_panels_of_families(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}

    def draw(sources: list[str], panels: dict[str, list[Line]], *, many: bool = False) -> Image:
        assert many and sources == ["s"]
        seen.update({title: [line.label for line in lines] for title, lines in panels.items()})
        return Image()

    monkeypatch.setattr("pkt_stages.reporting.figures.ladder", draw)
    gap: dict[str, dict[str, Recovery | None]] = {"s": {"gsm8k": Recovery(0.5, 0.1)}}
    rows = [("Ceilings", "own", "own"), *(("Transport", f"{kind}{i}", kind) for kind in "abc" for i in range(4))]
    rows.append(("Controls", "control of b", "b"))
    climbs = [Climb(name, group, name, family, group != "Ceilings", gap, {}, {}) for group, name, family in rows]
    (drawn,) = drawings([Ladder(NATS, ["s"], ["gsm8k"], climbs)])
    assert drawn.name == "recovered_gap_by_source_nats" and drawn.caption.startswith("In nats. Recovered gap")
    assert seen == {
        "in nats, 1 of 3": ["own", "a0", "a1", "a2", "a3"],
        "in nats, 2 of 3": ["own", "b0", "b1", "b2", "b3", "control of b"],
        "in nats, 3 of 3": ["own", "c0", "c1", "c2", "c3"],
    }


def test_a_task_without_a_gap_has_no_share(tmp_path: Path) -> None:
    folder = write(tmp_path)
    write_json(folder / "evaluate/c/gsm8k.json", likely(TARGET))
    found, evaluated = profile(tmp_path, **CHANGES), Folder(folder / "evaluate")
    names = titles([method.name for method in found.methods])
    results = [result(evaluated, Folder(tmp_path), found, source, names, []) for source in found.sources["source"]]
    made = ladder(found, results, evaluated.by_task(["gsm8k"], "c"), NATS)
    assert made is not None and len(made.grid()) == 1


def report(pkt: Run, folder: Path) -> tuple[int, str, str]:
    return pkt(
        *("report", "--params", folder / "params.yaml", "--results", folder / "r", "--figures", folder / "figures"),
        *("--html", folder / "r.html", "--table", folder / "r.md", "--out", folder / "r.json"),
    )


def test_the_page_begins_with_it(pkt: Run, tmp_path: Path) -> None:
    profile(tmp_path, **CHANGES)
    write(tmp_path)
    status, _, err = report(pkt, tmp_path)
    assert status == 0, err
    page = (tmp_path / "r.html").read_text()
    assert page.index("What was recovered") < page.index("copy to t") < page.index("far to t")
    assert "<b>copy</b>, in nats: matched transport 100 %" in page
    assert re.findall("^### (.*)", (tmp_path / "r.md").read_text(), re.M)[:2] == ["In short", "What was recovered"]
    assert (tmp_path / "figures/recovered_gap_by_source.png").is_file()
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["recovered"]["nats"]["matched"]["recovered"]["far"]["gsm8k"][0] == pytest.approx(-0.5)


def test_likelihood_alone_makes_a_report(pkt: Run, tmp_path: Path) -> None:
    """Without any answer there are no scores, and tables and figures of the likelihood alone."""
    profile(tmp_path, **CHANGES)
    folder = write(tmp_path)
    for path in (folder / "evaluate").rglob("*.json"):
        made = json.loads(path.read_text())
        for run in made["runs"]:
            del run["correct"], run["score"], run["stderr"]
        write_json(path, made)
    status, _, err = report(pkt, tmp_path)
    assert status == 0, err
    table, page = (tmp_path / "r.md").read_text(), (tmp_path / "r.html").read_text()
    assert "log-likelihood" in table and "| score" not in table
    assert "Answer likelihood" in page and "<h3>Scores</h3>" not in page
    assert "points" not in json.loads((tmp_path / "r.json").read_text())["recovered"]


def test_without_an_oracle_there_is_no_gap(pkt: Run, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(params(models=["s-chat", "t"])))
    for model in ("s-chat", "t"):
        write_json(tmp_path / f"r/evaluate/{model}/gsm8k.json", likely(TARGET))
    status, _, err = report(pkt, tmp_path)
    assert status == 0, err
    assert "What was recovered" not in (tmp_path / "r.html").read_text()
