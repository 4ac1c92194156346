from __future__ import annotations

from typing import Any

import pytest

from pkt_stages.errors import UserError
from pkt_stages.evaluation.settings import Decoding, EvaluateParams
from pkt_stages.params import build


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 2}, "num_samples 2 with temperature 0 would repeat one answer; set a temperature"),
        ({"top_p": 0.5}, "top_p 0.5 has no effect with temperature 0; set a temperature"),
        ({"temperature": -1.0}, "temperature must be at least 0, found -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, found nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, found 0"),
        ({"limit": 0}, "limit must be at least 1, found 0"),
        ({"sandbox_seconds": 0.0}, "sandbox_seconds must be above 0, found 0.0"),
        ({"sandbox_memory_mb": 0}, "sandbox_memory_mb must be at least 1, found 0"),
        (
            {"sandbox_floor": "none"},
            "sandbox_floor: expected one of sandlock, namespaces, landlock, rlimits, found 'none'",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(EvaluateParams, settings, "evaluate")
    assert str(caught.value) == f"evaluate: {message}"


def test_decoding_refuses_what_contradicts_itself() -> None:
    with pytest.raises(ValueError, match=r"^num_samples 2 with temperature 0 would repeat one answer"):
        Decoding(num_samples=2)


def test_decoding_is_made_of_the_settings() -> None:
    params = EvaluateParams(num_samples=20, temperature=0.1, top_p=0.95, seed=3)
    assert params.decoding() == Decoding(512, 20, 0.1, 0.95, 3)
