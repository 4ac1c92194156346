"""One model on one test set: predictions, a score with its standard error, and what both depend on."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pkt_stages.encoding import Template
from pkt_stages.errors import UserError
from pkt_stages.evaluation.backends import Backend
from pkt_stages.evaluation.sandbox.levels import Level
from pkt_stages.evaluation.sandbox.pool import Job, Limits, Verdict, choose_level, judge
from pkt_stages.evaluation.scoring import JOBS, LETTERS, REFERENCE_KEYS, best_letter, pass_at_k
from pkt_stages.examples import TASKS, Example

_KS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated (mmlu generates none).

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
        """Raise ValueError for settings that make no sense."""
        if self.max_new_tokens < 1 or self.num_samples < 1:
            raise ValueError("max_new_tokens and num_samples must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples {self.num_samples} with temperature 0 would repeat one answer; set a temperature"
            )
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p} has no effect with temperature 0; set a temperature")


@dataclass(frozen=True)
class Evaluation:
    """A model's result on a test set.

    Attributes:
        metric: what `correct` holds: accuracy or pass@1.
        ids, correct: per example, in the test set's order; 0, 1, or a share when several answers were drawn.
        settings: everything that determined the result, as JSON values without time, host or path.
        pass_at_k: in percent, by k, for code.
        predictions: per example: id, prompt as sent, texts, extracted, correct, verdicts, log-probabilities.
    """

    task: str
    metric: str
    ids: list[str]
    correct: list[float]
    settings: dict[str, Any]
    pass_at_k: dict[str, float]
    predictions: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """Mean over examples, in percent."""
        return 100 * statistics.fmean(self.correct)

    @property
    def stderr(self) -> float:
        """Standard error of the mean over examples, in percent points; 0 for one example."""
        n = len(self.correct)
        return 100 * statistics.stdev(self.correct) / n**0.5 if n > 1 else 0.0

    def run(self, label: str) -> dict[str, Any]:
        """What differs between evaluations of one test set with equal settings, with a name for it."""
        made: dict[str, Any] = {
            "label": label,
            "score": self.score,
            "stderr": self.stderr,
            "correct": self.correct,
        }
        return made | ({"pass_at_k": self.pass_at_k} if self.pass_at_k else {})


def metrics(labelled: Sequence[tuple[str, Evaluation]]) -> dict[str, Any]:
    """Evaluations of one test set with equal settings (one, or one per delta), each with its label, as metrics.

    `score` and `stderr` in percent are of the mean over examples, each example's value being its mean over the runs.
    """
    evaluations = [evaluation for _, evaluation in labelled]
    first = evaluations[0]
    for other in evaluations[1:]:
        assert (other.task, other.ids, other.settings) == (first.task, first.ids, first.settings)
    means = [statistics.fmean(values) for values in zip(*(e.correct for e in evaluations), strict=True)]
    whole = Evaluation(first.task, first.metric, first.ids, means, first.settings, {}, [])
    return {
        "task": first.task,
        "metric": first.metric,
        "n": len(first.ids),
        "score": whole.score,
        "stderr": whole.stderr,
        "ids": first.ids,
        "runs": [evaluation.run(label) for label, evaluation in labelled],
        "settings": first.settings,
    }


def evaluate_model(
    backend: Backend,
    examples: Sequence[Example],
    *,
    task: str,
    template: Template = "chat",
    decoding: Decoding | None = None,
    sandbox_floor: Level = "sandlock",
    limits: Limits | None = None,
    scratch: Path | None = None,
    num_workers: int | None = None,
    known: dict[Job, Verdict] | None = None,
) -> Evaluation:
    """Ask a model a test set's questions and score the answers (METHODS section 10).

    Equal programs of generated code with equal tests run once.

    Args:
        backend: the model, HfBackend or VllmBackend.
        examples: a test set, with `prefix` and `reference`.
        task: mmlu, gsm8k, humaneval or mbpp.
        sandbox_floor: the weakest sandbox in which generated code may run.
        limits: of one sample of generated code.
        scratch: a folder for finished batches; an interrupted call goes on there. What was used is removed at the end.
        num_workers: samples of code that run at a time; all cores by default.
        known: verdicts by sample, of earlier calls with equal limits; new ones are added.

    Raises:
        UserError: an unknown task, examples without reference, a prompt longer than the context, letters that are
            not single tokens, or a host whose sandbox is too weak.
    """
    decoding = decoding or Decoding()
    limits = limits or Limits()
    check_examples(task, examples)
    level = choose_level(sandbox_floor, limits) if task in JOBS else None

    from lm_eval import evaluator

    from pkt_stages.evaluation.adapter import Adapter

    verdicts = {} if known is None else known

    # The harness copies its settings deeply; a function keeps the one dict.
    def judging(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[Verdict]]:
        jobs = [[JOBS[task](doc, text) for text in texts] for texts, doc in zip(answers, docs, strict=True)]
        new = [job for job in dict.fromkeys(job for row in jobs for job in row) if job not in verdicts]
        assert level is not None
        verdicts.update(zip(new, judge(new, level, limits, num_workers), strict=True))
        return [[verdicts[job] for job in row] for row in jobs]

    loaded = _load_task(task, examples, decoding, judging)
    model = Adapter(backend, template, decoding.seed, scratch, [task, template, asdict(decoding)])
    results = evaluator.evaluate(
        model, loaded, bootstrap_iters=0, apply_chat_template=True, confirm_run_unsafe_code=True
    )
    assert results is not None
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    metric = "pass@1" if task in JOBS else "accuracy"
    predictions = [_prediction(task, example, s, s[metric]) for example, s in zip(examples, samples, strict=True)]
    settings = {"backend": backend.name, "dtype": backend.dtype, "template": template}
    if task != "mmlu":
        settings |= asdict(decoding)
    if level is not None:
        settings |= {"sandbox": level, **{f"sandbox_{name}": value for name, value in asdict(limits).items()}}
    for used in model.scratches:
        used.remove()
    return Evaluation(
        task=task,
        metric=metric,
        ids=[example.id for example in examples],
        correct=[sample[metric] for sample in samples],
        settings=settings,
        pass_at_k=_pass_at_k([s["filtered_resps"][0] for s in samples]) if task in JOBS else {},
        predictions=predictions,
    )


def check_examples(task: str, examples: Sequence[Example]) -> None:
    """Raise UserError unless the task is known and each example has what its scoring needs, and an id of its own."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    if not examples:
        raise UserError(f"task {task}: no example to evaluate")
    seen: set[str] = set()
    for example in examples:
        missing = REFERENCE_KEYS[task] - set(example.reference)
        if missing:
            raise UserError(
                f"example {example.id}: `reference` lacks {min(missing)!r}, which task {task} needs;"
                " make the test set with `pkt prepare`"
            )
        if example.id in seen:
            raise UserError(f"example {example.id}: this id occurs twice in the test set")
        seen.add(example.id)
        if task == "mmlu" and example.reference["answer"] not in LETTERS:
            raise UserError(
                f"example {example.id}: expected an answer of {', '.join(LETTERS)},"
                f" found {example.reference['answer']!r}"
            )


