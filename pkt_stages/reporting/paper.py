"""The paper's names, its claims as paired tests of our numbers, its tables where the profile has its models."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import yaml

from pkt_stages.profile import Method
from pkt_stages.reporting.measure import POINTS
from pkt_stages.reporting.table import Cell, Difference, Row, corrected, difference

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
        seen = f" ({self.difference.power_text})" if found == "nothing" else ""
        if self.says == "nothing":
            return f"no difference shown{seen}" if found == "nothing" else "no: " + found
        if found == "nothing":
            return f"not shown{seen}"
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


def descriptions(methods: Iterable[Method]) -> dict[str, str]:
    """What each row is, in one line: as paper.yaml says, else as its code's file begins; nothing where neither does."""
    known = _content()["rows"]
    found = {}
    for method in methods:
        named = max((name for name in known if f"{method.name}_".startswith(f"{name}_")), key=len, default=None)
        found[method.name] = known[named] if named else _first_sentence(method.code) if method.code else ""
    return found


def _first_sentence(code: str) -> str:
    """Of a file of pkt_stages/methods, without the references in parentheses."""
    text = files("pkt_stages.methods").joinpath(f"{code}.py").read_text(encoding="utf-8")
    sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return re.sub(r"\s*\([^)]*\)", "", " ".join(sentence.split()))


def claims(metrics: Metrics, tasks: Sequence[str], *, section: str) -> list[Claim]:
    """The claims (`claims` of the paper, or `controls`) whose two rows are there, each tested on every task.

    p-values are corrected (Holm) over all claims and tasks of the section.
    """
    content = _content()
    paper = content["scores"][LLAMA]
    found: list[tuple[dict[str, Any], str]] = []
    compared = []
    for claim in content[section]:
        if claim["row"] not in metrics or claim["other"] not in metrics:
            continue
        for task in tasks:
            both = [metrics[claim[side]][task] for side in ("row", "other") if task in metrics[claim[side]]]
            if len(both) == 2 and all(map(POINTS.measured, both)) and POINTS.comparable(*both):
                row, other = map(POINTS.results, both)
                found.append((claim, task))
                compared.append((difference(row, other, POINTS), row, other))
    made: dict[str, Claim] = {}
    for (claim, task), differs in zip(found, corrected(compared, POINTS), strict=True):
        one = made.setdefault(claim["text"], Claim(claim["text"], {}))
        one.verdicts[task] = Verdict(differs, _paper_difference(paper, claim, task), claim["says"])
    return list(made.values())


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
