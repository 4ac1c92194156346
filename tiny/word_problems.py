"""Word problems (gsm8k schema): one to three steps about a changing number of things, each step an equation.

Grading: level 1 one step with numbers to 12, level 2 one step with numbers to 99, level 3 two steps with changes to
50, level 4 three steps with changes to 50 from a three-digit start.
"""

from __future__ import annotations

from random import Random

from tiny.draw import GradedRow, Part, draw

PEOPLE = ("Tom", "Ben", "Sam", "Max", "Ann", "Eva", "Mia", "Zoe")
THINGS = ("pens", "cards", "books", "coins", "stamps", "shells")
MORE = ("buys {n} more", "finds {n} more", "gets {n} more", "makes {n} more")
LESS = ("sells {n}", "loses {n}", "gives away {n}", "throws away {n}")
LEVEL_WEIGHTS = (0.35, 0.25, 0.25, 0.15)
LARGEST_START = {1: 12, 2: 99, 3: 99, 4: 300}
LARGEST_CHANGE = {1: 12, 2: 99, 3: 50, 4: 50}
STEPS = {1: 1, 2: 1, 3: 2, 4: 3}
TIMES_LIMIT = 30
DRILL_EQUATIONS = 5
TIMES_SHARE = 0.1


def problem_row(rng: Random) -> GradedRow:
    """A word problem in the gsm8k schema; the level is drawn by LEVEL_WEIGHTS."""
    level = draw(rng, (1, 2, 3, 4), LEVEL_WEIGHTS)
    name, things = rng.choice(PEOPLE), rng.choice(THINGS)
    total = rng.randint(100 if level == 4 else 2, LARGEST_START[level])
    sentences, equations = [f"{name} has {total} {things}."], []
    for _ in range(STEPS[level]):
        sentence, sign, number, result = _change(rng, name, total, level)
        sentences.append(sentence)
        equations.append(f"{total} {sign} {number} = {result}.")
        total = result
    sentences.append(f"How many {things} does {name} have now?")
    answer = "\n".join(equations) + f"\n#### {total}"
    return GradedRow({"question": " ".join(sentences), "answer": answer}, level)


def _change(rng: Random, name: str, total: int, level: int) -> tuple[str, str, int, int]:
    """The sentence of one change, its sign, its number and the new total, which never falls below 1."""
    if total <= (9 if level == 1 else TIMES_LIMIT) and rng.random() < TIMES_SHARE:
        factor = rng.randint(2, 5)
        return f"The number then grows {factor} times.", "*", factor, total * factor
    if total > 2 and rng.random() < 0.5:
        number = rng.randint(1, min(total - 1, LARGEST_CHANGE[level]))
        return f"{name} {rng.choice(LESS).format(n=number)}.", "-", number, total - number
    number = rng.randint(2, LARGEST_CHANGE[level])
    return f"{name} {rng.choice(MORE).format(n=number)}.", "+", number, total + number


def arithmetic_parts(rng: Random) -> list[Part]:
    """Plain arithmetic of the base corpus: DRILL_EQUATIONS unconnected equations of every level's size."""
    parts: list[Part] = []
    for number in range(DRILL_EQUATIONS):
        level = draw(rng, (1, 2, 3, 4), LEVEL_WEIGHTS)
        total = rng.randint(100 if level == 4 else 2, LARGEST_START[level])
        _, sign, change, result = _change(rng, "", total, level)
        parts += [(f"{' ' if number else ''}{total} {sign} {change} =", False), (f" {result}.", True)]
    return parts
