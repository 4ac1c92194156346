# ruff: noqa: E501 (programs read better on one line)
"""Programs for the sandbox: honest ones, whose verdict must be Python's own, and hostile ones, which must not pass.

`python -m tests.evaluation.programs [FILE...]` runs all of them on each level that this host has and prints the table
of docs/evaluation.md. Each FILE holds HumanEval's or MBPP's rows as published (JSON lines); their reference programs are
run as well.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pkt_stages.evaluation.sandbox.levels import LEVELS
from pkt_stages.evaluation.sandbox.pool import Job, Limits, Verdict, judge
from pkt_stages.evaluation.sandbox.worker import probe
from pkt_stages.tasks import load

ROOT = Path(__file__).parents[2]

# Values by an expression, what they import, and an expression that is true of the value `v`.
VALUES: dict[str, tuple[str, str, str]] = {
    "None": ("None", "", "v is None"),
    "bool": ("True", "", "v is True"),
    "int": ("-7", "", "v == -7"),
    "huge int": ("-7 ** 9000", "", "v == -7 ** 9000"),
    "int of 53 bits": ("2 ** 53", "", "v == 2 ** 53 and v + 1 != v"),
    "float": ("1 / 3", "", "v == 1 / 3"),
    "negative zero": ("-0.0", "", "str(v) == '-0.0'"),
    "nan": ("float('nan')", "", "v != v"),
    "infinity": ("-float('inf')", "", "v == -float('inf')"),
    "complex": ("1 - 2j", "", "v == 1 - 2j and v.imag == -2"),
    "text": ("'a\"\\\\\\n\\tü€'", "", "v == 'a\"\\\\\\n\\tü€' and v.isprintable() is False"),
    "lone surrogates": ("'\\ud83d' + '\\ude00'", "", "len(v) == 2 and v[0] == '\\ud83d'"),
    "emoji": ("'😀'", "", "len(v) == 1 and v.isprintable()"),
    "bytes": ("b'\\x00\\xff'", "", "v == b'\\x00\\xff'"),
    "bytearray": ("bytearray(b'ab')", "", "v == b'ab' and isinstance(v, bytearray)"),
    "memoryview": ("memoryview(b'ab')", "", "v == b'ab'"),
    "list": ("[1, [2.5, 'x'], None]", "", "v == [1, [2.5, 'x'], None] and type(v) is list"),
    "tuple": ("(1, (2, [3]))", "", "v == (1, (2, [3])) and type(v) is tuple"),
    "empty containers": ("((), [], {}, set(), frozenset(), '')", "", "v == ((), [], {}, set(), frozenset(), '')"),
    "set": ("{(1, 2), 'a', frozenset({3})}", "", "v == {(1, 2), 'a', frozenset({3})}"),
    "frozenset": ("frozenset('ab')", "", "v == frozenset('ab') and hash(v) == hash(frozenset('ab'))"),
    "dict": (
        "{'b': 1, (1, 2): {'c': []}, 3: None}",
        "",
        "v == {'b': 1, (1, 2): {'c': []}, 3: None} and list(v)[0] == 'b'",
    ),
    "range": ("range(1, 9, 3)", "", "v == range(1, 9, 3) and list(v) == [1, 4, 7]"),
    "slice": ("slice(1, None, 2)", "", "[0, 1, 2, 3][v] == [1, 3]"),
    "Ellipsis": ("...", "", "v is ..."),
    "NotImplemented": ("NotImplemented", "", "v is NotImplemented"),
    "a type": ("dict", "", "v is dict and v(a=1) == {'a': 1}"),
    "an exception type": ("KeyError", "", "issubclass(v, LookupError)"),
    "keys": ("{'b': 1, 'a': 2}.keys()", "", "v == {'a', 'b'} and sorted(v) == ['a', 'b']"),
    "values": ("{'b': 1, 'a': 2}.values()", "", "sorted(v) == [1, 2] and len(v) == 2"),
    "items": ("{'b': 1}.items()", "", "list(v) == [('b', 1)] and ('b', 1) in v"),
    "Counter": (
        "Counter('aab')",
        "from collections import Counter",
        "v == {'a': 2, 'b': 1} and v.most_common(1) == [('a', 2)]",
    ),
    "OrderedDict": (
        "OrderedDict(b=1, a=2)",
        "from collections import OrderedDict",
        "list(v.items()) == [('b', 1), ('a', 2)] and v.popitem() == ('a', 2)",
    ),
    "defaultdict": (
        "defaultdict(list, a=[1])",
        "from collections import defaultdict",
        "v['a'] == [1] and v['z'] == []",
    ),
    "deque": (
        "deque([1, 2, 3], maxlen=2)",
        "from collections import deque",
        "list(v) == [2, 3] and v.maxlen == 2 and v == deque([2, 3])",
    ),
    "namedtuple": (
        "namedtuple('P', 'x y')(1, 2)",
        "from collections import namedtuple",
        "v == (1, 2) and v.x == 1 and v._fields == ('x', 'y')",
    ),
    "Fraction": ("Fraction(2, 4)", "from fractions import Fraction", "v == 0.5 and v.denominator == 2 and v + v == 1"),
    "Decimal": ("Decimal('1.10')", "from decimal import Decimal", "v == Decimal('1.1') and str(v) == '1.10' and v > 1"),
    "date": (
        "date(2024, 2, 29)",
        "from datetime import date",
        "v == date(2024, 2, 29) and v.weekday() == 3 and v.isoformat() == '2024-02-29'",
    ),
    "datetime": (
        "datetime(2024, 2, 29, 1, 2, tzinfo=timezone.utc)",
        "from datetime import datetime, timezone",
        "v.strftime('%H:%M') == '01:02' and v.utcoffset().seconds == 0",
    ),
    "timedelta": (
        "timedelta(days=-1, microseconds=5)",
        "from datetime import timedelta",
        "v == timedelta(days=-1, microseconds=5) and v.days == -1",
    ),
    "time": ("time(3, 4)", "from datetime import time", "v == time(3, 4)"),
    "UUID": ("UUID(int=7)", "from uuid import UUID", "v.int == 7"),
    "array": ("array('d', [1.5, 2])", "from array import array", "v == array('d', [1.5, 2.0]) and v.typecode == 'd'"),
    "path": (
        "PurePosixPath('a/b.txt')",
        "from pathlib import PurePosixPath",
        "v.suffix == '.txt' and v == PurePosixPath('a/b.txt')",
    ),
    "generator": ("(i * i for i in range(4))", "", "list(v) == [0, 1, 4, 9]"),
    "iterator": ("iter('ab')", "", "next(v) == 'a' and next(v) == 'b' and next(v, None) is None"),
    "map": ("map(str, [1, 2])", "", "list(v) == ['1', '2']"),
    "zip": ("zip('ab', [1, 2])", "", "dict(v) == {'a': 1, 'b': 2}"),
    "filter": ("filter(None, [0, 1, 2])", "", "list(v) == [1, 2]"),
    "enumerate": ("enumerate('ab')", "", "list(v) == [(0, 'a'), (1, 'b')]"),
    "reversed": ("reversed([1, 2])", "", "list(v) == [2, 1]"),
    "permutations": ("permutations([1, 2])", "from itertools import permutations", "sorted(v) == [(1, 2), (2, 1)]"),
    "endless iterator": ("count(5)", "from itertools import count", "[next(v), next(v)] == [5, 6]"),
    "a function": ("(lambda a, b=1: a + b)", "", "v(2) == 3 and v(2, b=5) == 7 and callable(v)"),
    "a built-in function": ("len", "", "v('abc') == 3"),
    "a function of a module": ("math.gcd", "import math", "v(4, 6) == 2"),
    "a bound method": ("'a-b'.split", "", "v('-') == ['a', 'b']"),
    "a partial": ("partial(pow, 2)", "from functools import partial", "v(5) == 32"),
    "a closure with state": ("(lambda n=[0]: (n.__setitem__(0, n[0] + 1), n[0])[1])", "", "v() == 1 and v() == 2"),
    "a list with itself": ("(lambda a: (a.append(a), a)[1])([])", "", "v[0] is v"),
    "one list twice": ("(lambda a: [a, a])([1])", "", "v[0] is v[1]"),
    "a list 90 deep": ("eval('[' * 90 + ']' * 90)", "", "str(v) == '[' * 90 + ']' * 90"),
    "a list 5000 deep": (
        "reduce(lambda a, _: [a], range(5000), [])",
        "from functools import reduce",
        "reduce(lambda a, _: a[0], range(5000), v) == []",
    ),
    "a dict 900 deep": (
        "reduce(lambda a, _: {'k': a}, range(900), {})",
        "from functools import reduce",
        "reduce(lambda a, _: a['k'], range(900), v) == {}",
    ),
    "200,000 integers": ("list(range(200000))", "", "len(v) == 200000 and v[-1] == 199999"),
    "a text of 3 MB": ("'ü' * 1500000", "", "len(v) == 1500000"),
}
_DEF = "def f(*a, **k):\n"


def _ways() -> Iterator[tuple[str, str, str, str]]:
    """Each value in every way that it may pass: name, code, setup, tests."""
    for name, (value, imports, holds) in VALUES.items():
        code = f"{imports}\n{_DEF}    return {value}\n"
        yield f"{name} as a result", code, imports, f"v = f()\nassert {holds}"
        passes_on = f"{imports}\ndef f(v):\n    return bool({holds})\n"
        yield f"{name} as an argument", passes_on, imports, f"assert f({value})"
        nested = f"{imports}\n{_DEF}    return {{'k': [({value},)]}}\n"
        yield f"{name} inside a result", nested, imports, f"v = f()['k'][0][0]\nassert {holds}"
        back = f"{imports}\ndef f(v, n):\n    return v if n else None\n"
        yield f"{name} there and back", back, imports, f"v = f({value}, 1)\nassert {holds}"
        wrong = f"{imports}\n{_DEF}    return [{value}]\n"
        yield f"{name}, wrong", wrong, imports, f"v = f()\nassert {holds}"


_NODE = "class Node:\n    def __init__(self, v, next=None):\n        self.v, self.next = v, next\n"
_POINT = "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 0\n    y: int = 0\n"
_STACK = "class f:\n    def __init__(self):\n        self.a = []\n    def push(self, x):\n        self.a.append(x)\n    def pop(self):\n        return self.a.pop()\n"
# name: (prefix, code, setup, tests)
OTHERS: dict[str, tuple[str, str, str, str]] = {
    "sorts in place": ("", "def f(x):\n    x.sort()\n", "", "y = [2, 1]\nz = y\nf(y)\nassert z == [1, 2]"),
    "reverses a part in place": (
        "",
        "def f(x):\n    x[0].reverse()\n",
        "",
        "y = [[1, 2], 3]\nf(y)\nassert y == [[2, 1], 3]",
    ),
    "returns its argument": (
        "",
        "def f(x):\n    x.append(1)\n    return x\n",
        "",
        "y = []\nassert f(y) is y and y == [1]",
    ),
    "adds to a dict and a set": (
        "",
        "def f(d, s):\n    d['a'] = s\n    s.add(1)\n",
        "",
        "d, s = {}, set()\nf(d, s)\nassert d['a'] is s and s == {1}",
    ),
    "empties a deque": (
        "",
        "def f(d):\n    while d:\n        d.popleft()\n",
        "from collections import deque",
        "d = deque([1, 2])\nf(d)\nassert not d",
    ),
    "changes a bytearray": ("", "def f(b):\n    b[0] = 65\n", "", "b = bytearray(b'xy')\nf(b)\nassert b == b'Ay'"),
    "changes an array": (
        "",
        "def f(b):\n    b[0] = 65\n",
        "from array import array",
        "b = array('i', [1])\nf(b)\nassert b[0] == 65",
    ),
    "changes a Counter": (
        "",
        "def f(c):\n    c['a'] += 1\n",
        "from collections import Counter",
        "c = Counter()\nf(c)\nassert c == {'a': 1}",
    ),
    "leaves its argument alone": (
        "",
        "def f(x):\n    return sorted(x)\n",
        "",
        "y = [2, 1]\nassert f(y) == [1, 2] and y == [2, 1]",
    ),
    "a wrong change in place": ("", "def f(x):\n    x.reverse()\n", "", "y = [1, 3, 2]\nf(y)\nassert y == [1, 2, 3]"),
    "changes before it raises": (
        "",
        "def f(x):\n    x.append(1)\n    raise KeyError('k')\n",
        "",
        "y = []\ntry:\n    f(y)\nexcept KeyError as e:\n    assert e.args == ('k',) and y == [1]",
    ),
    "changes what a callback was given": (
        "",
        "def f(g):\n    x = [1]\n    g(x)\n    return x\n",
        "",
        "assert f(lambda x: x.append(2)) == [1, 2]",
    ),
    "a key function": (
        "",
        "def f(x, key):\n    return sorted(x, key=key)\n",
        "",
        "assert f(['bb', 'a'], key=len) == ['a', 'bb']\nassert f([1, 2], key=lambda v: -v) == [2, 1]",
    ),
    "a comparison": (
        "",
        "from functools import cmp_to_key\ndef f(x, c):\n    return sorted(x, key=cmp_to_key(c))\n",
        "",
        "assert f([1, 3, 2], lambda a, b: b - a) == [3, 2, 1]",
    ),
    "a callback that raises": (
        "",
        "def f(g):\n    try:\n        g()\n    except ValueError as e:\n        return e.args[0]\n",
        "",
        "def g():\n    raise ValueError(7)\nassert f(g) == 7",
    ),
    "a callback's exception passes": (
        "",
        "def f(g):\n    return g()\n",
        "",
        "def g():\n    raise ZeroDivisionError\ntry:\n    f(g)\n    assert False, 'no exception'\nexcept ZeroDivisionError:\n    pass",
    ),
    "a callback that counts": (
        "",
        "def f(g, n):\n    for _ in range(n):\n        g()\n",
        "",
        "n = [0]\ndef g():\n    n[0] += 1\nf(g, 50)\nassert n == [50]",
    ),
    "a decorator": (
        "",
        "def f(g):\n    def inner(*a):\n        return g(*a) + 1\n    return inner\n",
        "",
        "@f\ndef h(x):\n    return x * 2\nassert h(4) == 9",
    ),
    "composes functions": ("", "def f(g, h):\n    return lambda x: g(h(x))\n", "", "assert f(str, abs)(-3) == '3'"),
    "a generator argument": (
        "",
        "def f(g):\n    return next(g), list(g)\n",
        "",
        "assert f(i for i in range(4)) == (0, [1, 2, 3])",
    ),
    "takes what it needs of an endless argument": (
        "",
        "def f(g):\n    return [next(g), next(g)]\n",
        "import itertools",
        "assert f(itertools.count()) == [0, 1]",
    ),
    "a generator that raises later": (
        "",
        "def f():\n    yield 1\n    yield 2\n    raise ValueError('end')\n",
        "",
        "g = f()\nassert [next(g), next(g)] == [1, 2]\ntry:\n    next(g)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'end'",
    ),
    "an endless generator": (
        "",
        "def f():\n    i = 0\n    while True:\n        yield i\n        i += 1\n",
        "import itertools",
        "assert list(itertools.islice(f(), 300)) == list(range(300))",
    ),
    "is a generator": ("", "def f():\n    yield 1\n", "import types", "assert isinstance(f(), types.GeneratorType)"),
    "a key error's text": (
        "",
        "def f(x):\n    return {}[x]\n",
        "",
        "try:\n    f('a')\n    assert False\nexcept KeyError as e:\n    assert str(e) == \"'a'\"",
    ),
    "an exception of its own": (
        "",
        "class E(ValueError):\n    pass\nclass D(E):\n    pass\ndef f(x):\n    raise D('own', x)\n",
        "",
        "try:\n    f(3)\n    assert False\nexcept E as e:\n    assert e.args == ('own', 3) and isinstance(e, ValueError)",
    ),
    "leaves by SystemExit": (
        "",
        "import sys\ndef f():\n    sys.exit(3)\n",
        "",
        "try:\n    f()\n    assert False\nexcept SystemExit as e:\n    assert e.code == 3",
    ),
    "its assertion fails": (
        "",
        "def f(x):\n    assert x > 0, 'positive'\n    return x\n",
        "",
        "try:\n    f(-1)\n    raise RuntimeError\nexcept AssertionError as e:\n    assert str(e) == 'positive'",
    ),
    "stops an iteration": (
        "",
        "def f():\n    raise StopIteration\n",
        "",
        "try:\n    f()\n    assert False\nexcept StopIteration:\n    pass",
    ),
    "endless recursion": (
        "",
        "def f(x):\n    return f(x + 1)\n",
        "",
        "try:\n    f(0)\n    assert False\nexcept RecursionError:\n    pass",
    ),
    "a deep recursion": (
        "",
        "import sys\nsys.setrecursionlimit(20000)\ndef f(x):\n    return 0 if x == 0 else 1 + f(x - 1)\n",
        "",
        "assert f(9000) == 9000",
    ),
    "a linked list as an argument": (
        "",
        _NODE + "def f(n):\n    return n.v + (f(n.next) if n.next else 0)\n",
        "",
        "root = Node(1)\nroot.next = Node(2)\nassert f(root) == 3",
    ),
    "a linked list as a result": (
        "",
        _NODE
        + "def f(xs):\n    head = None\n    for x in reversed(xs):\n        head = Node(x, head)\n    return head\n",
        "",
        "n = f([1, 2])\nassert n.v == 1 and n.next.v == 2 and n.next.next is None",
    ),
    "a class of the prompt": (
        _NODE + "def f(n):\n",
        _NODE + "def f(n):\n    return Node(n.v + 1, n)\n",
        "",
        "a = Node(1)\nb = f(a)\nassert isinstance(b, Node) and b.v == 2 and b.next is a",
    ),
    "changes an instance of the prompt's class": (
        _NODE + "def f(n):\n",
        _NODE + "def f(n):\n    n.v = [n.v]\n    n.next = Node(5)\n",
        "",
        "a = Node(1)\nf(a)\nassert a.v == [1] and a.next.v == 5",
    ),
    "a dataclass of the prompt": (
        _POINT + "def f(x):\n",
        _POINT + "def f(x):\n    return P(x, x)\n",
        "",
        "assert f(2) == P(2, 2) and f(2) != P(2, 3) and repr(f(1)) == 'P(x=1, y=1)'",
    ),
    "an enumeration of the prompt": (
        "from enum import Enum\nclass C(Enum):\n    A = 1\n    B = 2\ndef f(x):\n",
        "from enum import Enum\nclass C(Enum):\n    A = 1\n    B = 2\ndef f(x):\n    return C.A if x == C.B else C.B\n",
        "",
        "assert f(C.B) is C.A and f(C.A) == C.B",
    ),
    "a dataclass of its own": (
        "",
        _POINT + "def f(x):\n    return P(x)\n",
        "",
        "assert f(2).x == 2 and f(2) == P(2) and f(2) != P(3) and isinstance(f(1), P)",
    ),
    "a dataclass as an argument": (
        "",
        _POINT + "def f(p):\n    return p.x + p.y\n",
        "",
        "assert f(P(1, 2)) == 3 and f(P(y=5)) == 5",
    ),
    "an enumeration of its own": (
        "",
        "from enum import Enum\nclass C(Enum):\n    A = 1\ndef f():\n    return C.A\n",
        "",
        "assert f() == C.A and f().name == 'A' and f().value == 1",
    ),
    "an IntEnum": (
        "",
        "from enum import IntEnum\nclass C(IntEnum):\n    A = 4\ndef f():\n    return C.A\n",
        "",
        "assert f() == 4",
    ),
    "a list of its own kind": (
        "",
        "class L(list):\n    pass\ndef f():\n    return L([1, 2])\n",
        "",
        "assert f() == [1, 2] and len(f()) == 2",
    ),
    "a container of its own": (
        "",
        "class Box:\n    def __init__(self, xs):\n        self.xs = xs\n    def __iter__(self):\n        return iter(self.xs)\n    def __len__(self):\n        return len(self.xs)\n    def __getitem__(self, i):\n        return self.xs[i]\n    def __str__(self):\n        return f'Box{self.xs}'\ndef f(x):\n    return Box(x)\n",
        "",
        "b = f([1, 2, 3])\nassert list(b) == [1, 2, 3] and len(b) == 3 and b[1] == 2 and 2 in b and str(b) == 'Box[1, 2, 3]' and b",
    ),
    "a class under test": (
        "class f:\n",
        _STACK,
        "",
        "s = f()\ns.push(1)\ns.push([2])\nassert s.pop() == [2] and s.pop() == 1",
    ),
    "a helper class that the tests use": (
        "",
        _STACK.replace("class f", "class Stack") + "def f(s):\n    return s.pop()\n",
        "",
        "s = Stack()\ns.push(3)\nassert f(s) == 3 and s.a == []",
    ),
    "a class of the tests as an argument": (
        "",
        "def f(xs):\n    return sum(x.price for x in xs)\n",
        "class Item:\n    def __init__(self, p):\n        self.price = p\n    def double(self):\n        return 2 * self.price",
        "assert f([Item(1), Item(2)]) == 3",
    ),
    "a method of the tests' object": (
        "",
        "def f(x):\n    x.price += 1\n    return x.double()\n",
        "class Item:\n    def __init__(self, p):\n        self.price = p\n    def double(self):\n        return 2 * self.price",
        "i = Item(1)\nassert f(i) == 4 and i.price == 2",
    ),
    "a class of the tests that sorts and holds": (
        "",
        "def f(xs):\n    return sorted(xs)[0].v, len(xs[0]), xs[0][1], xs[0] == xs[0], str(xs[0]), len(set(xs))\n",
        "class Item:\n    def __init__(self, v):\n        self.v = v\n    def __lt__(self, o):\n        return self.v < o.v\n    def __len__(self):\n        return 7\n    def __getitem__(self, i):\n        return i + self.v\n    def __str__(self):\n        return 'item'",
        "assert f([Item(2), Item(1)]) == (1, 7, 3, True, 'item', 2)",
    ),
    "objects of its own in a set": (
        "",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\ndef f(x):\n    return P(x)\n",
        "",
        "assert len({f(1), f(1), f(2)}) == 2 and f(1) in [f(0), f(1)]",
    ),
    "a class as an argument": (
        "",
        "def f(t, x):\n    return isinstance(x, t) and t(x)\n",
        "",
        "assert f(int, 3) == 3 and f(str, 3) is False and f((list, tuple)[1], (1,)) == (1,)",
    ),
    "a module as an argument": ("", "def f(m):\n    return m.sqrt(4)\n", "import math", "assert f(math) == 2"),
    "a constant of its own": ("", "LIMIT = [3]\ndef f():\n    return LIMIT[0]\n", "", "assert f() == LIMIT[0]"),
    "a helper of its own that the tests call": (
        "",
        "def g(x):\n    return x + 1\ndef f(x):\n    return g(x) * 2\n",
        "",
        "assert f(1) == g(1) * 2 == 4",
    ),
    "shadows a built-in": ("", "def sum(x, y):\n    return x * y\nf = sum\n", "", "assert f(3, 4) == 12"),
    "prints what is asked": (
        "",
        "def f(x):\n    print(x, end='!')\n",
        "import io, contextlib",
        "out = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f('hi')\nassert out.getvalue() == 'hi!'",
    ),
    "prints while defining": ("", "print('x' * 100000)\ndef f(x):\n    return x\n", "", "assert f(1) == 1"),
    "annotations": (
        "",
        "from __future__ import annotations\ndef f(x: int) -> list[int]:\n    return [x]\nassert f.__annotations__ == {'x': 'int', 'return': 'list[int]'}\n",
        "",
        "assert f(1) == [1]",
    ),
    "annotations are objects": (
        "",
        "def f(x: int) -> str:\n    return x\nassert f.__annotations__['x'] is int\n",
        "",
        "assert f(1) == 1",
    ),
    "pickles and copies its own class": (
        "",
        _NODE
        + "import pickle, copy\ndef f(x):\n    return pickle.loads(pickle.dumps(Node(x))).v + copy.deepcopy(Node(x)).v\n",
        "",
        "assert f(2) == 4",
    ),
    "a thread": (
        "",
        "import threading\ndef f(x):\n    out = []\n    t = threading.Thread(target=out.append, args=(x,))\n    t.start()\n    t.join()\n    return out\n",
        "",
        "assert f(1) == [1]",
    ),
    "a pool of threads": (
        "",
        "from concurrent.futures import ThreadPoolExecutor\ndef f(n):\n    with ThreadPoolExecutor(8) as p:\n        return list(p.map(abs, range(-n, 0)))\n",
        "",
        "assert f(20) == list(range(20, 0, -1))",
    ),
    "coroutines": (
        "",
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0.001)\n    return x\ndef f(n):\n    async def run():\n        return await asyncio.gather(*map(g, range(n)))\n    return asyncio.run(run())\n",
        "",
        "assert f(5) == [0, 1, 2, 3, 4]",
    ),
    "a cache": (
        "",
        "from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n",
        "",
        "assert f(80) == 23416728348467685",
    ),
    "a heap": (
        "",
        "import heapq\ndef f(x):\n    heapq.heapify(x)\n    return [heapq.heappop(x) for _ in range(len(x))]\n",
        "",
        "y = [3, 1, 2]\nassert f(y) == [1, 2, 3] and y == []",
    ),
    "regular expressions": (
        "",
        "import re\ndef f(s):\n    return re.match(r'(\\w+)-(\\d+)', s)\n",
        "",
        "m = f('ab-12')\nassert m and m.group(1) == 'ab' and m.groups() == ('ab', '12') and f('?') is None",
    ),
    "a random number": (
        "",
        "import random\ndef f(n):\n    random.seed(n)\n    return random.random()\n",
        "import random",
        "random.seed(3)\nassert f(3) == random.random()",
    ),
    "a digest": (
        "",
        "import hashlib\ndef f(s):\n    return hashlib.md5(s.encode()).hexdigest()\n",
        "",
        "assert f('a') == '0cc175b9c0f1b6a831c399e269772661'",
    ),
    "compresses": (
        "",
        "import zlib\ndef f(b):\n    return zlib.decompress(zlib.compress(b))\n",
        "",
        "assert f(b'a' * 99) == b'a' * 99",
    ),
    "a time zone": (
        "",
        "from zoneinfo import ZoneInfo\nfrom datetime import datetime\ndef f():\n    return datetime(2024, 7, 1, tzinfo=ZoneInfo('UTC')).utcoffset().total_seconds()\n",
        "",
        "assert f() == 0",
    ),
    "a process id": (
        "",
        "import os\ndef f():\n    return os.getpid()\n",
        "",
        "assert isinstance(f(), int) and f() == f()",
    ),
    "keyword-only arguments": (
        "",
        "def f(*a, k, **o):\n    return a, k, o\n",
        "",
        "assert f(1, 2, k=3, z=4) == ((1, 2), 3, {'z': 4})",
    ),
    "too many arguments": (
        "",
        "def f(x):\n    return x\n",
        "",
        "try:\n    f(1, 2)\n    assert False\nexcept TypeError:\n    pass",
    ),
    "a fixture of its own in the tests": (
        "",
        "def f(x):\n    return x\n",
        "import unittest",
        "class T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f([1]), [1])\nr = unittest.TextTestRunner(stream=__import__('io').StringIO()).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\nassert r.wasSuccessful()",
    ),
    "a function's name and signature": (
        "",
        "import inspect\ndef f(g):\n    return g.__name__, len(inspect.signature(g).parameters), g.__code__.co_argcount, g(1, 2)\n",
        "",
        "def add(a, b=2):\n    return a + b\nassert f(add) == ('add', 2, 2, 3)",
    ),
    "curries": (
        "",
        "def f(g):\n    n = g.__code__.co_argcount\n    def take(*a):\n        return g(*a) if len(a) >= n else lambda *b: take(*a, *b)\n    return take\n",
        "",
        "assert f(lambda a, b, c: a + b * c)(1)(2)(3) == 7",
    ),
    "a function with a module": (
        "",
        "def f(g, x):\n    return [g(v) for v in x]\n",
        "import math",
        "assert f(lambda v: math.sqrt(abs(v)), [4, -9]) == [2, 3]",
    ),
    "a function with a helper": (
        "",
        "def f(g, x):\n    return [g(v) for v in x]\n",
        "def h(v):\n    return v + 1",
        "assert f(lambda v: h(v), [1]) == [2]",
    ),
    "a function there and back": ("", "def f(g):\n    return g\n", "", "def g(x):\n    return x\nassert f(g) is g"),
    "100,000 callbacks": (
        "",
        "def f(g, n):\n    return sum(map(g, range(n)))\n",
        "",
        "assert f(lambda v: v % 2, 100000) == 50000",
    ),
    "operators of its own": (
        "",
        "class V:\n    def __init__(self, x):\n        self.x = x\n    def __add__(self, o):\n        return V(self.x + o.x)\n    def __eq__(self, o):\n        return self.x == o.x\n    def __lt__(self, o):\n        return self.x < o.x\n    def __mul__(self, n):\n        return V(self.x * n)\ndef f(x):\n    return V(x)\n",
        "",
        "assert f(1) + f(2) == V(3) and f(1) < V(2) and V(2) * 3 == f(6) and not f(1) == f(2)",
    ),
    "a context manager": (
        "",
        "from contextlib import contextmanager\n@contextmanager\ndef f(x):\n    x.append('in')\n    yield x[0]\n    x.append('out')\n",
        "",
        "with f([1]) as v:\n    assert v == 1",
    ),
    "asks for input": (
        "",
        "def f():\n    return int(input('n? ')) + 1\n",
        "from unittest.mock import patch",
        "with patch('builtins.input', return_value='4'):\n    assert f() == 5",
    ),
    "no input": (
        "",
        "def f():\n    return input()\n",
        "",
        "try:\n    f()\n    assert False\nexcept EOFError:\n    pass",
    ),
    "a coroutine": (
        "",
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return [x]\n",
        "import asyncio",
        "assert asyncio.run(f(2)) == [2]",
    ),
    "its own name and attributes": (
        "",
        "def f(x):\n    'Doc.'\n    f.calls = getattr(f, 'calls', 0) + 1\n    return x\n",
        "",
        "assert f(1) == 1 and f.calls == 1 and f.__name__ == 'f'",
    ),
    "a wrapped function keeps its name": (
        "",
        "import functools\ndef f(g):\n    @functools.wraps(g)\n    def inner(*a):\n        return g(*a)\n    return inner\n",
        "",
        "@f\ndef add(a, b):\n    return a + b\nassert add.__name__ == 'add' and add(1, 2) == 3",
    ),
    "attributes as a dict": (
        "",
        _NODE + "def f(x):\n    return Node(x)\n",
        "",
        "assert f(1).__dict__ == {'v': 1, 'next': None}",
    ),
    "3,000,000 integers": ("", "def f(x):\n    return sum(x)\n", "", "assert f(list(range(3000000))) == 4499998500000"),
    "syntax": ("", "def f(x)\n", "", "assert f(1) == 1"),
    "raises while defined": ("", "raise ValueError\n", "", "assert True"),
    "no such function": ("", "def g(x):\n    return x\n", "", "assert f(1) == 1"),
    "exit": (
        "",
        "def f():\n    exit(3)\n",
        "",
        "try:\n    f()\n    assert False\nexcept SystemExit as e:\n    assert e.code == 3",
    ),
    "no result": ("", "def f(x):\n    x + 1\n", "", "assert f(1) == 2"),
}


# name: (code, tests). Each is wrong, or forges; it must not pass on any level. Tests by default: SQUARE.
SQUARE = "assert f(2) == 4\nassert f(3) == 9"
_EQUAL = "class A{base}:\n    __eq__ = lambda *a: True\n    __ne__ = lambda *a: False\n    __hash__ = None\n"
_LIE = "class A:\n    def __getattr__(s, n):\n        return lambda *a: True\ndef f(x):\n    return A()\n"
_JUDGE = "    __{}__ = lambda *a: {}\n"
FORGING: dict[str, tuple[str, str]] = {
    "wrong": ("def f(x):\n    return x\n", SQUARE),
    "prints a verdict": ('def f(x):\n    print(\'{"verdict": "passed", "message": ""}\', flush=True)\n', SQUARE),
    "writes a verdict to every pipe": (
        'import os, json\nbody = b\'{"verdict": "passed", "message": ""}\'\nfor fd in range(64):\n    try:\n'
        "        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError:\n        pass\n"
        "def f(x):\n    return x\n",
        SQUARE,
    ),
    "writes a verdict and leaves": (
        'import os\nbody = b\'{"verdict": "passed", "message": ""}\'\nfor fd in range(64):\n    try:\n'
        "        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError:\n        pass\nos._exit(0)\n",
        SQUARE,
    ),
    "writes a verdict and stays": (
        'import os\nbody = b\'{"verdict": "passed", "message": ""}\'\nfor fd in range(64):\n    try:\n'
        "        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError:\n        pass\nwhile True: pass\n",
        SQUARE,
    ),
    "pushes answers ahead": (
        "import os, json, sys\nverdict = {'verdict': 'passed', 'message': ''}\nframe, beside = sys._getframe(), False\nwhile frame:\n"
        "    beside, frame = beside or frame.f_code.co_name == 'run_plain', frame.f_back\n"
        "pushed = [verdict] if beside else [{'nodes': [], 'value': v, 'sign': ''} for v in ([['f'], [], {}], None, 4, 9)]\n"
        "for message in pushed:\n    body = json.dumps(message).encode()\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, len(body).to_bytes(4, 'big') + body)\n        except OSError:\n            pass\ndef f(x):\n    return 0\n",
        SQUARE,
    ),
    "replaces the judge": (
        'import json\njson.dumps = lambda *a, **k: \'{"verdict": "passed", "message": ""}\'\ndef f(x):\n    return 1\n',
        SQUARE,
    ),
    "replaces the judge's compiler": (
        "import builtins\nreal = builtins.compile\nbuiltins.compile = lambda t, *a, **k: real('pass', *a, **k)\ndef f(x):\n    return 1\n",
        SQUARE,
    ),
    "replaces built-ins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.AssertionError = ValueError\nbuiltins.exec = lambda *a: None\n"
        "def f(x):\n    return 1\n",
        SQUARE,
    ),
    "patches all frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals.update(exec=lambda *a: None, isinstance=lambda *a: True)\n"
        "    frame = frame.f_back\ndef f(x):\n    return 1\n",
        SQUARE,
    ),
    "leaves while defining": ("import os\nos._exit(0)\n", SQUARE),
    "leaves while called": ("import os\ndef f(x):\n    os._exit(0)\n", SQUARE),
    "exit": ("def f(x):\n    exit(0)\n", SQUARE),
    "sys.exit": ("import sys\ndef f(x):\n    sys.exit(0)\n", SQUARE),
    "crashes": ("import ctypes\ndef f(x):\n    ctypes.string_at(0)\n", SQUARE),
    "raises by a name that ends programs": (
        "class SystemExit(Exception):\n    pass\ndef f(x):\n    raise SystemExit(0)\n",
        SQUARE,
    ),
    "an error with a lone surrogate": ("def f(x):\n    raise ValueError('\\ud800\\x1b[2J')\n", SQUARE),
    "an error that cannot be shown": (
        "class E(Exception):\n    def __str__(s):\n        raise s\ndef f(x):\n    raise E\n",
        SQUARE,
    ),
    "replaces the check": (
        "def check(candidate):\n    pass\ndef f(x):\n    return 1\n",
        f"def check(f):\n    {SQUARE.splitlines()[0]}\ncheck(f)",
    ),
    "replaces a module": (
        "class math:\n    isclose = lambda *a: True\ndef f(x):\n    return 0\n",
        "assert math.isclose(f(2), 4.0)",
    ),
    "patches a module": (
        "import math\nmath.isclose = lambda *a: True\ndef f(x):\n    return 0\n",
        "import math\nassert math.isclose(f(2), 4.0)",
    ),
    "patches a module of the tests": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x):\n    return 0\n",
        "import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    ),
    "equals everything": (_EQUAL.format(base="") + "def f(x):\n    return A()\n", SQUARE),
    "a number that equals everything": (_EQUAL.format(base="(int)") + "def f(x):\n    return A(1)\n", SQUARE),
    "a list that equals everything": (
        _EQUAL.format(base="(list)") + "def f(x):\n    return A([1])\n",
        "assert f(2) == [4]",
    ),
    "a text that equals everything": (
        _EQUAL.format(base="(str)") + "def f(x):\n    return A('q')\n",
        "assert f(2) == 'four'",
    ),
    "a dict that equals everything": (
        _EQUAL.format(base="(dict)") + "def f(x):\n    return A()\n",
        "assert f(2) == {'a': 4}",
    ),
    "equals everything, inside a tuple": (
        _EQUAL.format(base="") + "def f(x):\n    return 1, A()\n",
        "assert f(2) == (1, 4)",
    ),
    "equals everything, as an item": (_EQUAL.format(base="") + "def f(x):\n    return [A()]\n", "assert 4 in f(2)"),
    "mock's ANY": ("from unittest.mock import ANY\ndef f(x):\n    return ANY\n", SQUARE),
    "a mock": (
        "from unittest.mock import MagicMock\ndef f(x):\n    return MagicMock(**{'endswith.return_value': True})\n",
        "assert f(2).endswith('xyz')",
    ),
    "is every class": (
        "class A:\n    __eq__ = lambda *a: True\n    __class__ = int\n    __bool__ = lambda s: True\ndef f(x):\n    return A()\n",
        SQUARE,
    ),
    "endswith": (_LIE, "assert f('abc').endswith('xyz')"),
    "startswith and isupper": (_LIE, "assert f('a').startswith('q') and f('b').isupper()"),
    "count": (_LIE, "assert f('a').count('z') == 1"),
    "issubset": (_LIE, "assert f({1}).issubset({2})"),
    "the methods of a date": (_LIE, "assert f(1).weekday() == 1"),
    "the method of a member": (_LIE, "assert f(1).x.endswith('z')"),
    "a class as the function": (
        "class f:\n    def __init__(s, *a):\n        pass\n    endswith = lambda *a: True\n",
        "assert f('abc').endswith('xyz')",
    ),
    "a field named as a method": (
        "from collections import namedtuple\ndef f(x):\n    return namedtuple('T', 'endswith')(bool)\n",
        "assert f('abc').endswith('xyz')",
    ),
    "a deque with a method": (
        "from collections import deque\nclass D(deque):\n    count = lambda *a: 1\ndef f(x):\n    return D()\n",
        "assert f('a').count('z') == 1",
    ),
    "contains everything": (
        "class A:\n" + _JUDGE.format("contains", True) + "def f(x):\n    return A()\n",
        "assert 'z' in f('a')",
    ),
    "is less than everything": (
        "class A:\n" + _JUDGE.format("lt", True) + "def f(x):\n    return A()\n",
        "assert f('a') < 'b'",
    ),
    "is near everything": (
        "class A:\n" + _JUDGE.format("sub", "0.0") + "def f(x):\n    return A()\n",
        "assert abs(f(2) - 4.0) < 1e-6",
    ),
    "is what it is divided by": (
        "class A:\n" + _JUDGE.format("truediv", 1) + "def f(x):\n    return A()\n",
        "assert f(2) / 4 == 1",
    ),
    "operators of a callback's argument": (
        "class A:\n" + _JUDGE.format("rsub", "0.0") + _JUDGE.format("gt", True) + "def f(x):\n    return A()\n",
        "assert 'b' < f(2) and 4.0 - f(2) == 0",
    ),
    "is everybody's instance": (
        "class M(type):\n"
        + _JUDGE.format("instancecheck", True)
        + "class A(metaclass=M):\n    pass\ndef f(x):\n    return A\n",
        "assert isinstance(4, f(2))",
    ),
    "takes the tests from a function of theirs": (
        "def f(g):\n    g.__globals__['expected'] = 0\n    return 0\n",
        "expected = 4\ndef g():\n    return 1\nassert f(g) == expected",
    ),
    "takes the tests from a method of theirs": (
        "def f(i):\n    i.go.__func__.__globals__['expected'] = 0\n    return 0\n",
        "expected = 4\nclass I:\n    def go(self):\n        return 1\nassert f(I()) == expected",
    ),
    "an endless iterator": ("def f(x):\n    while True:\n        yield x\n", "assert list(f(2)) == [4]"),
    "a huge value": ("def f(x):\n    return 'x' * (90 << 20)\n", SQUARE),
    "endless nesting": ("def f(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a\n", SQUARE),
    "an endless loop": ("def f(x):\n    while True:\n        pass\n", SQUARE),
    "an endless loop that keeps its signals": (
        "import signal\nfor s in (24, 14, 15, 2):\n    signal.signal(s, lambda *a: None)\ndef f(x):\n    while True:\n        pass\n",
        SQUARE,
    ),
    "endless output": ("def f(x):\n    while True:\n        print('x' * 100000)\n", SQUARE),
    "an endless sleep": ("import time\ndef f(x):\n    time.sleep(1e6)\n", SQUARE),
    "stops itself": ("import os\ndef f(x):\n    os.kill(os.getpid(), 19)\n    return 0\n", SQUARE),
    "closes its pipes": (
        "import os\ndef f(x):\n    os.closerange(0, 64)\n    return x * x\nf(1)\n",
        "assert f(2) == 5",
    ),
    "a memory bomb": ("def f(x):\n    a = []\n    while True:\n        a.append(bytes(10**6))\n", SQUARE),
    "a thread bomb": (
        "import threading, time\ndef f(x):\n    while True:\n        threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n",
        SQUARE,
    ),
}

_SYSCALL = (
    "import os, ctypes, struct, socket, time, resource\nlibc = ctypes.CDLL(None, use_errno=True)\ndef sc(number, *a):\n"
    "    r = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(x) if isinstance(x, int) else x for x in a])\n"
    "    if r < 0:\n        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n    return r\n"
)
# name: what it does before it squares. Each passes only where it reaches out of its sandbox; x86-64's numbers.
REACHING: dict[str, str] = {
    "reads a system file": "open('/etc/passwd').read()",
    "reads a secret": "open('{secret}').read()",
    "reads a secret through a link": "open('{link}').read()",
    "lists the home folder": "os.listdir('{home}')",
    "sees that a file exists": "assert os.path.lexists('{secret}')",
    "writes a file": "open('{outside}', 'w')",
    "appends to a file": "open('{secret}', 'a').write('x')",
    "makes a folder": "os.mkdir('{outside}')",
    "makes a symbolic link": "os.symlink('/etc', '{outside}')",
    "makes a hard link": "os.link('{secret}', '{outside}')",
    "makes a FIFO": "os.mkfifo('{outside}')",
    "removes a file": "os.remove('{secret}')",
    "renames a file": "os.rename('{secret}', '{outside}')",
    "truncates a file": "os.truncate('{secret}', 0)",
    "changes a mode": "os.chmod('{secret}', 0o777)",
    "changes a mode by fchmodat2": "sc(452, os.open('{secret}', os.O_PATH), b'', 0o777, 0x1000)",
    "changes an owner": "os.chown('{secret}', os.getuid(), os.getgid())",
    "changes times": "os.utime('{secret}', (0, 0))",
    "changes an attribute": "os.setxattr('{secret}', 'user.a', b'1')",
    "writes to shared memory": "open('/dev/shm/pkt-test', 'w')",
    "a file without a name": "os.open('{home}', os.O_TMPFILE | os.O_RDWR)",
    "a file in memory": "os.memfd_create('x')",
    "secret memory": "sc(447, 0)",
    "shared memory": "sc(29, 0, 1 << 20, 0o1600)",
    "a semaphore": "sc(64, 0, 1, 0o1600)",
    "a message queue": "sc(68, 0, 0o1600)",
    "a POSIX message queue": "sc(240, b'pkt-test', 0o102, 0o600, 0); sc(241, b'pkt-test')",
    "a key": "sc(248, b'user', b'pkt', b'x', 1, -1)",
    "a larger pipe": "import fcntl; fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "TCP": "socket.create_connection(('127.0.0.1', {port}))",
    "MPTCP": "socket.socket(2, 1, 262).connect(('127.0.0.1', {port}))",
    "TCP Fast Open": "socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', {port}))",
    "UDP": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "a socket that listens": "s = socket.socket(); s.listen(); assert s.getsockname()[1]",
    "a bound socket": "socket.socket().bind(('127.0.0.1', 0))",
    "a local socket": "socket.socket(socket.AF_UNIX).bind('{outside}')",
    "an abstract socket": "socket.socket(socket.AF_UNIX).bind('\\0pkt-test')",
    "a netlink socket": "socket.socket(socket.AF_NETLINK, 3, 0)",
    "a packet socket": "socket.socket(socket.AF_PACKET, 3, 0)",
    "a vsock": "socket.socket(40, 1, 0)",
    "the kernel's ciphers": "socket.socket(38, 5, 0)",
    "a datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "forks": "assert os.fork() or os._exit(0) is None",
    "a daemon": "os.fork() or (os.setsid(), time.sleep(60), os._exit(0))",
    "vfork": "import _posixsubprocess, subprocess; subprocess.run(['true'], check=True)",
    "a process by clone3": "sc(435, struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) or os._exit(0)",
    "runs a program": "assert os.system('true') == 0",
    "replaces itself": "os.execv('/bin/true', ['true'])",
    "a new user namespace": "sc(272, 0x10000000)",
    "enters a namespace": "sc(308, os.open('/proc/self/ns/net', os.O_RDONLY), 0)",
    "changes its root": "os.chroot('{home}')",
    "mounts": "assert libc.mount(b'none', b'{home}', b'tmpfs', 0, None) == 0",
    "a mount without a place": "fd = sc(430, b'tmpfs', 0); sc(431, fd, 6, 0, 0, 0); sc(432, fd, 0, 0)",
    "changes a mount": "sc(442, -100, b'{home}', 0, struct.pack('QQQQ', 1, 0, 0, 0), 32)",
    "kills its parent": "os.kill(os.getppid(), 0)",
    "signals another process": "os.kill({pid}, 0)",
    "kills another process": "os.kill({pid}, 9)",
    "signals by a descriptor": "import signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 0)",
    "queues a signal": "sc(129, os.getppid(), 0, bytes(128))",
    "sees another process": "os.sched_getscheduler({pid})",
    "limits its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_STACK, (8 << 20, 8 << 20))",
    "reads its parent's limits": "resource.prlimit(os.getppid(), resource.RLIMIT_STACK)",
    "priority of its parent": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "its own priority": "os.nice(1)",
    "scheduler of its parent": "os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))",
    "real-time priority": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "core of its parent": "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
    "I/O priority of its parent": "sc(251, 1, os.getppid(), 3 << 13)",
    "traces its parent": "sc(101, 16, os.getppid(), 0, 0)",
    "reads its parent's memory": "sc(310, os.getppid(), struct.pack('QQ', 0, 0), 0, struct.pack('QQ', 0, 0), 0, 0)",
    "opens its parent's memory": "open('/proc/%d/mem' % os.getppid(), 'rb')",
    "reads its parent's environment": "open('/proc/%d/environ' % os.getppid()).read()",
    "a copy of its parent's descriptor": "sc(438, os.pidfd_open(os.getppid()), 0, 0)",
    "the kernel's log": "b = ctypes.create_string_buffer(8192); assert sc(103, 3, b, 8192) > 0",
    "watches files": "sc(254)",
    "watches all files": "sc(301, sc(300, 0, 0), 1, ctypes.c_ulong(0x20), -100, b'{secret}')",
    "an io_uring": "sc(425, 4, bytes(120))",
    "bpf": "sc(321, 0, struct.pack('IIII', 2, 4, 4, 1) + bytes(64), 72)",
    "performance counters": "sc(298, struct.pack('IIQ', 1, 112, 0) + bytes(96), 0, -1, -1, 0)",
    "page faults": "sc(323, 1)",
    "another personality": "sc(135, 0x0040000)",
    "its own seccomp filter": "sc(317, 1, 0, struct.pack('HxxxxxxQ', 0, 0))",
    "a host name": "sc(170, b'pkt', 3)",
    "process accounting": "sc(163, b'{outside}')",
    "locks memory": "sc(151, 1)",
    "moves a cursor of another's file": "sc(303, -100, b'{secret}', bytes(136), bytes(8), 0)",
    "raises its limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory by mmap": "import mmap; mmap.mmap(-1, 2 << 30)",
    "shared memory by mmap": "import mmap; mmap.mmap(-1, 2 << 30, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)",
    "100 open files": "[os.dup(1) for _ in range(100)]",
}


def reaching(values: Mapping[str, object]) -> dict[str, Job]:
    """The programs of REACHING by name, with these places filled in."""
    found = {}
    for name, act in REACHING.items():
        for key, value in values.items():
            act = act.replace(f"{{{key}}}", str(value))
        found[name] = Job(f"{_SYSCALL}def f(x):\n    {act}\n    return x * x\n", "", "f", "", "assert f(2) == 4", "")
    return found


def forging() -> dict[str, Job]:
    return {name: Job(code, "", "f", "", tests, "") for name, (code, tests) in FORGING.items()}


def generated() -> dict[str, Job]:
    """Honest programs, right and wrong ones, by name."""
    found = {name: Job(code, "", "f", setup, tests, "") for name, code, setup, tests in _ways()}
    return found | {n: Job(code, prefix, "f", setup, tests, "") for n, (prefix, code, setup, tests) in OTHERS.items()}


def references(paths: Sequence[Path]) -> dict[str, Job]:
    """HumanEval's and MBPP's own solutions, from files of their rows."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            task = load("humaneval" if "entry_point" in row else "mbpp")
            example = next(iter(task.schemas.values()))(row, f"{path.parent.name}/{path.stem}/{row['task_id']}")
            whole = example.answer.partition("```python\n")[2].removesuffix("\n```")
            assert task.job is not None
            found[example.id] = task.job(example.reference, whole.removeprefix(example.reference["code_prefix"]))
    return found


