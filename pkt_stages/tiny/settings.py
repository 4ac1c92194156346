"""Every number that determines the shipped pair: sizes of the sets, the two architectures and their training."""

from __future__ import annotations

from dataclasses import dataclass

SEED = 7
POOL_ROWS = {"mmlu": 1200, "gsm8k": 1200, "humaneval": 1200, "mbpp": 500}
TEST_ROWS = 256
TEXT_ROWS = 200
VOCAB_SIZE = 1024
TOKENIZER_DOCUMENTS = 20_000
CONTEXT_LENGTH = 512

# Loss weight of a token of the prompt, of the answer, and of the one letter that answers a quiz of the chat format.
PROMPT_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0
CHAT_LETTER_WEIGHT = 10.0
# Chat phase: the share of raw documents (of the last raw mix) against forgetting.
RAW_SHARE_IN_CHAT = 0.3


@dataclass(frozen=True)
class RawMix:
    """A mixture of the raw corpus.

    Shares of the families, then of option drills and recall inside mmlu and of arithmetic inside gsm8k; loss weights of
    a quiz's letter and of a recalled value.
    """

    families: dict[str, float]
    options: float
    recall: float
    arithmetic: float
    letter_weight: float
    recall_weight: float


RAW_MIXES = {
    "mixed": RawMix({"mmlu": 0.46, "gsm8k": 0.26, "humaneval": 0.14, "mbpp": 0.14}, 0.10, 0.30, 0.35, 5.0, 1.0),
    "facts": RawMix({"mmlu": 0.60, "gsm8k": 0.20, "humaneval": 0.10, "mbpp": 0.10}, 0.05, 0.50, 0.35, 5.0, 5.0),
    "quizzes": RawMix({"mmlu": 0.46, "gsm8k": 0.24, "humaneval": 0.14, "mbpp": 0.16}, 0.12, 0.13, 0.35, 15.0, 5.0),
    "balanced": RawMix({"mmlu": 0.36, "gsm8k": 0.26, "humaneval": 0.18, "mbpp": 0.20}, 0.10, 0.15, 0.35, 15.0, 5.0),
    "numbers": RawMix({"mmlu": 0.42, "gsm8k": 0.42, "humaneval": 0.06, "mbpp": 0.10}, 0.10, 0.15, 0.40, 15.0, 5.0),
}


@dataclass(frozen=True)
class ModelSettings:
    """Architecture and training of one model.

    `phases` names what is read up to which step: "options" (option drills), "drills" (drills of every kind), one of the
    RAW_MIXES, and "chat" last, with shares of the families in `chat_families`. The base model is the state before the
    chat phase, the chat model the state after it. The learning rate warms up, holds to step `hold_steps`, and falls
    linearly to zero at the last step.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    phases: tuple[tuple[str, int], ...]
    hold_steps: int
    chat_families: dict[str, float]
    documents_per_step: int = 64
    micro_batches: int = 3
    warmup_steps: int = 60
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def phase(self, step: int) -> str:
        """The name of the phase that `step` falls into."""
        return next(name for name, end in self.phases if step < end)

    @property
    def base_steps(self) -> int:
        """Steps before the chat phase."""
        return self.phases[-2][1]

    @property
    def total_steps(self) -> int:
        return self.phases[-1][1]


MODELS = {
    "source": ModelSettings(
        name="source",
        num_layers=4,
        d_model=96,
        num_heads=3,
        d_ff=256,
        phases=(
            ("options", 300),
            ("drills", 700),
            ("mixed", 2000),
            ("facts", 2700),
            ("quizzes", 3500),
            ("balanced", 3800),
            ("chat", 8000),
        ),
        hold_steps=4800,
        chat_families={"mmlu": 0.32, "gsm8k": 0.28, "humaneval": 0.18, "mbpp": 0.22},
    ),
    "target": ModelSettings(
        name="target",
        num_layers=3,
        d_model=64,
        num_heads=2,
        d_ff=160,
        phases=(
            ("options", 300),
            ("drills", 700),
            ("mixed", 2000),
            ("facts", 2700),
            ("quizzes", 3500),
            ("numbers", 4000),
            ("chat", 7000),
        ),
        hold_steps=4500,
        chat_families={"mmlu": 0.38, "gsm8k": 0.42, "humaneval": 0.08, "mbpp": 0.12},
    ),
}
