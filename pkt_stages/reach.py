"""What code a command can reach, read from the syntax alone: nothing is imported, nothing runs.

The unit is a definition at a module's top level (a function, a class, an assignment). It reaches the definitions whose
names it uses, through imports at the top or inside functions, `module.name` and re-exports. From there on:

- A module's statements that define nothing (a call, an `if`, a loop), those of the packages around it, and the files in
  its folder that are no Python belong to each of its definitions.
- A module is reached as a whole where it is used as a value, where a text names it (`python -m`), and where one of its
  own definitions uses `globals`; and all modules of a folder are, where one of them uses `__file__`.
- What only `TYPE_CHECKING` imports is not there when code runs, and reaches nothing.
- Other packages are not followed.

docs/decisions/009-code-hashes.md says why, and what it cannot see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pkt_stages import syntax
from pkt_stages.errors import UserError

# Definitions that shape no output, whatever they do; the only list. Their names count, their code does not.
SHAPES_NOTHING = (
    "errors.UserError",  # words for the user
    "options.Stopwatch",  # a stage's line on the terminal
    "progress.track",  # bars on the terminal
    "scratch.fingerprint",  # the name of an unfinished run's folder
)
LOOSE = ""  # in place of a definition's name: a module's statements that define nothing
WHOLE = "*"  # all of a module


class Node(NamedTuple):
    """A definition, by its module and name; or LOOSE, WHOLE, or `/file` for a file beside the module.

    What is not followed has no module, and is called by its full name.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.name or '(statements)'}"


class Part(NamedTuple):
    """What a node says.

    Attributes:
        text: a hash of it.
        names: what the names in it stand for, sorted by name as it is written.
    """

    text: str
    names: list[tuple[str, list[Node]]]


