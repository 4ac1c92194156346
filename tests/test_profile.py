from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.profile import Profile, read_profile
from tests.profiles import rows, write_params

ROOT = Path(__file__).parents[1]


NOTHING: dict[str, Any] = {"task": [], "methods": [], "seeking": [], "target_methods": []}
PARTS: dict[str, Any] = {name: {} for name in ("prepare", "align", "finetune", "generate", "distill", "evaluate")}


def shown(profile: Profile) -> list[tuple[str, str, str | None]]:
    return [(method.name, method.section, method.code) for method in profile.methods]


def test_the_default_profile() -> None:
    profile = read_profile(ROOT / "params.yaml")
    assert shown(profile) == [
        ("laten", "PrePKT", "laten"),
        ("unaligned_seeking", "PrePKT", "seeking"),
        ("postpkt_random", "PostPKT", None),
        ("postpkt_pissa", "PostPKT", None),
        ("postpkt_seeking", "PostPKT", None),
        ("kd", "Distillation", None),
        ("control_random_delta", "Controls", "random_delta"),
    ]
    assert (profile.sources, profile.target) == (["source-chat"], "target-chat")
    assert profile.tasks == ["mmlu", "gsm8k", "humaneval", "mbpp"]
    assert profile.method("laten").folder("s") == ("laten", "s")
    assert profile.method("postpkt_pissa").folder("s") == ("postpkt_pissa",)
    assert list(profile.pairs) == ["pair", "source", "target"]


def test_rows_come_in_the_order_of_made_by_with_controls_last(tmp_path: Path) -> None:
    made_by = {"distill": {"kd": {}}, "align": {"control_rows": {"given": "random"}, "own": {"code": "mine"}}}

    def edit(params: dict[str, Any]) -> None:
        rows(params, **made_by)
        params["analysed"] = NOTHING

    profile = read_profile(write_params(tmp_path, edit))
    assert shown(profile) == [
        ("kd", "Distillation", None),
        ("own", "PrePKT", "mine"),
        ("control_rows", "Controls", "laten"),
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("profiles/*/params.yaml")), ids=lambda path: path.parent.name)
def test_every_profile_reads(path: Path) -> None:
    assert read_profile(path).name == path.parent.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"made_by": {"align": {"laten": {}}, "distill": {"laten": {}}}},
            "made_by.distill: laten is in made_by.align, too; list it once",
        ),
        (
            {"made_by": {"alining": {"laten": {}}}},
            "made_by.alining: no such group; expected any of align, unaligned, grid, finetune, finetune_seeking,"
            " finetune_answers, distill, control",
        ),
        ({"made_by": {"align": {"laten": 3}}}, "section 'made_by.align.laten': expected a mapping, found int"),
        ({"source": []}, "source: expected a list with at least one name, found []"),
        ({"target": ["a"]}, "target: expected a name, found ['a']"),
        ({"models": "all"}, "models: expected a list of names, found 'all'"),
        ({"task": {}}, "task: expected at least one task, found none"),
        ({"every_step": ["kd"]}, "every_step: kd is made by distill, not align"),
        (
            {"every_step": ["latne"]},
            "unknown method 'latne'; `made_by` has laten, unaligned_seeking, postpkt_random,"
            " postpkt_pissa, postpkt_seeking, kd, control_random_delta",
        ),
        (
            {"analysed": {"task": ["gsm9k"], "methods": [], "seeking": [], "target_methods": []}},
            "analysed.task: 'gsm9k' is not in `task` (mmlu, gsm8k, humaneval, mbpp)",
        ),
        (
            {"analysed": {"task": [], "methods": ["postpkt_random"], "seeking": [], "target_methods": []}},
            "analysed.methods: postpkt_random is made by finetune, not align, unaligned, finetune_seeking,"
            " finetune_answers, distill, control",
        ),
        (
            {"made_by": {"align": {"laten": {}}}, "every_step": [], "analysed": NOTHING},
            "made_by: 'unaligned' is missing; a group without methods is an empty mapping: {}",
        ),
        (
            {"by_source": {"laten": {}, "unaligned_seeking": {}, "postpkt_seeking": {}, "kd": {}}},
            "by_source: 'control_random_delta' is missing; it unites groups of `made_by`, see the end of `made_by` in"
            " params.yaml",
        ),
        (
            {"methods": {"latne": {}}},
            "methods: 'laten' is missing; it unites groups of `made_by`, see the end of `made_by` in params.yaml",
        ),
        (
            {"task": {"mmlu": {"algin": {}}}, "analysed": NOTHING},
            "task.mmlu: 'prepare' is missing; a task has the parts of `no_change`: prepare, align, finetune, generate,"
            " distill, evaluate",
        ),
        (
            {"task": {"mmlu": PARTS | {"algin": {}}}, "analysed": NOTHING},
            "task.mmlu: 'algin' does not belong there; a task has the parts of `no_change`: prepare, align, finetune,"
            " generate, distill, evaluate",
        ),
        ({"models": ["target-chat"]}, "models: 'source-chat' is missing; a source is attributed and evaluated, too"),
        ({"models": ["source-chat"]}, "models: 'target-chat' is missing; rows are compared with the target"),
        ({"seek_source": []}, "seek_source: 'source-chat' is missing; unaligned_seeking needs its sub-matrices"),
        (
            {"pairs": {"one": {"first": "a"}}},
            "pairs.one: expected the keys first and second with a model each, found {'first': 'a'}",
        ),
    ],
)
def test_bad_profiles(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_params(tmp_path, lambda params: params.update(changes))
    with pytest.raises(UserError) as caught:
        read_profile(path)
    assert str(caught.value) == f"{path}: {message}"


def test_controls_need_the_row_that_they_control(tmp_path: Path) -> None:
    def edit(params: dict[str, Any]) -> None:
        rows(params, control={"control_random_delta": {"code": "random_delta"}})
        params["analysed"] = NOTHING

    with pytest.raises(UserError, match=r"made_by\.align: 'laten' is missing; control_random_delta is a control of"):
        read_profile(write_params(tmp_path, edit))
