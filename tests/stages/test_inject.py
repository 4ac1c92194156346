from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkt_stages import artifacts
from pkt_stages.models.inject import injected, load_delta, merged
from pkt_stages.models.load import load_model, load_tokenizer, resolve, weights_hash
from tests.stages.transfer_files import options, write_inputs

Run = Callable[..., tuple[int, str, str]]
IDS = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    """What `pkt inject` takes, with weights large enough to move the target."""
    from pkt_stages.core.hypernetwork import init_weights
    from pkt_stages.models.sites import SITES
    from pkt_stages.models.transfer import open_transfer

    folder = tmp_path_factory.mktemp("aligned")
    paths = write_inputs(folder, source_folder, target_folder)
    paths = {name: paths[name] for name in ("selection", "rows")}
    meta = open_transfer(paths["selection"], paths["rows"], rate=0.2).meta
    steps = []
    for step, std in ((1, 0.02), (2, 0.05), (3, 1e-4)):
        generator = torch.Generator().manual_seed(step)
        weights = init_weights(SITES, d_source=96, d_hidden=8, d_target=64, std=std, generator=generator)
        models = {side: meta[side] for side in ("source", "target")}
        path = folder / "mappings" / f"step_{step:02d}.safetensors"
        artifacts.save(
            path,
            "hypernetwork",
            weights,
            {**models, "params": {"rate": 0.2, "given": "selected", "seed": 0}, "step": step},
        )
        steps.append({"step": step, "weights_hash": weights_hash(weights)})
    artifacts.write_json(folder / "align.json", {"chosen_step": 2, "steps": steps})
    return {**paths, "hypernetwork": folder / "mappings", "metrics_in": folder / "align.json"}


def inject(
    pkt: Run, target: Path, aligned: dict[str, Path], out: Path, *settings: object, **changed: Path
) -> tuple[int, str, str]:
    return pkt("inject", "--target", target, *options(**{**aligned, **changed}), "--out", out, *settings)


