"""Runs the tests, in a sandbox: beside the generated code, as the benchmark does, or apart from it.

Beside it, in one process, a candidate can forge whatever it likes; what fails there fails. Apart from it, the test code
sees what the benchmark itself put before the candidate (imports and helper functions of the prompt, so that a candidate
cannot replace a helper that the tests rely on), the built-ins, the standard library's modules, and for every other name
that the candidate defined what `plain` makes of it: a value, or a proxy. A proxy answers what reads the object. What
would have the object judge the tests' own values (`==`, `<`, `in`, the methods that a value would have) it does not do.
"""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import json
import marshal
import sys
import types
from collections.abc import Callable
from typing import Any

from pkt_stages.evaluation.sandbox.candidate import DONE, Proxy, Taker, define, exception_type, nearest, stream
from pkt_stages.evaluation.sandbox.plain import THEIR_METHODS, NotPlain, Peer, check_settable, message_of, receive, send


class Remote(Proxy):
    """An object in the candidate's process.

    Attributes:
        _whole: the tests made it by calling a class of the candidate's, so that its methods are what is tested.
    """

    __slots__ = ("_whole",)

    def __init__(self, peer: Checker, number: int, whole: bool) -> None:
        super().__init__(peer, number)
        object.__setattr__(self, "_whole", whole)

    def _ask(self, do: str, *values: Any) -> Any:
        return self._peer.ask_whole(self._whole, do, self._number, *values)

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name not in _SHOWN) or (name in THEIR_METHODS and not self._whole):
            raise AttributeError(f"{name!r} of an object of the candidate's own")
        return self._ask("get", name)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and super().__instancecheck__(value)

    def _operate(self, name: str, other: Any, reflected: bool) -> Any:
        """Between two objects of the candidate's; with a value of the tests only arithmetic of what is tested."""
        if isinstance(other, Remote) or (self._whole and name != "eq"):
            return super()._operate(name, other, reflected)
        return NotImplemented


_SHOWN = ("__name__", "__qualname__", "__dict__", "__wrapped__")  # data of an object, for all their names
_SCALARS = (type(None), bool, int, float, str)


class Checker(Peer):
    """The side of the tests."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing)
        self.errors: dict[str, type[BaseException]] = {}
        self._whole = False
        self._taker = Taker()

    def ask_whole(self, whole: bool, do: str, of: int | None, *values: Any) -> Any:
        """As `ask`; with `whole` the objects that come back are the tests' own making, as far as they are objects."""
        before, self._whole = self._whole, whole
        try:
            return self.ask(do, of, *values)
        finally:
            self._whole = before

    def act(self, do: str, of: Any, values: list[Any]) -> Any:
        if do == "next":
            return self._taker.take(of, *values)
        if do == "input":
            return builtins.input(*values)
        if do in ("get", "set"):
            name = values[0]
            if not isinstance(name, str) or name.startswith("_") or isinstance(of, _CODE):
                raise NotPlain(f"{do} of a {type(of).__name__} of the tests")
            if do == "set":
                check_settable(of, name)
        return DONE[do](of, *values)

    def proxy(self, number: int, kind: str, more: list[Any]) -> Any:
        if kind == "coroutine":
            return self._awaited(number)
        return stream(self, number) if kind == "iterator" else Remote(self, number, self._whole)

    async def _awaited(self, number: int) -> Any:
        return self.ask("await", number)

    def code_of(self, function: types.FunctionType) -> list[Any]:
        """Of a function that needs built-ins, modules of the standard library and its arguments alone."""
        code, names, modules = function.__code__, function.__globals__, {}
        if code.co_freevars or function.__kwdefaults__ or function.__dict__:
            return []
        if any(type(value) not in _SCALARS for value in function.__defaults__ or ()):
            return []
        for name in _globals(code):
            if isinstance(names.get(name), types.ModuleType) and (module := self.name_of(names[name])):
                modules[name] = module[0]
            elif name in names or not hasattr(builtins, name):
                return []
        return [marshal.dumps(code).hex(), modules, function.__defaults__]

    def number_of(self, proxy: Any) -> int | None:
        return int(proxy._number) if type(proxy) is Remote else None

    def name_of(self, value: Any) -> tuple[str, str] | None:
        """Of the standard library: a type, a function, or a module."""
        if isinstance(value, types.ModuleType):
            return (value.__name__, "") if value.__name__.partition(".")[0] in sys.stdlib_module_names else None
        if known := super().name_of(value):
            return known
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not (isinstance(module, str) and isinstance(name, str)):
            return None
        found: Any = sys.modules.get(module) if module.partition(".")[0] in sys.stdlib_module_names else None
        for part in name.split("."):
            found = getattr(found, part, None)
        return (module, name) if found is value else None

    def error(self, kinds: list[list[str]], text: str, values: list[Any]) -> BaseException:
        return nearest(kinds, values, self.errors) or RuntimeError(f"{kinds[0][1]}: {text}"[:300])

    def show(self, text: str) -> None:
        sys.stdout.write(text)


