"""What was known before a transfer beside what it brought: tables, rank correlations and a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.core.statistics import Recovery
from pkt_stages.errors import UserError
from pkt_stages.profile import Profile
from pkt_stages.reporting.diagnostics import Diagnostics, diagnostics, measured
from pkt_stages.reporting.ladder import Climb, Ladder
from pkt_stages.reporting.measure import NATS
from pkt_stages.reporting.reading import Folder
from tests.reporting.metrics import profile
from tests.reporting.test_ladder import CHANGES, report, write

Run = Callable[..., tuple[int, str, str]]
# By source: recovered share, and a residual that falls as it rises, a CKA that says nothing.
SOURCES = {"a": (1.0, 0.0), "b": (0.75, 0.25), "c": (0.5, 0.5), "d": (0.25, 0.75), "e": (0.0, 1.0)}


def sources(folder: Path, names: str) -> tuple[Profile, Ladder]:
    listed: dict[str, Any] = {"source": list(names), "transport_source": list(names)}
    listed |= {"selected": {"trained": list(names), "with_base": []}}
    found = profile(folder, **CHANGES | listed | {"models": [*(f"{name}-chat" for name in names), "t", "c"]})
    for name in names:
        alike = {"size_ratio": 1.0, "cka": 0.5, "procrustes": SOURCES[name][1], "neurons": SOURCES[name][0]}
        write_json(folder / f"analysis/correlate/{name}.json", {"diagnostics": alike})
    shares = {name: {"gsm8k": Recovery(SOURCES[name][0], 0.01)} for name in names}
    climbs = [
        Climb("own", "Ceilings", "ceiling", "own", False, shares, {}, {}),
        Climb("matched", "Transport", "matched transport", "matched", True, shares, {}, {}),
    ]
    return found, Ladder(NATS, list(names), ["gsm8k"], climbs)


def beside(folder: Path, found: Profile, ladder: Ladder | None) -> Diagnostics:
    made = diagnostics(measured(Folder(folder / "analysis"), found), ladder)
    assert made is not None
    return made


def test_rank_correlations(tmp_path: Path) -> None:
    found = beside(tmp_path, *sources(tmp_path, "abcde"))
    assert list(found.rows) == ["matched"]
    assert found.grid()[:2] == [
        [
            *("source", "parameters, source / target", "CKA of paired layers", "Procrustes residual"),
            *("neurons' best correlation", "matched transport, %"),
        ],
        ["a", "1.000", "0.500", "0.000", "1.000", "100 ±1"],
    ]
    label, size, cka, residual, neurons = found.ranks()[1]
    assert (label, size, cka) == ("matched transport", "-", "-")
    assert residual.startswith("-1.00 [-1.00, -1.00] p 0.0") and neurons.startswith("+1.00 [+1.00, +1.00] p 0.0")
    numbers = found.numbers()
    assert numbers["rank_correlations"]["matched"]["procrustes"]["p_value"] == pytest.approx(2 / 120, abs=0.005)
    assert numbers["by_source"]["e"]["procrustes"] == 1
    assert numbers == beside(tmp_path, *sources(tmp_path, "abcde")).numbers()
    (drawing,) = found.section().drawings
    assert drawing.image.png.startswith(b"\x89PNG") and drawing.image == found.section().drawings[0].image
    assert "Spearman's, over 5 sources" in found.markdown()


def test_equal_models_are_tied(tmp_path: Path) -> None:
    """Two sources that differ by rounding alone have one rank: of (1, 1, 2, 3, 4) with (1, 1, 2, 3, 4), and it is 1."""
    made, ladder = sources(tmp_path, "abcde")
    alike = {"size_ratio": 1.0, "cka": 0.5, "procrustes": 0.25 - 1e-9, "neurons": 1.0}
    write_json(tmp_path / "analysis/correlate/a.json", {"diagnostics": alike})
    shares = ladder.climbs[1].by_task
    shares["a"]["gsm8k"] = Recovery(0.75 - 1e-9, 0.01)  # type: ignore[index]
    found = beside(tmp_path, made, ladder).rows["matched"].ranks["procrustes"]
    assert found is not None and found.rho == pytest.approx(-1)


def test_few_sources_have_no_rank_correlation(tmp_path: Path) -> None:
    found = beside(tmp_path, *sources(tmp_path, "abcd"))
    assert len(found.grid()) == 5 and len(found.ranks()) == 1
    assert found.section().drawings == [] and "Spearman" not in found.markdown()


def test_without_an_oracle_the_diagnostics_stand_alone(tmp_path: Path) -> None:
    found = beside(tmp_path, sources(tmp_path, "abcde")[0], None)
    assert found.rows == {} and found.grid()[1] == ["a", "1.000", "0.500", "0.000", "1.000"]


def test_missing_metrics(tmp_path: Path) -> None:
    found, ladder = sources(tmp_path, "ab")
    (tmp_path / "analysis/correlate/b.json").unlink()
    with pytest.raises(UserError, match=r"correlate/b.json: no such metrics; the params list this row"):
        measured(Folder(tmp_path / "analysis"), found)
    partial = diagnostics(measured(Folder(tmp_path / "analysis", partial=True), found), ladder)
    assert partial is not None and [row[0] for row in partial.grid()] == ["source", "a"]


def test_they_stand_in_the_report(pkt: Run, tmp_path: Path) -> None:
    profile(tmp_path, **CHANGES)
    write(tmp_path)
    status, _, err = report(pkt, tmp_path)
    assert status == 0, err
    assert "### Before any transfer" in (tmp_path / "r.md").read_text()
    assert "Before any transfer" in (tmp_path / "r.html").read_text()
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["diagnostics"]["by_source"]["far"]["procrustes"] == 0.875
