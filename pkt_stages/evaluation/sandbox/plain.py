"""What generated code and its tests exchange: values, and calls in both directions.

A message is JSON. Its values are a flat list of nodes that refer to each other by number, so that depth costs nothing
and two names of one list stay two names of one list. Built-in containers, numbers and texts, the value types of the
standard library, and instances of classes that the benchmark itself defines travel by value; subclasses travel as the
built-in that they derive from, so that no object with an `__eq__` of its own reaches the tests. What a call changed in
its arguments comes back with the answer. Everything else stays where it is and travels as a handle.
"""

from __future__ import annotations

import builtins
import collections
import json
import os
import types
from array import array
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

MAX_MESSAGE = 256 << 20  # bytes
_HEADER_SIZE = 4  # bytes: a message's length, big-endian
_LARGE = 2**53  # integers below it are the same in every reader of JSON

Ref = Any  # a JSON scalar, which is itself, or [number of a node]
Node = list[Any]  # a tag and what belongs to it


class NotPlain(ValueError):
    """A message that is not what `pack` writes, or a value that cannot be sent."""


# Made anew from a few values: type -> those values.
_MADE: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    complex: lambda v: (v.real, v.imag),
    range: lambda v: (v.start, v.stop, v.step),
    slice: lambda v: (v.start, v.stop, v.step),
    Fraction: lambda v: (v.numerator, v.denominator),
    Decimal: lambda v: (str(v),),
    datetime: lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo),
    date: lambda v: (v.year, v.month, v.day),
    time: lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo),
    timedelta: lambda v: (v.days, v.seconds, v.microseconds),
    timezone: lambda v: (v.utcoffset(None),),
    UUID: lambda v: (v.hex,),
    PurePosixPath: lambda v: (str(v),),
}
_MAKERS: dict[str, Any] = {kind.__name__: kind for kind in _MADE}
_DICTS: dict[str, type[dict[Any, Any]]] = {
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MUTABLE = ("list", "set", "bytearray", "deque", "array", "instance", *_DICTS)
_SINGLE = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
# Types whose name says all: no function is among them, and nothing that equals what it is not.
NAMED: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(kind for kind in vars(builtins).values() if isinstance(kind, type)),
        *(type(None), types.FunctionType, *_DICTS.values(), collections.deque, array, *_MADE),
    )
}
# What the values above do by themselves; of any other object these would be its author's word.
THEIR_METHODS = frozenset(
    name
    for kind in (str, bytes, int, float, *_SEQUENCES.values(), *_DICTS.values(), collections.deque, array, *_MADE)
    for name in dir(kind)
    if callable(getattr(kind, name))
)


