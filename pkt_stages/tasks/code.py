"""What tasks of generated code have in common: a function is begun in the prompt, and a program is run with tests."""

from __future__ import annotations

from typing import Any

from pkt_stages.examples import Example

LEAD = "Here is the completed function:\n\n\n```python\n"


def completion(dataset: str, id: str, *, asked: str, begun: str, whole: str, tests: dict[str, Any]) -> Example:
    """An example of a function to complete.

    Args:
        asked: what the prompt shows.
        begun: the code that the answer is forced to begin with.
        whole: the solution, `begun` included.
        tests: what the reference holds besides `begun`, which is its `code_prefix`.
    """
    return Example(
        dataset=dataset,
        id=id,
        prompt=f"Complete the following python function.\n\n\n{asked}",
        answer=f"{LEAD}{whole}\n```",
        prefix=LEAD + begun,
        reference={"code_prefix": begun, **tests},
    )
