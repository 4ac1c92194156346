"""The paper's names, its claims as paired tests of our numbers, its tables where the profile has its models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import yaml

from pkt_stages.reporting.table import SEED, Cell, Difference, Row, results

# Metrics of one pair by row and task; the source's and the target's rows go by these two words.
Metrics = Mapping[str, Mapping[str, dict[str, Any]]]
LLAMA = "llama2"


@dataclass(frozen=True)
class Verdict:
    """A claim on one task: the difference of the two rows here, and in the paper (None where it gives no numbers)."""

    difference: Difference
    paper: float | None
    says: str

    @property
    def text(self) -> str:
        """What the test says of the claim: that no difference is shown is no proof that there is none."""
        found = {"▲": "higher", "▼": "lower", "": "nothing"}[self.difference.mark]
        if self.says == "nothing":
            return "no difference shown" if found == "nothing" else "no: " + found
        if found == "nothing":
            return "not shown"
        return "yes" if found == self.says else "no: " + found


@dataclass(frozen=True)
class Claim:
    """What is claimed of two rows, and the verdict by task."""

    text: str
    verdicts: dict[str, Verdict]

    def numbers(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "claim": self.text,
            "tasks": {
                task: {**asdict(v.difference), "paper": v.paper, "verdict": v.text} for task, v in self.verdicts.items()
            },
        }


@dataclass(frozen=True)
class PaperRow:
    """A row of one of the paper's tables: the pair's name, the method, and by task our cell and the paper's score."""

    pair: str
    label: str
    cells: dict[str, tuple[Cell, float]]


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, as far as the profile has its rows."""

    number: int
    title: str
    tasks: list[str]
    rows: list[PaperRow]


def _content() -> dict[str, Any]:
    return dict(yaml.safe_load(files("pkt_stages.reporting").joinpath("paper.yaml").read_text(encoding="utf-8")))


def titles(methods: Iterable[str]) -> dict[str, str]:
    """What tables and figures call these methods: as the paper does, a variant by what its name adds.

    `laten_steps_16` is "LaTen, steps 16"; a name that begins with none of the paper's is shown with blanks.
    """
    known = _content()["titles"]
    found = {}
    for method in methods:
        start = max((name for name in known if f"{method}_".startswith(f"{name}_")), key=len, default="")
        more = method.removeprefix(start).strip("_").replace("_", " ")
        found[method] = ", ".join(part for part in (known.get(start), more) if part)
    return found


def claims(metrics: Metrics, tasks: Sequence[str], *, section: str) -> list[Claim]:
    """The claims (`claims` of the paper, or `controls`) whose two rows are there, each tested on every task.

    p-values are corrected (Holm) over all claims and tasks of the section.
    """
    import torch

    from pkt_stages.core.statistics import compare, holm

    content = _content()
    paper = content["scores"][LLAMA]
    found: list[tuple[dict[str, Any], dict[str, Difference]]] = []
    for claim in content[section]:
        if claim["row"] not in metrics or claim["other"] not in metrics:
            continue
        by_task = {}
        for task in tasks:
            row, other = (results(metrics[claim[side]][task]) for side in ("row", "other"))
            made = compare(row, other, torch.Generator().manual_seed(SEED))
            by_task[task] = Difference(**asdict(made), adjusted_p=made.p_value)
        found.append((claim, by_task))
    if not found:
        return []
    raw = torch.tensor([d.p_value for _, by_task in found for d in by_task.values()], dtype=torch.float64)
    adjusted = iter(holm(raw).tolist())
    return [
        Claim(
            claim["text"],
            {
                task: Verdict(
                    replace(difference, adjusted_p=next(adjusted)),
                    _paper_difference(paper, claim, task),
                    claim["says"],
                )
                for task, difference in by_task.items()
            },
        )
        for claim, by_task in found
    ]


def _paper_difference(paper: Mapping[str, Mapping[str, float]], claim: Mapping[str, str], task: str) -> float | None:
    scores = [paper.get(claim[side], {}).get(task) for side in ("row", "other")]
    return None if scores[0] is None or scores[1] is None else scores[0] - scores[1]


def tables(rows: Mapping[tuple[str, str], Mapping[str, Row]]) -> list[PaperTable]:
    """The paper's tables with ours beside, for those of its rows that the profile has.

    Args:
        rows: by (source, target) and name: `source`, `target` or a method's.
    """
    content = _content()
    made = []
    for table in content["tables"]:
        found = []
        for key, methods in table["rows"].items():
            pair = content["pairs"][key]
            ours = rows.get((pair["source"], pair["target"]), {})
            for method in (m for m in methods if m in ours):
                cells, scores = ours[method].cells, content["scores"][key][method]
                if both := {task: (cells[task], scores[task]) for task in table["tasks"] if task in cells}:
                    label = method if method in ("source", "target") else ours[method].label
                    found.append(PaperRow(pair["name"], label, both))
        if found:
            made.append(PaperTable(table["number"], table["title"], table["tasks"], found))
    return made
