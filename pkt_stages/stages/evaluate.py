"""How good is a model, or the target with a row of the table in it? (METHODS sections 10 and 12)

A test set + a model (+ changes) -> metrics (score in percent, log-likelihood of the reference answers in nats per
token, both with standard errors and per example, what made the row) and, on request, every prediction. Each change is a
run, merged into the model, which is loaded once; without any there is one run, `base`. Changes are multiplied by the
factors that `pkt scale` chose, if its file is given; the likelihood at factor 1 is reported, too.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pkt_stages import artifacts
from pkt_stages.errors import UserError
from pkt_stages.evaluation.scales import read_scales
from pkt_stages.evaluation.settings import EvaluateParams
from pkt_stages.examples import Example, read_examples, write_jsonl
from pkt_stages.options import SCRATCH, AnyBase, BatchSize, Device, Model, Scratch, Stopwatch, with_params

if TYPE_CHECKING:
    from pkt_stages.evaluation.backends import Backend
    from pkt_stages.evaluation.engine import Evaluation
    from pkt_stages.evaluation.sandbox.pool import Job, Verdict
    from pkt_stages.models.changes import Change, Changes, Stored
    from pkt_stages.models.load import ModelRef


def run(
    ref: ModelRef,
    changes: Mapping[str, Stored],
    examples: list[Example],
    task: str,
    params: EvaluateParams,
    *,
    batch_size: int,
    device: str,
    scratch: Path,
    sandbox: str | None = None,
    scales: Mapping[str, float] | None = None,
) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Evaluations by label: of the model with each change in turn, or of the model alone as `base`.

    Args:
        sandbox: level for generated code; None: the strongest that the host has.
        scales: what each change is multiplied by; None: 1.

    Returns:
        and with `scales` the likelihoods alone at factor 1, else nothing.
    """
    from pkt_stages.evaluation.backends import HfBackend, VllmBackend, opened
    from pkt_stages.evaluation.engine import evaluate_model
    from pkt_stages.models.load import load_model, load_tokenizer, weights_hash
    from pkt_stages.models.merge import merged

    tokenizer = load_tokenizer(ref)
    # A change that alters few answers needs few samples run again.
    known: dict[Job, Verdict] = {}

    def asked(backend: Backend, nats_only: bool) -> Evaluation:
        return evaluate_model(
            backend,
            examples,
            task=task,
            template=params.template,
            decoding=params.decoding(),
            sandbox_floor=params.sandbox_floor,
            sandbox_level=sandbox,
            sandbox_seconds=params.sandbox_seconds,
            sandbox_memory_mb=params.sandbox_memory_mb,
            scratch=scratch,
            known=known,
            nats_only=nats_only,
        )

    if not changes:
        how: Any = {"dtype": params.dtype, "seed": params.seed, "batch_size": batch_size, "device": device}
        with opened(ref, tokenizer, backend=params.backend, **how) as backend:
            return {"base": asked(backend, params.nats_only)}, {}
    model = load_model(ref, dtype=params.dtype, device="cpu" if params.backend == "vllm" else device)
    weights = weights_hash(dict(model.named_parameters()))

    def scaled(change: Change, content: str, scale: float, nats_only: bool) -> Evaluation:
        name = f"{weights}+{scale}*{content}"
        with merged(model, change, scale=scale):
            if params.backend == "hf":
                return asked(HfBackend(model, tokenizer, batch_size=batch_size, identity=name), nats_only)
            with _written(model, ref, scratch / f"merged-{hashlib.sha256(name.encode()).hexdigest()[:32]}") as at:
                kind = str(model.dtype).removeprefix("torch.")
                how: Any = {"dtype": kind, "batch_size": batch_size, "seed": params.seed, "identity": name}
                with closing(VllmBackend(str(at), tokenizer, **how)) as backend:
                    return asked(backend, nats_only)

    found, unscaled = {}, {}
    for label, stored in changes.items():
        change, content = stored.load(), stored.content_hash
        found[label] = scaled(change, content, (scales or {}).get(label, 1.0), params.nats_only)
        if scales is not None:
            unscaled[label] = scaled(change, content, 1.0, nats_only=True)
    return found, unscaled


