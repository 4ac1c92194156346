"""What the commands that train do alike; a whole run is in tests/stages/test_finetune.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt_stages.encoding import Encoded
from pkt_stages.errors import UserError
from pkt_stages.models import training
from pkt_stages.models.recipe import TrainingParams
from pkt_stages.parallel import Group

EXAMPLES = [Encoded([0, 7 + i, 9, 1], [-100, -100, 9, 1]) for i in range(7)]
PARAMS = TrainingParams(epochs=3, batch_size=3)
JOB = training.Job("finetune", None, PARAMS, {"name": "target", "revision": None}, None, EXAMPLES)


def refused(place: training.Place) -> str:
    """The message with which a training is refused before a model is loaded."""

    def never(*given: Any) -> Any:
        raise AssertionError

    with pytest.raises(UserError) as caught:
        training.train_seeds(JOB, place, start=never, make_trainer=never)
    assert not place.scratch.exists()
    return str(caught.value)


def test_several_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refused(training.Place(tmp_path / "scratch", "cuda", 4)) == (
        "2 GPUs are visible, one process trains on one; set CUDA_VISIBLE_DEVICES, or start one process per GPU with"
        " torchrun"
    )


def test_a_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    message = refused(training.Place(tmp_path / "scratch", "cpu", 4, group=Group(0, 2)))
    assert message == "batch_size 3 cannot be divided among 2 processes"


def test_what_names_a_run(tmp_path: Path) -> None:
    """All that can change an adapter does, and neither the other seeds nor the method's name."""
    place = training.Place(tmp_path, "cpu", 4)
    file = tmp_path / "file"
    file.write_text("x")
    names = [
        training._fingerprint(JOB, place),
        training._fingerprint(replace(JOB, params=replace(PARAMS, lr=1e-3)), place),
        training._fingerprint(replace(JOB, target={"name": "other", "revision": None}), place),
        training._fingerprint(replace(JOB, source={"name": "source", "revision": None}), place),
        training._fingerprint(replace(JOB, examples=EXAMPLES[:6]), place),
        training._fingerprint(replace(JOB, files=[file]), place),
        training._fingerprint(JOB, replace(place, micro_batch_size=2)),
        training._fingerprint(JOB, replace(place, device="cuda")),
        training._fingerprint(JOB, replace(place, group=Group(0, 2))),
    ]
    assert len(set(names)) == len(names)
    same = replace(JOB, method="m", params=replace(PARAMS, seeds=(7,)))
    assert training._fingerprint(same, replace(place, scratch=tmp_path / "b", curves=tmp_path)) == names[0]
