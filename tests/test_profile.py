# ruff: noqa: E501
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pkt_stages.errors import UserError
from pkt_stages.profile import Profile, chat_model, read_profile
from tests.profiles import add_row, one_source, rows, write_params

ROOT = Path(__file__).parents[1]


NOTHING: dict[str, Any] = {"task": [], "source": [], "methods": [], "seeking": [], "target_methods": []}
DEFAULT: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
FIRST, TARGET, ORACLE = str(DEFAULT["source"][0]), str(DEFAULT["target"]), str(DEFAULT["oracle"])
SOURCES = [f"{FIRST}-chat", "source-chat"]
ONE_OF = "each of `source` stands in one of selected.trained and selected.with_base"
PARTS: dict[str, Any] = {name: {} for name in ("prepare", "align", "finetune", "generate", "distill", "evaluate")}


def shown(profile: Profile) -> list[tuple[str, str, str | None]]:
    return [(method.name, method.section, method.code) for method in profile.methods]


def test_the_default_profile() -> None:
    profile = read_profile(ROOT / "params.yaml")
    assert shown(profile) == [
        ("own", "Ceilings", "own"),
        ("own_sites", "Ceilings", "own"),
        ("matched", "Transport", "matched"),
        ("theseus", "Transport", "theseus"),
        ("laten", "PrePKT", "laten"),
        ("unaligned_seeking", "PrePKT", "seeking"),
        ("postpkt_random", "PostPKT", None),
        ("postpkt_pissa", "PostPKT", None),
        ("postpkt_seeking", "PostPKT", None),
        ("kd", "Distillation", None),
        ("control_random_isometry", "Controls", "matched"),
        ("control_random_delta", "Controls", "random_delta"),
    ]
    assert profile.sources == {
        "transport_source": [FIRST, "source"],
        "source": [FIRST, "source"],
        "seek_source": ["source"],
        "teacher": ["source"],
    }
    assert (profile.target, profile.oracle) == (TARGET, ORACLE)
    # The first source is the target and its oracle, written again in the other one's shape.
    assert profile.attributed == [f"{FIRST}-chat", "source-chat", TARGET]
    assert {name: (entry["of"], entry["how"]) for name, entry in profile.reexpressed.items()} == {
        f"{FIRST}-base": (TARGET, {"seed": 0}),
        f"{FIRST}-chat": (ORACLE, {"seed": 0}),
    }
    assert profile.tasks == ["mmlu", "gsm8k", "humaneval", "mbpp"]
    assert profile.method("laten").folder("s") == ("laten", "s")
    assert profile.method("postpkt_pissa").folder("s") == ("postpkt_pissa",)
    assert profile.method("matched").folder("s") == ("matched", "s")
    assert profile.method("own").folder("s") == ("own",)
    assert list(profile.pairs) == ["pair", "source", "target"]
    assert profile.analysed["source"] == ["source"]


