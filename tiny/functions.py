"""Two code families: list functions from a docstring (humaneval schema), step functions from a sentence (mbpp schema).

Grading: by the number of composed operations, and inside each table by rank, which sets how often the corpus uses an
operation (Zipf-like). Benchmark rows draw operations with the flatter BENCHMARK_EXPONENT.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from tiny.draw import GradedRow, draw, zipf_weights

CORPUS_EXPONENT = 1.0
BENCHMARK_EXPONENT = 0.4
NUM_ASSERTS = 4
LEVEL_WEIGHTS = (0.2, 0.3, 0.3, 0.2)
NAMES = ("solve", "compute", "apply", "run", "work", "process", "convert", "handle")
WORDS = ("river", "Stone", "apple", "Green", "banana", "Level", "window", "Tree")


@dataclass(frozen=True)
class Operation:
    """A wording and its code; `{k}` in both is a drawn constant, `{x}` in the code the value worked on."""

    words: str
    code: str


FILTERS = (
    Operation("even ones", "n for n in numbers if n % 2 == 0"),
    Operation("odd ones", "n for n in numbers if n % 2 == 1"),
    Operation("positive ones", "n for n in numbers if n > 0"),
    Operation("negative ones", "n for n in numbers if n < 0"),
    Operation("large ones", "n for n in numbers if n > 50"),
    Operation("small ones", "n for n in numbers if n < 10"),
    Operation("round ones", "n for n in numbers if n % 10 == 0"),
    Operation("velvet ones", "n for n in numbers if n % 7 == 3"),
    Operation("hollow ones", "n for n in numbers if n % 5 == 2"),
    Operation("bright ones", "n for n in numbers if n % 3 == 1"),
)
MAPS = (
    Operation("squares", "n * n for n in numbers"),
    Operation("doubles", "n * 2 for n in numbers"),
    Operation("halves", "n // 2 for n in numbers"),
    Operation("opposites", "-n for n in numbers"),
    Operation("cubes", "n * n * n for n in numbers"),
    Operation("last digits", "abs(n) % 10 for n in numbers"),
    Operation("shadows", "n * 3 + 1 for n in numbers"),
    Operation("echoes", "n * n - n for n in numbers"),
    Operation("mirrors", "100 - n for n in numbers"),
)
BOUNDS = (
    Operation("ones above {k}", "n for n in numbers if n > {k}"),
    Operation("ones below {k}", "n for n in numbers if n < {k}"),
    Operation("ones up to {k}", "n for n in numbers if n <= {k}"),
    Operation("ones from {k}", "n for n in numbers if n >= {k}"),
    Operation("ones other than {k}", "n for n in numbers if n != {k}"),
)
LIST_STEPS = (FILTERS, MAPS, BOUNDS)
LIST_STEP_WEIGHTS = (0.35, 0.4, 0.25)
REDUCES = (
    Operation("the sum of", "sum(numbers)"),
    Operation("a list of", "numbers"),
    Operation("the count of", "len(numbers)"),
    Operation("a sorted list of", "sorted(numbers)"),
    Operation("the largest of", "max(numbers, default=0)"),
    Operation("the smallest of", "min(numbers, default=0)"),
    Operation("a reversed list of", "numbers[::-1]"),
    Operation("the spread of", "max(numbers, default=0) - min(numbers, default=0)"),
)
NUMBER_STEPS = (
    Operation("add {k}", "{x} + {k}"),
    Operation("multiply by {k}", "{x} * {k}"),
    Operation("subtract {k}", "{x} - {k}"),
    Operation("square", "{x} * {x}"),
    Operation("halve", "{x} // 2"),
    Operation("negate", "-{x}"),
    Operation("take the remainder by {k}", "{x} % {k}"),
    Operation("drop the last digit", "{x} // 10"),
    Operation("limit to {k}", "min({x}, {k})"),
    Operation("raise to {k}", "max({x}, {k})"),
    Operation("drop the sign", "abs({x})"),
    Operation("sharpen", "{x} * 3 + 1"),
    Operation("soften", "{x} // 4 - 2"),
    Operation("twist", "50 - {x}"),
)
TEXT_STEPS = (
    Operation("reverse", "{x}[::-1]"),
    Operation("make upper case", "{x}.upper()"),
    Operation("repeat {k} times", "{x} * {k}"),
    Operation("drop the first letter", "{x}[1:]"),
    Operation("make lower case", "{x}.lower()"),
    Operation("keep the first {k} letters", "{x}[:{k}]"),
    Operation("drop the last letter", "{x}[:-1]"),
    Operation("swap the case", "{x}.swapcase()"),
    Operation("keep every second letter", "{x}[::2]"),
    Operation("add a star", "{x} + '*'"),
    Operation("replace e by a", "{x}.replace('e', 'a')"),
    Operation("fold", "{x} + {x}[::-1]"),
    Operation("frost", "'<' + {x} + '>'"),
    Operation("dust", "{x}.replace('a', '')"),
)


def list_function_row(rng: Random, exponent: float = BENCHMARK_EXPONENT) -> GradedRow:
    """A row of the humaneval schema: a reduction of one to four filters and maps (= the level), last one named first.

    A function whose tests all want the same result is drawn anew: filters that exclude each other tell nothing.
    """
    level = draw(rng, (1, 2, 3, 4), LEVEL_WEIGHTS)
    name = rng.choice(NAMES)
    inputs = [[rng.randint(-30, 99) for _ in range(rng.randint(8, 14))] for _ in range(NUM_ASSERTS)]
    outputs: list[Any] = []
    while all(output == outputs[0] for output in outputs):
        words, body = _list_function(rng, level, exponent)
        prompt = f'def {name}(numbers):\n    """Return {words}."""\n'
        outputs = _outputs(prompt + body, name, inputs)
    asserts = "".join(f"    assert candidate({i!r}) == {o!r}\n" for i, o in zip(inputs, outputs, strict=True))
    row = {
        "task_id": "",
        "prompt": prompt,
        "canonical_solution": body,
        "test": f"def check(candidate):\n{asserts}",
        "entry_point": name,
    }
    return GradedRow(row, level)


def _list_function(rng: Random, steps: int, exponent: float) -> tuple[str, str]:
    """The description and the body of a function that applies `steps` different list steps and a reduction."""
    chain: list[Operation] = []
    while len(chain) < steps:
        step = _pick(rng, draw(rng, LIST_STEPS, LIST_STEP_WEIGHTS), exponent)
        if step not in chain:
            chain.append(step)
    words, body = "the numbers", ""
    for step in chain:
        limit = rng.randint(1, 40)
        words = f"the {step.words.format(k=limit)} of {words}"
        body += f"    numbers = [{step.code.format(k=limit)}]\n"
    reduce = _pick(rng, REDUCES, exponent)
    return f"{reduce.words} {words}", f"{body}    return {reduce.code}\n"


def step_function_row(rng: Random, exponent: float = BENCHMARK_EXPONENT) -> GradedRow:
    """A row of the mbpp schema: one to four operations in sequence (= the level) on a number or a text."""
    level = draw(rng, (1, 2, 3, 4), LEVEL_WEIGHTS)
    numeric = rng.random() < 0.5
    kind, variable, table = ("number", "x", NUMBER_STEPS) if numeric else ("text", "s", TEXT_STEPS)
    phrases, lines = [], []
    for position in range(level):
        step = _pick(rng, table, exponent)
        constant = rng.randint(2, 30 if numeric else 5)
        phrases.append(step.words.format(k=constant))
        code = step.code.format(x=variable, k=constant)
        lines.append(f"    return {code}" if position == level - 1 else f"    {variable} = {code}")
    name = rng.choice(NAMES)
    code = f"def {name}({variable}):\n" + "\n".join(lines) + "\n"
    inputs: list[Any] = (
        [rng.randint(-99, 999) for _ in range(NUM_ASSERTS)] if numeric else rng.sample(WORDS, NUM_ASSERTS)
    )
    outputs = _outputs(code, name, inputs)
    row = {
        "task_id": 0,
        "text": f"Write a function to take a {kind} and {', then '.join(phrases)}.",
        "code": code,
        "test_list": [f"assert {name}({i!r}) == {o!r}" for i, o in zip(inputs, outputs, strict=True)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    return GradedRow(row, level)


def _pick(rng: Random, table: tuple[Operation, ...], exponent: float) -> Operation:
    return draw(rng, table, zipf_weights(len(table), exponent))


def _outputs(code: str, name: str, inputs: list[Any]) -> list[Any]:
    """What the canonical solution returns; it is text that this module wrote, so it runs in place."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return [namespace[name](value) for value in inputs]
