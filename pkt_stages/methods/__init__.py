"""Methods that have code of their own, one file each; `code: <file>` in a method's entry of `made_by` names it.

A file holds a frozen dataclass `Params` and plain functions. `pkt derive` calls `derive(inputs, params)`; `pkt align`
and `pkt inject` call `mapping(...)` and, for a selection of its own, `source_rows(...)` and `target_neurons(...)`
(see laten.py). Nothing lists the files.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from pkt_stages.errors import UserError


@dataclass(frozen=True)
class Method:
    """A method's code with its settings.

    Attributes:
        name: of the file.
        code: the module.
        settings: an instance of its `Params`.
    """

    name: str
    code: ModuleType
    settings: Any

    def facts(self) -> dict[str, Any]:
        """As JSON values, for metadata."""
        return {"code": self.name, **asdict(self.settings)}


def names() -> list[str]:
    """The files that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, function: str) -> ModuleType:
    """The module of a file of this folder.

    Raises:
        UserError: there is none, or it lacks `Params` or the function.
    """
    if name not in names():
        raise UserError(f"code {name!r}: no such file in pkt_stages/methods; found {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    if missing := [part for part in ("Params", function) if not hasattr(module, part)]:
        raise UserError(
            f"code {name!r}: pkt_stages/methods/{name}.py has no `{missing[0]}`, so it is for another command"
        )
    return module
