"""Own, matched and Theseus through their commands, on a random model and the same model in another shape."""

from __future__ import annotations

import json
import random
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pkt_stages.examples import write_jsonl
from tests.conftest import write_examples
from tests.stages.test_reexpress import make

Run = Callable[..., tuple[int, str, str]]
LARGER = ("--num-layers", 4, "--d-model", 96, "--d-ff", 56, "--num-heads", 8, "--num-kv-heads", 4)


def trained(folder: Path, base: Path) -> Path:
    """What training might make of a model: every weight and gain a little different."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def texts(path: Path, count: int = 24) -> Path:
    draw = random.Random(0)
    letters = string.ascii_letters + string.digits + " .,;:+-"  # more than the model is wide: each is a token
    write_jsonl(path, [{"text": "".join(draw.choices(letters, k=60))} for _ in range(count)])
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a trained model with grouped queries and biases, and both written again; sums over texts."""
    from pkt_stages.__main__ import main

    folder = tmp_path_factory.mktemp("transport")
    base = make(folder / "base", "llama, biases")
    trained(folder / "tuned", base)

    def run(*arguments: object) -> None:
        before, sys.argv = sys.argv, ["pkt", *map(str, arguments)]
        with pytest.raises(SystemExit) as stop:
            main()
        sys.argv = before
        assert not stop.value.code

    for name in ("base", "tuned"):
        run("reexpress", "--model", folder / name, "--out", folder / f"re-{name}", *LARGER)
        run("reexpress", "--model", folder / name, "--out", folder / f"turned-{name}")
    texts(folder / "texts.jsonl")
    for source in ("base", "re-base", "turned-base"):
        run(
            *("correlate", "--source", folder / source, "--target", base, "--texts", folder / "texts.jsonl"),
            *("--num-texts", 24, "--out", folder / f"sums-{source}"),
        )
    return folder


def derive(pkt: Run, parent: Path, code: str, source: str, out: Path, **settings: Any) -> tuple[int, str, str]:
    """Runs `pkt derive` with the base and tuned model that begin with `source`."""
    given = [f"--set={name}={value}" for name, value in settings.items()]
    return pkt(
        *("derive", "--code", code, "--target", parent / "base", "--source", parent / f"{source}tuned"),
        *("--base", parent / f"{source}base", "--correlation", parent / f"sums-{source}base", "--out", out, *given),
    )


def change(row: Path, number: int = 0) -> dict[str, Tensor]:
    return load_file(row / f"delta_{number}.safetensors")


