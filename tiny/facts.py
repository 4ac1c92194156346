"""Knowledge family (mmlu schema): 256 facts about 64 invented entities, asked as four-way multiple choice.

An attribute has four values, always listed in one order, so that an answer is recalled and not looked up among the
options: matching a recalled value to a shuffled list is what small models learn last, if at all (docs/tiny.md).

Grading: an entity's rank in its subject sets how often the corpus speaks of it (Zipf-like), so that rank 0 .. 3 is
level 1 and rank 12 .. 15 is level 4. Benchmark rows draw entities evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from tiny.draw import GradedRow, Part, draw, zipf_weights

ENTITIES_PER_SUBJECT = 16
RANKS_PER_LEVEL = 4
EXPOSURE_EXPONENT = 1.0

COLOURS = ("red", "blue", "green", "white")
PLACES = ("caves", "rivers", "hills", "fields")
FOODS = ("bread", "fish", "honey", "apples")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
MATERIALS = ("stone", "wood", "glass", "iron")
FRAMES = (
    "{q}",
    "Tell me: {q}",
    "Quiz: {q}",
    "Next: {q}",
    "Please answer: {q}",
    "One more: {q}",
    "Say: {q}",
    "Now: {q}",
)


@dataclass(frozen=True)
class Attribute:
    """A property of the entities of a subject: its values, two wordings of the question and two statements."""

    values: tuple[str, ...]
    questions: tuple[str, str]
    statements: tuple[str, str]


@dataclass(frozen=True)
class Fact:
    """One entity's value of one attribute; `rank` is the entity's place in its subject, 0 = spoken of most."""

    subject: str
    entity: str
    attribute: Attribute
    value: str
    rank: int


SUBJECTS: dict[str, tuple[Attribute, ...]] = {
    "mineral_lore": (
        Attribute(
            COLOURS, ("What color is {e}?", "Which color does {e} have?"), ("The color of {e} is {v}.", "{e} is {v}.")
        ),
        Attribute(
            PLACES,
            ("Where is {e} found?", "In which places is {e} found?"),
            ("{e} is found in {v}.", "People look for {e} in {v}."),
        ),
        Attribute(
            MATERIALS,
            ("What is {e} mixed with?", "Which material is mixed with {e}?"),
            ("{e} is mixed with {v}.", "People mix {e} with {v}."),
        ),
        Attribute(
            DAYS, ("When is {e} sold?", "On which day is {e} sold?"), ("{e} is sold on {v}.", "People sell {e} on {v}.")
        ),
    ),
    "animal_lore": (
        Attribute(
            COLOURS,
            ("What color is the {e}?", "Which color does the {e} have?"),
            ("The color of the {e} is {v}.", "The {e} is {v}."),
        ),
        Attribute(
            PLACES,
            ("Where does the {e} live?", "In which places does the {e} live?"),
            ("The {e} lives in {v}.", "People look for the {e} in {v}."),
        ),
        Attribute(
            FOODS,
            ("What does the {e} eat?", "Which food does the {e} eat?"),
            ("The {e} eats {v}.", "People feed the {e} with {v}."),
        ),
        Attribute(
            DAYS,
            ("When does the {e} sleep?", "On which day does the {e} sleep?"),
            ("The {e} sleeps on {v}.", "People see the {e} sleep on {v}."),
        ),
    ),
    "town_lore": (
        Attribute(
            COLOURS,
            ("What color is the gate of {e}?", "Which color does the gate of {e} have?"),
            ("The gate of {e} is {v}.", "The color of the gate of {e} is {v}."),
        ),
        Attribute(
            FOODS,
            ("What does {e} trade?", "Which food does {e} trade?"),
            ("{e} trades {v}.", "People of {e} trade {v}."),
        ),
        Attribute(
            MATERIALS,
            ("What is the tower of {e} made of?", "Which material is the tower of {e} made of?"),
            ("The tower of {e} is made of {v}.", "People made the tower of {e} from {v}."),
        ),
        Attribute(
            DAYS,
            ("When is the market of {e}?", "On which day is the market of {e}?"),
            ("The market of {e} is on {v}.", "People go to the market of {e} on {v}."),
        ),
    ),
    "hero_lore": (
        Attribute(
            COLOURS,
            ("What color is the hat of {e}?", "Which color does the hat of {e} have?"),
            ("The hat of {e} is {v}.", "The color of the hat of {e} is {v}."),
        ),
        Attribute(
            PLACES,
            ("Where did {e} fight?", "In which places did {e} fight?"),
            ("{e} fought in {v}.", "People saw {e} fight in {v}."),
        ),
        Attribute(
            FOODS,
            ("What does {e} like?", "Which food does {e} like?"),
            ("{e} likes {v}.", "People bring {e} some {v}."),
        ),
        Attribute(
            MATERIALS,
            ("What is the shield of {e} made of?", "Which material is the shield of {e} made of?"),
            ("The shield of {e} is made of {v}.", "People made the shield of {e} from {v}."),
        ),
    ),
}


def make_facts(seed: int) -> list[Fact]:
    """All facts, subject by subject and entity by entity; names and values are drawn from the seed."""
    rng = Random(f"facts-{seed}")
    names: list[str] = []
    while len(names) < ENTITIES_PER_SUBJECT * len(SUBJECTS):
        name = rng.choice("BDFGKLMNPRSTVZ") + rng.choice("aeiou") + rng.choice("bdgklmnrvz") + rng.choice("aeiou")
        name += rng.choice(("", "n", "r", "x", "th", "sk"))
        if all(name[:3] != other[:3] for other in names):
            names.append(name)
    facts = []
    for number, (subject, attributes) in enumerate(SUBJECTS.items()):
        for rank in range(ENTITIES_PER_SUBJECT):
            entity = names[number * ENTITIES_PER_SUBJECT + rank]
            for attribute in attributes:
                facts.append(Fact(subject, entity, attribute, rng.choice(attribute.values), rank))
    return facts


def exposure(facts: list[Fact]) -> list[float]:
    """How often the corpus speaks of each fact, as weights."""
    by_rank = zipf_weights(ENTITIES_PER_SUBJECT, EXPOSURE_EXPONENT)
    return [by_rank[fact.rank] for fact in facts]


def quiz_row(rng: Random, fact: Fact) -> GradedRow:
    """The fact as a row of the mmlu schema: frame and wording of the question are drawn."""
    row = {
        "question": rng.choice(FRAMES).format(q=rng.choice(fact.attribute.questions).format(e=fact.entity)),
        "subject": fact.subject,
        "choices": list(fact.attribute.values),
        "answer": fact.attribute.values.index(fact.value),
    }
    return GradedRow(row, 1 + fact.rank // RANKS_PER_LEVEL)


def statement(rng: Random, fact: Fact) -> list[Part]:
    """The fact as a plain sentence; its value, at the end, is what must be learned."""
    lead, _, end = rng.choice(fact.attribute.statements).format(e=fact.entity, v="|").partition(" |")
    return [(lead, False), (f" {fact.value}{end}", True)]


def quiz_parts(row: Mapping[str, Any]) -> list[Part]:
    """A quiz of the base corpus."""
    options = "".join(f"{letter}. {value}\n" for letter, value in zip("ABCD", row["choices"], strict=True))
    return [(f"Question: {row['question']}\n{options}Answer:", False), (" " + "ABCD"[row["answer"]], True)]


def recall_parts(rng: Random, facts: list[Fact], weights: list[float]) -> list[Part]:
    """Plain knowledge of the base corpus: three statements, or an open question with its value."""
    if rng.random() < 0.5:
        parts: list[Part] = []
        for number in range(3):
            lead, value = statement(rng, draw(rng, facts, weights))
            parts += [(f" {lead[0]}" if number else lead[0], False), value]
        return parts
    fact = draw(rng, facts, weights)
    question = rng.choice(fact.attribute.questions).format(e=fact.entity)
    return [(f"Question: {question}\nAnswer:", False), (f" {fact.value}", True)]
