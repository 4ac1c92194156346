"""`make soak`: every kind of stage is broken while it computes and while it writes, and a run is killed 40 times at
any time; the results are those of a run that nothing disturbed, byte for byte, and nothing half-written is left.

It takes some 30 minutes; `make test` has a short form (tests/pipeline/test_interruptions.py).
"""

from __future__ import annotations

import itertools
import random
import shutil
import string
from pathlib import Path
from typing import Any

from pkt_stages.examples import write_jsonl
from tests.conftest import make_model
from tests.pipeline.repository import LATEN, make_repository, ran, run, shrink
from tests.profiles import rows
from tests.soak.interruptions import (
    Act,
    Fault,
    Write,
    contents,
    disturbed,
    killed_after,
    leftovers,
    one_line,
    undisturbed,
    until_gone,
)

SOURCE = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4}
SOURCE |= {"num_attention_heads": 6, "num_key_value_heads": 3}


def every_stage(params: dict[str, Any]) -> None:
    """Methods and models such that no stage of dvc.yaml has nothing to do."""
    shrink(params)
    rows(
        params,
        align=LATEN,
        unaligned={"unaligned_seeking": {"code": "seeking", "rank": 4}},
        grid={"unaligned_top_pca_random": {"code": "grid", "layers": "top", "width": "pca", "neurons": "random"}},
        finetune={"postpkt_pissa": {"init": "pissa"}},
        finetune_seeking={"postpkt_seeking": {"init": "seeking"}},
        finetune_answers={"seqkd": {"generate": {"train_set": "align"}, "finetune": {"init": "random"}}},
        distill={"kd": {"objective": "kd"}},
        control={"control_random_delta": {"code": "random_delta"}},
        oracle={"own": {"code": "own"}},
        transport={"matched": {"code": "matched", "vocabulary": False}},
        transport_control={"control_random_transport": {"code": "random_delta"}},
    )
    params |= {"every_step": ["laten"], "correlate": {"num_texts": 6}}
    params |= {"seek_source": ["source"], "teacher": ["source"], "transport_source": ["source"]}
    params |= {"oracle": "target-base", "models": [*params["models"], "target-base"]}
    params["reexpressed"] = {"reexpressed-base": {"of": "target-base", "like": "source-base", "how": {"seed": 0}}}
    params["analysed"] |= {"methods": ["laten"], "seeking": ["postpkt_seeking"], "target_methods": ["postpkt_pissa"]}
    params["pairs"]["target"] = {"first": "target-base", "second": "target-chat"}
    params["generate"] = {"max_new_tokens": 4}
    params["finetune"] |= {"epochs": 2}
    params["distill"] |= {"epochs": 1, "batch_size": 4, "rank": 4}


def points(writes: list[Write]) -> list[Fault]:
    """Two moments of each kind of stage: while it computes, and one of its writes, in turn the first, one in the
    middle and the last. Each kind is killed; in some the second comes as an interrupt or as a disk without space."""
    by_stage: dict[str, list[Write]] = {}
    for write in writes:
        by_stage.setdefault(write.stage, []).append(write)
    first_of_kind = {name.split("@")[0]: name for name in reversed(by_stage)}
    acts: itertools.cycle[Act] = itertools.cycle(["kill all", "kill stage", "kill all", "fill disk", "interrupt"])
    thirds = itertools.cycle([0.0, 0.5, 1.0])
    chosen = []
    for name, of_stage in by_stage.items():
        if name not in first_of_kind.values():
            continue
        act = next(acts)
        # A file is renamed when all of it is written; too late for a disk to be full.
        begun = {write.path: write.number for write in reversed(of_stage) if write.event == "open"}
        done = [write.number for write in of_stage if write.event == "os.rename"]
        numbers = sorted(begun.values()) if act == "fill disk" else done
        chosen += [
            Fault(name, "compute", "kill all"),
            Fault(name, numbers[int(next(thirds) * (len(numbers) - 1))], act),
        ]
    return chosen


def test_results_do_not_depend_on_what_broke_a_run(tmp_path: Path) -> None:
    calm = make_repository(tmp_path / "calm", every_stage)
    make_model(calm / "data/tiny/target-base", seed=3)
    # As many tokens as a map of the residual stream needs.
    texts = [{"text": f"Text {i}: {''.join(random.Random(i).choices(string.ascii_letters, k=90))}"} for i in range(6)]
    write_jsonl(calm / "data/tiny/texts/texts.jsonl", texts)
    for seed, phase in enumerate(("base", "chat"), start=4):  # heads as long and as shared as the target's
        make_model(calm / f"data/tiny/source-{phase}", seed=seed, **SOURCE)
    run(calm, "git", "add", "-A")
    run(calm, "git", "commit", "-q", "-m", "nothing has run")
    rough = Path(shutil.copytree(calm, tmp_path / "rough"))
    plan = points(undisturbed(calm, tmp_path / "none"))
    kinds = {fault.stage.split("@")[0] for fault in plan}
    said = disturbed(rough, tmp_path / "faults", plan)
    assert contents(rough) == contents(calm)
    assert leftovers(rough) == []
    for fault, text in said.items():
        if fault.act == "interrupt":
            assert one_line(text) == "pkt: interrupted; run again to go on"
        if fault.act == "fill disk":
            assert one_line(text).startswith("pkt: error: ")
    kills = sum(fault.act.startswith("kill") for fault in plan)
    print(f"\n{len(plan)} faults ({kills} kills) in {len(kinds)} kinds of stages")
    assert kills >= 20


KILLS, LONGEST = 40, 12.0  # seconds: so that a run gets somewhere, and not to its end


def some_stages(params: dict[str, Any]) -> None:
    """One of each kind that keeps something in scratch, and those around it."""
    shrink(params)
    rows(
        params,
        align=LATEN,
        unaligned={"unaligned_seeking": {"code": "seeking", "rank": 4}},
        finetune={"postpkt_random": {"init": "random"}},
        control={"control_random_delta": {"code": "random_delta"}},
    )
    params |= {"seek_source": ["source"]}
    params["finetune"] |= {"epochs": 4}


def test_a_run_that_is_killed_at_any_time(tmp_path: Path) -> None:
    calm = make_repository(tmp_path / "calm", some_stages)
    run(calm, "git", "add", "-A")
    run(calm, "git", "commit", "-q", "-m", "nothing has run")
    fresh = Path(shutil.copytree(calm, tmp_path / "fresh"))
    said = killed_after(calm, 1200)
    assert said is not None
    stages = ran(said)
    assert len(stages) >= 15
    chance = random.Random(0)
    kills, runs = 0, 0
    while kills < KILLS:
        rough = Path(shutil.copytree(fresh, tmp_path / f"rough_{runs}"))
        while killed_after(rough, 1200 if kills == KILLS else chance.uniform(1, LONGEST)) is None:
            kills += 1
            until_gone(rough)
        runs += 1
        assert contents(rough) == contents(calm)
        assert leftovers(rough) == []
    print(f"\n{kills} kills in {runs} runs of {len(stages)} stages")