def test_a_source_has_the_rows_of_the_lists_that_name_it() -> None:
    """And those that are made without a source."""
    profile = read_profile(ROOT / "params.yaml")
    every = [method.name for method in profile.methods]
    assert [method.name for method in profile.of_source("source")] == every
    sought_or_taught = ["unaligned_seeking", "postpkt_seeking", "kd"]
    assert [method.name for method in profile.of_source(FIRST)] == [
        name for name in every if name not in sought_or_taught
    ]
    assert chat_model("source") == "source-chat"


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
            "made_by.alining: no such group (did you mean 'align'?); expected any of oracle, transport, labelled,"
            " align, unaligned, grid, finetune, finetune_seeking, finetune_answers, finetune_states, distill, imported,"
            " control, transport_control, filter, filter_control",
        ),
        ({"made_by": {"align": {"laten": 3}}}, "section 'made_by.align.laten': expected a mapping, found int"),
        ({"source": []}, "source: expected a list with at least one name, found []"),
        (
            {"evaluate": {"sandbox_seconds": 5.0}},
            "evaluate.sandbox_seconds: does not belong there; expected in `task.<task>.evaluate` of the tasks of generated code, whose evaluations alone it changes",
        ),
        ({"target": ["a"]}, "target: expected a name, found ['a']"),
        ({"models": "all"}, "models: expected a list of names, found 'all'"),
        ({"task": {}}, "task: expected at least one task, found none"),
        ({"every_step": ["kd"]}, "every_step: kd is made by distill, not align"),
        (
            {"every_step": ["latne"]},
            "unknown method 'latne' (did you mean 'laten'?); `made_by` has own, own_sites, matched, theseus, laten, unaligned_seeking,"
            " postpkt_random, postpkt_pissa, postpkt_seeking, kd, control_random_isometry, control_random_delta",
        ),
        (
            {"analysed": NOTHING | {"task": ["gsm9k"]}},
            "analysed.task: 'gsm9k' is not in `task` (mmlu, gsm8k, humaneval, mbpp) (did you mean 'gsm8k'?)",
        ),
        (
            {"analysed": NOTHING | {"methods": ["postpkt_random"]}},
            "analysed.methods: postpkt_random is made by finetune, not align, unaligned, finetune_seeking,"
            " finetune_answers, finetune_states, distill, control",
        ),
        (
            {"analysed": NOTHING | {"methods": ["matched"]}},
            "analysed.methods: matched is made by transport, not align, unaligned, finetune_seeking, finetune_answers,"
            " finetune_states, distill, control",
        ),
        (
            {"analysed": NOTHING | {"source": ["sourse"]}},
            "analysed.source: 'sourse' is not in `source` (did you mean 'source'?)",
        ),
        ({"analysed": NOTHING | {"source": "source"}}, "analysed.source: expected a list of names, found 'source'"),
        (
            {"analysed": {key: names for key, names in NOTHING.items() if key != "source"}},
            "analysed.source: expected a list of names, found None",
        ),
        (
            {"made_by": {"align": {"laten": {}}}, "every_step": [], "analysed": NOTHING},
            "made_by: 'oracle' is missing; a group without methods is an empty mapping: {}",
        ),
        (
            {"aligned": {"laten": {}}},
            "aligned: 'control_random_delta' is missing; it unites groups of `made_by`, see the end of `made_by` in"
            " params.yaml",
        ),
        (
            {"sought": {"unaligned_seeking": {}}},
            "sought: 'postpkt_seeking' is missing; it unites groups of `made_by`, see the end of `made_by` in"
            " params.yaml",
        ),
        (
            {"taught": {"kd": {}, "gkd": {}}},
            "taught: 'gkd' does not belong there (did you mean 'kd'?); it unites groups of `made_by`, see the end of `made_by` in"
            " params.yaml",
        ),
        (
            {"transported": {"matched": {}, "theseus": {}}},
            "transported: 'control_random_isometry' is missing; it unites groups of `made_by`, see the end of"
            " `made_by` in params.yaml",
        ),
        (
            {"methods": {"latne": {}}},
            "methods: 'own' is missing; it unites groups of `made_by`, see the end of `made_by` in params.yaml",
        ),
        (
            {"task": {"mmlu": {"algin": {}}}, "analysed": NOTHING},
            "task.mmlu: 'prepare' is missing; a task has the parts of `no_change`: prepare, align, finetune, generate,"
            " distill, evaluate",
        ),
        (
            {"task": {"mmlu": PARTS | {"algin": {}}}, "analysed": NOTHING},
            "task.mmlu: 'algin' does not belong there (did you mean 'align'?); a task has the parts of `no_change`: prepare, align, finetune,"
            " generate, distill, evaluate",
        ),
        (
            {"models": [SOURCES[0], TARGET, ORACLE]},
            "models: 'source-chat' is missing; a source is evaluated, too",
        ),
        ({"models": SOURCES}, f"models: {TARGET!r} is missing; rows are compared with the target"),
        (
            {"models": [*SOURCES, TARGET]},
            f"models: {ORACLE!r} is missing; the recovered gap is that to the oracle",
        ),
        ({"oracle": ["a"]}, "oracle: expected a name, found ['a']"),
        ({"oracle": None}, "oracle: own is made of the oracle; name a model"),
        ({"attributed": "all"}, "attributed: expected a list of names, found 'all'"),
        (
            {"attributed": ["source-chat", TARGET]},
            f"attributed: '{FIRST}-chat' is missing; LaTen selects its neurons, too",
        ),
        ({"seek_source": []}, "seek_source: expected at least one source; unaligned_seeking is made from it"),
        ({"seek_source": ["target"]}, "seek_source: 'target' is not in `source`"),
        ({"teacher": []}, "teacher: expected at least one source; kd is made from it"),
        ({"teacher": ["source-chat"]}, "teacher: 'source-chat' is not in `source` (did you mean 'source'?)"),
        ({"teacher": "source"}, "teacher: expected a list of names, found 'source'"),
        ({"transport_source": []}, "transport_source: expected at least one source; matched is made from it"),
        ({"transport_source": ["target"]}, "transport_source: 'target' is not in `source`"),
        ({"transport_source": None}, "transport_source: expected a list of names, found None"),
        (
            {"labelled_source": ["source"]},
            "labelled_source: 'source' does not belong there; it repeats transport_source where there are rows in"
            " made_by.labelled, and is empty else",
        ),
        (
            {"selected": {"trained": [FIRST], "with_base": []}},
            f"selected: 'source' is missing; {ONE_OF}",
        ),
        (
            {"selected": {"trained": [FIRST, "source"], "with_base": ["source"]}},
            f"selected: 'source' stands twice; {ONE_OF}",
        ),
        ({"selected": {"trained": [FIRST]}}, "selected.with_base: expected a list of names, found None"),
        ({"reexpressed": []}, "section 'reexpressed': expected a mapping, found list"),
        ({"reexpressed": {"x": "target-base"}}, "section 'reexpressed.x': expected a mapping, found str"),
        *[
            (
                {"reexpressed": {"x": entry}},
                "reexpressed.x: expected `of` and `like` (models) and `how` (options of `pkt reexpress`, at least"
                f" `seed`), found {found}",
            )
            for entry, found in (
                ({}, "nothing"),
                ({"of": "a", "like": "b"}, "of, like"),
                ({"of": "a", "like": "b", "how": {}}, "of, like, how"),
                ({"of": "a", "like": "b", "how": {"seed": 0}, "by": "c"}, "of, like, how, by"),
            )
        ],
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


