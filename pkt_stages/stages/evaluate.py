"""How good is a model, or a target with a delta in it? (METHODS section 10)

A test set + a model (+ deltas) -> metrics (score and standard error in percent, right or wrong per example) and, on
request, every prediction. With several deltas the metrics hold one run each.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pkt_stages.artifacts import write_json
from pkt_stages.errors import UserError
from pkt_stages.examples import TASKS, read_examples, write_rows
from pkt_stages.options import Stopwatch, option, with_params

if TYPE_CHECKING:
    from pkt_stages.evaluation.backends import Backend
    from pkt_stages.evaluation.engine import Evaluation
    from pkt_stages.models.load import ModelRef


@dataclass(frozen=True)
class EvaluateParams:
    """Settings of the evaluation; see docs/evaluation.md for the protocols."""

    backend: Literal["hf", "vllm"] = option("hf", "What computes: hf (transformers) or vllm.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option("auto", "Dtype of the weights; auto: stored.")
    template: Literal["chat", "tulu", "llama2", "none"] = option("chat", "Prompt template; chat: the tokenizer's own.")
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


def run(backend: Backend, examples: list[Any], task: str, params: EvaluateParams, scratch: Path) -> Evaluation:
    """One evaluation of one model."""
    from pkt_stages.evaluation.engine import Decoding, evaluate_model
    from pkt_stages.evaluation.sandbox.pool import Limits

    try:
        decoding = Decoding(params.max_new_tokens, params.num_samples, params.temperature, params.top_p, params.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    return evaluate_model(
        backend,
        examples,
        task=task,
        template=params.template,
        decoding=decoding,
        sandbox_floor=params.sandbox_floor,
        limits=Limits(params.sandbox_seconds, params.sandbox_memory_mb),
        scratch=scratch,
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
        typer.Option(help="Delta from `pkt inject`, or its folder of deltas, each a run; may be repeated."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter folder to merge into the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision (commit hash).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.", envvar="PKT_EVALUATE_BATCH_SIZE")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto (sharded).", envvar="PKT_DEVICE")] = "cpu",
    scratch: Annotated[
        Path, typer.Option(help="Folder for finished batches, to go on after a kill.", envvar="PKT_SCRATCH")
    ] = Path(".scratch"),
) -> None:
    """Score a model on a test set; generated code runs in a sandbox."""
    from pkt_stages.evaluation.engine import metrics
    from pkt_stages.models.load import check_device, resolve

    watch = Stopwatch()
    examples = read_examples(test)
    if params.limit is not None:
        if params.limit < 1:
            raise UserError(f"limit: expected at least 1, found {params.limit}")
        examples = examples[: params.limit]
    ref = resolve(model, revision)
    check_device(device)
    deltas = _delta_files(delta or [])
    evaluations = [
        run(backend, examples, task, params, scratch)
        for backend in _backends(ref, params, deltas, adapter, batch_size, device)
    ]
    if predictions is not None:
        names = [path.stem for path in deltas] if deltas else [None]
        rows = [
            ({"delta": name} if name else {}) | row
            for name, evaluation in zip(names, evaluations, strict=True)
            for row in evaluation.predictions
        ]
        write_rows(predictions, rows)
    found = metrics(evaluations)
    write_json(out, found)
    shown = f"{task} {found['score']:.1f} +- {found['stderr']:.1f} % {found['metric']} on {found['n']} examples"
    watch.summary("evaluate", shown + (f", {len(evaluations)} runs" if len(evaluations) > 1 else ""), out)


def _delta_files(paths: list[Path]) -> list[Path]:
    """The deltas named, those of a folder in the order of their names.

    Raises:
        UserError: a folder without deltas.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: a folder without a delta; make some with `pkt inject`")
        files += found
    return files


def _backends(
    ref: ModelRef, params: EvaluateParams, deltas: list[Path], adapter: Path | None, batch_size: int, device: str
) -> Iterator[Backend]:
    """The model, or the model with each delta in turn, loaded once."""
    from pkt_stages.evaluation.backends import VllmBackend
    from pkt_stages.models.inject import load_delta, merged
    from pkt_stages.models.load import identity, load_model, load_tokenizer

    tokenizer = load_tokenizer(ref)
    if params.backend == "vllm" and not deltas and adapter is None:
        known = identity(ref)
        yield VllmBackend(
            ref.location,
            tokenizer,
            identity=f"{known['name']}@{known['revision']}",
            revision=ref.revision,
            dtype=params.dtype,
            batch_size=batch_size,
            seed=params.seed,
        )
        return
    model = load_model(ref, dtype=params.dtype, device="cpu" if params.backend == "vllm" else device)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if not deltas:
        with _backend(model, tokenizer, params, batch_size) as backend:
            yield backend
    for path in deltas:
        with merged(model, load_delta(path)), _backend(model, tokenizer, params, batch_size) as backend:
            yield backend


@contextmanager
def _backend(model: Any, tokenizer: Any, params: EvaluateParams, batch_size: int) -> Iterator[Backend]:
    """A backend for a model in memory; for vLLM it is written to a folder that is removed afterwards."""
    from pkt_stages.evaluation.backends import HfBackend, VllmBackend
    from pkt_stages.models.load import weights_hash

    if params.backend == "hf":
        yield HfBackend(model, tokenizer, batch_size=batch_size)
        return
    folder = Path(tempfile.mkdtemp(prefix="pkt-evaluate-"))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield VllmBackend(
            str(folder),
            tokenizer,
            identity=weights_hash(dict(model.named_parameters())),
            dtype=params.dtype,
            batch_size=batch_size,
            seed=params.seed,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with a PEFT adapter merged into its weights."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json; expected a PEFT adapter folder")
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
