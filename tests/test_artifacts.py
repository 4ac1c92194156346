from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pkt_stages import artifacts
from pkt_stages.errors import UserError

KIND = artifacts.Kind(
    "hypernetwork",
    "pkt align",
    {
        "{site}.0.weight": artifacts.TensorSpec(("float32",), ("d_hidden", "d_source")),
        "{site}.2.weight": artifacts.TensorSpec(("float32",), ("d_target", "d_hidden")),
    },
)


def hypernetwork(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"ffn_up.0.weight": torch.full((3, 4), value), "ffn_up.2.weight": torch.full((2, 3), value)}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "h.safetensors"
    artifacts.save(path, KIND, hypernetwork(0.5), {"step": 3})
    loaded = artifacts.load(path, KIND)
    assert loaded.meta["step"] == 3
    assert loaded.shapes == {"ffn_up.0.weight": (3, 4), "ffn_up.2.weight": (2, 3)}
    assert torch.equal(loaded["ffn_up.2.weight"], torch.full((2, 3), 0.5))
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    """In two processes with different hash seeds, and whatever the order of the metadata."""
    code = (
        "import sys, torch; from pathlib import Path; from pkt_stages import artifacts\n"
        "keys = {'b', 'a', 'zz', 'model', 'params', 'x1', 'x2'}\n"
        "w = {'ffn_up.0.weight': torch.ones(3, 4), 'ffn_up.2.weight': torch.ones(2, 3)}\n"
        "artifacts.save(Path(sys.argv[1]), artifacts.MAPPING, w, {k: k for k in keys})\n"
    )
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": torch.ones(1)}, "unexpected tensor other in a hypernetwork artifact"),
        ({"ffn_up.0.weight": torch.ones(3, 4).half()}, "tensor ffn_up.0.weight: expected float32, found float16"),
        (
            {"ffn_up.0.weight": torch.ones(3)},
            r"tensor ffn_up.0.weight: expected dimensions \[d_hidden, d_source\], found shape \[3\]",
        ),
        ({"ffn_up.2.weight": torch.ones(2, 5)}, "tensor ffn_up.2.weight: d_hidden is 5, but 3 in ffn_up.0.weight"),
    ],
)
def test_tensors_that_do_not_fit_their_kind_are_a_programmers_error(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        artifacts.save(tmp_path / "h.safetensors", KIND, hypernetwork() | change, {})


def test_dimensions_of_the_same_layer_must_agree(tmp_path: Path) -> None:
    """union_{module}_{layer}: rows and neurons of one layer belong together, other layers are free."""
    tensors = {
        f"{name}.{layer}": torch.ones(size, 4)
        for layer, size in ((0, 2), (1, 3))
        for name in ("ffn_up", "ffn_down", "attn_v", "attn_o")
    }
    tensors |= {f"neurons.{m}.{layer}": torch.arange(n) for m in ("ffn", "attn") for layer, n in ((0, 2), (1, 3))}
    artifacts.save(tmp_path / "r.safetensors", artifacts.SOURCE_ROWS, tensors, {})
    tensors["neurons.attn.1"] = torch.arange(2)
    with pytest.raises(AssertionError, match=r"union_attn_1 is 2, but 3 in attn_o\.1"):
        artifacts.save(tmp_path / "r.safetensors", artifacts.SOURCE_ROWS, tensors, {})


def test_nan_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    with pytest.raises(UserError, match=r"tensor ffn_up\.0\.weight holds NaN or infinity; not written"):
        artifacts.save(path, KIND, hypernetwork(float("nan")), {})
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h.safetensors"
    artifacts.save(path, KIND, hypernetwork(1.0), {})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"h\.safetensors: the disk is full; free space and run again"):
        artifacts.save(path, KIND, hypernetwork(2.0), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """A living process keeps its own: a killed DVC can leave its stage running."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".m.json.{gone.pid}.tmp"
    others = [tmp_path / name for name in (f".m.json.{os.getppid()}.tmp", ".m.json.x.tmp", f".n.json.{gone.pid}.tmp")]
    for path in (left, *others):
        path.write_text("half")
    artifacts.write_json(tmp_path / "m.json", {})
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "m.json", *others])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; expected a selection artifact, made by `pkt select`"):
        artifacts.load(tmp_path / "none.safetensors", artifacts.SELECTION)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b'\x10\0\0\0\0\0\0\0{"a": 1}        '])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        artifacts.load(path, artifacts.DELTA)
    assert "\n" not in str(caught.value)
    assert "make it again with `pkt inject`" in str(caught.value)


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    artifacts.save(path, KIND, hypernetwork(), {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        artifacts.load(path, KIND)


def test_wrong_kind_foreign_and_old_files(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    artifacts.save(path, KIND, hypernetwork(), {})
    with pytest.raises(UserError, match=r"expected a delta artifact \(made by `pkt inject`\), found hypernetwork"):
        artifacts.load(path, artifacts.DELTA)
    save_file(hypernetwork(), path)
    with pytest.raises(UserError, match="without this project's metadata; expected a hypernetwork artifact"):
        artifacts.load(path, KIND)
    save_file(hypernetwork(), path, metadata={"pkt": '{"kind": "hypernetwork", "schema_version": 0}'})
    with pytest.raises(UserError, match="expected schema version 1, found 0"):
        artifacts.load(path, KIND)
    save_file(
        {"ffn_up.0.weight": torch.ones(2, 2)}, path, metadata={"pkt": '{"kind":"hypernetwork","schema_version":1}'}
    )
    with pytest.raises(UserError, match=r"tensor \{site\}\.2\.weight is missing from a hypernetwork artifact"):
        artifacts.load(path, KIND)


def test_metadata_that_lack_something(tmp_path: Path) -> None:
    """Whoever asks for it says so in one line, at any depth."""
    path = tmp_path / "h.safetensors"
    artifacts.save(path, KIND, hypernetwork(), {"target": {"model": {"name": "x"}}})
    meta = artifacts.load(path, KIND).meta
    assert meta["target"] == {"model": {"name": "x"}} and meta.get("source") is None
    lacks = f"{path}: make it again with `pkt align`; its metadata lack "
    for key, look in (("source", lambda: meta["source"]), ("revision", lambda: meta["target"]["model"]["revision"])):
        with pytest.raises(UserError) as caught:
            look()
        assert str(caught.value) == f"{lacks}{key!r}"


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        artifacts.write_json(tmp_path / "file" / "m.json", {})


def test_any_name_and_shape_where_the_kind_says_so(tmp_path: Path) -> None:
    tensors = {"up.0.weight": torch.ones(2, 3), "scale": torch.tensor(1.0)}
    artifacts.save(tmp_path / "m.safetensors", artifacts.MAPPING, tensors, {})
    assert artifacts.load(tmp_path / "m.safetensors", artifacts.MAPPING).shapes == {"up.0.weight": (2, 3), "scale": ()}
    with pytest.raises(AssertionError, match="tensor up: expected float32, found int64"):
        artifacts.save(tmp_path / "m.safetensors", artifacts.MAPPING, {"up": torch.ones(2).long()}, {})


def test_the_kind_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    artifacts.save(path, artifacts.MAPPING, {"w": torch.ones(1)}, {})
    assert artifacts.kind_of(path, (artifacts.DELTA, artifacts.MAPPING)) is artifacts.MAPPING
    artifacts.save(path, KIND, hypernetwork(), {})
    with pytest.raises(
        UserError, match="expected an artifact of a kind among delta, mapping; found kind 'hypernetwork'"
    ):
        artifacts.kind_of(path, (artifacts.DELTA, artifacts.MAPPING))


def replace(out: Path, **files: str) -> None:
    with artifacts.replaced_folder(out, "mark") as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    replace(out, mark="1", old="x")
    replace(out, mark="2", new="y")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"mark": "2", "new": "y"}
    with pytest.raises(AssertionError, match="mark"):
        replace(out, other="3")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"mark": "2", "new": "y"}
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_s_files_may_be_read_by_the_same_users(tmp_path: Path) -> None:
    """Whoever wrote them: safetensors lets nobody but their owner."""
    with artifacts.replaced_folder(tmp_path / "out", "mark") as folder:
        (folder / "mark").write_text("1")
        (folder / "deep").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "deep/a.safetensors")
        (folder / "deep/a.safetensors").chmod(0o600)
    modes = [(tmp_path / "out" / name).stat().st_mode for name in ("mark", "deep/a.safetensors")]
    assert modes[0] == modes[1]


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    replace(out, mark="1")  # an empty one is nobody's
    (out / "mark").rename(out / "thesis.tex")
    with pytest.raises(UserError) as caught:
        replace(out, mark="2")
    assert str(caught.value) == f"{out}: holds thesis.tex and no mark, so it is not ours to replace; give a new folder"
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file; give a folder"):
        replace(out / "thesis.tex", mark="2")


def test_what_a_killed_writer_left_of_a_folder_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".out.new"
    left.mkdir()
    (left / "half").write_text("")
    replace(tmp_path / "out", mark="1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mark"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_seen(dtype: str, value: float) -> None:
    tensor = torch.linspace(-3, 3, 35).reshape(5, 7).to(getattr(torch, dtype))
    assert artifacts.is_finite(tensor) and artifacts.is_finite(tensor[:0]) and artifacts.is_finite(tensor.mT)
    tensor[3, 2] = value
    assert not artifacts.is_finite(tensor) and not artifacts.is_finite(tensor.mT)