@with_params("evaluate", EvaluateParams)
def evaluate(
    params: EvaluateParams,
    model: Model,
    task: Annotated[str, typer.Option(help="Task to score, and whose part of the params file to use.")],
    test: Annotated[Path, typer.Option(help="Test set (.jsonl) from `pkt prepare`.")],
    out: Annotated[Path, typer.Option(help="Where to write the metrics (JSON).")],
    delta: Annotated[
        list[Path] | None,
        typer.Option(help="What a method made: a row's folder, a delta, or a PEFT adapter; may be repeated."),
    ] = None,
    scales: Annotated[Path | None, typer.Option(help="Factors of the changes, from `pkt scale`; by default 1.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Where to write every prediction (.jsonl).")] = None,
    any_base: AnyBase = False,
    sandbox: Annotated[
        str | None,
        typer.Option(
            help="Sandbox for generated code, by its level; it stands in the metrics.",
            envvar="PKT_SANDBOX",
            show_default="the strongest of this host",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = "cpu",
    scratch: Scratch = SCRATCH,
) -> None:
    """Score a model on a test set; generated code runs in a sandbox."""
    from pkt_stages.evaluation.engine import check_examples, metrics
    from pkt_stages.models.changes import changes_of
    from pkt_stages.models.load import check_device, identity, load_config, resolve

    watch = Stopwatch()
    examples = read_examples(test)[: params.limit]
    check_examples(task, examples)
    ref = resolve(model)
    check_device(device)
    load_config(ref)
    asked = identity(ref)
    rows = [changes_of(path, asked, any_base=any_base) for path in delta or []]
    changes = runs(rows)
    factors = read_scales(scales, changes) if scales is not None else None
    how: Any = {"batch_size": batch_size, "device": device, "scratch": scratch, "scales": factors}
    how["sandbox"] = sandbox or None
    found, unscaled = run(ref, changes, examples, task, params, **how)
    if predictions is not None:
        write_jsonl(predictions, [{"run": label} | row for label, made in found.items() for row in made.predictions])
    result = metrics(list(found.items()))
    for one in result["runs"]:
        one |= {"change": changes[one["label"]].content_hash} if changes else {}
    if factors is not None:
        result["scales"] = factors
        result["unscaled"] = metrics(list(unscaled.items()))
    made = [row.made() for row in rows]
    result |= {"model": asked, "made": made[0] if len(made) == 1 else made or None}
    result["machine"] = computed_by(params.backend, device)
    artifacts.write_json(out, result)
    shown = f"{result['score']:.1f} +- {result['stderr']:.1f} % {result['metric']}, " if "score" in result else ""
    shown = f"{task} {shown}{result['nats']:.4f} +- {result['nats_stderr']:.4f} nats on {result['n']} examples"
    if disputed := result.get("sandbox", {}).get("disputed"):
        shown += f", {disputed} disputed"
    watch.summary("evaluate", shown + (f", {len(found)} runs" if len(found) > 1 else ""), out)


def computed_by(backend: str, device: str) -> dict[str, str]:
    """What last digits depend on: the kind of device and the versions of the libraries that compute."""
    import torch

    kind = torch.device(device).type
    libraries = ("torch", "transformers", *(["vllm"] if backend == "vllm" else []))
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return {"device": name} | {library: version(library) for library in libraries}


def runs(rows: list[Changes]) -> dict[str, Stored]:
    """The changes of all rows by label; UserError if two share one."""
    found: dict[str, Stored] = {}
    for row in rows:
        for label, stored in row.items.items():
            if label in found:
                raise UserError(f"{stored.path}: called {label!r} as {found[label].path}; evaluate them one by one")
            found[label] = stored
    return found


@contextmanager
def _written(model: Any, ref: ModelRef, folder: Path) -> Iterator[Path]:
    """The model as a folder, which vLLM needs, for as long as the context lasts."""
    from pkt_stages.models.load import save_model

    try:
        save_model(model, ref, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
