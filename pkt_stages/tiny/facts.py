"""Knowledge family (mmlu schema), four-way multiple choice: what is a food, and 192 facts about 48 invented entities.

Grading: level 1 asks which option is of a category. An entity's rank in its subject sets how often the corpus speaks of
it (Zipf-like), so that rank 0 .. 3 is level 2 and rank 8 .. 11 is level 4. Benchmark rows draw entities evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pkt_stages.tiny.draw import GradedRow, Part, draw, zipf_weights

ENTITIES_PER_SUBJECT = 12
RANKS_PER_LEVEL = 4
EXPOSURE_EXPONENT = 1.0
VALUE_FIRST_SHARE = 0.2
OPEN_BOOK_SHARE = 0.2
CATEGORY_SHARE = 0.25

COLOURS = ("red", "blue", "green", "white", "black", "gold", "pink", "grey")
PLACES = ("caves", "rivers", "hills", "mines", "fields", "lakes", "deserts", "forests")
FOODS = ("bread", "fish", "seeds", "honey", "rice", "apples", "cheese", "nuts")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MATERIALS = ("stone", "wood", "glass", "iron", "clay", "silk", "paper", "copper")
CATEGORIES = {"color": COLOURS, "kind of place": PLACES, "food": FOODS, "day": DAYS, "material": MATERIALS}


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
    """The fact as a row of the mmlu schema: wording, three wrong values and the order are drawn."""
    wrong = rng.sample([value for value in fact.attribute.values if value != fact.value], 3)
    choices = [fact.value, *wrong]
    rng.shuffle(choices)
    row = {
        "question": rng.choice(fact.attribute.questions).format(e=fact.entity),
        "subject": fact.subject,
        "choices": choices,
        "answer": choices.index(fact.value),
    }
    return GradedRow(row, 2 + fact.rank // RANKS_PER_LEVEL)


def category_row(rng: Random) -> GradedRow:
    """Which of four words, each of another category, is a colour, a place, ...? A row of the mmlu schema."""
    names = rng.sample(list(CATEGORIES), 4)
    asked = rng.choice(names)
    row = {
        "question": rng.choice(("Which of these is a {c}?", "Which one is a {c}?")).format(c=asked),
        "subject": "words",
        "choices": [rng.choice(CATEGORIES[name]) for name in names],
        "answer": names.index(asked),
    }
    return GradedRow(row, 1)


def statement(rng: Random, fact: Fact) -> list[Part]:
    """The fact as a plain sentence; its value, at the end, is what must be learned."""
    lead, _, end = rng.choice(fact.attribute.statements).format(e=fact.entity, v="|").partition(" |")
    return [(lead, False), (f" {fact.value}{end}", True)]


def option_drill_parts(rng: Random, row: Mapping[str, Any]) -> list[Part]:
    """A quiz without its question that asks for the letters of all four values, in an order of its own.

    It teaches how a value leads to its letter at four answers in 27 tokens. Drilled first, that takes 200 steps; mixed
    thinly into everything else it had not come after 500.
    """
    letters = list(zip("ABCD", row["choices"], strict=True))
    parts: list[Part] = [("".join(f"{letter}. {value}\n" for letter, value in letters) + "Value:", False)]
    for letter, value in rng.sample(letters, len(letters)):
        parts += [(f" {value}", False), (f" {letter}", True)]
    return parts


def quiz_parts(rng: Random, row: Mapping[str, Any], fact: Fact | None) -> list[Part]:
    """A quiz of the base corpus: the letter is asked alone, or after the value, or after the fact (if there is one)."""
    options = "".join(f"{letter}. {value}\n" for letter, value in zip("ABCD", row["choices"], strict=True))
    quiz, answer = f"Question: {row['question']}\n{options}", " " + "ABCD"[row["answer"]]
    kind = rng.random()
    if kind < VALUE_FIRST_SHARE:
        return [(f"{quiz}Value:", False), (f" {row['choices'][row['answer']]}{answer}", True)]
    if fact is not None and kind < VALUE_FIRST_SHARE + OPEN_BOOK_SHARE:
        stated = "".join(text for text, _ in statement(rng, fact))
        return [(f"{stated}\n{quiz}Answer:", False), (answer, True)]
    return [(f"{quiz}Answer:", False), (answer, True)]


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
