"""Plain data as JSON: the only thing that generated code and its checker exchange.

Tuples, sets, dicts, bytes, complex numbers, ranges, non-finite floats and iterators are tagged; subclasses travel as
the built-in they derive from, so that an object with its own `__eq__` never reaches the checker. What is not plain
data stays where it is and travels as a handle. This module imports next to nothing, because a sandboxed interpreter
starts with it for every sample; that is why it writes JSON itself (printable ASCII without escapes).
"""

import posix  # what os is made of; os itself would be a tenth of the start

TYPE_CHECKING = False  # typing would cost as much time as the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_ITEMS = 100_000  # taken from an iterator
HEADER_SIZE = 4  # bytes: a message's length, big-endian

_SEQUENCES: "dict[str, type]" = {"tuple": tuple, "set": set, "frozenset": frozenset}


class NotPlain(ValueError):
    """A message that is not what `encode` writes, or a value that cannot be sent."""


def encode(value: "Any", handle: "Callable[[Any], int]") -> str:
    """`value` as JSON text; `handle` numbers the objects that are not plain data."""
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, int):
        number = int.__index__(value)
        return str(number) if -(2**53) < number < 2**53 else f'{{"int":"{number:x}"}}'
    if isinstance(value, float):
        shown = float.__repr__(value)
        return shown if shown[-1] not in "nf" else f'{{"float":"{shown}"}}'
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, list):
        return _items(list.__iter__(value), handle)
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return f'{{"{tag}":{_items(kind.__iter__(value), handle)}}}'  # type: ignore[attr-defined]
    if isinstance(value, dict):
        pairs = (f"[{encode(k, handle)},{encode(v, handle)}]" for k, v in dict.items(value))
        return f'{{"dict":[{",".join(pairs)}]}}'
    if isinstance(value, (bytes, bytearray)):
        return f'{{"bytes":"{bytes(value).hex()}"}}'
    if isinstance(value, complex):
        return f'{{"complex":{_items((value.real, value.imag), handle)}}}'
    if isinstance(value, range):
        return f'{{"range":{_items((value.start, value.stop, value.step), handle)}}}'
    if hasattr(type(value), "__next__"):
        return f'{{"iterator":{_items(_first(value), handle)}}}'
    return f'{{"object":{handle(value)}}}'


def _text(value: str) -> str:
    if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    return f'{{"text":"{value.encode("utf-8", "surrogatepass").hex()}"}}'


def _items(values: "Any", handle: "Callable[[Any], int]") -> str:
    return f"[{','.join([encode(item, handle) for item in values])}]"


def _first(iterator: "Any") -> "Any":
    for taken, item in enumerate(iterator):
        if taken == MAX_ITEMS:
            raise OverflowError(f"an iterator of more than {MAX_ITEMS} items")
        yield item


def decode(value: "Any", handle: "Callable[[int], Any]") -> "Any":
    """The value whose JSON, read, is `value`; `handle` gives the object of a number.

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
            return _SEQUENCES[tag]([decode(item, handle) for item in inner])
        return _DECODERS[tag](inner, handle)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotPlain(f"malformed {tag!r}: {error}") from None


_DECODERS: "dict[str, Callable[[Any, Callable[[int], Any]], Any]]" = {
    "int": lambda inner, _: int(inner, 16),
    "float": lambda inner, _: {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[inner],
    "text": lambda inner, _: bytes.fromhex(inner).decode("utf-8", "surrogatepass"),
    "dict": lambda inner, handle: {decode(k, handle): decode(v, handle) for k, v in inner},
    "bytes": lambda inner, _: bytes.fromhex(inner),
    "complex": lambda inner, handle: complex(*[decode(part, handle) for part in inner]),
    "range": lambda inner, handle: range(*[decode(part, handle) for part in inner]),
    "iterator": lambda inner, handle: iter([decode(item, handle) for item in inner]),
    "object": lambda inner, handle: handle(inner),
}


def read_exactly(pipe: int, size: int) -> bytes:
    """That many bytes from a pipe; the process ends when the other side has closed it."""
    parts = []
    while size:
        part = posix.read(pipe, min(size, 1 << 20))
        if not part:
            posix._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(pipe: int) -> bytes:
    """The body of the next message on a pipe."""
    return read_exactly(pipe, int.from_bytes(read_exactly(pipe, HEADER_SIZE), "big"))


def send(pipe: int, body: bytes) -> None:
    """Write a message, its length in front."""
    view = memoryview(len(body).to_bytes(HEADER_SIZE, "big") + body)
    while view:
        view = view[posix.write(pipe, view) :]


def take_over_stdio() -> "tuple[int, int]":
    """Keep stdin and stdout as private pipes; what the code reads is empty, and what it prints leads nowhere."""
    requests, answers = posix.dup(0), posix.dup(1)
    posix.dup2(2, 1)
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    return requests, answers
