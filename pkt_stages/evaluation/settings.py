"""Settings of what asks a model for answers: of `pkt generate`, of `pkt evaluate`, and of who compares evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pkt_stages.encoding import PromptParams
from pkt_stages.options import DType
from pkt_stages.params import option


@dataclass(frozen=True)
class AnswerParams(PromptParams):
    """How a model answers a prompt."""

    backend: Literal["hf", "vllm"] = option("hf", "What computes: hf (transformers) or vllm.")
    dtype: DType = option("auto", "Dtype of the weights; auto: stored.")
    max_new_tokens: int = option(512, "Tokens per generated answer, at most.", ge=1)
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    seed: int = option(0, "Seed of sampling.")


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: at most so many per answer.
        num_samples: answers per example; more than one needs a temperature above 0.
        temperature: 0 is greedy.
        top_p: 0 .. 1, the probability mass that is drawn from.
        seed: of the random numbers.
    """

    max_new_tokens: int = 512
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples {self.num_samples} with temperature 0 would repeat one answer; set a temperature"
            )
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p} has no effect with temperature 0; set a temperature")


@dataclass(frozen=True)
class EvaluateParams(AnswerParams):
    """Settings of the evaluation; see docs/evaluation.md for the protocols."""

    num_samples: int = option(1, "Answers per example; more than one needs a temperature.", ge=1)
    top_p: float = option(1.0, "Probability mass that is sampled from.", gt=0, le=1)
    sandbox_floor: Literal["sandlock", "namespaces", "landlock", "rlimits"] = option(
        "sandlock", "Weakest sandbox in which generated code may run."
    )
    sandbox_seconds: float = option(
        10.0, "CPU time per sample of generated code, in seconds; three times that by the clock.", gt=0
    )
    sandbox_memory_mb: int = option(1024, "Memory limit per sample of generated code, in MiB.", ge=1)
    nats_only: bool = option(
        False, "The reference answers' likelihood alone: nothing is generated; choices are scored all the same."
    )
    limit: int | None = option(None, "Only the first so many examples, for a quick look.", ge=1)

    def __post_init__(self) -> None:
        self.decoding()

    def decoding(self) -> Decoding:
        """Raise ValueError if these settings contradict each other."""
        return Decoding(self.max_new_tokens, self.num_samples, self.temperature, self.top_p, self.seed)