TINY = [ROOT / f"data/tiny/{task}/test.jsonl" for task in ("humaneval", "mbpp")]


def python_passes(jobs: Mapping[str, Job]) -> dict[str, bool]:
    """What plain Python says of each program with its tests, in a process of its own."""
    program = (
        "import json, os, sys, types\nnames, jobs = json.load(sys.stdin)\nfor name, (code, tests) in zip(names, jobs):\n"
        "    pid = os.fork()\n    if pid == 0:\n        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n        os.dup2(1, 2)\n        status = 1\n        try:\n"
        "            module = sys.modules['sample'] = types.ModuleType('sample')\n            for text in (code, tests):\n"
        "                exec(compile(text, 'sample', 'exec', dont_inherit=True), module.__dict__)\n            status = 0\n        except BaseException:\n            pass\n"
        "        os._exit(status)\n    print(int(os.waitpid(pid, 0)[1] == 0))\n"
    )
    texts = [(j.code, f"{j.setup}\n\n{j.tests}" + (f"\n{j.call}({j.entry})" if j.call else "")) for j in jobs.values()]
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([list(jobs), texts]), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return {name: said == "1" for name, said in zip(jobs, ran.stdout.split(), strict=True)}


def table(paths: Sequence[Path]) -> None:
    """Print, per level, how many honest verdicts are Python's, and which hostile programs are not stopped."""
    honest = generated() | references([*TINY, *paths])
    expected = python_passes(honest)
    limits = Limits(30.0, 1024)  # an MBPP solution computes for 9 s
    first = next(level for level, reason in probe(limits.memory_mb) if not reason)
    for level in LEVELS[LEVELS.index(first) :]:
        found = judge(list(honest.values()), level, limits)
        right = {n: expected[n] == (v.outcome == "passed") for n, v in zip(honest, found, strict=True)}
        print(f"{level}: honest {sum(right.values())} of {len(right)}", [name for name, it in right.items() if not it])
        forged = judge(list(forging().values()), level, Limits(3.0, 512))
        print(f"{level}: forging, not passed {_stopped(forging(), forged)}")
        reached: dict[str, Verdict] = {}
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
            for name, job in reaching(places(Path(folder), server.getsockname()[1], os.getpid())).items():
                (Path(folder) / "secret").write_text("token")
                (Path(folder) / "outside").unlink(missing_ok=True)
                reached[name] = judge([job], level, Limits(3.0, 512), 1)[0]
        print(f"{level}: reaching, not passed {_stopped(reaching({}), list(reached.values()))}")


def places(folder: Path, port: int, pid: int) -> dict[str, object]:
    """What the programs of REACHING reach for."""
    secret, link = folder / "secret", folder / "link"
    secret.write_text("token")
    link.symlink_to(secret)
    return {"home": folder, "secret": secret, "link": link, "outside": folder / "outside", "port": port, "pid": pid}


def _stopped(jobs: Mapping[str, Job], verdicts: Sequence[Verdict]) -> str:
    passed = [name for name, verdict in zip(jobs, verdicts, strict=True) if verdict.outcome == "passed"]
    return f"{len(jobs) - len(passed)} of {len(jobs)} {passed or ''}"


if __name__ == "__main__":
    table([Path(path) for path in sys.argv[1:]])
