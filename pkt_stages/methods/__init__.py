"""Methods that have code of their own, one file each; `code: <file>` in a method's entry of `made_by` names it.

A file holds a frozen dataclass `Params` and plain functions: for `pkt derive` a `derive(inputs, params)`; for
`pkt align` and `pkt inject` `mapping`, `source_rows` and `place`, as laten.py has them and says what they are given.
A `check(source, target, params)`, where there is one, raises UserError if the two models' sizes do not go with it;
`pkt check` calls it before anything runs. Nothing lists the files.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from pkt_stages.errors import UserError, meant


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


def load(name: str, functions: Sequence[str]) -> ModuleType:
    """The module of a file of this folder.

    Raises:
        UserError: there is none, or it lacks `Params` or one of the functions.
    """
    if name not in names():
        found = f"found {', '.join(names())}"
        raise UserError(f"code {name!r}: no such file in pkt_stages/methods{meant(name, names())}; {found}")
    module = importlib.import_module(f"{__name__}.{name}")
    if missing := [part for part in ("Params", *functions) if not hasattr(module, part)]:
        raise UserError(
            f"code {name!r}: pkt_stages/methods/{name}.py has no `{missing[0]}`;"
            " it is for another command, or not whole"
        )
    return module