class Peer:
    """One end of the line: asks the other, answers it, and keeps the objects that the other has handles of.

    Attributes:
        shared: classes that both sides define, by name; their instances travel by value.
    """

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._mine: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.shared: dict[str, Any] = {}

    # What the two ends do differently.

    def act(self, do: str, of: Any, values: list[Any]) -> Any:
        """Do what was asked of an object (None: of this side itself)."""
        raise NotImplementedError

    def proxy(self, number: int, kind: str, more: list[Any]) -> Any:
        """What stands here for the other side's object.

        Args:
            kind: iterator, coroutine, function (its name in `more`, and its `code` if it has some), or object.
        """
        raise NotImplementedError

    def number_of(self, proxy: Any) -> int | None:
        """The other side's number of a proxy; None for anything else."""
        raise NotImplementedError

    def error(self, kinds: list[list[str]], text: str, values: list[Any]) -> BaseException:
        """The exception to raise here for one that was raised there, by its classes, its message and its arguments."""
        raise NotImplementedError

    def named(self, module: str, name: str) -> Any:
        """What the other side calls by a name of the standard library."""
        return NAMED[name]

    def name_of(self, value: Any) -> tuple[str, str] | None:
        """The module and name that the other side will know a type by."""
        known = isinstance(value, type) and NAMED.get(value.__name__) is value
        return ("", value.__name__) if known else None

    def code_of(self, function: types.FunctionType) -> list[Any]:
        """What the other side needs to have a function itself; nothing: it stays here, and is called from there."""
        return []

    def printed(self) -> str:
        """What was printed here since the last answer."""
        return ""

    def show(self, text: str) -> None:
        """Print here what was printed there."""

    # The exchange.

    def ask(self, do: str, of: int | None, *values: Any) -> Any:
        """What the other side answers; meanwhile it may ask in turn.

        Raises:
            NotPlain: the answer is none, or a value cannot be carried.
            BaseException: what was raised there.
        """
        packer = _Packer(self, [])
        refs = [packer.ref(value) for value in values]
        nodes = packer.finish()
        sign = os.urandom(8).hex()  # an answer that was written before its question cannot bear it
        self._send({"do": do, "of": of, "nodes": nodes, "values": refs, "sign": sign})
        while True:
            message = self._receive()
            if "do" not in message:
                break
            self._answer(message)
        if message.get("sign") != sign:
            raise NotPlain("an answer to another question")
        if isinstance(message.get("printed"), str):
            self.show(message["printed"])
        unpacker = _Unpacker(self, message, packer.objects)
        unpacker.write_back(message.get("changed"), nodes)
        if "raised" in message:
            kinds, text = message["raised"], str(message.get("text", ""))
            raise self.error(kinds, text, unpacker.values(message.get("value")))
        return unpacker.values([message.get("value")])[0]

    def serve(self) -> None:
        """Answer until the other side has closed its pipe."""
        while True:
            self._answer(self._receive())

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            answer = self._acted(message)
        except BaseException as error:  # what came cannot be read, or what came out cannot be carried
            answer = {"nodes": [], "value": [], **_raised(error)}
        if text := self.printed():
            answer["printed"] = text
        self._send({"sign": message.get("sign"), **answer})

    def _acted(self, message: dict[str, Any]) -> dict[str, Any]:
        unpacker = _Unpacker(self, message, [])
        values, of = unpacker.values(message["values"]), message["of"]
        packer = _Packer(self, unpacker.objects)
        answer: dict[str, Any] = {}
        try:
            found = self.act(str(message["do"]), None if of is None else self._mine[of], values)
            answer["value"] = packer.ref(found)
        except BaseException as error:
            answer = {"value": [packer.ref(argument) for argument in error.args], **_raised(error)}
        answer["changed"] = packer.changed(message["nodes"])
        answer["nodes"] = packer.finish()
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MAX_MESSAGE:
            raise NotPlain(f"values of {len(body) >> 20} MB, at most {MAX_MESSAGE >> 20} MB can be exchanged")
        send(self._outgoing, body)

    def _receive(self) -> dict[str, Any]:
        body = receive(self._incoming)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise NotPlain(f"no JSON: {error}") from None
        if not isinstance(message, dict):
            raise NotPlain("expected a JSON object")
        return message

    def keep(self, value: Any) -> int:
        """The number under which the other side may ask for an object."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._mine)
            self._mine.append(value)
        return number

    def kept(self, number: int) -> Any:
        return self._mine[number]


def _raised(error: BaseException) -> dict[str, Any]:
    kinds = [[kind.__module__, kind.__name__] for kind in type(error).__mro__]
    return {"raised": kinds, "text": message_of(error)}


def message_of(error: BaseException) -> str:
    """The start of an exception's text; nothing if asking for it fails."""
    try:
        return str(error)[:300]
    except BaseException:
        return ""


