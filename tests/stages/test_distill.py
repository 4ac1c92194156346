from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages.encoding import Encoded, encode, tokens_at
from pkt_stages.examples import read_examples
from pkt_stages.models import trainer
from pkt_stages.models.distillation import collate_with_prompts
from pkt_stages.models.load import load_model, load_tokenizer, resolve
from pkt_stages.stages.distill import DistillParams
from pkt_stages.templates import render_prompt
from tests import tokenizers
from tests.conftest import make_model, write_examples
from tests.stages.selection_files import options

Run = Callable[..., tuple[int, str, str]]
ANSWERS = ["It is 1.", "A far longer answer.", "3", "It is 4.", "5", "It is 6."]
SETTINGS = ["--method", "m", "--epochs", "2", "--batch-size", "3", "--rank", "4", "--lr", "1e-2", "--max-length", "128"]
SETTINGS += [
    "--max-new-tokens",
    "6",
    "--micro-batch-size",
    "2",
    "--train-set",
    "train",
    "--seeds",
    "0",
    "--dropout",
    "0",
]


@pytest.fixture
def paths(tmp_path: Path, source_folder: Path, target_folder: Path) -> dict[str, Path]:
    names = {"out": "adapters", "metrics": "distill.json", "scratch": "scratch"}
    return {
        "source": source_folder,
        "target": target_folder,
        "train": write_examples(tmp_path / "train.jsonl", ANSWERS),
        **{option: tmp_path / name for option, name in names.items()},
    }


def distill(pkt: Run, paths: dict[str, Path], *settings: str) -> tuple[int, str, str]:
    return pkt("distill", *options(**paths), *SETTINGS, *settings)


