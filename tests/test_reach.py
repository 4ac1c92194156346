"""What a definition reaches, on toy packages; and what the hash over it tells apart."""

from __future__ import annotations

from pathlib import Path

import pytest

import pkt_stages
from pkt_stages.errors import UserError
from pkt_stages.reach import SHAPES_NOTHING, WHOLE, Node, Package


def package(folder: Path, files: dict[str, str]) -> Package:
    """A package `pkt` of these files; every folder with Python in it gets an empty __init__.py."""
    for name, text in files.items():
        path = folder / "pkt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".py":
            (path.parent / "__init__.py").touch()
    (folder / "pkt/__init__.py").touch()
    return Package(folder / "pkt")


def reached(folder: Path, files: dict[str, str], root: str = "a:f") -> set[str]:
    """What a definition reaches beside itself, without the name of the package."""
    module, _, name = root.partition(":")
    start = Node(f"pkt.{module}", name)
    found = package(folder, files).reach([start])
    assert found.pop(start) is None
    return {f"{node.module.removeprefix('pkt').removeprefix('.')}:{node.name}" for node in found}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Names of the module, whatever they are; what nobody uses is not reached.
        ({"a.py": "X = g\ndef f(): return X\ndef g(): return h\nclass h: pass\ndef i(): return f"}, "a:X a:g a:h"),
        # Imports, at the top and inside; a module's attribute; a package's module.
        ({"a.py": "from pkt.b import g as h\ndef f(): h()", "b.py": "def g(): i()\ndef i(): pass\ni = i"}, "b:g b:i"),
        ({"a.py": "import pkt.c.b as d\ndef f(): d.g.x()", "c/b.py": "def g(): pass\ndef h(): pass"}, "c.b:g"),
        ({"a.py": "import pkt.c.b\ndef f(): pkt.c.b.g()", "c/b.py": "def g(): pass\ndef h(): pass"}, "c.b:g"),
        ({"a.py": "from pkt import b\ndef f(): b.g()", "b.py": "def g(): pass\ndef h(): pass"}, "b:g"),
        ({"c/a.py": "from . import b\nfrom ..d import h\ndef f(): b.g(h)", "c/b.py": "g = 1", "d.py": "h = 1"},
         "c.b:g d:h"),
        ({"a.py": "g = 1\ndef f():\n    from pkt.b import g\n    g()", "b.py": "def g(): pass"}, "b:g"),
        # Re-exports are followed, and a name that is bound twice is either.
        ({"a.py": "from pkt.b import g\ndef f(): g()", "b.py": "from pkt.c import g\nX = 1", "c.py": "g = 1"}, "c:g"),
        ({"a.py": "from pkt.b import c\ndef f(): c.g()", "b.py": "from pkt import c", "c.py": "g = 1\nh = 1"}, "c:g"),
        (
            {"a.py": "try:\n    from pkt.b import g\nexcept ImportError:\n    g = None\ndef f(): g()", "b.py": "g = 1"},
            "a: a:g b:g",
        ),
        # A name of a package before a module in it; one that is neither is the whole package.
        ({"a.py": "from pkt.c import b\ndef f(): b()", "c/__init__.py": "b = 1", "c/b.py": "X = 1"}, "c:b"),
        ({"a.py": "from pkt import c\ndef f(): c.x()", "c/__init__.py": "g = 1"}, "c:* c:g"),
        # A module as a value, in `getattr` say, is all of it; what it passes on as well, but no module that it uses.
        (
            {"a.py": "from pkt import b\ndef f(x): getattr(b, x)",
             "b.py": "from pkt import d\nfrom pkt.c import i\ng = 1", "c.py": "i = 1", "d.py": "j = 1"},
            "b:* b:g c:i",
        ),
        # So it is where a text names it, as for `python -m`, or one of its own definitions looks at all.
        ({"a.py": "def f(): run('-m', 'pkt.b')", "b.py": "def g(): pass"}, "b:* b:g"),
        ({"a.py": "def f(): return globals()\ng = 1"}, "a:* a:g"),
        ({"c/a.py": "def f(): return open(__file__)", "c/b.py": "g = 1", "d.py": "h = 1"}, "c:* c.a:* c.b:* c.b:g"),
        # Statements that define nothing, of the module and of the packages around it.
        ({"a.py": "def f(): pass\ng()\ndef g(): h()\ndef h(): pass"}, "a: a:g a:h"),
        ({"a.py": "def f(): pass\nX = {}\nfor x in Y: X[x] = 1\nY = 1"}, "a: a:X a:Y a:x"),
        ({"c/a.py": "def f(): pass", "c/__init__.py": "set_up()\ng = 1"}, "c:"),
        ({"a.py": "if __name__ == '__main__':\n    g()\ndef f(): pass\ndef g(): pass"}, "a: a:g"),
        # Files beside it, those in folders without Python as well; not what is hidden or compiled.
        (
            {"c/a.py": "def f(): pass", "c/x.yaml": "", "c/d/y.json": "", "c/e/b.py": "", "c/e/z.txt": "",
             "c/.w": "", "c/__pycache__/a.pyc": "", "v.txt": ""},
            "c:/d/y.json c:/x.yaml",
        ),
        # What only type checkers import.
        ({"a.py": "if TYPE_CHECKING:\n    from pkt.b import g\ndef f(x: g): pass", "b.py": "g = 1"}, ""),
        # Local names hide those of the module.
        ({"a.py": "from pkt import b\ndef f(b): return b.g, [g for g in b]\ng = 1", "b.py": "g = 1"}, ""),
    ],
)  # fmt: skip
def test_reach(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    root = "c.a:f" if "c/a.py" in files else "a:f"
    assert reached(tmp_path, files, root) == set(expected.split())


def test_what_leads_to_a_definition_is_known(tmp_path: Path) -> None:
    toy = package(tmp_path, {"a.py": "from pkt import b\ndef f(): b.g()", "b.py": "def g(): h()\ndef h(): pass\nk()"})
    found = {str(node): None if by is None else str(by) for node, by in toy.reach([Node("pkt.a", "f")]).items()}
    assert found == {"pkt.a:f": None, "pkt.b:g": "pkt.a:f", "pkt.b:(statements)": "pkt.b:g", "pkt.b:h": "pkt.b:g"}


BEFORE = {
    "a.py": "from pkt.b import g\nfrom numpy import mean\ndef f(): return g(mean)\ndef unused(): return 1",
    "b.py": "def g(x): return h(x)\ndef h(x): return [g, x]\nX = 1",
    "c.py": "def g(x): return 0",
    "d/e.py": "def k(): pass",
    "d/data.yaml": "k: 1",
}


@pytest.mark.parametrize(
    "edit",
    [
        {"a.py": BEFORE["a.py"].replace("return 1", "return 2")},
        {"b.py": "X = 2\ndef h(x): return [g, x]\n\n\ndef g(x):\n    'Words.'\n    return h(x)"},
        {"c.py": "def g(x): return 1"},
        {"d/data.yaml": "k: 2"},
        {"a.py": "from numpy import mean\nfrom pkt.b import g\ndef f(): return g(mean)"},
        # Moved, with or without what it uses.
        {"a.py": BEFORE["a.py"].replace("pkt.b", "pkt.z"), "z.py": BEFORE["b.py"]},
        {
            "b.py": "from pkt.c import h\ndef g(x): return h(x)",
            "c.py": "def h(x):\n    from pkt.b import g\n    return [g, x]",
        },
        {"a.py": "def f():\n    import pkt.b\n    from numpy import mean\n    return g(mean)\nfrom pkt.b import g"},
    ],
)
def test_the_hash_stays(tmp_path: Path, edit: dict[str, str]) -> None:
    before = package(tmp_path / "before", BEFORE).digest([Node("pkt.a", "f")])
    assert package(tmp_path / "after", {**BEFORE, **edit}).digest([Node("pkt.a", "f")]) == before


@pytest.mark.parametrize(
    "edit",
    [
        {"a.py": BEFORE["a.py"].replace("g(mean)", "g(g)")},
        {"b.py": BEFORE["b.py"].replace("[g, x]", "[x, g]")},
        # The same words that stand for something else.
        {"a.py": BEFORE["a.py"].replace("pkt.b", "pkt.c")},
        {"a.py": BEFORE["a.py"].replace("numpy", "torch")},
        {"b.py": BEFORE["b.py"].replace("X = 1", "x = 1"), "a.py": BEFORE["a.py"].replace("mean", "std as mean", 1)},
        {"b.py": "from pkt.c import g as h\ndef g(x): return h(x)"},
        {"b.py": BEFORE["b.py"] + "\nprint()"},
        {"b.py": BEFORE["b.py"] + "\nh = cached(h)"},
        {"__init__.py": "import os\nos.environ['X'] = '1'"},
        {"data.yaml": "k: 1"},
    ],
)
def test_the_hash_changes(tmp_path: Path, edit: dict[str, str]) -> None:
    before = package(tmp_path / "before", BEFORE).digest([Node("pkt.a", "f")])
    assert package(tmp_path / "after", {**BEFORE, **edit}).digest([Node("pkt.a", "f")]) != before


def test_what_shapes_nothing_is_a_name_only(tmp_path: Path) -> None:
    files = {"a.py": "from pkt import errors, progress\ndef f(): raise errors.UserError(progress.other())"}
    files |= {"errors.py": "class UserError(Exception): pass\ndef g(): pass", "progress.py": "def track(): pass"}
    first = package(tmp_path / "first", files)
    second = package(tmp_path / "second", {**files, "errors.py": "class UserError(ValueError): pass"})
    start = Node("pkt.a", "f")
    assert first.digest([start]) == second.digest([start])
    assert list(first.reach([start])) == [start]


def test_the_list_of_what_shapes_nothing_names_what_there_is() -> None:
    real = Package(Path(pkt_stages.__file__).parent)
    for path in SHAPES_NOTHING:
        module, _, name = path.rpartition(".")
        assert name in real.names(f"pkt_stages.{module}")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.py": "from pkt.b import g\ndef f(): g()"},
            "pkt.b: code imports this module, and there is none; mend the import, or add the file",
        ),
        (
            {"a.py": "from pkt import b\ndef f(): b.g()", "b.py": "x = 1\ndef g(:"},
            "pkt/b.py, line 2: invalid syntax; no valid Python",
        ),
    ],
)
def test_broken_code_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        package(tmp_path, files).digest([Node("pkt.a", "f")])
    assert str(error.value) == message


def test_broken_code_that_is_not_reached_does_not_matter(tmp_path: Path) -> None:
    assert reached(tmp_path, {"a.py": "def f(): pass", "b.py": "def"}) == set()


def test_the_modules_of_a_package(tmp_path: Path) -> None:
    toy = package(tmp_path, {"c/a.py": "", "c/d/b.py": "", "cc.py": ""})
    assert toy.modules("pkt.c") == ["pkt.c", "pkt.c.a", "pkt.c.d", "pkt.c.d.b"]
    assert toy.modules("pkt.e") == []
    assert toy.packages("pkt") == ["pkt.c"]
    assert toy.reach([Node("pkt.c", WHOLE)]) == {Node("pkt.c", WHOLE): None}
