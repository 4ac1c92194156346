"""The one exception type whose message is meant for the user, and how text and values from files are shown."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

SHOWN = 200  # characters of a value from a file


def printable(text: str) -> str:
    """One line of text: a line break or a terminal's control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """A value from a file for a message, cut short: a few aliases in YAML can stand for billions of entries."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        text = short.repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        text = f"a {type(value).__name__} with too many digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def meant(name: object, known: Iterable[str]) -> str:
    """What a wrong name was most likely meant to be, for a message: ` (did you mean 'rate'?)`, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class UserError(Exception):
    """Bad input, explained in one line: what, where, expected, found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names from files stand in messages
