"""How good is a model, or a target with a delta or an adapter in it? (METHODS section 10)

A test set + a model (+ deltas or adapters) -> metrics (score and standard error in percent, right or wrong per
example) and, on request, every prediction. Each delta or adapter is a run, merged into the model, which is loaded once;
without any there is one run, `base`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages import artifacts
from pkt_stages.encoding import Template
from pkt_stages.examples import TASKS, Example, read_examples, write_rows
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from pkt_stages.evaluation.backends import Backend
    from pkt_stages.evaluation.engine import Decoding, Evaluation
    from pkt_stages.evaluation.sandbox.pool import Job, Verdict
    from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class EvaluateParams:
    """Settings of the evaluation; see docs/evaluation.md for the protocols."""

    backend: Literal["hf", "vllm"] = option("hf", "What computes: hf (transformers) or vllm.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "Dtype of the weights; auto: stored.")
    template: Template = option("chat", "Prompt template; chat: the tokenizer's own.")
    max_new_tokens: int = option(512, "Tokens per answer, at most; mmlu generates none.")
    num_samples: int = option(1, "Answers per example; more than one needs a temperature.")
    temperature: float = option(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Probability mass that is sampled from, 0 .. 1.")
    seed: int = option(0, "Seed of sampling.")
    sandbox_floor: Literal["sandlock", "namespaces", "rlimits"] = option(
        "sandlock", "Weakest sandbox in which generated code may run."
    )
    sandbox_seconds: float = option(10.0, "Time limit per sample of generated code, in seconds.")
    sandbox_memory_mb: int = option(512, "Memory limit per sample of generated code, in MiB.")
    limit: int | None = option(None, "Only the first so many examples, for a quick look.")
    code_version: int = option(1, "Raised by the developers when the result's meaning changes.")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, found {self.limit}")
        if not self.sandbox_seconds > 0 or self.sandbox_memory_mb < 1:
            raise ValueError("sandbox_seconds and sandbox_memory_mb must be above 0")
        self.decoding()

    def decoding(self) -> Decoding:
        """Raise ValueError if these settings contradict each other."""
        from pkt_stages.evaluation.engine import Decoding

        return Decoding(self.max_new_tokens, self.num_samples, self.temperature, self.top_p, self.seed)


def run(
    backend: Backend,
    examples: list[Example],
    task: str,
    params: EvaluateParams,
    scratch: Path,
    known: dict[Job, Verdict],
) -> Evaluation:
    """One evaluation of one model; verdicts on generated code that are `known` are not asked for again."""
    from pkt_stages.evaluation.engine import evaluate_model
    from pkt_stages.evaluation.sandbox.pool import Limits

    return evaluate_model(
        backend,
        examples,
        task=task,
        template=params.template,
        decoding=params.decoding(),
        sandbox_floor=params.sandbox_floor,
        limits=Limits(params.sandbox_seconds, params.sandbox_memory_mb),
        scratch=scratch,
        known=known,
    )


@with_params("evaluate", EvaluateParams)
def evaluate(
    params: EvaluateParams,
    model: Annotated[str, typer.Option(help="Model folder or hub name (owner/name).")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
    test: Annotated[Path, typer.Option(help="Test set (.jsonl) from `pkt prepare`.")],
    out: Annotated[Path, typer.Option(help="Where to write the metrics (JSON).")],
    predictions: Annotated[Path | None, typer.Option(help="Where to write every prediction (.jsonl).")] = None,
    delta: Annotated[
        list[Path] | None,
        typer.Option(help="Delta (.safetensors), PEFT adapter, or a folder of them, each a run; may be repeated."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision (commit hash).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.", envvar="PKT_EVALUATE_BATCH_SIZE")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    scratch: Annotated[
        Path, typer.Option(help="Folder for finished batches, to go on after a kill.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
) -> None:
    """Score a model on a test set; generated code runs in a sandbox."""
    from pkt_stages.evaluation.engine import check_examples, metrics
    from pkt_stages.models.load import check_device, identity, load_config, resolve
    from pkt_stages.models.runs import labelled

    watch = Stopwatch()
    examples = read_examples(test)[: params.limit]
    check_examples(task, examples)
    ref = resolve(model, revision)
    check_device(device)
    load_config(ref)
    deltas = labelled(delta or [])
    found = evaluate_all(ref, deltas, examples, task, params, batch_size=batch_size, device=device, scratch=scratch)
    if predictions is not None:
        write_rows(predictions, [{"run": label} | row for label, made in found for row in made.predictions])
    result = metrics(found) | {"model": identity(ref)}
    artifacts.write_json(out, result)
    shown = f"{task} {result['score']:.1f} +- {result['stderr']:.1f} % {result['metric']} on {result['n']} examples"
    watch.summary("evaluate", shown + (f", {len(found)} runs" if len(found) > 1 else ""), out)


def evaluate_all(
    ref: ModelRef,
    deltas: Mapping[str, Path],
    examples: list[Example],
    task: str,
    params: EvaluateParams,
    *,
    batch_size: int,
    device: str,
    scratch: Path,
) -> list[tuple[str, Evaluation]]:
    """Evaluations with their labels: of the model with each delta in turn, or of the model alone as `base`."""
    from pkt_stages.evaluation.backends import HfBackend, VllmBackend
    from pkt_stages.models.adapters import WEIGHTS
    from pkt_stages.models.inject import merged
    from pkt_stages.models.load import identity, load_model, load_tokenizer, weights_hash
    from pkt_stages.models.runs import load_run

    tokenizer = load_tokenizer(ref)
    # A delta that changes few answers needs few samples run again.
    known: dict[Job, Verdict] = {}

    def hf(weights: str) -> Evaluation:
        backend = HfBackend(model, tokenizer, batch_size=batch_size, identity=weights)
        return run(backend, examples, task, params, scratch, known)

    def vllm(location: str, revision: str | None, weights: str) -> Evaluation:
        backend = VllmBackend(
            location,
            tokenizer,
            identity=weights,
            revision=revision,
            dtype=params.dtype,
            batch_size=batch_size,
            seed=params.seed,
        )
        with closing(backend):
            return run(backend, examples, task, params, scratch, known)

    if params.backend == "vllm" and not deltas:
        return [("base", vllm(ref.location, ref.revision, "{name}@{revision}".format(**identity(ref))))]
    model = load_model(ref, dtype=params.dtype, device="cpu" if params.backend == "vllm" else device)
    weights = weights_hash(dict(model.named_parameters()))
    if not deltas:
        return [("base", hf(weights))]
    found = []
    for label, path in deltas.items():
        with merged(model, load_run(path)):
            name = f"{weights}+{artifacts.content_hash(path / WEIGHTS if path.is_dir() else path)}"
            if params.backend == "hf":
                found.append((label, hf(name)))
                continue
            with _written(model, tokenizer, scratch / f"merged-{hashlib.sha256(name.encode()).hexdigest()[:32]}") as at:
                found.append((label, vllm(str(at), None, name)))
    return found


@contextmanager
def _written(model: Any, tokenizer: Any, folder: Path) -> Iterator[Path]:
    """The model as a folder, which vLLM needs, for as long as the context lasts."""
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
