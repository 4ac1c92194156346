"""Quick scores of the pair by difficulty level; the numbers that count come from `pkt evaluate`.

Greedy generation from `prompt + forced prefix`; generated code runs in a plain subprocess, since it is our own
models' output over a closed vocabulary.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pkt_stages.examples import Example
from pkt_stages.tasks import load
from tiny.draw import GradedRow

BATCH = 64
MAX_NEW_TOKENS = 120
CODE_SECONDS = 5
CODE_STOPS = re.compile(r"\n(?:class|def|#|if|print|```)|```")


@dataclass(frozen=True)
class Score:
    """Right answers by level, as level -> (right, asked)."""

    levels: dict[int, tuple[int, int]]

    @property
    def count(self) -> int:
        return sum(asked for _, asked in self.levels.values())

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 .. 1."""
        return sum(right for right, _ in self.levels.values()) / self.count

    def as_json(self) -> dict[str, Any]:
        by_level = {str(level): round(right / asked, 4) for level, (right, asked) in sorted(self.levels.items())}
        return {"accuracy": round(self.accuracy, 4), "count": self.count, "by_level": by_level}


def score_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tests: Mapping[str, list[GradedRow]]
) -> dict[str, Score]:
    """Score every test set."""
    model.eval()
    scores = {}
    for task, rows in tests.items():
        levels: dict[int, tuple[int, int]] = {}
        make = load(task).example
        examples = [make(graded.row, str(number)) for number, graded in enumerate(rows)]
        for graded, verdict in zip(rows, _verdicts(model, tokenizer, task, examples), strict=True):
            right, asked = levels.get(graded.level, (0, 0))
            levels[graded.level] = (right + verdict, asked + 1)
        scores[task] = Score(levels)
    return scores


def _verdicts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, examples: list[Example]
) -> list[bool]:
    outputs = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        texts = [f"<s><|user|>\n{example.prompt}\n<|assistant|>\n{example.prefix}" for example in batch]
        encoded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            if task == "mmlu":
                letters = [tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in "ABCD"]
                logits = model(**encoded).logits[:, -1, letters]
                outputs += ["ABCD"[choice] for choice in logits.argmax(-1).tolist()]
                continue
            generated = model.generate(  # type: ignore[misc]
                **encoded, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
        outputs += tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [_is_right(example, output) for example, output in zip(examples, outputs, strict=True)]


def _is_right(example: Example, output: str) -> bool:
    reference = example.reference
    if example.dataset == "mmlu":
        return output == reference["answer"]
    if example.dataset == "gsm8k":
        numbers = re.findall(r"-?\d+", output)
        return bool(numbers) and int(numbers[-1]) == int(reference["answer"])
    code = reference["code_prefix"] + CODE_STOPS.split(output)[0]
    if example.dataset == "humaneval":
        return _passes(f"{code}\n{reference['test']}\ncheck({reference['entry_point']})\n")
    return _passes("\n".join([code, *reference["test_list"]]))


def _passes(program: str) -> bool:
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=CODE_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
