"""One model on one test set: predictions, a score, the reference answers' likelihood, and what all depend on."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt_stages import tasks
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import Backend
from pkt_stages.evaluation.likelihood import answer_log_likelihoods, choice_log_likelihood
from pkt_stages.evaluation.scoring import best, pass_at_k, reference_of
from pkt_stages.evaluation.settings import Decoding
from pkt_stages.examples import Example, check_ids
from pkt_stages.templates import Template, dated

if TYPE_CHECKING:
    from pkt_stages.evaluation.sandbox.pool import Job, Verdict
    from pkt_stages.scratch import Batches

_KS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Evaluation:
    """A model's result on a test set.

    Attributes:
        metric: what `correct` holds, by the task's name for it: accuracy or pass@1.
        ids: of the examples, in the test set's order.
        correct: per example 0, 1, or a share when several answers were drawn; None if no answer was asked for.
        log_likelihoods: per example of the reference answer, nats per token (of choices: of the right one among them).
        settings: everything that determined the result, as JSON values without time, host or path.
        pass_at_k: in percent, by k, for code.
        sandbox: for code, its level and what that stops.
        disputed: for code, the ids of examples with an answer that passes only beside its tests.
        predictions: per example: id, prompt as sent, texts, extracted, correct, verdicts, log-probabilities.
    """

    task: str
    metric: str
    ids: list[str]
    correct: list[float] | None
    log_likelihoods: list[float]
    settings: dict[str, Any]
    pass_at_k: dict[str, float]
    predictions: list[dict[str, Any]]
    sandbox: dict[str, str] | None = None
    disputed: list[str] | None = None

    def run(self, label: str) -> dict[str, Any]:
        """What differs between evaluations of one test set with equal settings, with a name for it."""
        made: dict[str, Any] = {"label": label, **_means(self.correct, self.log_likelihoods)}
        made |= {"log_likelihoods": self.log_likelihoods}
        made |= {"correct": self.correct} if self.correct is not None else {}
        made |= {"disputed": self.disputed} if self.disputed is not None else {}
        return made | ({"pass_at_k": self.pass_at_k} if self.pass_at_k else {})


def _means(correct: Sequence[float] | None, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """`score` and `nats` with their standard errors over examples, 0 for one example; no score without answers."""

    def error(values: Sequence[float]) -> float:
        return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

    nats = {"nats": statistics.fmean(log_likelihoods), "nats_stderr": error(log_likelihoods)}
    if correct is None:
        return nats
    return nats | {"score": 100 * statistics.fmean(correct), "stderr": 100 * error(correct)}


def metrics(labelled: Sequence[tuple[str, Evaluation]]) -> dict[str, Any]:
    """Evaluations of one test set with equal settings (one, or one per delta), each with its label, as metrics.

    `score` and `stderr` in percent, and `nats` and `nats_stderr` (log-likelihood per token of the reference answer)
    are of the mean over examples, each example's value being its mean over the runs.
    """
    evaluations = [evaluation for _, evaluation in labelled]
    first = evaluations[0]
    for other in evaluations[1:]:
        assert (other.task, other.ids, other.settings) == (first.task, first.ids, first.settings)
    corrects = [e.correct for e in evaluations if e.correct is not None]
    assert len(corrects) in (0, len(evaluations))
    disputed = sum(len(evaluation.disputed or ()) for evaluation in evaluations)
    return {
        "task": first.task,
        "metric": first.metric,
        "n": len(first.ids),
        **_means(_over_runs(corrects) if corrects else None, _over_runs([e.log_likelihoods for e in evaluations])),
        "ids": first.ids,
        "runs": [evaluation.run(label) for label, evaluation in labelled],
        "settings": first.settings,
        **({"sandbox": {**first.sandbox, "disputed": disputed}} if first.sandbox is not None else {}),
    }


def _over_runs(values: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(run) for run in zip(*values, strict=True)]


def evaluate_model(
    backend: Backend,
    examples: Sequence[Example],
    *,
    task: str,
    template: Template = "chat",
    decoding: Decoding | None = None,
    sandbox_floor: str = "sandlock",
    sandbox_level: str | None = None,
    sandbox_seconds: float = 10.0,
    sandbox_memory_mb: int = 512,
    scratch: Path | None = None,
    known: dict[Job, Verdict] | None = None,
    nats_only: bool = False,
) -> Evaluation:
    """Ask a model a test set's questions and score the answers (METHODS sections 10 and 12).

    Equal programs of generated code with equal tests run once.

    Args:
        backend: the model, HfBackend or VllmBackend.
        examples: a test set, with `prefix` and `reference`.
        task: its name.
        decoding: of tasks whose answers are generated.
        sandbox_floor: the weakest sandbox in which generated code may run.
        sandbox_level: the sandbox to take; None: the strongest that the host has.
        sandbox_seconds, sandbox_memory_mb: limits of one sample of generated code.
        scratch: a folder for finished batches; an interrupted call goes on there. What was used is removed at the end.
        known: verdicts by sample, of earlier calls with equal limits; new ones are added.
        nats_only: generate nothing; a task whose answers are chosen is scored all the same.

    Raises:
        UserError: an unknown task, examples without reference, a prompt longer than the context, choices that are
            not single tokens, a reference answer without its prefix, or a host whose sandbox is too weak.
    """
    decoding = decoding or Decoding()
    check_examples(task, examples)
    its = tasks.load(task)
    config = its.harness()
    metric, chosen = str(config["metric_list"][0]["metric"]), config["output_type"] == "multiple_choice"
    settings: dict[str, Any] = {"backend": backend.name, "dtype": backend.dtype, "template": template}
    settings |= dated(backend.tokenizer, template)
    ids = [example.id for example in examples]
    used: list[Batches] = []
    log_likelihoods: list[float] = []
    if not chosen:
        how: Any = {"template": template, "facts": [task, template], "scratch": scratch, "used": used}
        log_likelihoods = answer_log_likelihoods(backend, examples, **how)
    if nats_only and not chosen:
        for batches in used:
            batches.remove()
        predictions = [
            {"id": id, "log_likelihood": round(nats, 4)} for id, nats in zip(ids, log_likelihoods, strict=True)
        ]
        return Evaluation(task, metric, ids, None, log_likelihoods, settings, {}, predictions)
    level = sandbox = None
    if its.judge is not None:
        limits = its.judge.Limits(sandbox_seconds, sandbox_memory_mb)
        level = its.judge.choose_level(sandbox_floor, limits, sandbox_level)
        sandbox = its.judge.described(level)

    from lm_eval import evaluator

    from pkt_stages.evaluation.harness import HarnessModel

    verdicts = {} if known is None else known

    def judged(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[Verdict]]:
        assert its.job is not None and its.judge is not None
        jobs = [[its.job(reference_of(doc), text) for text in texts] for texts, doc in zip(answers, docs, strict=True)]
        new = [job for job in dict.fromkeys(job for row in jobs for job in row) if job not in verdicts]
        verdicts.update(zip(new, its.judge.judge(new, level, limits), strict=True))
        return [[verdicts[job] for job in row] for row in jobs]

    loaded = _load_task(its, config, examples, decoding, judged)
    model = HarnessModel(backend, template, decoding.seed, scratch, used, [task, template, asdict(decoding)])
    results = evaluator.evaluate(
        model,
        {"tasks": {task: loaded}, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        apply_chat_template=True,
        confirm_run_unsafe_code=True,
    )
    assert results is not None
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    correct = [sample[metric] for sample in samples]
    if chosen:
        log_likelihoods = [
            choice_log_likelihood(
                loaded.doc_to_choice(s["doc"]), [p for p, _ in s["filtered_resps"]], s["doc"]["target"]
            )
            for s in samples
        ]
    else:
        settings |= asdict(decoding)
    if level is not None:
        settings |= {"sandbox": level, "sandbox_seconds": sandbox_seconds, "sandbox_memory_mb": sandbox_memory_mb}
    verdicts_of = [sample["filtered_resps"][0] for sample in samples] if its.job is not None else []
    for batches in used:
        batches.remove()
    return Evaluation(
        task=task,
        metric=metric,
        ids=ids,
        correct=correct,
        log_likelihoods=log_likelihoods,
        settings=settings,
        pass_at_k=_pass_at_k(verdicts_of) if its.job is not None else {},
        predictions=[
            {"id": id, "prompt": sample["arguments"][0][0], "correct": right, "log_likelihood": round(nats, 4)}
            | _said(its, loaded, sample)
            for id, sample, right, nats in zip(ids, samples, correct, log_likelihoods, strict=True)
        ],
        sandbox=sandbox,
        disputed=None if level is None else [id for id, row in zip(ids, verdicts_of, strict=True) if _disputed(row)],
    )


def _disputed(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.outcome == "disputed" for verdict in verdicts)


def check_examples(task: str, examples: Sequence[Example]) -> None:
    """Raise UserError unless the task is known and each example has what its scoring needs, and an id of its own."""
    its = tasks.load(task)
    if not examples:
        raise UserError(f"task {task}: no example to evaluate")
    for example in examples:
        its.check(example)
    check_ids({"the test set": examples})


def _load_task(
    task: tasks.Task, config: dict[str, Any], examples: Sequence[Example], decoding: Decoding, judged: Any
) -> Any:
    """The harness's task from its file, with the examples as its data and this project's scores."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = [
        {
            "id": example.id,
            "prompt": example.prompt,
            "prefix": example.prefix,
            "reference": json.dumps(dict(example.reference), sort_keys=True),
            "target": str(example.reference.get("answer", "")),
        }
        for example in examples
    ]

    def process(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
        return {metric: _score(task, doc, _answers(loaded, doc, results))}

    metric = config["metric_list"][0]["metric"]
    config = config | {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "process_results": process,
    }
    if config["output_type"] == "generate_until":
        config["repeats"] = decoding.num_samples
        config["generation_kwargs"] = config["generation_kwargs"] | {
            "max_gen_toks": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
        }
    filtered = judged if task.job is not None else _extracted(task.extract) if task.extract is not None else None
    if filtered is not None:
        config["filter_list"] = [{"name": "answers", "filter": [{"function": "custom", "filter_fn": filtered}]}]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it gives advice about data sets of one's own
    try:
        loaded = ConfigurableTask(config=config)
    finally:
        logger.setLevel(level)
    return loaded


def _extracted(extract: Callable[[str], str]) -> Callable[[Sequence[Sequence[str]], Any], list[list[str]]]:
    """For the harness, the answers in the texts of each example."""
    return lambda texts, _docs: [[extract(text) for text in row] for row in texts]


def _generates(loaded: Any) -> bool:
    return bool(loaded.OUTPUT_TYPE == "generate_until")


def _answers(loaded: Any, doc: dict[str, Any], results: Sequence[Any]) -> list[Any]:
    """What each sample says: an extracted text, or a verdict on code; the best choice, where there are choices."""
    if _generates(loaded):
        return list(results[0])
    return [best(loaded.doc_to_choice(doc), [score for score, _ in results])]


def _score(task: tasks.Task, doc: dict[str, Any], answers: Sequence[Any]) -> float:
    """The mean over an example's answers; of code pass@1."""
    if task.score is None:
        return pass_at_k(len(answers), sum(verdict.outcome == "passed" for verdict in answers), 1)
    reference = reference_of(doc)
    return sum(task.score(reference, answer) for answer in answers) / len(answers)


def _said(task: tasks.Task, loaded: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """What a line of the predictions file holds of the model's answers."""
    if not _generates(loaded):
        choices, scores = loaded.doc_to_choice(sample["doc"]), [score for score, _ in sample["filtered_resps"]]
        shown = {choice: round(score, 6) for choice, score in zip(choices, scores, strict=True)}
        return {"text": "", "extracted": best(choices, scores), "log_probabilities": shown}
    texts, found = sample["resps"][0], sample["filtered_resps"][0]
    if task.job is not None:
        reference = reference_of(sample["doc"])
        answers = [
            {"text": text, "extracted": task.job(reference, text).code, **asdict(verdict)}
            for text, verdict in zip(texts, found, strict=True)
        ]
    else:
        answers = [
            {"text": text, "extracted": answer, "message": "" if answer else "no answer"}
            for text, answer in zip(texts, found, strict=True)
        ]
    return answers[0] if len(answers) == 1 else {"samples": answers}


def _pass_at_k(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Unbiased pass@k in percent, for the usual k up to the number of samples."""
    n = len(verdicts[0])
    passed = [sum(v.outcome == "passed" for v in row) for row in verdicts]
    return {str(k): 100 * statistics.fmean(pass_at_k(n, c, k) for c in passed) for k in _KS if k <= n}
