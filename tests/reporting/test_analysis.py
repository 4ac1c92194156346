from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.errors import UserError
from pkt_stages.profile import Profile
from pkt_stages.reporting.analysis import Compared, compared, sections
from pkt_stages.reporting.paper import titles
from pkt_stages.reporting.reading import Folder, check_nothing_else
from tests.reporting.metrics import TASKS
from tests.reporting.metrics import profile as write_profile

SITES = ("ffn_up", "ffn_down", "attn_v", "attn_o")
ANALYSED = {
    "task": ["gsm8k"],
    "source": ["s"],
    "methods": ["laten"],
    "seeking": ["postpkt_seeking"],
    "target_methods": ["postpkt_pissa"],
}
LISTED: dict[str, Any] = {
    "made_by": {
        "align": {"laten": {}},
        "finetune_seeking": {"postpkt_seeking": {}},
        "finetune": {"postpkt_pissa": {}},
    },
    "pairs": {"pair": {"first": "s-chat", "second": "t"}, "x": {"first": "x-base", "second": "x-chat"}},
    "analysed": ANALYSED,
}
NEURON = {"site": "ffn_down", "layer": 1, "neuron": 7, "score": 0.5, "tokens": [" a", "\n"]}
NEURONS = {"examples": [{"id": "e1", "predicted": "8", "neurons": [NEURON]}]}


def comparison(rows: int, columns: int, *, same: bool, adapter: bool = False) -> dict[str, Any]:
    values = [[0.5 if x == y else 0.1 for x in range(columns)] for y in range(rows)]
    overall = {"num_entries": 4, "min": -1.5, "max": 0.25, "rms": 0.125, "share_within": 0.75, "share_beyond": 0.25}
    ranges = {"edges": [-1.0, -0.1, 0.1, 1.0], "counts": [0, 1, 2, 1, 0], "overall": overall}
    ranges |= {"within": 0.002, "beyond": 0.005}
    lines = {
        f"{site}.{moment}.weight": [[0.5, 0.4], [0.25, 0.2]] for site in SITES for moment in ("initial", "trained")
    }
    return {
        "cka": dict.fromkeys(SITES, values),
        "params": {"num_texts": 8, "reduction": "mean"},
        "ranges": ranges if same else None,
        "similarity": lines if adapter else None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "analysis"
    write_json(made / "compare/models/pair.json", comparison(4, 2, same=False))
    write_json(made / "compare/models/x.json", comparison(2, 2, same=True))
    write_json(made / "compare/laten/s/gsm8k.json", comparison(2, 2, same=True))
    for below in ("postpkt_seeking/s", "postpkt_pissa"):
        write_json(made / f"compare/{below}/gsm8k.json", comparison(2, 2, same=True, adapter=True))
    return made


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return write_profile(tmp_path, **LISTED)


def read(folder: Folder, profile: Profile) -> list[Compared]:
    return compared(folder, profile, titles(method.name for method in profile.methods), TASKS)


def test_everything_that_is_listed_and_nothing_else(folder: Path, profile: Profile) -> None:
    found = Folder(folder)
    comparisons = read(found, profile)
    check_nothing_else([found], Path("params.yaml"))
    cka, similarity, deltas, neurons = sections(comparisons, [("t", NEURONS)])
    assert [row[0] for row in cka.grids[0].rows] == [
        "s-chat and t",
        "x-base and x-chat",
        "target before and after LaTen, GSM8K",
        "target before and after LoRA, Seeking init, GSM8K",
        "target before and after LoRA, PiSSA init, GSM8K",
    ]
    # Mean over all pairs of layers (2 of 8 on the diagonal), and over equal layers where there are as many.
    assert cka.grids[0].rows[0][1:] == ["0.20"] * 4 + [""] * 4
    assert cka.grids[0].rows[1][1:] == ["0.30"] * 4 + ["0.50"] * 4
    assert "Between s-chat and t it is 0.20 on average" in cka.text
    assert similarity.grids[0].rows[0] == ["LoRA, Seeking init, GSM8K: W, start", *["+0.375"] * 4]
    assert deltas.grids[0].rows[0] == ["x-chat - x-base", "-1.5000", "+0.2500", "1.25e-01", "75.0%", "25.0%"]
    assert neurons.grids[0].caption == "t, e1: predicts '8'"
    assert neurons.grids[0].rows == [["down", "1", "7", "+0.500", "␣a ⏎"]]
    drawings = [d for section in (cka, similarity, deltas) for d in section.drawings]
    assert len({d.name for d in drawings}) == len(drawings) == 5 + 2 + 4
    for drawing in drawings:
        width, height = struct.unpack(">II", drawing.image.png[16:24])
        assert width > 600 and height > 300
    again = sections(read(Folder(folder), profile), [])
    assert [d.image for section in again for d in section.drawings] == [d.image for d in drawings]


def test_a_missing_and_an_unlisted_file(folder: Path, profile: Profile) -> None:
    (folder / "compare/postpkt_pissa/gsm8k.json").rename(folder / "compare/old.json")
    with pytest.raises(UserError, match=r"postpkt_pissa/gsm8k\.json: no such metrics; the params list this row"):
        read(Folder(folder), profile)
    (folder / "compare/old.json").rename(folder / "compare/postpkt_pissa/gsm8k.json")
    write_json(folder / "compare/models/old.json", {})
    found = Folder(folder)
    read(found, profile)
    with pytest.raises(UserError, match=r"delete them: rm -r \S+/compare/models/old.json"):
        check_nothing_else([found], Path("params.yaml"))


def test_metrics_of_another_version_are_named(folder: Path, profile: Profile) -> None:
    write_json(folder / "compare/models/x.json", {"cka": {}, "params": {}})
    with pytest.raises(UserError, match=r"models/x\.json: not the metrics of this version, 'ranges' is missing; run"):
        read(Folder(folder), profile)


def test_what_is_not_listed_has_no_section(folder: Path, tmp_path: Path) -> None:
    pair = write_profile(tmp_path, pairs={"pair": LISTED["pairs"]["pair"]})
    assert [s.title for s in sections(read(Folder(folder), pair), [])] == ["Do the models compute alike? (CKA)"]
    assert sections(read(Folder(folder), write_profile(tmp_path)), []) == []


def test_with_two_sources_the_source_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "compare/laten/s").rename(folder / "compare/laten/s2")
    write_json(folder / "compare/laten/s/gsm8k.json", comparison(2, 2, same=True))
    sources = ["s", "s2"]
    both = write_profile(
        tmp_path,
        source=sources,
        seek_source=sources,
        models=["s-chat", "s2-chat", "t"],
        attributed=["s-chat", "s2-chat", "t"],
        made_by=LISTED["made_by"],
        analysed={"task": ["gsm8k"], "source": sources, "methods": ["laten"]},
    )
    assert [one.change for one in read(Folder(folder), both)] == ["LaTen, GSM8K, from s", "LaTen, GSM8K, from s2"]


def test_of_several_sources_those_are_shown_that_the_params_analyse(folder: Path, tmp_path: Path) -> None:
    both = write_profile(
        tmp_path,
        source=["s2", "s"],
        models=["s-chat", "s2-chat", "t"],
        attributed=["s-chat", "s2-chat", "t"],
        made_by=LISTED["made_by"],
        analysed={"task": ["gsm8k"], "source": ["s"], "methods": ["laten"]},
    )
    assert [one.change for one in read(Folder(folder), both)] == ["LaTen, GSM8K"]
