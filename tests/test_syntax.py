"""Definitions as text: the same on every Python, the same after an edit that no output can depend on."""

from __future__ import annotations

import ast
import hashlib

import pytest

from pkt_stages import syntax
from pkt_stages.errors import UserError

# Whatever Python's versions have read differently, or print differently.
SAMPLE = r'''
"""Words."""
import os.path as p, json
from collections.abc import Sequence
LIMIT: int = 10**6 + 0x1F
NAMES = ("a" "b", u"c", b"\x00\xff", "é\U0001fae8\u2028", r"\d", 1e-5, 2j, ..., None, True, -0.0)
first, *rest = NAMES
async def f(a, /, b: int = 1, *args, c=[x for x in range(3) if x], **kwargs) -> None:
    """Words."""
    global LIMIT
    LIMIT += 1
    async with a as b, c:
        await b
    try:
        pass
    except (ValueError, OSError) as error:
        raise KeyError from error
    else:
        return {**kwargs, "k": {*args}, "l": {k: v for k, v in kwargs.items()}}
    finally:
        del a
@f(1, *NAMES, key=2, **{})
class C(dict, metaclass=type):
    """Words."""
    x: "int"
    def g(self, y=lambda z, *w: z if w else not self):
        nonlocal_ = f"{y!r:>{self.x}}{{}}" f"b" "c" f"{y=}{y:}{y:.2f}é" f"""{
            y}"""
        assert (n := len(nonlocal_)) > 1 <= 2, f"{n:05d}"
        match y:
            case [1, *others] | {"k": others, **others} if n:
                yield from others
            case C(x=0 as others) | "s" | None:
                yield
        while y[1:2, ::3].z[...]:
            break
        else:
            continue_ = not (y or n and -n @ n // n ** ~n)
'''
TEXT = "de29aebb70bbc2ed57ac61a7cc3a9db391fd709527f6ce08a82a1395c7c06fdd"


def said(source: str) -> str:
    """The text of a module's only definition."""
    module = syntax.parse(source.encode(), "pkt.a", "pkt")
    (name,) = module.definitions
    return syntax.read(module.definitions[name], "pkt")[0]


def uses(source: str, name: str = "f") -> set[str]:
    """What a definition uses of what is outside of it."""
    module = syntax.parse(source.encode(), "pkt.a", "pkt")
    return {
        ".".join(use.dotted) + "".join(f" {what.module}:{what.name}" for what in use.imported)
        for use in syntax.read(module.definitions[name], "pkt")[1]
    }


