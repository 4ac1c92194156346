from __future__ import annotations

from typing import Any

from pkt_stages.reporting.settings import InForce, Used, in_force


def used(command: str, **settings: dict[str, Any]) -> list[Used]:
    """`row_task` -> settings."""
    return [(command, *where.split("_"), found) for where, found in settings.items()]  # type: ignore[misc]


def test_what_most_rows_have_and_where_rows_or_tasks_differ() -> None:
    found = in_force(
        used(
            "align",
            laten_mmlu={"lr": 0.1, "steps": 2, "given": "selected"},
            laten_gsm8k={"lr": 0.1, "steps": 4, "given": "selected"},
            shuffled_mmlu={"lr": 0.1, "steps": 2, "given": "shuffled"},
            shuffled_gsm8k={"lr": 0.1, "steps": 4, "given": "shuffled"},
            long_mmlu={"lr": 0.1, "steps": 16, "given": "selected"},
            long_gsm8k={"lr": 0.1, "steps": 16, "given": "selected"},
        )
    )
    differing = [("mmlu", "steps 2"), ("gsm8k", "steps 4"), ("shuffled", "given shuffled"), ("long", "steps 16")]
    assert found == [InForce("align", "lr 0.1, given selected", differing)]


def test_what_depends_on_both_is_told_for_each() -> None:
    (found,) = in_force(used("kd", a_x={"n": 1}, a_y={"n": 2}, b_x={"n": 2}, b_y={"n": 2}, c_x={"n": 2}, c_y={"n": 2}))
    assert (found.usual, found.differing) == ("n 2", [("a, x", "n 1")])


def test_settings_that_only_some_have_and_nested_ones() -> None:
    seeking, grid = {"code": "seeking", "rank": None}, {"code": "grid", "inject": {"dtype": "auto"}}
    (found,) = in_force([("derive", "a", "", seeking), ("derive", "b", "", grid)])
    assert found.usual == "code seeking"
    assert found.differing == [("a", "rank None"), ("b", "code grid, inject.dtype auto")]


def test_settings_that_only_a_task_has_are_the_tasks() -> None:
    (found,) = in_force(used("evaluate", a_x={}, b_x={}, a_y={"n": [1]}, b_y={"n": [1]}))
    assert (found.usual, found.differing) == ("", [("y", "n [1]")])


def test_commands_come_as_they_are_met_and_a_row_twice_counts_once() -> None:
    made = in_force([("b", "row", "x", {"n": 1}), ("a", "row", "x", {"n": 1}), ("b", "row", "x", {"n": 1})])
    assert made == [InForce("b", "n 1", []), InForce("a", "n 1", [])]