# An attribute of these could lead to the tests' own names.
_CODE = (types.FunctionType, types.MethodType, types.ModuleType, types.CodeType, types.FrameType, types.TracebackType)


def run_plain(given: int, verdict: int) -> None:
    """Judge a job as the benchmark does: generated code and tests in one process and one namespace."""
    job = json.loads(receive(given))

    def run() -> None:
        names = define(job["code"])
        exec(compile(f"{job['setup']}\n\n{job['tests']}", "<tests>", "exec", dont_inherit=True), names)
        if job["call"]:
            names[job["call"]](names[job["entry"]])

    send(verdict, json.dumps(_judged(run)).encode())


def run_checker(given: int, verdict: int, outgoing: int, incoming: int) -> None:
    """Judge a job whose generated code is in another process."""
    job = json.loads(receive(given))
    send(verdict, json.dumps(_judged(lambda: _run_tests(job, Checker(incoming, outgoing)))).encode())


def _judged(run: Callable[[], None]) -> dict[str, str]:
    """{"verdict": passed | failed | error | memory, "message": ...}."""
    try:
        run()
    except MemoryError:
        return {"verdict": "memory", "message": "out of memory"}
    except AssertionError as error:
        return {"verdict": "failed", "message": f"AssertionError: {message_of(error)}"[:200].rstrip(": ")}
    except BaseException as error:
        return {"verdict": "error", "message": f"{type(error).__name__}: {message_of(error)}"[:200]}
    return {"verdict": "passed", "message": ""}


def _run_tests(job: dict[str, Any], peer: Checker) -> None:
    """Run tests against the candidate's process; what fails raises.

    Args:
        job: prefix (the benchmark's code before the candidate's), entry (the function under test), setup and tests
            (code), all trusted as far as the benchmark is; and code, which is not.
    """
    entry = job["entry"]
    module = types.ModuleType("tests")
    sys.modules[module.__name__] = module
    names = module.__dict__
    classes = _define_helpers(job["prefix"], entry, names)
    peer.shared = {
        name: value
        for name, value in names.items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not issubclass(value, BaseException)
    }
    defined, kinds, errors = peer.ask("define", None, job["code"], list(peer.shared))
    for name, bases in sorted(errors.items(), key=lambda item: len(item[1])):  # a base before what derives from it
        known = (exception_type(module, name, peer.errors) for module, name in bases[1:])
        peer.errors[name] = names.get(name) or type(name, (next(kind for kind in known if kind),), {})
    tree = ast.parse(f"{job['setup']}\n\n{job['tests']}")
    program = compile(tree, "<tests>", "exec", dont_inherit=True)
    bound = _bound(program)
    for name in sorted(_modules(tree) - bound - set(names) - {entry}):
        names[name] = importlib.import_module(name)
    wanted = _names(program) | ({entry} if entry else set())
    own = bound | set(names) | (set(dir(builtins)) - {entry})
    for name in sorted((wanted & set(defined)) - own):
        whole = name in kinds and (name in classes or entry not in ("", name))
        names[name] = peer.errors.get(name) or peer.ask_whole(whole, "name", None, name)
    exec(program, names)
    if job["call"]:
        names[job["call"]](names[entry])


def _define_helpers(prefix: str, entry: str, names: dict[str, Any]) -> set[str]:
    """Run the benchmark's code before the candidate's, without what the candidate completes; the classes in it."""
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
        exec(compile(ast.Module(body, []), "<prompt>", "exec", dont_inherit=True), names)
        return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return set()


def _names(code: types.CodeType) -> set[str]:
    """All global names that a piece of code reads or writes, nested functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _globals(code: types.CodeType) -> set[str]:
    """The global names that a function's code uses, nested functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    used = {str(step.argval) for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME"))}
    return (used - {"__name__"}).union(*map(_globals, inner))


def _modules(tree: ast.Module) -> set[str]:
    """The standard library's modules of which a program uses an attribute, whether it imports them or not."""
    owners = (node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {owner.id for owner in owners if isinstance(owner, ast.Name)} & sys.stdlib_module_names


def _bound(code: types.CodeType) -> set[str]:
    """The names that a piece of code binds at top level."""
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
