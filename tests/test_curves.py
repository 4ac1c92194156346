from __future__ import annotations

from pathlib import Path

from pkt_stages.curves import curve_writer, numbers


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


def test_keys_are_no_paths(tmp_path: Path) -> None:
    """Ids of examples are keys, whatever they are."""
    ids = ["toy_1", "a b", "../../up", "/etc/x", "..", ".", "x" * 300, "x" * 301, "a\nb", "a\x00b", "é"]
    with curve_writer(tmp_path / "a" / "b") as log:
        log({"step": 1, "loss": {id: float(i) for i, id in enumerate(ids)}})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    below = tmp_path / "a" / "b" / "plots" / "metrics" / "loss"
    assert len([path for path in files if path.parent == below]) == len(ids)
    assert all(tmp_path / "a" / "b" in path.parents for path in files)
    assert list(numbers({"loss": {"toy_1": 1.0, "a b": 2.0, "v1.5": 3.0}})) == ["loss/toy_1", "loss/a b", "loss/v1.5"]
