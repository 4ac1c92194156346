from __future__ import annotations

from pkt_stages.tasks import load

ROW = {
    "prompt": 'def f(x):\n    """Doc."""\n',
    "canonical_solution": "    return x\n",
    "test": "t",
    "entry_point": "f",
}


def test_the_prefix_is_the_prompt_s_code() -> None:
    made = load("humaneval").example(ROW, "x")
    assert made.prompt == f"Complete the following python function.\n\n\n{ROW['prompt']}"
    assert made.answer == 'Here is the completed function:\n\n\n```python\ndef f(x):\n    """Doc."""\n    return x\n```'
    assert made.prefix == f"Here is the completed function:\n\n\n```python\n{ROW['prompt']}"
    assert made.reference == {"code_prefix": ROW["prompt"], "test": "t", "entry_point": "f"}


def test_the_training_rows_have_a_schema_of_their_own() -> None:
    made = load("humaneval").example({"instruction": "Write f.", "output": "def f(): ..."}, "x", "evol_instruct")
    assert (made.dataset, made.prompt, made.answer, made.prefix) == ("humaneval", "Write f.", "def f(): ...", "")


def test_check_is_called_with_the_function() -> None:
    task = load("humaneval")
    assert task.job is not None
    job = task.job(task.example(ROW, "x").reference, "    return x")
    assert (job.code, job.prefix) == (f"{ROW['prompt']}    return x", ROW["prompt"])
    assert (job.entry, job.setup, job.tests, job.call) == ("f", "", "t", "check")