class Package:
    """A Python package as text.

    Args:
        folder: of the package; its name is the package's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.name = folder, folder.name
        self._paths: dict[str, Path] = {}
        self._homes: dict[str, str] = {}  # of a module: the package in whose folder it lies
        for path in sorted(folder.rglob("*.py")):
            home = self._dotted(path.parent)
            name = home if path.name == "__init__.py" else f"{home}.{path.stem}"
            self._paths[name], self._homes[name] = path, home
        # What is no Python, by package and by name in its folder. Folders without Python count to the one above.
        self._files: dict[str, dict[str, Path]] = {home: {} for home in self._homes.values()}
        for path in sorted(folder.rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
            if path.suffix != ".py" and not hidden and path.is_file():
                above = next(above for above in path.parents if self._dotted(above) in self._files)
                self._files[self._dotted(above)][path.relative_to(above).as_posix()] = path
        self._modules: dict[str, syntax.Module] = {}
        self._parts: dict[Node, Part] = {}

    def _dotted(self, folder: Path) -> str:
        return ".".join((self.name, *folder.relative_to(self._folder).parts))

    def modules(self, package: str) -> list[str]:
        """The modules of a package in this one, itself first; none if there is no such package."""
        return sorted(name for name in self._paths if name == package or name.startswith(f"{package}."))

    def packages(self, package: str) -> list[str]:
        """The packages that are directly in a package."""
        return sorted(name for name in self._files if name.rpartition(".")[0] == package)

    def beside(self, file: Path) -> Node:
        """A file that is no part of the package, as a root."""
        self._files.setdefault("", {})[file.as_posix()] = file
        return Node("", f"/{file.as_posix()}")

    def names(self, module: str) -> set[str]:
        """What a module defines or imports.

        Raises:
            UserError: there is no such module, or it is no Python.
        """
        found = self._module(module)
        return {*found.definitions, *found.imports}

    def reach(self, roots: Sequence[Node]) -> dict[Node, Node | None]:
        """What the roots reach, nearest first, each with the first that leads to it.

        Raises:
            UserError: a module that is reached is missing or no Python.
        """
        first: dict[Node, Node | None] = dict.fromkeys(roots)
        queue = list(first)
        for node in queue:  # which grows
            for _, targets in self._part(node).names:
                for target in targets:
                    if target.module and target not in first:
                        first[target] = node
                        queue.append(target)
        return first

    def digest(self, roots: Sequence[Node]) -> str:
        """SHA-256 of the code that the roots reach, hexadecimal.

        It goes over the texts and over what each name in them stands for. These are numbered as they are met, so that
        it does not count in which module they are.

        Raises:
            UserError: a module that is reached is missing or no Python.
        """
        number = {node: place for place, node in enumerate(self.reach(roots))}
        total = hashlib.sha256()
        for node in number:
            text, names = self._part(node)
            known = [(name, [number.get(target, target.name) for target in targets]) for name, targets in names]
            total.update(f"{text} {known}\n".encode())
        return total.hexdigest()

    def _part(self, node: Node) -> Part:
        if node not in self._parts:
            self._parts[node] = self._read(node)
        return self._parts[node]

    def _read(self, node: Node) -> Part:
        if node.name.startswith("/"):
            return Part(hashlib.sha256(self._files[node.module][node.name[1:]].read_bytes()).hexdigest(), [])
        module = self._module(node.module)
        if node.name == WHOLE:
            found = [(name, self._lookup(module.name, name)) for name in sorted(self.names(module.name))]
            # An imported definition can be taken from here; an imported module is used here, or not at all.
            inside = [(name, [one for one in nodes if one.module and one.name != WHOLE]) for name, nodes in found]
            return Part(WHOLE, [*inside, *self._around(module)])
        statements = module.loose if node.name == LOOSE else module.definitions[node.name]
        text, uses, constants = syntax.read(statements, module.package)
        names: dict[str, list[Node]] = {}
        for use in uses:
            name, targets = self._stand_for(module.name, use)
            names[name] = [*names.get(name, ()), *targets]
        for constant in constants:
            if constant in self._paths:
                names[repr(constant)] = [Node(constant, WHOLE)]
        around = self._around(module) if node.name != LOOSE else []
        known = sorted((name, list(dict.fromkeys(targets))) for name, targets in names.items() if targets)
        return Part(hashlib.sha256(text.encode()).hexdigest(), [*known, *around])

    def _around(self, module: syntax.Module) -> list[tuple[str, list[Node]]]:
        """What belongs to each definition of a module."""
        parts = module.name.split(".")
        above = [".".join(parts[: n + 1]) for n in range(len(parts))]
        loose = [Node(name, LOOSE) for name in above if name in self._paths and self._module(name).loose]
        files = [(f"/{name}", [Node(module.package, f"/{name}")]) for name in self._files.get(module.package, ())]
        return [(LOOSE, loose), *files]

    def _stand_for(self, module: str, use: syntax.Use) -> tuple[str, list[Node]]:
        """What a name that is used in a module stands for, and what to call it: of other packages no more is known."""
        name, *attributes = use.dotted
        if use.imported:
            nodes = [node for what in use.imported for node in self._imported(what)]
        else:
            nodes = self._lookup(module, name) or self._special(module, name)
        nodes = self._follow(nodes, attributes)
        return ".".join(use.dotted) if any(node.module for node in nodes) else name, nodes

    def _lookup(self, module: str, name: str) -> list[Node]:
        """What a name at a module's top level stands for; nothing if there is no such name."""
        found, nodes = self._module(module), []
        if name in found.definitions:
            short = f"{module}.{name}".removeprefix(f"{self.name}.")
            nodes.append(Node("", short) if short in SHAPES_NOTHING else Node(module, name))
        return nodes + [node for what in found.imports.get(name, ()) for node in self._imported(what)]

    def _special(self, module: str, name: str) -> list[Node]:
        """What the names stand for by which code looks at its own module."""
        if name == "__file__":
            return [Node(one, WHOLE) for one, home in self._homes.items() if home == self._homes[module]]
        if name == "globals":
            return [Node(module, WHOLE)]
        return [Node("", module)] if name in ("__name__", "__package__", "__path__", "__spec__") else []

    def _imported(self, what: syntax.Imported) -> list[Node]:
        """What an import brings; UserError for a module of this package that is not there."""
        if what.module.partition(".")[0] != self.name:
            return [Node("", what.module if what.name is None else f"{what.module}.{what.name}")]
        return self._follow([Node(self._module(what.module).name, WHOLE)], [what.name] if what.name is not None else [])

    def _follow(self, nodes: Iterable[Node], attributes: Sequence[str]) -> list[Node]:
        """What attributes of modules stand for; a module as a whole where nothing of it has that name."""
        found: list[Node] = []
        for node in nodes:
            if not node.module or node.name != WHOLE or not attributes:
                found.append(node)
            elif inside := self._lookup(node.module, attributes[0]):
                found += self._follow(inside, attributes[1:])
            elif (below := f"{node.module}.{attributes[0]}") in self._paths:
                found += self._follow([Node(below, WHOLE)], attributes[1:])
            else:
                found.append(node)
        return found

    def _module(self, name: str) -> syntax.Module:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> syntax.Module:
        if name not in self._paths:
            if self.modules(name):
                return syntax.Module(name, name)  # a folder without __init__.py is a package all the same
            raise UserError(f"{name}: code imports this module, and there is none; mend the import, or add the file")
        path = self._paths[name]
        try:
            return syntax.parse(path.read_bytes(), name, self._homes[name])
        except (SyntaxError, ValueError) as error:
            where = path.relative_to(self._folder.parent).as_posix()
            line = f", line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f": {error}"
            raise UserError(f"{where}{line}; no valid Python") from None