def own(pkt: Run, parent: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    given = [f"--set={name}={value}" for name, value in settings.items()]
    models = ("--target", parent / "base", "--source", parent / "tuned")
    assert pkt("derive", "--code", "own", *models, "--out", out, *given)[0] == 0
    return change(out)


def logits(pkt: Run, parent: Path, row: Path, out: Path) -> Tensor:
    from tests.stages.test_reexpress import logits as of

    assert pkt("export", "--model", parent / "base", "--delta", row, "--out", out)[0] == 0
    return of(out)


def test_own_makes_the_target_its_trained_model(pkt: Run, parent: Path, tmp_path: Path) -> None:
    from tests.stages.test_reexpress import logits as of

    weights = own(pkt, parent, tmp_path / "own")
    before, after = (load_file(parent / name / "model.safetensors") for name in ("base", "tuned"))
    assert weights.keys() == after.keys()
    assert all(torch.allclose(before[name] + weights[name], after[name], atol=1e-7) for name in after)
    assert torch.allclose(logits(pkt, parent, tmp_path / "own", tmp_path / "out"), of(parent / "tuned"), atol=1e-4)


def test_own_without_vocabulary_is_what_a_transport_moves(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """As changes of the projections alone, with what training did to the gains in front of them; by hand for one."""
    weights = own(pkt, parent, tmp_path / "own", vocabulary="false")
    assert not [name for name in weights if "embed" in name or "head" in name or "norm" in name]
    before, after = (load_file(parent / name / "model.safetensors") for name in ("base", "tuned"))
    name, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight"
    expected = (after[name] * after[norm] - before[name] * before[norm]) / before[norm]
    assert torch.allclose(weights[name], expected, atol=1e-6)
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.allclose(weights[name], after[name] - before[name])


@pytest.mark.parametrize("source", ["", "turned-", "re-"])
def test_matched_recovers_what_is_there(pkt: Run, parent: Path, tmp_path: Path, source: str) -> None:
    """From a copy, a turned one, and one in another shape with random filler, grouped queries and biases."""
    status, _, err = derive(pkt, parent, "matched", source, tmp_path / "row")
    assert status == 0, err
    inside = own(pkt, parent, tmp_path / "own", vocabulary="false")
    found = change(tmp_path / "row")
    assert found.keys() == inside.keys() | {"model.embed_tokens.weight", "lm_head.weight"}
    lost = sum(float((found[name] - inside[name]).square().sum()) for name in inside)
    assert lost**0.5 < 1e-4 * sum(float(weight.square().sum()) for weight in inside.values()) ** 0.5
    # With embedding and head it computes what the trained model does.
    from tests.stages.test_reexpress import logits as of

    assert torch.allclose(logits(pkt, parent, tmp_path / "row", tmp_path / "out"), of(parent / "tuned"), atol=2e-3)
    meta = json.loads((tmp_path / "row/changes.json").read_text())
    assert meta["ranks"]["residual"] == [48, 48] and len(meta["pairs"]) == 2


def test_the_layers_are_found(parent: Path) -> None:
    """Four layers of which two are filler: the pairs are the others, in order, and the filler is like none."""
    from pkt_stages.models.folding import Folded
    from pkt_stages.models.load import resolve
    from pkt_stages.models.reexpression import reexpression

    sizes = [Folded(resolve(str(parent / name))).sizes for name in ("base", "re-base")]
    places = reexpression(sizes[0], sizes[1]).layers
    told = json.loads((parent / "sums-re-base/correlation.json").read_text())
    assert told["pairs"] == [[place, layer] for layer, place in enumerate(places)]
    assert [max(row) == 0 for row in told["similarity"]] == [layer not in places for layer in range(4)]
    assert all(told["similarity"][place][layer] == pytest.approx(1, abs=1e-3) for layer, place in enumerate(places))


@pytest.mark.parametrize("settings", [{}, {"heads": "true"}])
def test_theseus_is_exact_where_activations_differ_by_an_isometry(
    pkt: Run, parent: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    assert derive(pkt, parent, "theseus", "turned-", tmp_path / "row", **settings)[0] == 0
    inside, found = own(pkt, parent, tmp_path / "own", vocabulary="false"), change(tmp_path / "row")
    ranks = json.loads((tmp_path / "row/changes.json").read_text())["ranks"]
    exact = 0
    for name, weight in inside.items():
        layer, part = name.split(".")[2], name.split(".")[4]
        key = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}.get(part, f"attn_{part[0]}")
        if ranks[f"layer_{layer}.{key}.out"][0] == ranks[f"layer_{layer}.{key}.out"][1]:
            assert float((found[name] - weight).norm() / weight.norm()) < 1e-3, name
            exact += 1
    assert exact > len(inside) // 2


def test_random_maps_are_a_control(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """One change per seed, unlike each other, of about the size of the fitted one, and nothing of it."""
    for code in ("matched", "theseus"):
        row = tmp_path / code
        assert derive(pkt, parent, code, "re-", row, maps="random", seeds="[0, 1]", vocabulary="false")[0] == 0
        assert [c["label"] for c in json.loads((row / "changes.json").read_text())["changes"]] == ["seed_0", "seed_1"]
        first, second = change(row), change(row, 1)
        inside = own(pkt, parent, tmp_path / f"own-{code}", vocabulary="false")
        flat = [torch.cat([d[name].flatten() for name in inside]) for d in (first, second, inside)]
        assert 0.3 < float(flat[0].norm() / flat[2].norm()) < 3
        assert abs(float(torch.cosine_similarity(flat[0], flat[2], dim=0))) < 0.1
        assert abs(float(torch.cosine_similarity(flat[0], flat[1], dim=0))) < 0.1


def test_two_runs_are_equal(pkt: Run, parent: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert derive(pkt, parent, "matched", "re-", tmp_path / name)[0] == 0
    assert (tmp_path / "a/delta_0.safetensors").read_bytes() == (tmp_path / "b/delta_0.safetensors").read_bytes()


def test_sums_do_not_depend_on_how_many_pairs_are_held(pkt: Run, parent: Path, tmp_path: Path) -> None:
    out = tmp_path / "sums"
    given = ("--source", parent / "re-base", "--target", parent / "base", "--texts", parent / "texts.jsonl")
    assert pkt("correlate", *given, "--num-texts", 24, "--pairs-at-once", 1, "--out", out)[0] == 0
    for path in sorted((parent / "sums-re-base").iterdir()):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_how_alike_two_models_are(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """A model and itself in another shape are one; unrelated weights of the same shape are not."""
    other = make(tmp_path / "other", "llama, biases")
    generator = torch.Generator().manual_seed(5)
    weights = load_file(other / "model.safetensors")
    drawn = {name: weight + torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    save_file(drawn, other / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for source in (parent / "re-base", other):
        status, printed, err = pkt(
            *("correlate", "--source", source, "--target", parent / "base", "--texts", parent / "texts.jsonl"),
            *("--num-texts", 24, "--out", tmp_path / f"sums-{source.name}", "--metrics", tmp_path / "alike.json"),
        )
        assert status == 0, err
        found[source.name] = json.loads((tmp_path / "alike.json").read_text())["diagnostics"]
        assert f"procrustes {found[source.name]['procrustes']:.3f}, neurons " in printed
    same = found["re-base"]
    assert same["procrustes"] < 1e-3 and same["neurons"] > 0.999 and same["cka"] > 0.999
    sizes = [sum(w.numel() for w in load_file(parent / n / "model.safetensors").values()) for n in ("re-base", "base")]
    assert same["size_ratio"] == pytest.approx(sizes[0] / sizes[1])
    far = found["other"]
    assert far["procrustes"] > 0.3 and far["neurons"] < 0.9 and far["cka"] < 0.9 and far["size_ratio"] == 1


def test_whitening_needs_the_grams(pkt: Run, parent: Path, tmp_path: Path) -> None:
    status, _, err = derive(pkt, parent, "theseus", "turned-", tmp_path / "row", whitening=0.25)
    assert status == 2
    assert err == (
        f"pkt: error: {parent}/sums-turned-base: whitening needs either model's own sums, too; run `pkt correlate` with"
        " grams: true\n"
    )
    given = ("--source", parent / "turned-base", "--target", parent / "base", "--texts", parent / "texts.jsonl")
    assert pkt("correlate", *given, "--num-texts", 24, "--grams", "--out", tmp_path / "sums")[0] == 0
    models = ("--target", parent / "base", "--source", parent / "turned-tuned", "--base", parent / "turned-base")
    given = ("--correlation", tmp_path / "sums", "--set", "whitening=0.25", "--out", tmp_path / "row")
    assert pkt("derive", "--code", "theseus", *models, *given)[0] == 0


def test_too_few_texts(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """One short text: the map of the residual stream cannot be whole, and the rank that it has is said."""
    write_jsonl(tmp_path / "one.jsonl", [{"text": "a short text"}])
    given = ("--source", parent / "re-base", "--target", parent / "base", "--texts", tmp_path / "one.jsonl")
    assert pkt("correlate", *given, "--num-texts", 1, "--out", tmp_path / "sums")[0] == 0
    models = ("--target", parent / "base", "--source", parent / "re-tuned", "--base", parent / "re-base")
    status, _, err = pkt(
        "derive", "--code", "matched", *models, "--correlation", tmp_path / "sums", "--out", tmp_path / "row"
    )
    assert status == 2
    assert err == (
        f"pkt: error: {tmp_path}/sums: 13 tokens give the map of the residual stream rank 13 of 48; run `pkt correlate`"
        " on more texts\n"
    )
    assert not (tmp_path / "row").exists()


def test_base_and_trained_source_of_two_shapes(pkt: Run, parent: Path, tmp_path: Path) -> None:
    models = ("--target", parent / "base", "--source", parent / "tuned", "--base", parent / "re-base")
    status, _, err = pkt(
        *("derive", "--code", "matched", *models, "--correlation", parent / "sums-re-base", "--out", tmp_path / "row")
    )
    assert status == 2
    assert err == (
        f"pkt: error: {parent}/tuned: num_layers 2, its base model {parent}/re-base has 4; what training added is the"
        " difference of two models of one shape\n"
    )


def test_a_correlation_of_other_models(pkt: Run, parent: Path, tmp_path: Path) -> None:
    models = ("--target", parent / "base", "--source", parent / "turned-tuned", "--base", parent / "turned-base")
    status, _, err = pkt(
        *("derive", "--code", "matched", *models, "--correlation", parent / "sums-base", "--out", tmp_path / "row")
    )
    assert status == 2
    assert f"{parent}/sums-base: of the source base at sha256:" in err and "run `pkt correlate` on these models" in err


def test_a_method_that_moves_a_change_needs_a_base(pkt: Run, parent: Path, tmp_path: Path) -> None:
    given = ("--target", parent / "base", "--source", parent / "tuned", "--correlation", parent / "sums-base")
    status, _, err = pkt("derive", "--code", "theseus", *given, "--out", tmp_path / "row")
    assert (status, err) == (
        2,
        "pkt: error: the method takes --target and --source and --base and --correlation, nothing else; found --target"
        " and --source and --correlation\n",
    )


def test_tied_embeddings_keep_their_vocabulary(pkt: Run, tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama, tied")
    trained(tmp_path / "tuned", base)
    given = ("--source", base, "--target", base, "--texts", texts(tmp_path / "texts.jsonl"), "--num-texts", 24)
    assert pkt("correlate", *given, "--out", tmp_path / "sums")[0] == 0
    models = ("--target", base, "--source", tmp_path / "tuned", "--base", base, "--correlation", tmp_path / "sums")
    status, _, err = pkt("derive", "--code", "matched", *models, "--out", tmp_path / "row")
    assert status == 2
    assert err == (
        f"pkt: error: {base}: its head is its embedding, which get different changes; set vocabulary: false\n"
    )
    given = ("--set", "vocabulary=false", "--out", tmp_path / "row")
    assert pkt("derive", "--code", "matched", *models, *given)[0] == 0


def test_selected_layers(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """The source's best-scored layers in order, by the neurons' sums; refused without attributions, or with others."""
    from tests.stages.test_parallel import write_examples

    examples = write_examples(tmp_path / "examples.jsonl", ["1", "2", "3"])
    found = {}
    for name in ("re-tuned", "tuned"):
        out = tmp_path / f"{name}.safetensors"
        assert pkt("attribute", "--model", parent / name, "--extract", examples, "--out", out)[0] == 0
        scores = load_file(out)
        sums = scores["ffn_scores.rms"].sum((0, 2)) + scores["attn_scores.rms.all_positions"].sum((0, 2))
        found[name] = sums.tolist()
    count = len(found["tuned"])
    best = sorted(sorted(range(len(found["re-tuned"])), key=lambda layer: -found["re-tuned"][layer])[:count])
    models = ("--source", parent / "re-base", "--target", parent / "base", "--texts", parent / "texts.jsonl")
    given = ("--attribution", tmp_path / "re-tuned.safetensors", tmp_path / "tuned.safetensors")
    command = ("correlate", *models, "--num-texts", 4, "--out", tmp_path / "sums", "--layer-pairs", "selected")
    assert pkt(*command, *given)[0] == 0
    pairs = json.loads((tmp_path / "sums/correlation.json").read_text())["pairs"]
    assert pairs == [[layer, place] for place, layer in enumerate(best)]
    assert "layer_pairs is selected, and --attribution is not given" in pkt(*command)[2]
    assert "layer_pairs is cka, and --attribution is given" in pkt(*command[:-2], *given)[2]
    swapped = ("--source", parent / "base", "--target", parent / "base", *models[4:])
    status, _, err = pkt("correlate", *swapped, *command[7:], *given)
    assert status == 2
    assert best[-1] >= 2
    assert f"layer {best[-1]} of the source is among the selected" in err


def test_cross_lora_finds_permuted_units(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """Without a text: exact on a copy with all units in other places, but for what a weight does not span."""
    for name in ("base", "tuned"):
        out = tmp_path / f"moved-{name}"
        assert pkt("reexpress", "--model", parent / name, "--out", out, "--no-rotate")[0] == 0
    models = ("--source", tmp_path / "moved-base", "--target", parent / "base", "--texts", parent / "texts.jsonl")
    assert pkt("correlate", *models, "--num-texts", 4, "--out", tmp_path / "sums-moved-base")[0] == 0
    (tmp_path / "base").symlink_to(parent / "base")
    assert derive(pkt, tmp_path, "cross_lora", "moved-", tmp_path / "row")[0] == 0
    found, wanted = change(tmp_path / "row"), own(pkt, parent, tmp_path / "own", vocabulary="false")
    base = load_file(parent / "base/model.safetensors")
    for name, weight in found.items():
        if name.endswith("bias"):
            continue
        module = name.removesuffix(".weight")
        norm = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}[module.split(".")[3]]
        reads = not module.endswith(("o_proj", "down_proj"))
        gain = base[f"{'.'.join(module.split('.')[:3])}.{norm}.weight"].double() if reads else 1.0
        folded = base[name].double() * gain
        u, _, vh = torch.linalg.svd(folded, full_matrices=False)
        expected = u @ u.mT @ (wanted[name].double() * gain) @ vh.mT @ vh / gain
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Align examples of two tasks, three and one."""
    from tests.stages.test_parallel import write_examples

    for task, ids in (("gsm8k", ["1", "2", "3"]), ("mmlu", ["4"])):
        (tmp_path / "examples" / task).mkdir(parents=True)
        write_examples(tmp_path / "examples" / task / "align.jsonl", ids)
    return tmp_path / "examples"


@pytest.mark.parametrize("signs", ["mean", "majority"])
def test_gradfix_keeps_what_goes_downhill(pkt: Run, parent: Path, tmp_path: Path, asked: Path, signs: str) -> None:
    from pkt_stages.encoding import encode
    from pkt_stages.examples import read_examples
    from pkt_stages.models.load import load_model, load_tokenizer, resolve

    assert derive(pkt, parent, "matched", "turned-", tmp_path / "row")[0] == 0
    given = ("--target", parent / "base", "--delta", tmp_path / "row", "--examples", asked)
    command = ("derive", "--code", "gradfix", *given, "--set=template=none", f"--set=signs={signs}")
    assert pkt(*command, "--out", tmp_path / "kept")[0] == 0
    assert pkt(*command, "--set=mode=force", "--out", tmp_path / "forced")[0] == 0
    ref = resolve(str(parent / "base"))
    model = load_model(ref, dtype="float32").requires_grad_(True)
    before, kept, forced = (change(tmp_path / name) for name in ("row", "kept", "forced"))
    total = {name: torch.zeros_like(weight) for name, weight in before.items()}
    for task, count in (("gsm8k", 3), ("mmlu", 1)):
        for example in read_examples(asked / task / "align.jsonl"):
            one = encode(load_tokenizer(ref), example, template="none", max_length=2048)
            model.zero_grad()
            labels = torch.tensor([one.labels])
            model(input_ids=torch.tensor([one.ids]), labels=labels).loss.backward()
            for name, parameter in model.named_parameters():
                if name in total and parameter.grad is not None:
                    total[name] += parameter.grad.sign() if signs == "majority" else parameter.grad / count
    assert kept.keys() == forced.keys() == before.keys()
    sure = 0
    for name, delta in before.items():
        plain = total[name].abs() > 1e-6
        sure += int(plain.sum())
        downhill = -total[name].sign()
        torch.testing.assert_close(kept[name][plain], torch.where(delta.sign() == downhill, delta, 0.0)[plain])
        torch.testing.assert_close(forced[name][plain], (delta.abs() * downhill)[plain])
    assert sure > 1000
    facts = json.loads((tmp_path / "kept/changes.json").read_text())
    assert 0 < facts["kept"]["delta"] < 1
    assert facts["examples"] == {"gsm8k": 3, "mmlu": 1}
    again = tmp_path / "again"
    assert pkt(*command, "--out", again)[0] == 0
    assert (again / "delta_0.safetensors").read_bytes() == (tmp_path / "kept/delta_0.safetensors").read_bytes()


def test_gradfix_refuses_what_is_no_transport(pkt: Run, parent: Path, tmp_path: Path, asked: Path) -> None:
    assert derive(pkt, parent, "matched", "turned-", tmp_path / "row")[0] == 0
    given = ("--target", parent / "base", "--delta", tmp_path / "row")
    _, _, err = pkt("derive", "--code", "gradfix", *given, "--out", tmp_path / "kept")
    assert "the method takes --target and --delta and --examples, nothing else; found --target and --delta" in err
    _, _, err = pkt("derive", "--code", "gradfix", *given, "--examples", tmp_path, "--out", tmp_path / "kept")
    assert f"{tmp_path}: no <task>/align.jsonl below it" in err
    other = ("--target", parent / "tuned", "--delta", tmp_path / "row", "--examples", asked)
    assert "made for the target base" in pkt("derive", "--code", "gradfix", *other, "--out", tmp_path / "kept")[2]
    assert not (tmp_path / "kept").exists()


def ariadne(pkt: Run, base: Path, tuned: Path, parent: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    """The change for the target `base` from a source that is itself, trained to `tuned`."""
    sums = parent / "sums-base"
    given = [f"--set={name}={value}" for name, value in {"num_texts": 24, **settings}.items()]
    models = ("--target", base, "--source", tuned, "--base", base, "--correlation", sums)
    more = ("--texts", parent / "texts.jsonl", "--out", out)
    status, _, err = pkt("derive", "--code", "ariadne", *models, *more, *given)
    assert status == 0, err
    return change(out)


def with_changed(parent: Path, folder: Path, part: str) -> Path:
    """The base model with the training of those weights alone whose name holds `part`."""
    shutil.copytree(parent / "base", folder)
    before, after = (load_file(parent / name / "model.safetensors") for name in ("base", "tuned"))
    weights = {name: after[name] if part in name else weight for name, weight in before.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("incremental", ["false", "true"])
def test_ariadne_is_exact_for_the_last_down_projection(
    pkt: Run, parent: Path, tmp_path: Path, incremental: str
) -> None:
    tuned = with_changed(parent, tmp_path / "tuned", "layers.1.mlp.down_proj.weight")
    settings = {"penalty": 1e-9, "incremental": incremental}
    found = ariadne(pkt, parent / "base", tuned, parent, tmp_path / "row", **settings)
    before, after = (load_file(folder / "model.safetensors") for folder in (parent / "base", tuned))
    assert sorted(found) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    for name, weight in found.items():
        torch.testing.assert_close(weight, after[name] - before[name], rtol=0, atol=2e-5)


def test_ariadne_by_brute_force(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """Every token at once, float64, from a source that is the target itself, so that nothing turns."""
    from pkt_stages.models.load import load_model, resolve
    from pkt_stages.models.texts import paired_minibatches

    refs = [resolve(str(parent / name)) for name in ("base", "tuned")]
    names = ("out0", "out1", "ffn0", "ffn1")
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    seen: list[list[Tensor]] = []
    for ref in refs:
        model = load_model(ref, dtype="float32")
        for n, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda _m, _i, o, name=f"out{n}": kept[name].append(o[0]))
            layer.mlp.down_proj.register_forward_pre_hook(lambda _m, i, name=f"ffn{n}": kept[name].append(i[0][0]))
        for batch, _ in paired_minibatches(refs, parent / "texts.jsonl", 24, 512, 1):
            model(input_ids=torch.tensor(batch.ids))
        seen.append([torch.cat(kept[name]).double() for name in names])
        for found in kept.values():
            found.clear()
    (s0, s1, h0, h1), (t0, t1, _, _) = seen

    def fitted(h: Tensor, wanted: Tensor) -> Tensor:
        gram = h.mT @ h
        return torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)), h.mT @ wanted).mT

    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    models = (parent / "base", parent / "tuned", parent)
    whole = ariadne(pkt, *models, tmp_path / "whole")
    step = ariadne(pkt, *models, tmp_path / "step", incremental="true")
    few = ariadne(pkt, *models, tmp_path / "few", incremental="true", pairs_at_once=1)
    for row, last in ((whole, t1 - s1), (step, (t1 - s1) - (t0 - s0)), (few, (t1 - s1) - (t0 - s0))):
        torch.testing.assert_close(row[first].double(), fitted(h0, t0 - s0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[second].double(), fitted(h1, last), rtol=1e-4, atol=1e-5)


def test_ariadne_with_random_turns_is_a_control(pkt: Run, parent: Path, tmp_path: Path) -> None:
    drawn = {"maps": "random", "seeds": "[0,1]"}
    first = ariadne(pkt, parent / "base", parent / "tuned", parent, tmp_path / "row", **drawn)
    second = change(tmp_path / "row", 1)
    fitted = ariadne(pkt, parent / "base", parent / "tuned", parent, tmp_path / "fitted")
    assert first.keys() == second.keys() == fitted.keys()
    assert not any(torch.allclose(first[name], second[name], rtol=0.1) for name in first)
    assert not any(torch.allclose(first[name], fitted[name], rtol=0.1) for name in first)


LONG = [f"The answer number {n} is {' '.join(format(n * 7919 + k * k, 'x') for k in range(9))}." for n in range(12)]


def with_gradients(pkt: Run, parent: Path, folder: Path, source: str, *more: object) -> tuple[object, ...]:
    """The options of a derive by labels: as `derive`, with the gradients of long answers."""
    for task, answers in (("gsm8k", LONG[:7]), ("mmlu", LONG[7:])):
        (folder / "examples" / task).mkdir(parents=True, exist_ok=True)
        write_examples(folder / "examples" / task / "align.jsonl", answers)
    models = ("--source", parent / f"{source}base", "--target", parent / "base")
    given = ("--examples", folder / "examples", "--correlation", parent / f"sums-{source}base", "--template", "none")
    status, printed, err = pkt("gradients", *models, *given, "--out", folder / "asked", *more)
    assert status == 0, err
    assert printed.startswith("gradients: 12 examples of 2 tasks, ")
    models = ("--source", parent / f"{source}tuned", "--base", parent / f"{source}base", "--target", parent / "base")
    return (*models, "--correlation", parent / f"sums-{source}base", "--gradients", folder / "asked")


@pytest.mark.parametrize("source", ["", "turned-", "re-"])
def test_bico_is_exact_where_the_right_maps_exist(pkt: Run, parent: Path, tmp_path: Path, source: str) -> None:
    """All projections of a turned copy, gate and up too; of one among random filler those whose input has none."""
    given = with_gradients(pkt, parent, tmp_path, source)
    status, _, err = pkt("derive", "--code", "bico", *given, "--out", tmp_path / "row")
    assert status == 0, err
    ranks = json.loads((tmp_path / "row/changes.json").read_text())["ranks"]
    assert all(rank == full for rank, full in ranks.values())
    inside, found = own(pkt, parent, tmp_path / "own", vocabulary="false"), change(tmp_path / "row")
    assert found.keys() == inside.keys()
    for name, weight in inside.items():
        if source != "re-" or not name.endswith(("down_proj.weight", "o_proj.weight")):
            assert float((found[name] - weight).norm() / weight.norm()) < 2e-3, name
    asked = json.loads((tmp_path / "asked/gradients.json").read_text())
    assert asked["examples"] == {"gsm8k": 7, "mmlu": 5} and asked["num_answer_tokens"] > 400


def test_bico_from_gradients_alone(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """Input maps of W^T dL/dy: no wider than the output, so of down all d_model of the neurons' directions."""
    given = with_gradients(pkt, parent, tmp_path, "turned-", "--grams")
    out = tmp_path / "row"
    assert pkt("derive", "--code", "bico", *given, "--set", "inputs=gradients", "--out", out)[0] == 0
    ranks = json.loads((out / "changes.json").read_text())["ranks"]
    inside, found = own(pkt, parent, tmp_path / "own", vocabulary="false"), change(out)
    exact = 0
    for name, weight in inside.items():
        layer, part = name.split(".")[2], name.split(".")[4]
        key = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}.get(part, f"attn_{part[0]}")
        if name.endswith("bias") or len(set(ranks[f"layer_{layer}.{key}.in"])) == 1:
            assert float((found[name] - weight).norm() / weight.norm()) < 2e-3, name
            exact += 1
    assert len(inside) > exact > len(inside) // 3
    # Whitening changes no exact map, and takes what `grams` kept.
    out = tmp_path / "white"
    more = ("--set", "inputs=gradients", "--set", "whitening=0.25", "--out", out)
    assert pkt("derive", "--code", "bico", *given, *more)[0] == 0
    name = "model.layers.1.self_attn.q_proj.bias"
    torch.testing.assert_close(change(out)[name], inside[name], rtol=0, atol=1e-4)


def test_gains_apart_go_by_the_norms_own_gradients(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """As published; a copy's changes of projections and gains, as they are."""
    given = with_gradients(pkt, parent, tmp_path, "")
    assert pkt("derive", "--code", "bico", *given, "--set", "fold=false", "--out", tmp_path / "row")[0] == 0
    before, after = (load_file(parent / name / "model.safetensors") for name in ("base", "tuned"))
    found = change(tmp_path / "row")
    assert "model.layers.1.post_attention_layernorm.weight" in found
    for name, weight in found.items():
        expected = after[name] - before[name]
        assert float((weight - expected).norm() / expected.norm()) < 2e-3, name
    ranks = json.loads((tmp_path / "row/changes.json").read_text())["ranks"]
    assert ranks["layer_0.ffn_in.out"] == [48, 48]


def test_gradients_are_equal_however_many_pairs_are_held(pkt: Run, parent: Path, tmp_path: Path) -> None:
    for name, count in (("a", 8), ("b", 8), ("c", 1)):
        with_gradients(pkt, parent, tmp_path / name, "re-", "--pairs-at-once", count)
    a, b, c = (tmp_path / name / "asked" for name in "abc")
    for path in sorted(a.iterdir()):
        assert path.read_bytes() == (b / path.name).read_bytes()
    for layer in (0, 1):
        one, other = (load_file(folder / f"layer_00{layer}.safetensors") for folder in (a, c))
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-9) for name in one)


def test_bico_refuses_what_it_cannot_work_from(pkt: Run, parent: Path, tmp_path: Path) -> None:
    given = with_gradients(pkt, parent, tmp_path, "turned-")
    row = ("--out", tmp_path / "row")
    _, _, err = pkt("derive", "--code", "bico", *given[:-2], *row)
    assert "the method takes --target and --source and --base and --correlation and --gradients, nothing else" in err
    _, _, err = pkt("derive", "--code", "bico", *given, "--set", "whitening=0.5", *row)
    message = "whitening needs either model's own sums, too; run `pkt gradients` with grams: true"
    assert err == f"pkt: error: {tmp_path}/asked: {message}\n"
    (tmp_path / "asked/gradients.json").rename(tmp_path / "kept.json")
    _, _, err = pkt("derive", "--code", "bico", *given, *row)
    assert err.startswith(f"pkt: error: {tmp_path}/asked/gradients.json: not readable (") and "`pkt gradients`" in err
    told = json.loads((tmp_path / "kept.json").read_text())
    (tmp_path / "asked/gradients.json").write_text(json.dumps(told | {"pairs": [[0, 0]]}))
    _, _, err = pkt("derive", "--code", "bico", *given, *row)
    assert f"{tmp_path}/asked: of other pairs of layers than {parent}/sums-turned-base; run `pkt gradients`" in err
    other = told | {"source": told["source"] | {"revision": "other"}}
    (tmp_path / "asked/gradients.json").write_text(json.dumps(other))
    _, _, err = pkt("derive", "--code", "bico", *given, *row)
    assert "run `pkt gradients` on these models" in err
    assert not (tmp_path / "row").exists()


def test_too_few_answers(pkt: Run, parent: Path, tmp_path: Path) -> None:
    """Behind the last attention only tokens that predict an answer have a gradient; the rank that they give is said."""
    given = with_gradients(pkt, parent, tmp_path, "turned-")
    for path in (tmp_path / "examples").glob("*/align.jsonl"):
        write_examples(path, ["It is 1."])
    asked = ("--examples", tmp_path / "examples", "--correlation", parent / "sums-turned-base", "--template", "none")
    models = ("--source", parent / "turned-base", "--target", parent / "base")
    assert pkt("gradients", *models, *asked, "--out", tmp_path / "asked")[0] == 0
    count = json.loads((tmp_path / "asked/gradients.json").read_text())["num_answer_tokens"]
    status, _, err = pkt("derive", "--code", "bico", *given, "--out", tmp_path / "row")
    assert status == 2
    assert f"{tmp_path}/asked: {count} answer tokens give the map of the gradient at attn_q of layers 0-0 rank" in err
    assert err.endswith("; run `pkt gradients` on more examples\n")


def test_examples_that_two_models_read_differently(pkt: Run, parent: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    other = trained(tmp_path / "other", parent / "base")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_tokens(["answer"])
    tokenizer.save(str(other / "tokenizer.json"))
    models = ("--source", other, "--target", parent / "base")
    texts(tmp_path / "t.jsonl", 4)
    sums = ("--correlation", tmp_path / "sums")
    (tmp_path / "examples/gsm8k").mkdir(parents=True)
    write_examples(tmp_path / "examples/gsm8k/align.jsonl", LONG[:2])
    assert (
        pkt("correlate", *models, "--texts", tmp_path / "t.jsonl", "--num-texts", 4, "--out", tmp_path / "sums")[0] == 0
    )
    command = ("gradients", *models, *sums, "--template", "none", "--out", tmp_path / "asked")
    status, _, err = pkt(*command, "--examples", tmp_path / "examples")
    assert status == 2 and "example toy_0: the two models' tokenizers or templates do not read it alike" in err
    _, _, err = pkt(*command, "--examples", tmp_path / "sums")
    assert f"{tmp_path}/sums: no <task>/align.jsonl below it; make it with `pkt prepare`" in err
    assert not (tmp_path / "asked").exists()