@pytest.mark.parametrize(
    ("group", "name", "controlled"),
    [
        ("control", "control_random_delta", "align: 'laten'"),
        ("transport_control", "control_random_transport", "transport: 'matched'"),
        ("filter", "gradfix", "transport: 'theseus'"),
        ("filter_control", "control_gradfix", "transport_control: 'control_random_transport'"),
    ],
)
def test_controls_need_the_row_that_they_control(tmp_path: Path, group: str, name: str, controlled: str) -> None:
    def edit(params: dict[str, Any]) -> None:
        rows(params, **{group: {name: {"code": "random_delta"}}})
        params["analysed"] = NOTHING

    path = write_params(tmp_path, edit)
    with pytest.raises(UserError) as caught:
        read_profile(path)
    assert str(caught.value) == f"{path}: made_by.{controlled} is missing; {name} is made of its delta"


def test_a_control_beside_the_row_that_it_controls(tmp_path: Path) -> None:
    """Of a transport in a group of its own, below all rows that are none."""
    entry = {"code": "random_delta"}
    path = write_params(tmp_path, lambda p: add_row(p, "transport_control", "control_random_transport", entry))
    assert shown(read_profile(path))[-1] == ("control_random_transport", "Controls", "random_delta")


def test_without_oracle_nothing_written_anew_and_nothing_transported(tmp_path: Path) -> None:
    def edit(params: dict[str, Any]) -> None:
        one_source(params)
        rows(params, align={"laten": {}})

    profile = read_profile(write_params(tmp_path, edit))
    assert (profile.oracle, profile.reexpressed, profile.sources["transport_source"]) == (None, {}, [])
    assert [method.name for method in profile.of_source("source")] == ["laten"]


