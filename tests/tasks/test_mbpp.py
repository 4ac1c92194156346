from __future__ import annotations

import pytest

from pkt_stages.tasks import load

CODE = "import re\r\ndef f(a=(1, 2), b=3):\r\n  return 1"


def test_the_signature_keeps_imports_and_nested_defaults() -> None:
    made = load("mbpp").example({"text": "Write f.", "code": CODE, "test_list": ["assert f() == 1"]}, "x")
    assert made.prompt == "Complete the following python function.\n\n\nWrite f.\nimport re\ndef f(a=(1, 2), b=3)"
    assert made.answer.startswith(made.prefix + ":\n  return 1")
    assert made.reference == {
        "code_prefix": "import re\ndef f(a=(1, 2), b=3)",
        "setup": "",
        "test_list": ["assert f() == 1"],
    }


@pytest.mark.parametrize(("prefix", "entry"), [("def g(x):\n  ...\ndef f(x)", "f"), ("x = 1", "")])
def test_assertions_call_the_last_function(prefix: str, entry: str) -> None:
    task = load("mbpp")
    assert task.job is not None
    job = task.job({"code_prefix": prefix, "setup": "s = 1", "test_list": ["assert f(1)", "assert f(2)"]}, ": ...")
    assert (job.code, job.prefix, job.entry, job.call) == (f"{prefix}: ...", prefix, entry, "")
    assert (job.setup, job.tests) == ("s = 1", "assert f(1)\nassert f(2)")
