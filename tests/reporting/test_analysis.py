from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from pkt_stages.artifacts import write_json
from pkt_stages.errors import UserError
from pkt_stages.reporting.analysis import sections
from pkt_stages.reporting.reading import Folder

SITES = ("ffn_up", "ffn_down", "attn_v", "attn_o")
SETTINGS: dict[str, Any] = {
    "source": ["s"],
    "target": ["t"],
    "models": ["t"],
    "sft": ["x"],
    "analysed_task": ["gsm8k"],
    "analysed_pair_methods": ["laten", "postpkt_seeking"],
    "analysed_seeking_methods": ["postpkt_seeking"],
    "analysed_target_methods": ["postpkt_pissa"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def cka(rows: int, columns: int) -> dict[str, Any]:
        values = [[0.5 if x == y else 0.1 for x in range(columns)] for y in range(rows)]
        return {"cka": dict.fromkeys(SITES, values), "params": {"num_texts": 8, "reduction": "mean"}}

    write_json(tmp_path / "cka/s-t.json", cka(4, 2))
    ranges = {"num_entries": 4, "min": -1.5, "max": 0.25, "rms": 0.125, "share_within": 0.75, "share_beyond": 0.25}
    deltas = {"edges": [-1.0, -0.1, 0.1, 1.0], "counts": [0, 1, 2, 1, 0], "overall": ranges}
    deltas |= {"within": 0.002, "beyond": 0.005}
    write_json(tmp_path / "deltas/x.json", deltas)
    write_json(tmp_path / "cka/x.json", cka(2, 2))
    lines = {
        f"{s}.{m}.{a}": [[0.5, 0.4], [0.25, 0.2]] for s in SITES for m in ("initial", "trained") for a in ("weight",)
    }
    for below in ("laten/s-t/gsm8k", "postpkt_seeking/s-t/gsm8k", "postpkt_pissa/t/gsm8k"):
        write_json(tmp_path / f"cka/{below}.json", cka(2, 2))
        write_json(tmp_path / f"deltas/{below}.json", deltas)
        if not below.startswith("laten"):
            write_json(tmp_path / f"similarity/{below}.json", {"similarity": lines})
    neuron = {"site": "ffn_down", "layer": 1, "neuron": 7, "score": 0.5, "tokens": [" a", "\n"]}
    example = {"id": "e1", "predicted": "8", "neurons": [neuron]}
    write_json(tmp_path / "neurons/t/gsm8k.json", {"examples": [example]})
    return tmp_path


def test_everything_that_is_listed_and_nothing_else(folder: Path) -> None:
    read = Folder(folder)
    cka, similarity, deltas, neurons = sections(read, SETTINGS)
    read.check_nothing_else(Path("params.yaml"))
    assert [row[0] for row in cka.grids[0].rows] == [
        "s and t",
        "x: base and chat",
        "target before and after LaTen, GSM8K",
        "target before and after LoRA, Seeking init, GSM8K",
        "target before and after LoRA, PiSSA init, GSM8K",
    ]
    # Mean over all pairs of layers (2 of 8 on the diagonal), and over equal layers where there are as many.
    assert cka.grids[0].rows[0][1:] == ["0.20"] * 4 + [""] * 4
    assert cka.grids[0].rows[1][1:] == ["0.30"] * 4 + ["0.50"] * 4
    assert similarity.grids[0].rows[0] == ["LoRA, Seeking init, GSM8K: W, start", *["+0.375"] * 4]
    assert deltas.grids[0].rows[0] == ["x: chat - base", "-1.5000", "+0.2500", "1.25e-01", "75.0%", "25.0%"]
    assert neurons.grids[0].caption == "t, e1: predicts '8'"
    assert neurons.grids[0].rows == [["down", "1", "7", "+0.500", "␣a ⏎"]]
    drawings = [d for section in (cka, similarity, deltas) for d in section.drawings]
    assert len({d.name for d in drawings}) == len(drawings) == 5 + 2 + 4
    for drawing in drawings:
        width, height = struct.unpack(">II", drawing.png[16:24])
        assert width > 600 and height > 300
    again = sections(Folder(folder), SETTINGS)
    assert [d.png for section in again for d in section.drawings] == [d.png for d in drawings]


def test_a_missing_and_an_unlisted_file(folder: Path) -> None:
    (folder / "similarity/postpkt_pissa/t/gsm8k.json").rename(folder / "similarity/old.json")
    with pytest.raises(UserError, match=r"postpkt_pissa/t/gsm8k\.json: no such metrics; the params list this row"):
        sections(Folder(folder), SETTINGS)
    (folder / "similarity/old.json").rename(folder / "similarity/postpkt_pissa/t/gsm8k.json")
    write_json(folder / "deltas/old.json", {})
    read = Folder(folder)
    sections(read, SETTINGS)
    with pytest.raises(UserError, match=r"delete them: rm -r \S+/deltas/old.json"):
        read.check_nothing_else(Path("params.yaml"))


def test_without_methods_the_models_are_compared(folder: Path) -> None:
    nothing = {name: [] for name in SETTINGS if name.startswith("analysed") or name == "sft"}
    assert [s.title for s in sections(Folder(folder), SETTINGS | nothing)] == ["Do the models compute alike? (CKA)"]
