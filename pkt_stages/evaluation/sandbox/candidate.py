"""Runs inside the sandbox, with generated code: defines it and answers calls. Nothing it says is a verdict.

Started as `python -c` with the text of plain.py in front; whatever the generated code does to this process (replace
built-ins, write to the pipes, exit), it can only change the values that its own functions return.
"""

from __future__ import annotations

from typing import Any

from pkt_stages.evaluation.sandbox.plain import decode, encode, pack, receive, send, take_over_stdio, unpack


def serve() -> None:
    """Answer requests until the pipe closes: `code` first, then `call`, `get` and `set` on names or handles."""
    requests, answers = take_over_stdio()
    objects: list[Any] = []
    names: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}

    def number(value: Any) -> int:
        for index, known in enumerate(objects):
            if known is value:
                return index
        objects.append(value)
        return len(objects) - 1

    def answer(request: dict[str, Any]) -> Any:
        if "code" in request:
            exec(compile(request["code"], "<candidate>", "exec"), names)
            return sorted(name for name in names if isinstance(name, str))
        owner = request["of"]
        found = names[owner] if isinstance(owner, str) else objects[owner]
        if "call" in request:
            arguments = decode(request["call"], objects.__getitem__)
            return found(*arguments[0], **arguments[1])
        if "set" in request:
            return setattr(found, request["name"], decode(request["set"], objects.__getitem__))
        return getattr(found, request["name"]) if "name" in request else found

    while True:
        request = unpack(receive(requests))
        try:
            message = {"value": encode(answer(request), number)}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            message = {"raised": kinds, "message": _text(error)}
        send(answers, pack(message))


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return ""