def test_the_target_of_another_profile_may_be_adopted(tmp_path: Path) -> None:
    """And the oracle."""

    def edit(params: dict[str, Any]) -> None:
        params |= {"models": SOURCES, "adopted": [TARGET, ORACLE]}

    assert read_profile(write_params(tmp_path, edit)).oracle == ORACLE


def test_where_nothing_is_aligned_no_neurons_need_be_attributed(tmp_path: Path) -> None:
    def edit(params: dict[str, Any]) -> None:
        rows(params, finetune={"postpkt_pissa": {"init": "pissa"}})
        params |= {"attributed": [], "analysed": NOTHING}

    assert read_profile(write_params(tmp_path, edit)).attributed == []


BAD = [
    "a/b",
    "../a",
    "a b",
    "a|b",
    "<b>",
    "a\nb",
    "a\x1bb",
    "a;b",
    "$(a)",
    "`a`",
    "a'b",
    "-a",
    ".a",
    "",
    "a*",
    "a\u2028b",
]


@pytest.mark.parametrize("name", [*BAD, "laten_rate_0.1", "7", 7, True, None])
def test_names_of_methods_and_tasks_go_through_dvc(tmp_path: Path, name: Any) -> None:
    """And through paths, commands and tables."""
    path = write_params(tmp_path, lambda params: add_row(params, "align", name, {"rate": 0.05}))
    with pytest.raises(UserError) as caught:
        read_profile(path)
    rule = "use letters, digits and any of _ - (a letter or _ first; DVC cuts keys at dots)"
    shown = str(UserError(repr(name)))
    assert str(caught.value) == f"{path}: made_by.align: {shown} is no name here; {rule}"
    path = write_params(tmp_path, lambda params: params["task"].update({name: dict(PARTS)}))
    with pytest.raises(UserError) as caught:
        read_profile(path)
    assert str(caught.value) == f"{path}: task: {shown} is no name here; {rule}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("key", ["profile", "target", "oracle", "models", "source", "pairs", "reexpressed"])
def test_names_of_models_and_profiles(tmp_path: Path, key: str, name: str) -> None:
    def edit(params: dict[str, Any]) -> None:
        if isinstance(params[key], dict):
            params[key][name] = next(iter(params[key].values()))
        else:
            params[key] = [*params[key], name] if isinstance(params[key], list) else name

    path = write_params(tmp_path, edit)
    with pytest.raises(UserError) as caught:
        read_profile(path)
    rule = "use letters, digits and any of _ - . (a letter, a digit or _ first)"
    assert str(caught.value) == f"{path}: {key}: {UserError(repr(name))} is no name here; {rule}"


def test_models_may_have_dots(tmp_path: Path) -> None:
    def edit(params: dict[str, Any]) -> None:
        one_source(params)
        rows(params, align={"laten": {}})
        params |= {"source": ["qwen2.5"], "target": "1.5b-chat", "seek_source": [], "teacher": []}
        params["selected"] = {"trained": ["qwen2.5"], "with_base": []}
        params |= {"models": ["qwen2.5-chat", "1.5b-chat"], "attributed": ["qwen2.5-chat", "1.5b-chat"]}

    assert read_profile(write_params(tmp_path, edit)).target == "1.5b-chat"


def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(("\ufeff" + (ROOT / "params.yaml").read_text().replace("\n", "\r\n")).encode())
    assert read_profile(path).content == read_profile(ROOT / "params.yaml").content


def test_without_alignments_nothing_needs_a_selection() -> None:
    profile = read_profile(ROOT / "profiles/sizes/params.yaml")
    assert not profile.in_group("align") and profile.attributed == []
    assert profile.content["selected"] == {"trained": [], "with_base": []}
