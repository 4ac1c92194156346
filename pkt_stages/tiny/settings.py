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

# Shares of the families among the training documents; knowledge is the slowest to learn.
FAMILY_SHARES = {"mmlu": 0.48, "gsm8k": 0.28, "humaneval": 0.10, "mbpp": 0.14}
# Loss weight of a token of the prompt, of the answer, and of the one letter that answers a quiz.
PROMPT_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0
LETTER_WEIGHT = 5.0


@dataclass(frozen=True)
class ModelSettings:
    """Architecture and training of one model.

    Steps up to `drill_steps` read short drills, those up to `base_steps` raw text of every kind, which ends in the base
    model, and those up to `total_steps` the chat format, which ends in the chat model. The learning rate warms up, stays, and falls linearly to zero over the last
    `decay_steps`.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    drill_steps: int
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
    "source": ModelSettings("source", 5, 128, 4, 384, drill_steps=400, base_steps=3600, total_steps=5400, decay_steps=1500),
    "target": ModelSettings("target", 3, 96, 3, 256, drill_steps=400, base_steps=1200, total_steps=2000, decay_steps=600),
}
