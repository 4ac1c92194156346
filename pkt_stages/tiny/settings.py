"""Every number that determines the shipped pair: sizes of the sets, the two architectures and their training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
# Chat phases: shares of the families, and the share of raw documents ("balanced" mix) against forgetting. The later
# ones give the family that is behind more room.
CHAT_FAMILIES = {
    "chat": {"mmlu": 0.40, "gsm8k": 0.26, "humaneval": 0.10, "mbpp": 0.24},
    "chat_steps": {"mmlu": 0.38, "gsm8k": 0.24, "humaneval": 0.05, "mbpp": 0.33},
    "chat_numbers": {"mmlu": 0.22, "gsm8k": 0.74, "humaneval": 0.02, "mbpp": 0.02},
}
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
    "mixed": RawMix({"mmlu": 0.48, "gsm8k": 0.28, "humaneval": 0.10, "mbpp": 0.14}, 0.10, 0.30, 0.35, 5.0, 1.0),
    "facts": RawMix({"mmlu": 0.60, "gsm8k": 0.22, "humaneval": 0.07, "mbpp": 0.11}, 0.05, 0.50, 0.35, 5.0, 5.0),
    "quizzes": RawMix({"mmlu": 0.48, "gsm8k": 0.26, "humaneval": 0.10, "mbpp": 0.16}, 0.12, 0.13, 0.35, 15.0, 5.0),
    "balanced": RawMix({"mmlu": 0.38, "gsm8k": 0.28, "humaneval": 0.08, "mbpp": 0.26}, 0.10, 0.15, 0.35, 15.0, 5.0),
    "numbers": RawMix({"mmlu": 0.40, "gsm8k": 0.42, "humaneval": 0.06, "mbpp": 0.12}, 0.10, 0.15, 0.45, 15.0, 5.0),
}


class Decay(NamedTuple):
    """A linear fall of the learning rate, in steps: where it begins to hold, where it reaches zero, its slope."""

    first: int
    zero: int
    span: int


@dataclass(frozen=True)
class ModelSettings:
    """Architecture and training of one model.

    `phases` names what is read up to which step: "options" (option drills), "drills" (drills of every kind), one of the
    RAW_MIXES, and last one or more of CHAT_FAMILIES. The base model is the state before the first chat phase, the chat
    model the state after the last. `stream` names the random stream of the documents.

    The learning rate warms up, stays, and falls linearly: from step `first` of a decay on its factor is
    (zero - step) / span, at most 1.
    """

    name: str
    stream: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    phases: tuple[tuple[str, int], ...]
    decays: tuple[Decay, ...]
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
        """Steps before the first chat phase."""
        return max(end for name, end in self.phases if name not in CHAT_FAMILIES)

    @property
    def total_steps(self) -> int:
        return self.phases[-1][1]


MODELS = {
    "source": ModelSettings(
        name="source",
        stream="target",  # it began as the target of a larger model, whose training would have taken too long
        num_layers=3,
        d_model=96,
        num_heads=3,
        d_ff=256,
        phases=(
            ("options", 300),
            ("drills", 700),
            ("mixed", 1920),
            ("facts", 2720),
            ("quizzes", 3500),
            ("balanced", 4250),
            ("chat", 5525),
            ("chat_steps", 6600),
        ),
        decays=(Decay(0, 5750, 1500), Decay(5525, 6600, 3070)),
    ),
    "target": ModelSettings(
        name="target",
        stream="small",
        num_layers=2,
        d_model=64,
        num_heads=2,
        d_ff=160,
        phases=(
            ("options", 300),
            ("drills", 700),
            ("mixed", 1900),
            ("facts", 1940),
            ("drills", 2600),
            ("numbers", 3800),
            ("chat", 4900),
            ("chat_numbers", 5800),
        ),
        decays=(Decay(0, 4900, 940), Decay(4900, 5800, 1800)),
    ),
}
