from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from pkt_stages import artifacts
from pkt_stages.core.delta import low_rank_factors
from pkt_stages.models.adapters import Adapter
from pkt_stages.models.changes import Change, DenseDelta, SparseDelta, write_changes
from pkt_stages.models.load import identity, load_model, resolve
from pkt_stages.models.lora import Lora, adapter_of, pissa, seeking, site_modules
from pkt_stages.models.sites import SITES, as_rows, geometry, module_name, weight_name
from tests.conftest import make_model

Run = Callable[..., tuple[int, str, str]]
RANK, ALPHA = 4, 8.0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [f"A text, number {i}: {'abcdefgh'[i] * (i + 2)}." for i in range(8)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def compare(pkt: Run, out: Path, first: Path, texts: Path, *more: object) -> tuple[int, str, str]:
    given = ("--first", first, "--texts", texts, "--out", out, "--metrics", out.with_suffix(".json"))
    return pkt("compare", *given, *(() if "--num-texts" in more else ("--num-texts", 8)), *more)


def metrics(out: Path) -> Any:
    return json.loads(out.with_suffix(".json").read_text())


def row(folder: Path, target: Path, changes: dict[str, Change], **params: object) -> Path:
    """A row as some command makes it for this target."""
    model = identity(resolve(str(target)))
    write_changes(
        folder, changes, {"command": "c", "method": folder.name, "target": model, "source": None, "params": params}
    )
    return folder


def test_a_model_and_its_base(pkt: Run, target_folder: Path, texts: Path, tmp_path: Path) -> None:
    other, out = make_model(tmp_path / "other", seed=9), tmp_path / "c"
    status, printed, err = compare(pkt, out, target_folder, texts, "--second", other)
    assert status == 0, err
    assert printed.startswith("compare: mean CKA of layer pairs ffn_up ") and "; delta -" in printed
    assert sorted(path.name for path in out.iterdir()) == ["cka.safetensors", "compare.json", "ranges.safetensors"]
    new, old = (load_file(folder / "model.safetensors") for folder in (other, target_folder))
    assert metrics(out)["similarity"] is metrics(out)["made"] is metrics(out)["run"] is None
    assert metrics(out)["second"] == identity(resolve(str(other)))
    found = metrics(out)["ranges"]
    assert found["weights"] == sorted(new)
    name = "model.layers.1.mlp.up_proj.weight"
    difference = (new[name] - old[name]).double()
    expected = {
        "num_entries": difference.numel(),
        "min": difference.min().item(),
        "max": difference.max().item(),
        "rms": difference.square().mean().sqrt().item(),
        "share_within": (difference.abs() <= 0.002).double().mean().item(),
        "share_beyond": (difference.abs() > 0.005).double().mean().item(),
    }
    assert found["by_weight"][name] == pytest.approx(expected)
    every = torch.cat([(new[n] - old[n]).flatten() for n in new]).double()
    assert found["overall"]["rms"] == pytest.approx(every.square().mean().sqrt().item())
    assert found["overall"]["share_within"] == pytest.approx((every.abs() <= 0.002).double().mean().item())
    assert (found["overall"]["min"], found["overall"]["max"]) == (every.min().item(), every.max().item())
    edges = torch.tensor(found["edges"], dtype=torch.float64)
    middle = len(edges) // 2
    assert sum(found["counts"]) == every.numel()
    assert found["counts"][middle] == int((every.abs() <= edges[middle]).sum())  # norms did not move
    # Weight by weight, the histograms of the artifact add up to the same.
    kept = artifacts.load(out / "ranges.safetensors", artifacts.DELTA_RANGES)
    assert kept["counts"].sum(0).tolist() == found["counts"] and kept.meta["weights"] == found["weights"]
    assert str(tmp_path) not in out.with_suffix(".json").read_text()


def test_two_changes_of_one_base(pkt: Run, target_folder: Path, texts: Path, tmp_path: Path) -> None:
    """By hand: on one layer the second goes twice as far, on another at a right angle; a third weight stays."""
    base = load_file(target_folder / "model.safetensors")
    up, down = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    changes: dict[str, dict[str, Tensor]] = {"first": {}, "second": {}}
    for model, name, row, value in (("first", up, 0, 1.0), ("second", up, 0, 2.0), ("first", down, 0, 2.0)):
        changes[model].setdefault(name, torch.zeros_like(base[name]))[row] = value
    changes["second"][down] = torch.zeros_like(base[down])
    changes["second"][down][1] = 2.0
    for model, change in changes.items():
        shutil.copytree(target_folder, tmp_path / model)
        whole = {name: weight + change.get(name, 0) for name, weight in base.items()}
        save_file(whole, tmp_path / model / "model.safetensors", metadata={"format": "pt"})
    given = ("--second", tmp_path / "second", "--base", target_folder)
    status, printed, err = compare(pkt, tmp_path / "c", tmp_path / "first", texts, *given)
    assert status == 0, err
    found = metrics(tmp_path / "c")
    assert found["base"] == identity(resolve(str(target_folder)))
    assert found["deltas"]["layer_0"] == {"relative_norm": pytest.approx(2), "cosine": pytest.approx(1)}
    assert found["deltas"]["layer_1"] == {"relative_norm": pytest.approx(1), "cosine": pytest.approx(0, abs=1e-6)}
    # Squared lengths 1 and 4 of the first, 4 and 4 of the second; their product is 2.
    whole = {"relative_norm": pytest.approx((8 / 5) ** 0.5), "cosine": pytest.approx(2 / 40**0.5)}
    assert found["deltas"]["all"] == whole
    assert found["deltas"]["lm_head.weight"] == {"relative_norm": None, "cosine": None}
    assert "; from the base the second's is 1.265 times as long, cosine 0.316" in printed


def test_models_of_different_shapes(
    pkt: Run, source_folder: Path, target_folder: Path, texts: Path, tmp_path: Path
) -> None:
    """They have no ranges; equal runs write equal bytes."""
    for name in ("a", "b"):
        status, printed, _ = compare(pkt, tmp_path / name / "c", source_folder, texts, "--second", target_folder)
        assert status == 0 and "; no ranges, for their weights are not the same ones; 8 texts -> " in printed
    for file in ("c/cka.safetensors", "c/compare.json", "c.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not (tmp_path / "a/c/ranges.safetensors").exists()
    assert artifacts.load(tmp_path / "a/c/cka.safetensors", artifacts.CKA).shapes["cka.attn_o"] == (4, 3)
    assert metrics(tmp_path / "a/c")["ranges"] is None


def test_a_model_before_and_after_a_change(pkt: Run, target_folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert compare(pkt, out, target_folder, texts, "--second", target_folder)[0] == 0
    found = artifacts.load(out / "cka.safetensors", artifacts.CKA)
    for site in SITES:
        torch.testing.assert_close(found[f"cka.{site}"].diagonal(), torch.ones(3, dtype=torch.float64))
    assert metrics(out)["ranges"]["overall"]["max"] == 0
    draw = torch.Generator().manual_seed(0)
    factors = (torch.randn(2, 64, generator=draw), torch.randn(96, 2, generator=draw))
    adapter = Adapter({"model.layers.1.mlp.up_proj": factors}, 2.0)
    made = row(tmp_path / "kd", target_folder, {"seed_3": adapter}, rank=2)
    # The folder of an earlier comparison is replaced.
    assert compare(pkt, out, target_folder, texts, "--delta", made)[0] == 0
    told = metrics(out)
    assert told["run"] == "seed_3" and told["made"]["method"] == "kd" and told["made"]["params"] == {"rank": 2}
    assert told["first"] == told["second"] == identity(resolve(str(target_folder)))
    assert told["similarity"] is None  # nothing says what it started from
    diagonal = torch.tensor(told["cka"]["ffn_up"]).diagonal().tolist()
    # Only what comes after the adapter changes.
    assert diagonal[0] == pytest.approx(1) and diagonal[1] < 0.99
    assert told["ranges"]["weights"] == ["model.layers.1.mlp.up_proj.weight"]
    entries = (factors[1] @ factors[0]).double()
    assert told["ranges"]["overall"]["max"] == pytest.approx(entries.max().item())
    assert told["ranges"]["overall"]["num_entries"] == entries.numel()


def test_ranges_of_a_sparse_and_a_dense_change(pkt: Run, target_folder: Path, texts: Path, tmp_path: Path) -> None:
    rows = torch.zeros(1, 2, 64)
    rows[0, :, :2] = torch.tensor([[0.0009, -0.5], [0.003, 0.01]])
    changes: dict[str, Change] = {
        f"x/{number}": {"ffn_up": SparseDelta(torch.tensor([2]), torch.tensor([[4, 7]]), rows * factor)}
        for number, factor in ((7, 1.0), (0, 2.0))
    }
    made, out = row(tmp_path / "laten", target_folder, changes), tmp_path / "c"
    for given, label, least in ((("--run", "x/0"), "x/0", -1.0), (("--run", 1), "x/0", -1.0), ((), "x/7", -0.5)):
        assert compare(pkt, out, target_folder, texts, "--delta", made, *given)[0] == 0
        found = metrics(out)
        assert (found["run"], found["ranges"]["weights"]) == (label, ["model.layers.2.mlp.up_proj.weight"])
        whole = found["ranges"]["overall"]
        assert (whole["min"], whole["num_entries"]) == (least, 128)  # of its rows alone
    weights = {"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), 0.25), "lm_head.weight": torch.ones(264, 64)}
    dense = row(tmp_path / "grid", target_folder, {"delta": DenseDelta(weights)})
    assert compare(pkt, out, target_folder, texts, "--delta", dense)[0] == 0
    by_weight = metrics(out)["ranges"]["by_weight"]
    assert {name: found["max"] for name, found in by_weight.items()} == {
        "model.layers.0.mlp.up_proj.weight": 0.25,
        "lm_head.weight": 1.0,
    }


def slow_cosine(a: Tensor, b: Tensor) -> float:
    rows = [float(x.double() @ y.double() / (x.double().norm() * y.double().norm())) for x, y in zip(a, b, strict=True)]
    return sum(rows) / len(rows)


@pytest.fixture
def trained(target_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """What `pkt finetune` and `pkt seek` leave behind, for an update that a step of training moved a little."""
    ref = resolve(str(target_folder))
    sizes = geometry(load_model(ref).config)
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"layers": torch.arange(3), "layer_sensitivity": torch.ones(4, dtype=torch.float64)}
    parts = {}
    for site in SITES:
        tensors[f"{site}.corner"] = torch.zeros(3, 2, dtype=torch.int64)
        for layer in range(3):
            part = torch.randn(sizes.weight_shape(site), generator=draw)
            tensors[f"{site}.submatrix.{layer}"] = parts[module_name(site, layer)] = part
    target = {"model": identity(ref), "geometry": {}}
    artifacts.save(tmp_path / "parts.safetensors", artifacts.SUBMATRICES, tensors, {"target": target})
    lora = Lora(site_modules(LlamaConfig(num_hidden_layers=3)), RANK, ALPHA, 0.0)
    made = {"submatrices": tmp_path / "parts.safetensors"}
    for init, attach in (("pissa", pissa), ("seeking", seeking)):
        start = adapter_of(attach(load_model(ref), lora, parts), ALPHA)
        moved = {m: (a, b + 0.05 * torch.randn(b.shape, generator=draw)) for m, (a, b) in start.factors.items()}
        changes: dict[str, Change] = {"seed_0": Adapter(moved, ALPHA).minus(start)}
        made[init] = row(tmp_path / init, target_folder, changes, init=init, rank=RANK, alpha=ALPHA)
    return made


def test_pissa_is_orthogonal_to_the_base_that_it_trains_on(
    pkt: Run, target_folder: Path, trained: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    status, printed, err = compare(pkt, tmp_path / "c", target_folder, texts, "--delta", trained["pissa"])
    assert status == 0, err
    assert ", cosine with weight +0." in printed
    found = artifacts.load(tmp_path / "c" / "similarity.safetensors", artifacts.SIMILARITY)
    assert {name.split(".", 1)[1] for name in found.shapes} == {
        f"{moment}.{against}" for moment in ("initial", "trained") for against in ("weight", "reduced_base")
    }
    model = load_model(resolve(str(target_folder)))
    for site in SITES:
        assert found[f"{site}.initial.reduced_base"][:, 1].abs().max() < 1e-6
        assert found[f"{site}.initial.weight"].min() > 0.2
        for layer in range(3):
            weight = model.get_parameter(weight_name(layer, site))
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            leading = u[:, :RANK] * s[:RANK] @ vh[:RANK]
            expected = slow_cosine(as_rows(leading, site), as_rows(weight, site))
            assert float(found[f"{site}.initial.weight"][layer, 0]) == pytest.approx(expected, abs=1e-5)


def test_seeking_against_weight_base_and_submatrix(
    pkt: Run, target_folder: Path, trained: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    given = ("--delta", trained["seeking"], "--submatrices", trained["submatrices"])
    status, _, err = compare(pkt, tmp_path / "c", target_folder, texts, *given)
    assert status == 0, err
    found = metrics(tmp_path / "c")["similarity"]
    parts = artifacts.load(trained["submatrices"], artifacts.SUBMATRICES)
    added = load_file(trained["seeking"] / "seed_0" / "adapter_model.safetensors")
    model = load_model(resolve(str(target_folder)))
    for site in SITES:
        for layer in range(3):
            part, module = parts[f"{site}.submatrix.{layer}"], module_name(site, layer)
            a, b = low_rank_factors(part, RANK)
            start = ALPHA / RANK * (b @ a)
            weight = model.get_parameter(weight_name(layer, site))
            a, b = (added[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
            after = start + ALPHA / RANK * (b @ a)
            for moment, update in (("initial", start), ("trained", after)):
                others = {"weight": weight, "reduced_base": weight - start, "submatrix": part}
                for name, other in others.items():
                    rows, flat = found[f"{site}.{moment}.{name}"][layer]
                    assert rows == pytest.approx(slow_cosine(as_rows(update, site), as_rows(other, site)), abs=1e-5)
                    assert flat == pytest.approx(
                        float(torch.cosine_similarity(update.flatten(), other.flatten(), 0)), abs=1e-5
                    )
            # The base has what the update holds, with the opposite sign.
            assert found[f"{site}.initial.reduced_base"][layer][1] < -0.5


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--num-texts", 9), "{texts}: 8 texts, 9 wanted (num_texts)"),
        (("--num-texts", 3), "options of `compare`: num_texts must be at least 4, found 3"),
        (("--batch-size", 3), "options of `compare`: batch_size must be at least 4, found 3"),
        (("--max-tokens", 0), "options of `compare`: max_tokens must be at least 1, found 0"),
        (
            ("--reduction", "per_sequence", "--max-tokens", 3),
            "text 1: 3 samples; unbiased HSIC needs at least 4; use longer texts, or more per minibatch",
        ),
        (
            ("--max-tokens", 1),
            "ffn_up: first layer 0: its features do not vary, CKA is undefined; use other texts, or leave out a model"
            " with layers that add nothing (filler of `pkt reexpress`)",
        ),
    ],
)
def test_bad_texts(
    pkt: Run, target_folder: Path, texts: Path, tmp_path: Path, extra: tuple[object, ...], message: str
) -> None:
    status, _, err = compare(pkt, tmp_path / "c", target_folder, texts, "--second", target_folder, *extra)
    assert (status, err) == (2, f"pkt: error: {message.format(texts=texts)}\n")
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.json").exists()


def test_a_text_longer_than_the_context(pkt: Run, target_folder: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": "x" * (10 + 300 * (i == 2))}) + "\n" for i in range(4)))
    given = ("--second", target_folder, "--num-texts", 4)
    status, _, err = compare(pkt, tmp_path / "c", target_folder, long, *given)
    expected = f"pkt: error: {long}: text 3 has 311 tokens, {target_folder} takes 256; set max_tokens to cut it\n"
    assert (status, err) == (2, expected)


def test_bad_input(
    pkt: Run, source_folder: Path, target_folder: Path, trained: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    parts, by_pissa, by_seeking = trained["submatrices"], trained["pissa"], trained["seeking"]
    ours, theirs = (identity(resolve(str(folder)))["revision"] for folder in (target_folder, source_folder))
    (tmp_path / "file").write_text("mine")
    for first, given, message in (
        (target_folder, (), "give --second, --delta, or both"),
        (
            target_folder,
            ("--second", target_folder, "--submatrices", parts),
            "--submatrices goes with --delta",
        ),
        (
            target_folder,
            ("--delta", by_pissa, "--base", target_folder),
            "--base goes with --second, and without --delta",
        ),
        (
            target_folder,
            ("--second", source_folder, "--base", target_folder),
            f"{source_folder}: has other weights than --base {target_folder}; give what it went on from",
        ),
        (target_folder, ("--second", tmp_path), f"{tmp_path}: a folder without config.json; expected a Hugging Face"),
        (
            source_folder,
            ("--delta", by_pissa),
            f"{by_pissa}: made for the target target at {ours}, found source at {theirs}; give its own target,"
            " or insist with --any-base",
        ),
        (target_folder, ("--delta", by_pissa, "--run", 1), f"{by_pissa}: has no run '1'; found seed_0"),
        (target_folder, ("--delta", by_pissa, "--run", "x"), f"{by_pissa}: has no run 'x'; found seed_0"),
        (
            target_folder,
            ("--delta", by_seeking),
            f"{by_seeking}: init seeking needs --submatrices (from `pkt seek`)",
        ),
        (
            target_folder,
            ("--delta", by_pissa, "--submatrices", parts),
            f"{by_pissa}: has no use for --submatrices; only an adapter of init seeking has",
        ),
    ):
        status, _, err = compare(pkt, tmp_path / "c", first, texts, *given)
        assert status == 2
        assert err.startswith(f"pkt: error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.json").exists()
    # Refused before anything is computed.
    status, _, err = compare(pkt, tmp_path / "file", target_folder, tmp_path / "no", "--second", target_folder)
    assert (status, err) == (2, f"pkt: error: {tmp_path / 'file'}: is a file; give a folder\n")