def record(paths: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(paths["metrics"].read_text())["seeds"]["0"]
    return found


def contents(paths: dict[str, Path]) -> list[bytes]:
    return [p.read_bytes() for p in sorted(paths["out"].rglob("*.*"))] + [paths["metrics"].read_bytes()]


def double(folder: Path) -> Any:
    return load_model(resolve(str(folder))).double()


def divergence(source: torch.Tensor, target: torch.Tensor, beta: float) -> float:
    """Generalised Jensen-Shannon divergence at one position, in nats; a slow loop (Agarwal et al. 2024, eq. 1)."""
    p, q = source.softmax(-1).tolist(), target.softmax(-1).tolist()
    if beta == 0:
        return sum(a * float(torch.tensor(a / b, dtype=torch.float64).log()) for a, b in zip(p, q, strict=True))
    if beta == 1:
        return sum(b * float(torch.tensor(b / a, dtype=torch.float64).log()) for a, b in zip(p, q, strict=True))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        mixed = beta * a + (1 - beta) * b
        logs = torch.tensor([a / mixed, b / mixed], dtype=torch.float64).log().tolist()
        total += beta * a * logs[0] + (1 - beta) * b * logs[1]
    return total


def examples(paths: dict[str, Path]) -> list[Encoded]:
    tokenizer = load_tokenizer(resolve(str(paths["target"])))
    return [encode(tokenizer, e, template="chat", max_length=128) for e in read_examples(paths["train"])]


def token_divergences(source: Any, target: Any, ids: list[int], labels: list[int], beta: float) -> list[float]:
    """Per supervised token, over the tokens that both models know."""
    with torch.no_grad():
        one, two = (model(torch.tensor([ids])).logits[0] for model in (source, target))
    known = min(one.shape[-1], two.shape[-1])
    return [divergence(one[i, :known], two[i, :known], beta) for i, label in enumerate(labels[1:]) if label != -100]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_per_answer_token(beta: float, pkt: Run, paths: dict[str, Path]) -> None:
    status, _, err = distill(pkt, paths, "--batch-size", "6", "--epochs", "1", "--beta", str(beta))
    assert status == 0, err
    source, target = double(paths["source"]), double(paths["target"])
    tokens = [d for e in examples(paths) for d in token_divergences(source, target, e.ids, e.labels, beta)]
    assert record(paths)["loss_by_step"][0] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
    assert json.loads(paths["metrics"].read_text())["num_supervised_tokens"] == len(tokens)


def test_gkd_follows_the_targets_own_answers(pkt: Run, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.experimental.gkd import GKDTrainer

    own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    write = GKDTrainer.generate_on_policy_outputs

    def spy(*given: Any) -> Any:
        own.append(write(*given))
        return own[-1]

    monkeypatch.setattr(GKDTrainer, "generate_on_policy_outputs", staticmethod(spy))
    settings = ["--objective", "gkd", "--batch-size", "6", "--epochs", "1", "--micro-batch-size", "4"]
    status, _, err = distill(pkt, paths, *settings)
    assert status == 0, err
    source, target = double(paths["source"]), double(paths["target"])
    gold = {tuple(e.ids): e for e in examples(paths)}
    prompts = {tuple(e.ids[: next(i for i, label in enumerate(e.labels) if label != -100)]) for e in gold.values()}
    means, seen = [], set()
    assert [len(ids) for ids, _, _ in own] == [3, 3]  # the largest divisor of the batch size that is not above 4
    for ids, mask, labels in own:
        tokens: list[float] = []
        for row in range(len(ids)):
            kept = mask[row].bool()
            text, wanted = ids[row][kept].tolist(), labels[row][kept].tolist()
            answer = next(i for i, label in enumerate(wanted) if label != -100)
            seen.add(tuple(text[:answer]))
            assert 1 <= len(text) - answer <= 6 and wanted[answer:] == text[answer:]
            tokens += token_divergences(source, target, text, wanted, 0.0)
        means.append(sum(tokens) / len(tokens))
    assert seen == prompts
    assert record(paths)["loss_by_step"][0] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert "num_supervised_tokens" not in json.loads(paths["metrics"].read_text())


@pytest.mark.parametrize("objective", ["kd", "gkd"])
def test_it_learns_and_the_adapter_fits_the_untouched_target(objective: str, pkt: Run, paths: dict[str, Path]) -> None:
    from peft import PeftModel

    settings = ["--objective", objective, "--epochs", "10", "--warmup-ratio", "0"]
    status, printed, err = distill(pkt, paths, *settings)
    assert status == 0, err
    losses = record(paths)["loss_by_epoch"]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]
    assert printed.startswith(f"distill: m, 1 seeds, loss by epoch {losses[0]:.4f} -> {losses[-1]:.4f} -> ")
    source, target = double(paths["source"]), load_model(resolve(str(paths["target"])))
    adapted = PeftModel.from_pretrained(target, paths["out"] / "seed_0").double()
    tokens = [d for e in examples(paths) for d in token_divergences(source, adapted, e.ids, e.labels, 0.0)]
    assert sum(tokens) / len(tokens) < (losses[-1] + 0.3 if objective == "kd" else losses[0])


def test_it_trains_on_the_align_set_unless_told_otherwise(pkt: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    settings = ["--train-set", "align", "--epochs", "1"]
    status, _, err = distill(pkt, paths, *settings)
    assert (status, err) == (2, "pkt: error: train_set align needs --align\n")
    align = write_examples(tmp_path / "align.jsonl", ANSWERS[:3])
    status, _, err = distill(pkt, {**paths, "align": align}, *settings)
    assert status == 0, err
    found = json.loads(paths["metrics"].read_text())
    assert found["num_examples"] == 3
    assert [found[side]["name"] for side in ("source", "target")] == ["source", "target"]
    assert DistillParams() == DistillParams(train_set="align", batch_size=16, lr=1e-5, epochs=5, dropout=0.05)


@pytest.mark.parametrize("objective", ["kd", "gkd"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    objective: str, pkt: Run, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--objective", objective, "--epochs", "3", "--dropout", "0.1"]
    assert distill(pkt, paths, *settings)[0] == 0
    again = {**paths, **{name: tmp_path / "again" / name for name in ("out", "metrics", "scratch")}}
    step_end = trainer._Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise InterruptedError
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer._Watch, "on_step_end", stop)
    with pytest.raises(InterruptedError):
        distill(pkt, again, *settings)
    assert [p.parent.name for p in again["scratch"].rglob(trainer._WHOLE)] == ["checkpoint-2", "checkpoint-3"]
    monkeypatch.setattr(trainer._Watch, "on_step_end", step_end)
    assert distill(pkt, again, *settings)[0] == 0
    assert contents(again) == contents(paths)


@pytest.mark.parametrize("larger", ["source", "target"])
def test_padding_rows_of_the_vocabulary_do_not_count(
    larger: str, pkt: Run, paths: dict[str, Path], tmp_path: Path
) -> None:
    padded = {**paths, larger: make_model(tmp_path / "padded", seed=4, vocab_size=272)}
    status, _, err = distill(pkt, padded, "--batch-size", "6", "--epochs", "1")
    assert status == 0, err
    source, target = double(padded["source"]), double(padded["target"])
    tokens = [d for e in examples(paths) for d in token_divergences(source, target, e.ids, e.labels, 0.0)]
    assert record(padded)["loss_by_step"][0] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_a_tokenizer_with_more_tokens_than_the_model(pkt: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    small = {**paths, "source": make_model(tmp_path / "small", seed=4, vocab_size=260)}
    _, _, err = distill(pkt, small)
    assert err.splitlines()[-1] == (
        f"pkt: error: {small['source']}: token 'Ń' of its tokenizer is number 260, its embedding has 260 rows; give it"
        " the tokenizer that it was trained with"
    )
    # Special tokens that nothing uses pass there, but have no logits either.
    large = {**paths, "source": make_model(tmp_path / "s", seed=4), "target": make_model(tmp_path / "t", seed=5)}
    for folder in (large["source"], large["target"]):
        tokenizer = load_tokenizer(resolve(str(folder)))
        tokenizer.add_tokens([f"<fill{i}>" for i in range(4)], special_tokens=True)
        tokenizer.save_pretrained(folder)
    _, _, err = distill(pkt, large)
    assert err.splitlines()[-1] == "pkt: error: the source's embedding has 264 rows, its tokenizer 265 tokens"


def test_another_vocabulary_is_an_error(pkt: Run, paths: dict[str, Path], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "other", seed=4)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(content))
    status, _, err = distill(pkt, {**paths, "source": folder})
    assert status == 2
    a, b = sorted((vocabulary["A"], vocabulary["B"]))
    assert err == (
        f"pkt: error: source and target must share their vocabulary: token 'A' is number {b} of 261 in the source,"
        f" {a} of 261 in the target; use objective uld, or `pkt generate` and `pkt finetune` (SeqKD),"
        " instead\n"
    )
    assert not paths["out"].exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--beta", "1.5"], "options of `distill`: beta must be at least 0 and at most 1, found 1.5"),
        (["--temperature", "0"], "options of `distill`: temperature must be above 0, found 0.0"),
        (["--objective", "seqkd"], "options of `distill`: objective: expected one of kd, gkd, uld, found 'seqkd'"),
        (
            ["--objective", "gkd", "--max-new-tokens", "250"],
            "the longest prompt has 25 tokens, with max_new_tokens 250 more than the 256 that the target takes;"
            " lower max_new_tokens",
        ),
        (["--rank", "40"], "rank 40 is larger than a side of model.layers.0.self_attn.v_proj [32, 64]; use at most 32"),
    ],
)
def test_bad_settings(settings: list[str], message: str, pkt: Run, paths: dict[str, Path]) -> None:
    status, _, err = distill(pkt, paths, *settings)
    assert (status, err) == (2, f"pkt: error: {message}\n")
    assert not paths["out"].exists() and not paths["metrics"].exists()


def test_prompts_stand_on_the_right_edge() -> None:
    batch = collate_with_prompts(
        [{"ids": [0, 7, 8, 9, 1], "labels": [-100, -100, -100, 9, 1]}, {"ids": [0, 5, 1], "labels": [-100, 5, 1]}], 2
    )
    assert batch["input_ids"].tolist() == [[0, 7, 8, 9, 1], [0, 5, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 9, 1], [-100, 5, 1, -100, -100]]
    assert batch["prompts"].tolist() == [[0, 7, 8], [2, 2, 0]]
    assert batch["prompt_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# --- two tokenizers ---------------------------------------------------------------------------------------------------

TEXTS = ["It costs €12 🙂.", "The café is naïve.", "1234567 + 89"]


@pytest.fixture
def apart(tmp_path: Path, paths: dict[str, Path]) -> dict[str, Path]:
    """A source and a target with other tokens, and another number of them."""
    for name, kind, size in (("source", "metaspace", 400), ("target", "bytes", 360)):
        folder = make_model(tmp_path / name, seed=size, vocab_size=size)
        tokenizers.save(folder, kind)
        paths[name] = folder
    paths["train"] = write_examples(tmp_path / "train.jsonl", TEXTS)
    return paths


def groups(tokenizer: Any, prompt: str, answer: str) -> list[tuple[int, int]]:
    """Tokens of an answer with the character behind each, 0 inside one: by reading on until it is whole."""
    ids, spans = tokens_at(tokenizer, prompt + answer)
    first = next(i for i, (start, end) in enumerate(spans) if start >= len(prompt) and end > start)
    found = []
    for i in range(first, len(ids)):
        whole = "\ufffd" not in tokenizer.decode(ids[first : i + 1], skip_special_tokens=True)
        last = i + 1 == len(ids) or spans[i + 1][1] != spans[i][1]
        assert whole == last
        found.append((i, spans[i][1] - len(prompt) if whole else 0))
    return found


def answer_probabilities(
    model: Any, tokenizer: Any, example: Any
) -> tuple[list[tuple[int, int]], torch.Tensor, list[int]]:
    prompt = render_prompt(tokenizer, "chat", example.prompt)
    ids, _ = tokens_at(tokenizer, prompt + example.answer)
    with torch.no_grad():
        return groups(tokenizer, prompt, example.answer), model(torch.tensor([ids])).logits[0].softmax(-1), ids


def test_uld_is_the_distance_of_sorted_probabilities(pkt: Run, apart: dict[str, Path]) -> None:
    """In float64 and loops: where both end at a character, a group's last distribution times what came before."""
    status, _, err = distill(pkt, apart, "--objective", "uld", "--epochs", "1")
    assert status == 0, err
    sides = [(double(apart[name]), load_tokenizer(resolve(str(apart[name])))) for name in ("target", "source")]
    losses = []
    for example in read_examples(apart["train"]):
        read = [answer_probabilities(model, tokenizer, example) for model, tokenizer in sides]
        ends = [{end for _, end in tokens if end} for tokens, _, _ in read]
        common = sorted(ends[0] & ends[1])
        assert common[-1] == len(example.answer) and len(common) < max(len(tokens) for tokens, _, _ in read)
        merged: list[list[torch.Tensor]] = []
        for tokens, p, ids in read:
            merged.append([])
            certain = torch.tensor(1.0).double()
            for i, end in tokens:
                if end in common:
                    merged[-1].append((certain * p[i - 1]).sort(descending=True).values)
                    certain = torch.tensor(1.0).double()
                else:
                    certain = certain * p[i - 1, ids[i]].clamp_min(1e-8)
        total = 0.0
        for ours, theirs in zip(*merged, strict=True):
            padded = torch.zeros(400, dtype=torch.float64)
            padded[:360] = ours
            total += float((padded - theirs).abs().sum())
        losses.append(total / len(common))
    assert record(apart)["loss_by_step"][0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    first = contents(apart)
    assert (apart["out"] / "seed_0" / "adapter_model.safetensors").is_file()
    for other in ("kd", "gkd"):
        status, _, err = distill(pkt, apart, "--objective", other)
        assert status == 2 and "use objective uld, or `pkt generate` and `pkt finetune` (SeqKD), instead" in err
    assert contents(apart) == first


def test_uld_needs_tokenizers_that_read_the_same(pkt: Run, apart: dict[str, Path]) -> None:
    tokenizers.save(apart["source"], "lower")
    status, _, err = distill(pkt, apart, "--objective", "uld")
    assert status == 2 and err.startswith(f"pkt: error: example toy_0: {apart['target']} reads 'It costs €12 🙂.', ")
    assert not apart["out"].exists()
