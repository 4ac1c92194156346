"""Runs the tests, in a sandbox of its own, against proxies of what the candidate's process defined.

The test code sees: what the benchmark itself put before the candidate (imports and helper functions of the prompt,
so that a candidate cannot replace a helper that the tests rely on), the built-ins, the standard library's modules,
and for every other name that the candidate defined a proxy that forwards calls. Values that come back are plain data
or handles without behaviour.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from pkt_stages.evaluation.sandbox.plain import NotPlain, decode, encode, receive, send, take_over_stdio

Ask = Callable[[dict[str, Any]], Any]


class Remote:
    """An object in the candidate's process. Calls and attributes are forwarded; equality is identity, nothing else."""

    __slots__ = ("_ask", "_of")

    def __init__(self, ask: Ask, of: str | int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_of", of)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask({"of": self._of, "call": [list(args), kwargs]})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask({"of": self._of, "name": name})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask({"of": self._of, "name": name, "set": value})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._of == other._of

    def __hash__(self) -> int:
        return hash(self._of)


def _number(value: Any) -> int:
    """The handle of what is sent back to where it came from."""
    if isinstance(value, Remote) and isinstance(value._of, int):
        return value._of
    raise NotPlain(f"the tests pass a {type(value).__name__}, which is no plain data")


def run_job(job: dict[str, Any], exchange: Callable[[bytes], bytes]) -> dict[str, str]:
    """The verdict on one candidate: {"verdict": passed | failed | error | memory, "message": ...}.

    Args:
        job: prefix (the benchmark's code before the candidate's), entry (the function under test), setup and tests
            (code), all trusted as far as the benchmark is.
        exchange: sends a request to the candidate and returns the answer's body.
    """
    handles: dict[int, Remote] = {}

    def ask(request: dict[str, Any]) -> Any:
        answer = _read(exchange(encode(request, _number).encode()))
        if "value" not in answer:
            raise _exception(decode(answer, handle))
        return decode(answer["value"], handle)

    def handle(of: int) -> Remote:
        return handles.setdefault(of, Remote(ask, of))

    random.seed(0)
    try:
        defined = ask({"code": job["code"]})
        if not isinstance(defined, list):
            raise NotPlain("expected names")
        names: dict[str, Any] = {"__name__": "tests"}
        _define_helpers(job["prefix"], job["entry"], names)
        tree = ast.parse(job["setup"] + "\n\n" + job["tests"])
        program = compile(tree, "<tests>", "exec")
        for name in sorted(_modules(tree) - _bound(program) - set(names) - {job["entry"]}):
            names[name] = importlib.import_module(name)
        wanted = _names(program) | ({job["entry"]} if job["entry"] else set())
        own = _bound(program) | set(names) | (set(dir(builtins)) - {job["entry"]})
        for name in sorted((wanted & {n for n in defined if isinstance(n, str)}) - own):
            names[name] = Remote(ask, name)
        exec(program, names)
        if job["call"]:
            names[job["call"]](names[job["entry"]])
    except MemoryError:
        return {"verdict": "memory", "message": "out of memory"}
    except AssertionError as error:
        return {"verdict": "failed", "message": f"AssertionError: {error}"[:200].rstrip(": ")}
    except BaseException as error:
        return {"verdict": "error", "message": f"{type(error).__name__}: {error}"[:200]}
    return {"verdict": "passed", "message": ""}


def _read(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotPlain(str(error)) from None
    if not isinstance(message, dict):
        raise NotPlain("expected a JSON object")
    return message


def _define_helpers(prefix: str, entry: str, names: dict[str, Any]) -> None:
    """Run the benchmark's code before the candidate's, without the function that the candidate completes."""
    for ending in ("", "\n    pass\n", ":\n    pass\n"):
        try:
            tree = ast.parse(prefix + ending)
        except SyntaxError:
            continue
        unfinished = tree.body[-1:]  # in case of a class, its methods are the candidate's as well
        body = [
            node
            for node in tree.body
            if node not in unfinished and not (isinstance(node, ast.FunctionDef) and node.name == entry)
        ]
        exec(compile(ast.Module(body, []), "<prompt>", "exec"), names)
        return


def _names(code: CodeType) -> set[str]:
    """All global names that a piece of code reads or writes, nested functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _modules(tree: ast.Module) -> set[str]:
    """The standard library's modules of which a program uses an attribute, whether it imports them or not."""
    owners = (node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {owner.id for owner in owners if isinstance(owner, ast.Name)} & sys.stdlib_module_names


def _bound(code: CodeType) -> set[str]:
    """The names that a piece of code binds at top level."""
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}


def _exception(answer: Any) -> Exception:
    """The built-in exception nearest to the one that the candidate raised."""
    kinds = answer.get("raised") if isinstance(answer, dict) else None
    if not isinstance(kinds, list) or not kinds:
        return NotPlain("expected an exception")
    message = str(answer.get("message", ""))[:300]
    for name in kinds:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (UnicodeDecodeError, Exception):
            try:
                return kind(message)
            except TypeError:
                continue
    return RuntimeError(f"{kinds[0]}: {message}"[:300])


def serve() -> None:
    """Fork one child per job, so that no test sees what another left behind."""
    requests, answers = take_over_stdio()

    def exchange(message: bytes) -> bytes:
        send(answers, message)
        return receive(requests)

    while True:
        job = json.loads(receive(requests))
        child = os.fork()
        if child == 0:
            send(answers, json.dumps(run_job(job, exchange)).encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            send(answers, json.dumps({"verdict": "error", "message": "the tests' process ended"}).encode())