def test_the_text_does_not_depend_on_the_version_of_python() -> None:
    text, _, constants = syntax.read(ast.parse(SAMPLE).body, "pkt")
    assert hashlib.sha256(text.encode()).hexdigest() == TEXT
    assert text.isascii()
    assert "é\U0001fae8\u2028" in constants


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(x):\n    return x", "def f(\n    x,  # a comment\n):\n\n    return (x)\n"),
        ("def f(x):\n    return x", 'def f(x):\n    """Words."""\n    "More of them."\n    return x'),
        ('class C:\n    """Words."""\n    x: int = 1', 'class C:\n    x: int = 1\n    """Other words."""'),
        ("x = 'a' 'b'", 'x = "ab"'),
        ("x = 1000", "x = 1_000"),
        ('x = f"{y}ab"', 'x = f"{y}a" "b"'),
        ('def f():\n    raise UserError(f"{g()}: bad") from None', "def f():\n    raise UserError(why) from None"),
        ('def f():\n    raise errors.UserError("bad")', "def f():\n    raise errors.UserError"),
        ('x = option(1, "steps", ge=1)', 'x = option(1, f"{STEPS} steps", ge=1)'),
        ('x = params.option(1, help="steps", ge=1)', 'x = params.option(1, help="others", ge=1)'),
        ('x = typer.Option("--x", help="words", min=1)', 'x = typer.Option("--x", min=1)'),
        ('x = typer.Argument(help="words")', 'x = typer.Argument(help=f"one of {ALL}")'),
        (
            "def f():\n    from pkt.b import g\n    import torch\n    return g(torch)",
            "def f():\n    import torch\n    from pkt.c import g\n    return g(torch)",
        ),
    ],
)
def test_what_no_output_can_depend_on_is_left_out(before: str, after: str) -> None:
    assert said(before) == said(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(x):\n    return x", "def f(x):\n    return y"),
        ("def f(x):\n    return x", "def f(x: int):\n    return x"),
        ("def f(x, y=1):\n    return x", "def f(x, y=2):\n    return x"),
        ("def f(x):\n    return x", "def f(x):\n    if x:\n        return x"),
        ("def f(x):\n    return x", "async def f(x):\n    return x"),
        ("def f():\n    return", "def f():\n    return None"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 'a'", "x = b'a'"),
        ("x = None", "x = ..."),
        ("x = {**y}", "x = {None: y}"),
        ('x = f"{y:2}"', 'x = f"{y:3}"'),
        ('x = f"{y}"', 'x = f"{y!r}"'),
        ("x = [a for a in b]", "x = [a for a in b if a]"),
        ("x = [a for b in c for a in b]", "x = [a for c in b for a in c]"),
        ("def f():\n    return (a := 1)", "def f():\n    return (b := 1)"),
        ("def f(*, x):\n    pass", "def f(*, x=None):\n    pass"),
        ('def f():\n    raise ValueError("bad")', 'def f():\n    raise ValueError("worse")'),
        ("def f():\n    raise UserError(x) from None", "def f():\n    raise UserError(x)"),
        ('x = UserError("bad")', 'x = UserError("worse")'),
        ('x = option(1, "steps", ge=1)', 'x = option(2, "steps", ge=1)'),
        ('x = option(1, "steps", ge=1)', 'x = option(1, "steps", ge=0)'),
        ('x = other(1, "steps")', 'x = other(1, "others")'),
        ('x = typer.Option("--x", help="words")', 'x = typer.Option("--y", help="words")'),
        ('x = Option(help="words")', 'x = Option(help="others")'),
        ('def f():\n    return "words"', 'def f():\n    return "others"'),
    ],
)
def test_everything_else_counts(before: str, after: str) -> None:
    assert said(before) != said(after)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Decorators, defaults, annotations and bases are read outside; attributes with what they belong to.
        (
            "@d.e(1)\ndef f(x: A = B, *y: C, z: D = E, **k: F) -> G:\n    return x, y, z, k",
            {"d.e", "A", "B", "C", "D", "E", "F", "G"},
        ),
        ("class f(A, metaclass=B):\n    x: C = D\n    def g(self):\n        return E.e", {"A", "B", "C", "D", "E.e"}),
        ("def f(x):\n    return x.a, g(x).b, c.d[0].e", {"g", "c.d"}),
        # A function's own names, wherever it binds them, are no uses; those of functions in it are theirs.
        ("def f(x):\n    a(y)\n    y = x\n    for z in y:\n        z()", {"a"}),
        ("def f():\n    with a as x, b as (y, *z):\n        del w\n        return x, y, z, w", {"a", "b"}),
        ("def f():\n    try:\n        a()\n    except b as error:\n        error()", {"a", "b"}),
        ("def f():\n    def g(x):\n        return x, y\n    y = 1\n    return g", set()),
        ("def f():\n    def g(x):\n        y = 1\n    return g, x, y", {"x", "y"}),
        ("def f():\n    return lambda x, y=z: (x, y, w)", {"z", "w"}),
        (
            "def f():\n    match a:\n        case [B(c=x), *y] | {'k': z, **w} as v:\n            v(x, y, z, w)",
            {"a", "B"},
        ),
        # A comprehension keeps its names to itself; only its first `in` is read outside.
        ("def f():\n    return [x for x in x], y", {"x", "y"}),
        ("def f(y):\n    return {k: v for k in y for v in k if v}, k", {"k"}),
        ("def f(y):\n    return any((z := x) for x in y), z", {"any"}),
        # What is declared elsewhere is not its own.
        ("def f():\n    global x\n    x = 1\n    return x", {"x"}),
        ("def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = 2\n    return g", set()),
        # A method does not see its class's names.
        ("class f:\n    x = 1\n    def g(self):\n        return x", {"x"}),
        # A function's own imports win; those of other packages count even if nothing uses them.
        (
            "def f():\n    from pkt.b import g as h\n    from .c import i\n    from . import d\n    return h, i.j, d.k",
            {"h pkt.b:g", "i.j pkt.c:i", "d.k pkt:d"},
        ),
        (
            "def f():\n    import pkt.b\n    import pkt.c as c\n    return pkt.b.g, c",
            {"pkt.b.g pkt:None", "c pkt.c:None"},
        ),
        ("def f():\n    import torch.nn\n    from trl import a", {"torch torch:None", "a trl:a"}),
        ("def f(g):\n    def h():\n        import g\n        return g.x\n    return g.y", {"g g:None", "g.x g:None"}),
        # Words that are left out use nothing.
        ("def f():\n    raise UserError(f'{g()}') from h", {"UserError", "h"}),
        ("def f(x=option(A, help=f'{B}', ge=C)):\n    pass", {"option", "A", "C"}),
        ("def f():\n    if TYPE_CHECKING:\n        a\n    else:\n        b", {"b"}),
    ],
)
def test_uses(source: str, expected: set[str]) -> None:
    assert uses(source) == expected


SORTED = """
'Words.'
import torch
from pkt import b as c, d
if TYPE_CHECKING:
    from pkt.e import E
X: int
X, Y = 1, [z for z in range(3)]
X += 1
def f(): pass
try:
    from pkt.g import g
except ImportError:
    g = None
    def h(): pass
Y[0] = 1
print(X)
"""


def test_a_module_is_sorted_into_definitions_imports_and_the_rest() -> None:
    module = syntax.parse(SORTED.encode(), "pkt.a", "pkt")
    found = {name: [type(one).__name__ for one in made] for name, made in module.definitions.items()}
    assert found == {
        "X": ["AnnAssign", "Assign", "AugAssign"],
        "Y": ["Assign"],
        "f": ["FunctionDef"],
        "g": ["Try"],
        "h": ["Try"],
    }
    assert module.imports == {
        "torch": [("torch", None)],
        "c": [("pkt", "b")],
        "d": [("pkt", "d")],
        "g": [("pkt.g", "g")],
    }
    assert [type(statement).__name__ for statement in module.loose] == ["Try", "Assign", "Expr"]


def test_a_star_import_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        syntax.parse(b"from pkt.b import *", "pkt.a", "pkt")
    assert str(error.value) == "pkt.a: `from pkt.b import *` hides what it brings; name that"
