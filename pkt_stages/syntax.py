"""A module's definitions as text that every version of Python reads alike, with the names that each of them uses.

Only what an output can depend on is read: no layout, comments, docstrings or help texts, no words of a UserError, and
no imports; what a name stands for is looked up by who asks (reach.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pkt_stages.errors import UserError


class Imported(NamedTuple):
    """What an import brings: a module, or a name of it."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Use:
    """A name that is used, and is no variable of the code itself.

    Attributes:
        dotted: `a.b.c`, in parts.
        imported: what the first part is, if a function imports it itself; else it is a name of the module's top level.
    """

    dotted: tuple[str, ...]
    imported: tuple[Imported, ...] = ()


@dataclass
class Module:
    """A module's top level.

    Attributes:
        package: in whose folder it lies.
        definitions: the statements that make a name.
        imports: what a name may stand for, if it is imported.
        loose: the statements that do something else than make names.
    """

    name: str
    package: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Imported]] = field(default_factory=dict)
    loose: list[ast.stmt] = field(default_factory=list)


def parse(source: bytes, name: str, package: str) -> Module:
    """Sort a module's statements.

    Raises:
        SyntaxError, ValueError: it is no Python. UserError: it imports `*`.
    """
    module = Module(name, package)
    for statement in _running(ast.parse(source).body):
        for inside in _same_scope(statement):
            if isinstance(inside, (ast.Import, ast.ImportFrom)):
                for imported, what in _imports(inside, package):
                    if imported == "*":
                        raise UserError(f"{name}: `from {what.module} import *` hides what it brings; name that")
                    module.imports.setdefault(imported, []).append(what)
            elif isinstance(inside, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                module.definitions.setdefault(inside.name, []).append(statement)
            elif isinstance(inside, ast.Name) and not isinstance(inside.ctx, ast.Load):
                module.definitions.setdefault(inside.id, []).append(statement)
        if not _only_names(statement):
            module.loose.append(statement)
    return module


def read(statements: Sequence[ast.stmt], package: str) -> tuple[str, list[Use], list[str]]:
    """What statements of a module's top level say.

    Args:
        package: in whose folder the module lies.

    Returns:
        their text; what they use, in order; and the string constants in them.
    """
    reader = _Reader(package)
    for statement in statements:
        reader.visit(statement)
    return "".join(reader.text), reader.uses(), reader.constants


def _running(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run: neither bare texts nor what is for type checkers."""
    for statement in body:
        if isinstance(statement, ast.If) and _dotted(statement.test)[-1:] == ("TYPE_CHECKING",):
            yield from _running(statement.orelse)
        elif not _is_text(statement):
            yield statement


def _same_scope(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those in it, without what functions, classes and comprehensions keep to themselves."""
    yield node
    own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp)
    if not isinstance(node, (*own, ast.GeneratorExp, ast.Lambda)):
        for inside in ast.iter_child_nodes(node):
            yield from _same_scope(inside)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _only_names(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but make names."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    else:
        named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
        return isinstance(statement, named)
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return all(isinstance(part, ast.Name) for part in parts)


def _dotted(node: ast.AST) -> tuple[str, ...]:
    """The parts of `a.b.c`; empty for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, Imported]]:
    """The names that an import binds, and what they stand for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first = alias.name.partition(".")[0]
            yield alias.asname or first, Imported(alias.name if alias.asname else first, None)
        return
    module = node.module or ""
    if node.level:
        above = package.split(".")
        module = ".".join([*above[: len(above) - node.level + 1], *([module] if module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, Imported(module, alias.name)


def _flat(node: ast.JoinedStr) -> Iterator[ast.expr]:
    """An f-string's values, and the text between them where there is any."""
    for part in node.values:
        if isinstance(part, ast.JoinedStr):
            yield from _flat(part)
        elif not isinstance(part, ast.Constant) or part.value:
            yield part


@dataclass
class _Scope:
    """The names that a function, a class or a comprehension binds.

    Attributes:
        names: what they stand for, if they are imported.
        elsewhere: names that it declares global or nonlocal.
    """

    kind: str
    names: dict[str, list[Imported]] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether a name in it is its own. A method does not see its class's names, but a class's imports count."""
        return name in self.names and name not in self.elsewhere and (self.kind != "class" or bool(self.names[name]))


class _Reader:
    """Reads a module's statements, node by node; `visit_Name` reads a `Name`, `_fields` what has no such method."""

    def __init__(self, package: str) -> None:
        self.text: list[str] = []
        self.constants: list[str] = []
        self._package = package
        self._scopes: tuple[_Scope, ...] = ()
        self._used: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[_Scope, ...]] = {}

    def uses(self) -> list[Use]:
        """In the end, when all that functions bind is known."""
        found: dict[Use, None] = {}
        for (dotted, _), scopes in self._used.items():
            own = next((scope.names[dotted[0]] for scope in reversed(scopes) if scope.has(dotted[0])), None)
            if own is None or own:
                found[Use(dotted, tuple(own or ()))] = None
        return list(found)

    def visit(self, node: ast.AST) -> None:
        getattr(self, f"visit_{type(node).__name__}", self._fields)(node)

    def _fields(self, node: ast.AST, scope: _Scope | None = None) -> None:
        """Read all that a node has. Empty fields do not count: Python's versions differ in them.

        Args:
            scope: of its `body`.
        """
        self.text.append(f"({type(node).__name__}")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or name in ("ctx", "type_comment", "kind"):
                continue
            outer = self._scopes
            if scope is not None and name == "body":
                self._scopes = (*outer, scope)
            self.text.append(f" {name}=")
            for part in value if isinstance(value, list) else [value]:
                before = len(self.text)
                if isinstance(part, ast.AST):
                    self.visit(part)
                elif part is None:
                    self.text.append("-")  # no default, or `**` among a dict's keys; None itself is a node
                else:
                    self._value(part)
                if len(self.text) > before:
                    self.text.append(",")
            self._scopes = outer
        self.text.append(")")

    def _value(self, value: Any) -> None:
        self.text.append(f"{type(value).__name__} {value!a}")  # which characters are printable depends on the version

    def _use(self, dotted: tuple[str, ...]) -> None:
        self.text.append(".".join(dotted))
        self._used[dotted, tuple(map(id, self._scopes))] = self._scopes

    def _bind(self, name: str | None, *imported: Imported, kinds: Sequence[str] = ()) -> None:
        """Note a name of the innermost scope (of these kinds)."""
        for scope in reversed(self._scopes):
            if name is not None and (not kinds or scope.kind in kinds):
                scope.names.setdefault(name, []).extend(imported)
                return

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._bind(node.id)
            if self._scopes and self._scopes[-1].kind == "class":
                self.text.append(node.id)
                return
        self._use((node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := _dotted(node):
            self._use(dotted)
        else:
            self._fields(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        """Bound in the function around a comprehension."""
        self._bind(node.target.id, kinds=("function", "class"))
        self.text.append(f"({node.target.id} := ")
        self.visit(node.value)
        self.text.append(")")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._bind(node.name)
        self._fields(node, self._arguments(node.args))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._fields(node, self._arguments(node.args))

    def _arguments(self, arguments: ast.arguments) -> _Scope:
        groups = arguments.posonlyargs, arguments.args, arguments.kwonlyargs, [arguments.vararg, arguments.kwarg]
        return _Scope("function", {one.arg: [] for group in groups for one in group if one is not None})

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._bind(node.name)
        self._fields(node, _Scope("class"))

    def _comprehension_of(self, node: Any) -> None:
        """The first `in` is read outside, the rest inside."""
        self.text.append(f"({type(node).__name__} ")
        outer, inner = self._scopes, (*self._scopes, _Scope("comprehension"))
        for place, generator in enumerate(node.generators):
            self._scopes = inner if place else outer
            self.visit(generator.iter)
            self._scopes = inner
            self.text.append(f" {generator.is_async} ")
            self.visit(generator.target)
            for condition in generator.ifs:
                self.text.append(" if ")
                self.visit(condition)
            self.text.append(";")
        for part in ("elt", "key", "value"):
            if (element := getattr(node, part, None)) is not None:
                self.visit(element)
                self.text.append(",")
        self._scopes = outer
        self.text.append(")")

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension_of

    def visit_ExceptHandler(self, node: ast.ExceptHandler | ast.MatchAs | ast.MatchStar) -> None:
        self._bind(node.name)
        self._fields(node)

    visit_MatchAs = visit_MatchStar = visit_ExceptHandler

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self._bind(node.rest)
        self._fields(node)

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> None:
        for scope in self._scopes[-1:]:
            scope.elsewhere.update(node.names)
        self._fields(node)

    visit_Nonlocal = visit_Global

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        """No text, as the order does not count. Importing another package may do something, used or not."""
        for name, what in _imports(node, self._package):
            self._bind(name, what)
            if what.module.partition(".")[0] != self._package.partition(".")[0]:
                self._used[(name,), (id(node),)] = (_Scope("function", {name: [what]}),)

    visit_ImportFrom = visit_Import

    def visit_Expr(self, node: ast.Expr) -> None:
        if not _is_text(node):
            self._fields(node)

    def visit_If(self, node: ast.If) -> None:
        running = list(_running([node]))
        if running == [node]:
            self._fields(node)
        else:
            for statement in running:
                self.visit(statement)

    def visit_Raise(self, node: ast.Raise) -> None:
        """A UserError's words are left out."""
        if isinstance(node.exc, ast.Call) and _dotted(node.exc.func)[-1:] == ("UserError",):
            node = ast.Raise(exc=node.exc.func, cause=node.cause)
        self._fields(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Help texts are left out."""
        args, keywords = node.args, node.keywords
        dotted = _dotted(node.func)
        if dotted in (("option",), ("params", "option"), ("options", "option")):
            args = args[:1] + args[2:]
        elif dotted not in (("typer", "Option"), ("typer", "Argument")):
            self._fields(node)
            return
        keywords = [keyword for keyword in keywords if keyword.arg != "help"]
        self._fields(ast.Call(func=node.func, args=args, keywords=keywords))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.constants.append(node.value)
        self._value(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """An f-string. Python's versions differ in how they cut the text between the values."""
        self.text.append("(JoinedStr ")
        literal = ""
        for part in [*_flat(node), None]:
            if isinstance(part, ast.Constant):
                literal += str(part.value)
                continue
            if literal:
                self._value(literal)
                literal = ""
            if isinstance(part, ast.FormattedValue):
                self.text.append(f"{{{part.conversion} ")
                self.visit(part.value)
                if isinstance(part.format_spec, ast.JoinedStr) and any(_flat(part.format_spec)):
                    self.visit(part.format_spec)
                self.text.append("}")
        self.text.append(")")