class _Packer:
    """Values as nodes. Number n below len(arrived) is the n-th object of the message that is being answered."""

    def __init__(self, peer: Peer, arrived: Sequence[Any]) -> None:
        self.objects = list(arrived)
        self._peer = peer
        self._first = len(arrived)
        self._numbers = {id(value): number for number, value in enumerate(arrived)}
        self._nodes: list[Node] = []

    def ref(self, value: Any) -> Ref:
        kind = type(value)
        if value is None or kind is bool or kind is float or (kind is int and -_LARGE < value < _LARGE):
            return value
        if kind is str and _is_text(value):
            return value
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return [number]

    def finish(self) -> list[Node]:
        """The nodes of all that `ref` was asked for, and of their parts."""
        while self._first + len(self._nodes) < len(self.objects):
            self._nodes.append(self._node(self.objects[self._first + len(self._nodes)]))
        return self._nodes

    def changed(self, nodes: list[Node]) -> dict[str, Node]:
        """The nodes of what arrived as these, where they are others now."""
        found = {}
        for number, before in enumerate(nodes):
            if _tag(before) in _MUTABLE:
                now = self._node(self.objects[number])
                if now != before:
                    found[str(number)] = now
        return found

    def _refs(self, values: Iterable[Any]) -> list[Ref]:
        return [self.ref(value) for value in values]

    def _node(self, value: Any) -> Node:
        number = self._peer.number_of(value)
        if number is not None:
            return ["yours", number]
        kind = type(value)
        name = kind.__name__
        if isinstance(value, type) and (named := self._peer.name_of(value)):
            return ["name", *named]
        if self._peer.shared.get(name) is kind:
            if isinstance(value, Enum):
                return ["member", name, value.name]
            if type(getattr(value, "__dict__", None)) is dict:
                return ["instance", name, list(value.__dict__), self._refs(value.__dict__.values())]
        for base in kind.__mro__:
            if base in _WRITERS:
                return _WRITERS[base](self, value)
        if hasattr(kind, "__next__"):
            return ["mine", self._peer.keep(value), "iterator"]
        if named := self._peer.name_of(value):
            return ["name", *named]
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
            code = self._peer.code_of(value) if isinstance(value, types.FunctionType) else []
            return ["mine", self._peer.keep(value), "function", value.__name__, *code]
        return ["mine", self._peer.keep(value), "coroutine" if isinstance(value, types.CoroutineType) else "object"]

    def items(self, tag: str, values: Any) -> Node:
        return [tag, self._refs(_SEQUENCES[tag].__iter__(values))]

    def ordered(self, tag: str, values: Any) -> Node:
        """A list or tuple; one of numbers alone, or of plain texts, is its own JSON."""
        kinds = {type(value) for value in values} if type(values) is _SEQUENCES[tag] else {object}
        flat = kinds <= {float, bool, type(None)}
        flat = flat or (kinds == {int} and min(values) > -_LARGE and max(values) < _LARGE)
        flat = flat or (kinds == {str} and all(map(str.isascii, values)))
        return [f"{tag}*", values if tag == "list" else list(values)] if flat else self.items(tag, values)

    def tuple_(self, value: tuple[Any, ...]) -> Node:
        fields = getattr(type(value), "_fields", None)
        named = type(fields) is tuple and len(fields) == len(value) and all(type(f) is str for f in fields)
        if named:
            return ["namedtuple", type(value).__name__, list(fields or ()), self._refs(tuple.__iter__(value))]
        return self.ordered("tuple", value)

    def dict_(self, tag: str, value: dict[Any, Any]) -> Node:
        node = [tag, self._refs(dict.keys(value)), self._refs(dict.values(value))]
        return [*node, self.ref(value.default_factory)] if isinstance(value, collections.defaultdict) else node

    def made(self, kind: type, value: Any) -> Node:
        return ["made", kind.__name__, self._refs(_MADE[kind](value))]


