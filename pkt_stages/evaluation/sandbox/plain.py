"""Plain data as JSON: the only thing that generated code and its checker exchange. Standard library only.

Tuples, sets, dicts, bytes, complex numbers, ranges, non-finite floats and iterators are tagged; subclasses travel as
the built-in they derive from, so that an object with its own `__eq__` never reaches the checker. What is not plain
data stays where it is and travels as a handle.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_ITEMS = 100_000  # taken from an iterator
HEADER = struct.Struct(">I")

_SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}


class NotPlain(ValueError):
    """A message that is not what `encode` writes."""


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """`value` as what JSON can hold; `handle` numbers the objects that are not plain data."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -(2**53) < number < 2**53 else {"int": format(number, "x")}
    if isinstance(value, float):
        number = float.__float__(value)
        return number if number - number == 0 else {"float": float.__repr__(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, handle) for item in list.__iter__(value)]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {tag: [encode(item, handle) for item in kind.__iter__(value)]}  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {"dict": [[encode(k, handle), encode(v, handle)] for k, v in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, handle), encode(value.imag, handle)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if hasattr(type(value), "__next__"):
        items = []
        for item in value:
            items.append(encode(item, handle))
            if len(items) > MAX_ITEMS:
                raise OverflowError(f"an iterator of more than {MAX_ITEMS} items")
        return {"iterator": items}
    return {"object": handle(value)}


def decode(value: Any, handle: Callable[[int], Any]) -> Any:
    """The reverse of `encode`; `handle` gives the object of a number.

    Raises:
        NotPlain: anything that `encode` does not write.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, handle) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise NotPlain("expected plain data")
    ((tag, inner),) = value.items()
    try:
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](decode(item, handle) for item in inner)
        return _DECODERS[tag](inner, handle)
    except (KeyError, TypeError, ValueError) as error:
        raise NotPlain(f"malformed {tag!r}: {error}") from None


_DECODERS: Mapping[str, Callable[[Any, Callable[[int], Any]], Any]] = {
    "int": lambda inner, _: int(inner, 16),
    "float": lambda inner, _: {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[inner],
    "dict": lambda inner, handle: {decode(k, handle): decode(v, handle) for k, v in inner},
    "bytes": lambda inner, _: bytes.fromhex(inner),
    "complex": lambda inner, handle: complex(*(decode(part, handle) for part in inner)),
    "range": lambda inner, _: range(*inner),
    "iterator": lambda inner, handle: iter([decode(item, handle) for item in inner]),
    "object": lambda inner, handle: handle(inner),
}


def pack(message: Mapping[str, Any]) -> bytes:
    """A message with its length in front."""
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def unpack(body: bytes) -> dict[str, Any]:
    """A message's body as a mapping.

    Raises:
        NotPlain: it is not a JSON object.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NotPlain(str(error)) from None
    if not isinstance(message, dict):
        raise NotPlain("expected a JSON object")
    return message


def read_exactly(pipe: int, size: int) -> bytes:
    """That many bytes from a pipe; the process ends when the other side has closed it."""
    parts = []
    while size:
        part = os.read(pipe, min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(pipe: int) -> bytes:
    """The body of the next message on a pipe."""
    return read_exactly(pipe, HEADER.unpack(read_exactly(pipe, HEADER.size))[0])


def send(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def take_over_stdio() -> tuple[int, int]:
    """Keep stdin and stdout as private pipes; what the code reads is empty, and what it prints leads nowhere."""
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return requests, answers
