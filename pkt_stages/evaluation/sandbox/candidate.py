"""Runs inside the sandbox, with generated code: defines it and does what is asked of it. Nothing it says is a verdict.

Whatever the generated code does to this process (replace built-ins, write to the pipes, exit), it can only change the
values that its own functions return.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib
import io
import marshal
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from pkt_stages.evaluation.sandbox.plain import Peer

_MAX_PRINTED = 1 << 20  # characters that are passed on


def define(code: str) -> dict[str, Any]:
    """Run generated code as a module, as `import` would, and return its names."""
    module = types.ModuleType("candidate")
    sys.modules[module.__name__] = module
    exec(compile(code, "<candidate>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


class Proxy:
    """What stands for an object of the other side: what is done to it is done there."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Any, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def _ask(self, do: str, *values: Any) -> Any:
        return self._peer.ask(do, self._number, *values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Iterator[Any]:
        return self._ask("iter")

    def __len__(self) -> int:
        return self._ask("len")

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("put", key, value)

    def __bool__(self) -> bool:
        return self._ask("bool")

    def __str__(self) -> str:
        return self._ask("str")

    def __repr__(self) -> str:
        return self._ask("repr")

    def __hash__(self) -> int:
        return self._ask("hash")

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, *raised: Any) -> None:
        self._ask("exit")

    def __instancecheck__(self, value: Any) -> bool:
        return self._ask("isinstance", value)

    def __eq__(self, other: object) -> bool:
        return other is self or self._operate("eq", other, False) is True

    def _operate(self, name: str, other: Any, reflected: bool) -> Any:
        return self._ask("operator", name, other, reflected)


def _operator(name: str, reflected: bool) -> Callable[[Proxy, Any], Any]:
    return lambda self, other: self._operate(name, other, reflected)


_OPERATORS = ("eq", "lt", "le", "gt", "ge")
_REFLECTED = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
for _name in (*_OPERATORS[1:], *_REFLECTED):
    setattr(Proxy, f"__{_name.rstrip('_')}__", _operator(_name, False))
for _name in _REFLECTED:
    setattr(Proxy, f"__r{_name.rstrip('_')}__", _operator(_name, True))


class Theirs(Proxy):
    """An object of the tests."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._ask("get", name)


def stream(peer: Peer, number: int) -> Iterator[Any]:
    """The items of the other side's iterator: one by one at first, so that none is made that nobody wants."""
    taken = 0
    while True:
        items, ended = peer.ask("next", number, max(1, taken // 2))
        yield from items
        if ended:
            return
        taken += len(items)


class Taker:
    """Takes items for the other side; what is raised behind the first items is kept until it is their turn."""

    def __init__(self) -> None:
        self._raised: dict[int, BaseException] = {}

    def take(self, iterator: Any, count: int) -> tuple[list[Any], bool]:
        if id(iterator) in self._raised:
            raise self._raised.pop(id(iterator))
        items: list[Any] = []
        while len(items) < count:
            try:
                items.append(next(iterator))
            except StopIteration:
                return items, True
            except BaseException as error:
                if not items:
                    raise
                self._raised[id(iterator)] = error
                break
        return items, False


class Candidate(Peer):
    """The side of the generated code."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(incoming, outgoing)
        self._names: dict[str, Any] = {}
        self._printed = sys.stdout = io.StringIO()
        self._taker = Taker()
        self._functions: dict[int, tuple[Any, int]] = {}
        builtins.input = lambda prompt="": self.ask("input", None, str(prompt))  # the tests may have put another there

    def act(self, do: str, of: Any, values: list[Any]) -> Any:
        if do == "define":
            code, shared = values
            self._names = define(code)
            self.shared = {name: self._names[name] for name in shared if isinstance(self._names.get(name), type)}
            kinds = {name: value for name, value in self._names.items() if isinstance(value, type)}
            errors = {name: _bases(kind) for name, kind in kinds.items() if issubclass(kind, BaseException)}
            return list(self._names), list(kinds), errors
        if do == "name":
            return self._names[values[0]]
        if do == "next":
            return self._taker.take(of, *values)
        return DONE[do](of, *values)

    def proxy(self, number: int, kind: str, more: list[Any]) -> Any:
        if kind == "iterator":
            return stream(self, number)
        theirs = Theirs(self, number)
        if kind != "function":
            return theirs
        name, *code = more
        function = _function(name, *code) if code else _calling(theirs, name)
        self._functions[id(function)] = (function, number)
        return function

    def number_of(self, proxy: Any) -> int | None:
        if type(proxy) is Theirs:
            return int(proxy._number)
        return self._functions.get(id(proxy), (None, None))[1]

    def error(self, kinds: list[list[str]], text: str, values: list[Any]) -> BaseException:
        return nearest(kinds, values, {}) or RuntimeError(text)

    def named(self, module: str, name: str) -> Any:
        if not module:
            return super().named(module, name)
        found = importlib.import_module(module)
        return operator.attrgetter(name)(found) if name else found

    def printed(self) -> str:
        text = self._printed.getvalue()
        if text:
            self._printed.seek(0)
            self._printed.truncate()
        return text[:_MAX_PRINTED]


def _operated(of: Any, name: str, value: Any, reflected: bool) -> Any:
    if name not in (*_OPERATORS, *_REFLECTED):
        raise ValueError(name)
    return getattr(operator, name)(*((value, of) if reflected else (of, value)))


# What may be asked of an object.
DONE: dict[str, Callable[..., Any]] = {
    "call": lambda of, args, kwargs: of(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "len": len,
    "item": operator.getitem,
    "put": operator.setitem,
    "bool": bool,
    "str": str,
    "repr": repr,
    "hash": hash,
    "isinstance": lambda of, value: isinstance(value, of),
    "operator": _operated,
    "enter": lambda of: type(of).__enter__(of),
    "exit": lambda of: type(of).__exit__(of, None, None, None),
    "await": lambda of: asyncio.run(_awaited(of)),
}


async def _awaited(value: Any) -> Any:
    return await value


def _calling(theirs: Theirs, name: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        return theirs(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    return function


def _function(name: str, code: str, modules: dict[str, str], defaults: list[Any] | None) -> types.FunctionType:
    """A function of the tests' that needs nothing of theirs."""
    names = {"__builtins__": builtins, **{name: importlib.import_module(module) for name, module in modules.items()}}
    made = types.FunctionType(marshal.loads(bytes.fromhex(code)), names, name)
    made.__defaults__ = tuple(defaults) if defaults is not None else None
    return made


def _bases(kind: type) -> list[list[str]]:
    return [[base.__module__, base.__name__] for base in kind.__mro__]


def exception_type(module: str, name: str, known: dict[str, type[BaseException]]) -> type[BaseException] | None:
    """The built-in or known exception of that name."""
    kind = getattr(builtins, name, None) if module == "builtins" else known.get(name)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def nearest(kinds: list[list[str]], values: list[Any], known: dict[str, type[BaseException]]) -> BaseException | None:
    """An instance of the first of these classes that is an `exception_type` and takes these arguments."""
    for module, name in kinds:
        kind = exception_type(module, name, known)
        if kind is not None:
            try:
                return kind(*values)
            except TypeError:
                continue
    return None


def run_candidate(incoming: int, outgoing: int) -> None:
    """Serve the tests until they are done."""
    try:
        Candidate(incoming, outgoing).serve()
    except EOFError:
        return
