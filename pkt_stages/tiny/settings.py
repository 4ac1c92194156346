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

# Loss weight of a token of the prompt, of the answer, and of the one letter that answers a quiz.
PROMPT_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0
LETTER_WEIGHT = 5.0


# Share of raw documents (FACT_MIX) in the chat phase, against forgetting.
RAW_SHARE_IN_CHAT = 0.3


@dataclass(frozen=True)
class RawMix:
    """Shares of the raw corpus: of the families, of option drills and recall in mmlu, of arithmetic in gsm8k."""

    families: dict[str, float]
    options: float
    recall: float
    arithmetic: float
    recall_weight: float


BASE_MIX = RawMix({"mmlu": 0.48, "gsm8k": 0.28, "humaneval": 0.10, "mbpp": 0.14}, 0.1, 0.3, 0.35, ANSWER_WEIGHT)
# Recall of facts is the slowest skill: this mix gives it half of the knowledge texts and a higher weight.
FACT_MIX = RawMix({"mmlu": 0.60, "gsm8k": 0.22, "humaneval": 0.07, "mbpp": 0.11}, 0.05, 0.5, 0.35, LETTER_WEIGHT)


@dataclass(frozen=True)
class ModelSettings:
    """Architecture and training of one model.

    Steps up to `option_steps` read option drills, up to `drill_steps` every kind of drill, up to `mixed_steps` raw text
    in the BASE_MIX, up to `base_steps` in the FACT_MIX, which ends in the base model, and up to `total_steps` the chat
    format, which ends in the chat model.
    The learning rate warms up, stays, and falls linearly to zero over the last `decay_steps`.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    option_steps: int
    drill_steps: int
    mixed_steps: int
    base_steps: int
    total_steps: int
    decay_steps: int
    documents_per_step: int = 64
    micro_batches: int = 3
    warmup_steps: int = 60
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.01
    clip_norm: float = 1.0


MODELS = {
    "source": ModelSettings(
        name="source",
        num_layers=4,
        d_model=128,
        num_heads=4,
        d_ff=384,
        option_steps=300,
        drill_steps=700,
        mixed_steps=1100,
        base_steps=2200,
        total_steps=3600,
        decay_steps=1000,
    ),
    "target": ModelSettings(
        name="target",
        num_layers=3,
        d_model=96,
        num_heads=3,
        d_ff=256,
        option_steps=300,
        drill_steps=700,
        mixed_steps=1920,
        base_steps=3200,
        total_steps=4200,
        decay_steps=800,
    ),
}