def _is_text(value: str) -> bool:
    """Whether JSON keeps it: halves of a surrogate pair might be joined."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _writer(kind: type) -> Callable[[_Packer, Any], Node]:
    return lambda packer, value: packer.made(kind, value)


def _dict_writer(tag: str) -> Callable[[_Packer, Any], Node]:
    return lambda packer, value: packer.dict_(tag, value)


# By the type, or the nearest base of it.
_WRITERS: dict[type, Callable[[_Packer, Any], Node]] = {
    int: lambda p, v: ["int", f"{int.__index__(v):x}"],
    float: lambda p, v: ["float", float.__repr__(v)],
    str: lambda p, v: ["str", str.encode(v, "utf-8", "surrogatepass").hex()],
    bytes: lambda p, v: ["bytes", bytes.hex(v)],
    bytearray: lambda p, v: ["bytearray", bytearray.hex(v)],
    memoryview: lambda p, v: ["bytes", v.tobytes().hex()],
    list: lambda p, v: p.ordered("list", v),
    tuple: lambda p, v: p.tuple_(v),
    set: lambda p, v: p.items("set", v),
    frozenset: lambda p, v: p.items("frozenset", v),
    collections.deque: lambda p, v: ["deque", p._refs(collections.deque.__iter__(v)), v.maxlen],
    array: lambda p, v: ["array", v.typecode, p._refs(array.__iter__(v))],
    type({}.keys()): lambda p, v: ["keys", p._refs(v)],
    type({}.values()): lambda p, v: ["values", p._refs(v)],
    type({}.items()): lambda p, v: ["items", p._refs(k for k, _ in v), p._refs(x for _, x in v)],
    type(Ellipsis): lambda p, v: ["single", "Ellipsis"],
    type(NotImplemented): lambda p, v: ["single", "NotImplemented"],
    **{kind: _dict_writer(tag) for tag, kind in _DICTS.items()},
    **{kind: _writer(kind) for kind in _MADE},
}


def _tag(node: Node) -> str:
    return str(node[0]).rstrip("*")


class _Unpacker:
    """The objects of a message's nodes. Everything else than `pack` writes is NotPlain."""

    def __init__(self, peer: Peer, message: dict[str, Any], arrived: Sequence[Any]) -> None:
        self._peer = peer
        self.objects = list(arrived)
        first = len(self.objects)
        try:
            nodes: list[Node] = message["nodes"]
            self.objects += [_shell(peer, node) if _tag(node) in _MUTABLE else _MISSING for node in nodes]
            for number in range(first, len(self.objects)):
                self._build(number, nodes, first)
            # Instances first: those that are keys may hash what they hold.
            for number in sorted(range(len(nodes)), key=lambda number: nodes[number][0] != "instance"):
                if _tag(nodes[number]) in _MUTABLE:
                    self._fill(self.objects[first + number], nodes[number])
        except NotPlain:
            raise
        except Exception as error:
            raise NotPlain(f"malformed values: {type(error).__name__}: {message_of(error)}") from None

    def values(self, refs: Any) -> list[Any]:
        try:
            return [self._value(ref) for ref in refs]
        except (LookupError, TypeError, ValueError) as error:
            raise NotPlain(f"malformed values: {message_of(error)}") from None

    def write_back(self, changed: Any, before: list[Node]) -> None:
        """Change in place the objects that went with a question, whose nodes were these, as the answer says."""
        try:
            for number, node in (changed or {}).items():
                at = int(number)
                if _tag(before[at]) != _tag(node) or _tag(node) not in _MUTABLE:
                    raise NotPlain("a change of another kind")
                self._fill(self.objects[at], node)
        except NotPlain:
            raise
        except Exception as error:
            raise NotPlain(f"malformed changes: {type(error).__name__}: {message_of(error)}") from None

    def _value(self, ref: Ref) -> Any:
        if type(ref) is not list:
            if type(ref) is dict:
                raise NotPlain("expected a value")
            return ref
        (number,) = ref
        if number < 0 or self.objects[number] is _MISSING:
            raise NotPlain("a value that refers to nothing")
        return self.objects[number]

    def _values(self, refs: list[Ref]) -> list[Any]:
        return [self._value(ref) for ref in refs]

    def _build(self, number: int, nodes: list[Node], first: int) -> None:
        """Make an object that cannot be changed later, and first what it consists of; without recursion."""
        waiting, begun = [number], set()
        while waiting:
            at = waiting[-1]
            if self.objects[at] is not _MISSING:
                waiting.pop()
                continue
            node = nodes[at - first]
            needed = [
                part
                for refs in node[1:]
                if type(refs) is list and not str(node[0]).endswith("*") and node[0] != "mine"
                for ref in refs
                if type(ref) is list
                for part in ref
                if self.objects[part] is _MISSING
            ]
            if not needed:
                self.objects[at] = self._made(node)
            elif at in begun:
                raise NotPlain("a tuple that contains itself")
            begun.add(at)
            waiting += needed

    def _made(self, node: Node) -> Any:
        tag = node[0]
        if tag in ("tuple*", "tuple", "frozenset"):
            return _SEQUENCES[_tag(node)](node[1] if tag == "tuple*" else self._values(node[1]))
        if tag == "made":
            return _MAKERS[node[1]](*self._values(node[2]))
        if tag == "namedtuple":
            values = self._values(node[3])
            _check_data(zip(node[2], values, strict=True))
            return collections.namedtuple(node[1], node[2])(*values)
        if tag == "keys":
            return dict.fromkeys(self._values(node[1])).keys()
        if tag == "values":
            return dict(enumerate(self._values(node[1]))).values()
        if tag == "items":
            return dict(zip(self._values(node[1]), self._values(node[2]), strict=True)).items()
        if tag == "mine":
            return self._peer.proxy(int(node[1]), str(node[2]), node[3:])
        if tag == "yours":
            return self._peer.kept(node[1])
        if tag == "name":
            return self._peer.named(node[1], node[2])
        if tag == "member":
            return self._peer.shared[node[1]][node[2]]
        return _LEAVES[tag](node[1])

    def _fill(self, value: Any, node: Node) -> None:
        tag = _tag(node)
        if tag == "list":
            list.__setitem__(value, slice(None), node[1] if node[0] == "list*" else self._values(node[1]))
        elif tag == "bytearray":
            value[:] = bytes.fromhex(node[1])
        elif tag == "array":
            value[:] = array(value.typecode, self._values(node[2]))
        elif tag == "instance":
            _set_attributes(value, dict(zip(node[2], self._values(node[3]), strict=True)))
        elif tag in ("set", "deque"):
            values = self._values(node[1])
            value.clear()
            (value.update if tag == "set" else value.extend)(values)
        else:
            pairs = list(zip(self._values(node[1]), self._values(node[2]), strict=True))
            value.clear()
            put = (collections.OrderedDict if tag == "OrderedDict" else dict).__setitem__
            for key, item in pairs:
                put(value, key, item)
            if tag == "defaultdict":
                value.default_factory = self._value(node[3])


