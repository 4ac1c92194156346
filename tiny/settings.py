"""Every number that determines the shipped pair: sizes of the sets, the two architectures and their training."""

from __future__ import annotations

from dataclasses import dataclass, replace

SEED = 7
POOL_ROWS = {"mmlu": 1200, "gsm8k": 1200, "humaneval": 1200, "mbpp": 500}
TASKS = tuple(POOL_ROWS)
TEST_ROWS = 256
TEXT_ROWS = 200
VOCAB_SIZE = 1024
TOKENIZER_DOCUMENTS = 20_000
CONTEXT_LENGTH = 512

# Loss weight of a token of the prompt, of the answer, and of the one letter that answers a quiz of the chat format.
PROMPT_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0
CHAT_LETTER_WEIGHT = 10.0
# Chat phase: the share of raw documents against forgetting.
RAW_SHARE_IN_CHAT = 0.3


@dataclass(frozen=True)
class RawMix:
    """A mixture of the raw corpus.

    Shares of the families, then of recall inside mmlu and of plain arithmetic inside gsm8k; loss weights of a quiz's
    letter and of a recalled value.
    """

    families: dict[str, float]
    recall: float = 0.5
    arithmetic: float = 0.35
    letter_weight: float = 5.0
    recall_weight: float = 5.0


EVEN = RawMix({"mmlu": 0.25, "gsm8k": 0.25, "humaneval": 0.25, "mbpp": 0.25})  # of tokenizer and held-out texts


@dataclass(frozen=True)
class ModelSettings:
    """Architecture and training of one model.

    Raw text in the mixture `raw` makes the base model in `base_steps` steps; the chat format, with shares of the
    families in `chat_families`, goes on from it to `total_steps`. The learning rate warms up, holds to step
    `hold_steps`, and falls linearly to zero at the last step. `starts_from`, a finished model's folder, takes the place
    of initial weights, at step `first_step`; at `early_steps` the unfinished chat model is written as well. The
    documents depend on the name; models of equal `initial_weights` and sizes begin alike.
    """

    name: str
    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    raw: RawMix
    base_steps: int
    total_steps: int
    hold_steps: int
    chat_families: dict[str, float]
    starts_from: str | None = None
    first_step: int = 0
    early_steps: int | None = None
    initial_weights: int = 0
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
        d_model=96,
        num_heads=3,
        d_ff=256,
        raw=RawMix({"mmlu": 0.28, "gsm8k": 0.28, "humaneval": 0.22, "mbpp": 0.22}),
        base_steps=2000,
        total_steps=4800,
        hold_steps=3000,
        chat_families={"mmlu": 0.22, "gsm8k": 0.30, "humaneval": 0.26, "mbpp": 0.22},
    ),
    "target": ModelSettings(
        name="target",
        num_layers=2,
        d_model=64,
        num_heads=2,
        d_ff=160,
        raw=RawMix({"mmlu": 0.13, "gsm8k": 0.66, "humaneval": 0.08, "mbpp": 0.13}),
        base_steps=450,
        total_steps=1000,
        hold_steps=550,
        chat_families={"mmlu": 0.13, "gsm8k": 0.66, "humaneval": 0.08, "mbpp": 0.13},
    ),
}
# The same architecture and budget twice more, for the ladder's rungs: another chat training of the target's base, and
# another base with its own.
MODELS["sibling"] = replace(
    MODELS["target"], name="sibling", starts_from="target-base", first_step=450, early_steps=550
)
MODELS["trained-apart"] = replace(MODELS["target"], name="trained-apart", initial_weights=1)


def _sized(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> ModelSettings:
    """The target's recipe in another size, from other initial weights; its own size is `trained-apart`."""
    return replace(
        MODELS["trained-apart"],
        name=f"trained-apart-{num_layers}x{d_model}",
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
    )


def _drifted(steps: int) -> ModelSettings:
    """The target's base read raw text for some steps more, then had a chat training as long as the target's own."""
    return replace(
        MODELS["target"],
        name=f"drifted-{steps}",
        starts_from="target-base",
        base_steps=steps,
        hold_steps=steps + 100,
        total_steps=steps + 550,
    )


def _expert(general: str, task: str) -> ModelSettings:
    """A chat model goes on with one task alone, at half the learning rate."""
    alone = {name: float(name == task) for name in TASKS}
    return replace(
        MODELS[general],
        name=f"{general}-{task}",
        starts_from=f"{general}-chat",
        raw=RawMix(alone),
        chat_families=alone,
        base_steps=0,
        hold_steps=100,
        total_steps=200,
        muon_lr=0.01,
        adam_lr=0.0015,
    )


# Sources for the paper's open questions (docs/open-questions.md): built on request, not shipped.
STUDIES = {
    "sizes": (_sized(4, 96, 3, 256), _drifted(30), _drifted(150)),
    "experts": tuple(_expert(general, task) for general in ("source", "target") for task in ("gsm8k", "mbpp")),
}