def _load_task(task: str, examples: Sequence[Example], decoding: Decoding, judging: Any) -> Any:
    """The harness's task from this package's file, with the examples as its data."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

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
    config: dict[str, Any] = {"task": task, "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}
    if task in JOBS:
        config["filter_list"] = [{"name": "verdicts", "filter": [{"function": "custom", "filter_fn": judging}]}]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about every overwritten setting
    try:
        manager = TaskManager(include_path=str(Path(__file__).parent / "tasks"), include_defaults=False)
        # Only the members of a group may change what a task file says.
        found = manager.load({"group": "pkt", "task": [config]})["tasks"][task]
    finally:
        logger.setLevel(level)
    if task != "mmlu":
        generation = {
            "max_gen_toks": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
        }
        found.set_config("generation_kwargs", generation, update=True)
        found.set_config("repeats", decoding.num_samples)
    return {"tasks": {task: found}, "groups": {}, "group_map": {}}


def _prediction(task: str, example: Example, sample: dict[str, Any], correct: float) -> dict[str, Any]:
    """A line of the predictions file."""
    made: dict[str, Any] = {"id": example.id, "prompt": sample["arguments"][0][0], "correct": correct}
    if task == "mmlu":
        scores = [score for score, _ in sample["filtered_resps"]]
        shown = {letter: round(score, 6) for letter, score in zip(LETTERS, scores, strict=True)}
        return made | {"text": "", "extracted": best_letter(scores), "log_probabilities": shown}
    texts, found = sample["resps"][0], sample["filtered_resps"][0]
    if task in JOBS:
        answers = [
            {"text": text, "extracted": JOBS[task](sample["doc"], text).code, **asdict(verdict)}
            for text, verdict in zip(texts, found, strict=True)
        ]
    else:
        answers = [
            {"text": text, "extracted": number, "message": "" if number else "no number"}
            for text, number in zip(texts, found, strict=True)
        ]
    return made | (answers[0] if len(answers) == 1 else {"samples": answers})


def _pass_at_k(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Unbiased pass@k in percent, for the usual k up to the number of samples."""
    n = len(verdicts[0])
    passed = [sum(v.outcome == "passed" for v in row) for row in verdicts]
    return {str(k): 100 * statistics.fmean(pass_at_k(n, c, k) for c in passed) for k in _KS if k <= n}