_MISSING = object()
_EMPTY: dict[str, Callable[[], Any]] = {"list": list, "set": set, "bytearray": bytearray, **_DICTS}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "int": lambda inner: int(inner, 16),
    "float": float,
    "str": lambda inner: bytes.fromhex(inner).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
    "single": lambda inner: _SINGLE[inner],
}


def _shell(peer: Peer, node: Node) -> Any:
    """An object that can be filled later."""
    tag = _tag(node)
    if tag == "instance":
        return object.__new__(peer.shared[node[1]])
    if tag == "deque":
        return collections.deque(maxlen=node[2])
    if tag == "array":
        return array(node[1])
    return _EMPTY[tag]()


def _set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    _check_data(attributes.items())
    for name in attributes:
        check_settable(value, name)
    value.__dict__.clear()
    value.__dict__.update(attributes)


def check_settable(value: Any, name: str) -> None:
    """Raise NotPlain unless it is data of an instance: what its class does stays the class's."""
    its = getattr(type(value), name, None)
    if isinstance(value, type) or callable(its) or hasattr(type(its), "__get__"):
        raise NotPlain(f"{name} is no data of a {type(value).__name__}")


def _check_data(attributes: Iterable[tuple[str, Any]]) -> None:
    for name, value in attributes:
        if callable(value) and name in THEIR_METHODS:
            raise NotPlain(f"{name} is no data")


def read_exactly(pipe: int, size: int) -> bytes:
    """That many bytes from a pipe.

    Raises:
        EOFError: the other side has closed it.
    """
    parts = []
    while size:
        part = os.read(pipe, min(size, 1 << 20))
        if not part:
            raise EOFError("the other process ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(pipe: int) -> bytes:
    """The body of the next message on a pipe."""
    size = int.from_bytes(read_exactly(pipe, _HEADER_SIZE), "big")
    if size > MAX_MESSAGE:
        raise NotPlain(f"values of {size >> 20} MB, at most {MAX_MESSAGE >> 20} MB can be exchanged")
    return read_exactly(pipe, size)


def framed(body: bytes) -> bytes:
    """A message with its length in front."""
    return len(body).to_bytes(_HEADER_SIZE, "big") + body


def unframed(told: bytes) -> bytes | None:
    """The body of the first message, when all of it is there."""
    size = int.from_bytes(told[:_HEADER_SIZE], "big")
    end = _HEADER_SIZE + size
    return told[_HEADER_SIZE:end] if len(told) >= end else None


def send(pipe: int, body: bytes) -> None:
    """Write a message."""
    view = memoryview(framed(body))
    while view:
        view = view[os.write(pipe, view) :]
