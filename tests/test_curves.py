from __future__ import annotations

from pathlib import Path

from pkt_stages.curves import curve_writer


def test_the_order_of_a_record_makes_no_difference(tmp_path: Path) -> None:
    """Records of a finished seed come back from JSON with sorted names, those of a running one as they were made."""
    written = []
    for name, record in (
        ("a", {"step": 1, "seed_0": {"loss": 2.0, "epoch": 1.0}}),
        ("b", {"seed_0": {"epoch": 1.0, "loss": 2.0}, "step": 1}),
    ):
        with curve_writer(tmp_path / name) as log:
            log(record)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()})
    assert written[0] == written[1]
    assert "metrics.json" in written[0]
