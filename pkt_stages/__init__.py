"""Parametric knowledge transfer between language models, as stages; and its results from Python.

What `__all__` names is the public interface (docs/using.md). Nothing is imported before it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkt_stages.errors import UserError
    from pkt_stages.interface import LoadedDelta, load_delta, merge, read_predictions, read_scores

__all__ = ["LoadedDelta", "UserError", "load_delta", "merge", "read_predictions", "read_scores"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pkt_stages import errors, interface

    return errors.UserError if name == "UserError" else getattr(interface, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
