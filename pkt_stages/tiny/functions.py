"""Two code families: list functions from a docstring (humaneval schema), step functions from a sentence (mbpp schema).

Grading: by the number of composed operations, and inside each table by rank, which sets how often the corpus uses an
operation (Zipf-like). Benchmark rows draw operations with the flatter BENCHMARK_EXPONENT.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from pkt_stages.tiny.draw import GradedRow, draw, zipf_weights

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
    Operation("even", "n % 2 == 0"),
    Operation("odd", "n % 2 == 1"),
    Operation("positive", "n > 0"),
    Operation("negative", "n < 0"),
    Operation("large", "n > 50"),
    Operation("small", "n < 10"),
    Operation("round", "n % 10 == 0"),
    Operation("velvet", "n % 7 == 3"),
    Operation("hollow", "n % 5 == 2"),
    Operation("bright", "n % 3 == 1"),
)
MAPS = (
    Operation("squares", "n * n"),
    Operation("doubles", "n * 2"),
    Operation("halves", "n // 2"),
    Operation("opposites", "-n"),
    Operation("cubes", "n * n * n"),
    Operation("last digits", "abs(n) % 10"),
    Operation("shadows", "n * 3 + 1"),
    Operation("echoes", "n * n - n"),
    Operation("mirrors", "100 - n"),
)
BOUNDS = (
    Operation("above {k}", "n > {k}"),
    Operation("below {k}", "n < {k}"),
    Operation("up to {k}", "n <= {k}"),
    Operation("from {k}", "n >= {k}"),
    Operation("other than {k}", "n != {k}"),
)
REDUCES = (
    Operation("the sum of", "sum({x})"),
    Operation("a list of", "{x}"),
    Operation("the count of", "len({x})"),
    Operation("a sorted list of", "sorted({x})"),
    Operation("the largest of", "max({x}, default=0)"),
    Operation("the smallest of", "min({x}, default=0)"),
    Operation("a reversed list of", "{x}[::-1]"),
    Operation("the spread of", "max({x}, default=0) - min({x}, default=0)"),
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
    """A row of the humaneval schema. Levels: reduction; + filter or map; + filter and map; + a bound as well."""
    level = draw(rng, (1, 2, 3, 4), LEVEL_WEIGHTS)
    use_filter = level >= 3 or (level == 2 and rng.random() < 0.5)
    use_map = level >= 3 or (level == 2 and not use_filter)
    reduce = _pick(rng, REDUCES, exponent)
    words, item, conditions = "numbers", "n", []
    if use_filter:
        chosen = _pick(rng, FILTERS, exponent)
        words, conditions = f"{chosen.words} numbers", [chosen.code]
    if level == 4 or (level <= 2 and not use_filter and rng.random() < 0.5):
        bound, limit = _pick(rng, BOUNDS, exponent), rng.randint(1, 40)
        words = f"{words} {bound.words.format(k=limit)}"
        conditions.append(bound.code.format(k=limit))
    if use_map:
        mapped = _pick(rng, MAPS, exponent)
        words, item = f"the {mapped.words} of the {words}", mapped.code
    else:
        words = f"the {words}"
    suffix = f" if {' and '.join(conditions)}" if conditions else ""
    values = f"[{item} for n in numbers{suffix}]" if suffix or use_map else "numbers"
    name = rng.choice(NAMES)
    prompt = f'def {name}(numbers):\n    """Return {reduce.words} {words}."""\n'
    solution = f"    return {reduce.code.format(x=values)}\n"
    inputs = [[rng.randint(-30, 99) for _ in range(rng.randint(8, 14))] for _ in range(NUM_ASSERTS)]
    outputs = _outputs(prompt + solution, name, inputs)
    asserts = "".join(f"    assert candidate({i!r}) == {o!r}\n" for i, o in zip(inputs, outputs, strict=True))
    row = {
        "task_id": "",
        "prompt": prompt,
        "canonical_solution": solution,
        "test": f"def check(candidate):\n{asserts}",
        "entry_point": name,
    }
    return GradedRow(row, level)


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
