"""Runs inside the sandbox, with generated code: defines it and answers calls. Nothing it says is a verdict.

It is started with plain.py's text in front. Whatever the generated code does to this process (replace built-ins, write
to the pipes, exit), it can only change the values that its own functions return.
"""

from pkt_stages.evaluation.sandbox.plain import TYPE_CHECKING, decode, encode, receive, send, take_over_stdio

if TYPE_CHECKING:
    from typing import Any

_JSON_WORDS: "dict[str, Any]" = {"__builtins__": {}, "null": None, "true": True, "false": False}


def serve() -> None:
    """Answer requests until the pipe closes.

    A request is plain data, {"code": text} first, then {"of": name or handle} with what is wanted of it:
    {"call": [arguments, keywords]}, {"name": attribute}, or {"name": attribute, "set": value}.
    """
    requests, answers = take_over_stdio()
    objects: list[Any] = []
    names: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}

    def number(value: "Any") -> int:
        for index, known in enumerate(objects):
            if known is value:
                return index
        objects.append(value)
        return len(objects) - 1

    def answer(request: "dict[str, Any]") -> "Any":
        if "code" in request:
            exec(compile(request["code"], "<candidate>", "exec"), names)
            return [name for name in names if isinstance(name, str)]
        owner = request["of"]
        found = names[owner] if isinstance(owner, str) else objects[owner]
        if "call" in request:
            arguments, keywords = request["call"]
            return found(*arguments, **keywords)
        if "set" in request:
            return setattr(found, request["name"], request["set"])
        return getattr(found, request["name"])

    while True:
        # The request comes from the checker, which is trusted, and its JSON is Python as well.
        request = decode(eval(receive(requests), dict(_JSON_WORDS)), objects.__getitem__)
        try:
            message = f'{{"value":{encode(answer(request), number)}}}'
        except BaseException as error:
            raised = {"raised": [kind.__name__ for kind in type(error).__mro__], "message": _message(error)}
            message = encode(raised, number)
        send(answers, message.encode())


def _message(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return ""