def test_one_delta_per_transfer_example_at_the_chosen_step(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    status, printed, err = inject(pkt, target_folder, aligned, tmp_path / "d", "--report", tmp_path / "r.json")
    assert status == 0, err
    assert printed.startswith("inject: 2 deltas at step 2, up to ")
    selection = artifacts.load(aligned["selection"], "selection")
    rows = artifacts.load(aligned["rows"], "source_rows")
    weights = load_file(aligned["hypernetwork"] / "step_02.safetensors")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["delta_0.safetensors", "delta_1.safetensors"]
    for place, example in ((0, 3), (1, 4)):
        delta = load_delta(tmp_path / "d" / f"delta_{place}.safetensors")
        # floor(0.2 * 96) FFN and floor(0.2 * 64) attention neurons: the first of the selection's.
        for site, module, k in (("ffn_down", "ffn", 19), ("attn_v", "attn", 12)):
            assert torch.equal(delta[site].neurons, selection[f"{module}_target_neurons"][example, :, :k])
            assert torch.equal(delta[site].layers, torch.arange(3))
            layer = int(selection[f"{module}_layers"][example, 1, 0])
            neuron = int(selection[f"{module}_source_neurons"][example, 1, 2])
            row = rows[f"{site}.{layer}"][rows[f"neurons.{module}.{layer}"].tolist().index(neuron)]
            mapped = weights[f"{site}.2.weight"] @ torch.relu(weights[f"{site}.0.weight"] @ row)
            assert torch.allclose(delta[site].rows[1, 2], mapped, rtol=1e-4, atol=1e-7)
    report = json.loads((tmp_path / "r.json").read_text())
    assert [e["example"]["id"] for e in report["examples"]] == ["toy_10", "toy_11"]
    assert all(e["step"] == 2 and 0 < e["rounding_loss"] < 0.01 for e in report["examples"])
    assert len({report["base_weights_hash"], *(e["weights_hash"] for e in report["examples"])}) == 3


def test_every_step(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    status, printed, err = inject(pkt, target_folder, aligned, tmp_path / "all", "--every-step")
    assert status == 0, err
    assert printed.startswith("inject: 6 deltas at step 1, 2, 3, up to ")
    assert inject(pkt, target_folder, aligned, tmp_path / "one", "--step", "3")[0] == 0
    names = sorted(str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.safetensors"))
    assert names == [f"step_0{step}/delta_{place}.safetensors" for step in (1, 2, 3) for place in (0, 1)]
    for place in (0, 1):
        one, every = (tmp_path / "one", tmp_path / "all" / "step_03")
        name = f"delta_{place}.safetensors"
        assert (one / name).read_bytes() == (every / name).read_bytes()


def test_a_delta_gives_the_recorded_weights_and_comes_out_again(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path
) -> None:
    assert inject(pkt, target_folder, aligned, tmp_path)[0] == 0
    model = load_model(resolve(str(target_folder)))
    base = weights_hash(model.state_dict())
    hashes = []
    for place in (0, 1):
        path = tmp_path / f"delta_{place}.safetensors"
        with merged(model, load_delta(path)) as report:
            hashes.append(weights_hash(model.state_dict()))
        meta = artifacts.load(path, "delta").meta
        assert meta["weights_hash"] == hashes[-1] != base
        assert meta["changed_weights"] == report.changed_weights
        assert weights_hash(model.state_dict()) == base
    assert hashes[0] != hashes[1]


def test_a_whole_model_on_request(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    status, _, err = inject(pkt, target_folder, aligned, tmp_path, "--example", "toy_11", "--model-out", folder)
    assert status == 0, err
    assert not (tmp_path / "delta_0.safetensors").exists()
    before, after = (load_file(path / "model.safetensors") for path in (target_folder, folder))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert len(changed) == 12  # four sites of three layers
    saved = AutoModelForCausalLM.from_pretrained(folder)
    base = load_model(resolve(str(target_folder)))
    with torch.no_grad(), injected(base, load_delta(tmp_path / "delta_1.safetensors")):
        assert float((saved(input_ids=IDS).logits - base(input_ids=IDS).logits).abs().max()) < 1e-5
    tokenizers = [load_tokenizer(resolve(str(path))) for path in (target_folder, folder)]
    assert tokenizers[0].encode("What comes after 1?") == tokenizers[1].encode("What comes after 1?")
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    status, _, err = inject(pkt, target_folder, aligned, tmp_path, "--example", "1", "--model-out", folder)
    assert status == 2
    assert err.splitlines()[-1] == f"pkt: error: {folder}: exists already; give a new folder for the model"


def test_runs_write_equal_bytes(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert inject(pkt, target_folder, aligned, tmp_path / name, "--report", tmp_path / f"{name}.json")[0] == 0
    names = [p.name for p in (tmp_path / "a").iterdir()]
    assert len(names) == 2
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_older_deltas_do_not_stay(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "delta_2.safetensors").write_bytes(b"of a run with three examples")
    assert inject(pkt, target_folder, aligned, tmp_path)[0] == 0
    assert not (tmp_path / "delta_2.safetensors").exists()


def test_rounding_warns_and_refuses(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "warned", "--dtype", "bfloat16", "--step", "2")
    assert status == 0
    assert "warning: toy_10: rounding loses " in err
    small = ("--dtype", "float16", "--step", "3")
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "refused", *small)
    assert status == 2
    message = err[err.index("pkt: error") :]
    assert message.startswith("pkt: error: rounding to float16 would lose ")
    assert message.endswith("of the delta's norm (limit 50%); choose a wider dtype (--dtype float32),"
                            " or pass --allow-rounding-loss\n")  # fmt: skip
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--step", "1", "--every-step"), "--every-step goes with neither --step nor --model-out; leave one out"),
        (("--step", "4"), "step 4 is not one of the 3 steps of {metrics_in}"),
        (("--example", "toy_1"), "{selection}: has no transfer example 'toy_1'; found 0: toy_10, 1: toy_11"),
        (("--model-out", "m"), "--model-out writes one model, {selection} has 2 transfer examples; add --example"),
        (
            ("--dtype", "int8"),
            "options of `inject`: dtype: expected one of auto, float32, float16, bfloat16, found 'int8'",
        ),
    ],
)
def test_bad_settings(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", *settings)
    assert status == 2
    assert err == f"pkt: error: {message.format(**aligned)}\n"
    assert not (tmp_path / "out").exists()


def test_metrics_of_another_run(pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path) -> None:
    metrics = json.loads(aligned["metrics_in"].read_text())
    metrics["steps"][1]["weights_hash"] = metrics["steps"][0]["weights_hash"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(metrics))
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", metrics_in=other)
    mapping = aligned["hypernetwork"] / "step_02.safetensors"
    assert status == 2
    assert err == f"pkt: error: {mapping}: not of the same run of `pkt align` as {other}\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError: "),
        ("[]", "TypeError: "),
        ('{"steps": []}', "KeyError: 'chosen_step'"),
    ],
)
def test_malformed_metrics(
    pkt: Run, aligned: dict[str, Path], target_folder: Path, tmp_path: Path, content: str, reason: str
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    status, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", metrics_in=bad)
    assert status == 2
    assert err.startswith(f"pkt: error: {bad}: not the metrics of `pkt align` ({reason}")
    assert len(err.splitlines()) == 1
    bad.unlink()
    _, _, err = inject(pkt, target_folder, aligned, tmp_path / "out", metrics_in=bad)
    assert err == f"pkt: error: {bad}: no such file; expected the metrics of `pkt align`\n"


def test_wrong_target_and_swapped_artifacts(
    pkt: Run, aligned: dict[str, Path], source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    _, _, err = inject(pkt, source_folder, aligned, tmp_path)
    assert err == f"pkt: error: {source_folder}: this is the selection's source; its target is target\n"
    _, _, err = inject(pkt, target_folder, aligned, tmp_path, selection=aligned["rows"])
    assert err == (
        f"pkt: error: {aligned['rows']}: expected a selection artifact (made by `pkt select`), found source_rows\n"
    )


def test_a_mapping_between_other_models(
    pkt: Run, aligned: dict[str, Path], source_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    other = write_inputs(tmp_path / "swapped", source_folder, source_folder)
    given = {name: other[name] for name in ("selection", "rows")}
    _, _, err = inject(pkt, target_folder, aligned, tmp_path, **given)
    mapping = aligned["hypernetwork"] / "step_02.safetensors"
    assert err == (
        f"pkt: error: {mapping}: trained for the target target, {other['selection']} is for source;"
        " run `pkt align` again\n"
    )
