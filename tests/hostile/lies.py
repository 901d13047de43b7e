"""Attacks on the score from inside the program: exiting early, and objects that lie about their value."""

from functools import partial

from hostile.case import CHECK, Case, in_function

early = partial(Case, "early exit")
lying = partial(Case, "lying objects")

EARLY_EXIT = [
    early("sys.exit(0) at import", "import sys\nsys.exit(0)", outcome="crash"),
    early("sys.exit(0) in the function", in_function("sys.exit(0)", header="import sys"), outcome="crash"),
    early("os._exit(0) at import", "import os\nos._exit(0)", outcome="crash"),
    early("os._exit(0) in the function", in_function("os._exit(0)", header="import os"), outcome="crash"),
    early("os._exit(0) in a check", in_function("import os\nos._exit(0)"), CHECK, "f"),
    early("raise SystemExit", "raise SystemExit", outcome="crash"),
    early("raise SystemExit(0) in the function", in_function("raise SystemExit(0)"), outcome="crash"),
    early("SystemExit in a check", in_function("raise SystemExit(0)"), CHECK, "f"),
    early("exit() and quit()", in_function("exit(0)\nquit(0)"), outcome="crash"),
    early("the C library's _exit", in_function("ctypes.CDLL(None)._exit(0)", header="import ctypes"), outcome="crash"),
    early("the system call exit_group", in_function("ctypes.CDLL(None).syscall(231, 0)", header="import ctypes")),
    early(
        "atexit",
        """
import atexit, os, sys
atexit.register(lambda: (print("passed 2 tests", flush=True), os._exit(0)))
def f(x):
    sys.exit(0)
""",
        outcome="crash",
    ),
    early(
        "an object's __del__",
        """
import os, sys
class Last:
    def __del__(self):
        os._exit(0)
last = Last()
def f(x):
    sys.exit(0)
""",
        outcome="crash",
    ),
    early(
        "unittest.SkipTest",
        in_function("raise unittest.SkipTest('not today')", header="import unittest"),
        outcome="crash",
    ),
    early("SkipTest in a check", in_function("raise unittest.SkipTest", header="import unittest"), CHECK, "f"),
    early("KeyboardInterrupt", in_function("raise KeyboardInterrupt"), outcome="crash"),
    early("KeyboardInterrupt at import, in a check", "def f(x): return 0\nraise KeyboardInterrupt", CHECK, "f"),
    early("GeneratorExit", in_function("raise GeneratorExit"), outcome="crash"),
    early("an exception outside Exception", in_function("raise E", header="class E(BaseException): pass")),
    early("SIGINT to its own process", in_function("signal.raise_signal(signal.SIGINT)", header="import signal")),
    early(
        "an exception whose text cannot be read",
        """
class E(Exception):
    def __str__(self):
        raise SystemExit(0)
    __repr__ = __str__
def f(x):
    raise E
""",
    ),
    early(
        "an exception whose text has terminal escapes",
        in_function(r"raise ValueError('\x1b[2J\x1b]0;passed\x07\npassed 2 tests\r\udcff' + 'a' * 10000)"),
        outcome="crash",
    ),
    early("an exception named passed", in_function("raise passed('1.0')", header="class passed(Exception): pass")),
    early("sys.excepthook", in_function("1 / 0", header="import os, sys\nsys.excepthook = lambda *_: os._exit(0)")),
]

ALWAYS = """
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 21
    def __bool__(self): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __sub__
    def __abs__(self): return 0
    def __int__(self): return 21
    def __float__(self): return 21.0
    def __index__(self): return 21
    def __repr__(self): return "21"
    __str__ = __repr__
    def __iter__(self): return iter([21])
    def __len__(self): return 1
    def __reduce__(self): return (int, (21,))
"""


def always(base: str, expression: str, expected: str = "[1, 2]") -> dict:
    """Return answer and tests. The answer returns `expression`; Yes, a subclass of `base`, is equal to everything."""
    answer = f"class Yes({base}):{ALWAYS}\ndef f(x):\n    return {expression}\n"
    return {"answer": answer, "tests": [f"assert f(3) == {expected}"]}


LYING = [
    lying("__eq__ always true", **always("object", "Yes()", "21"), outcome="bad_type"),
    lying("__eq__ always true, in a check", always("object", "Yes()")["answer"], CHECK, "f"),
    lying("__eq__ always true, an int", **always("int", "Yes(5)", "21"), outcome="failed"),
    lying("__eq__ always true, an int in a check", always("int", "Yes(5)")["answer"], CHECK, "f"),
    lying("__eq__ always true, a float", **always("float", "Yes(5)", "21.0"), outcome="failed"),
    lying("__eq__ always true, a str", **always("str", "Yes('b')", "'a'"), outcome="failed"),
    lying("__eq__ always true, bytes", **always("bytes", "Yes(b'b')", "b'a'"), outcome="failed"),
    lying("__eq__ always true, a list", **always("list", "Yes([5])"), outcome="failed"),
    lying("__eq__ always true, a tuple", **always("tuple", "Yes([5])", "(1, 2)"), outcome="failed"),
    lying("__eq__ always true, a dict", **always("dict", "Yes(a=5)", "{'a': 1}"), outcome="failed"),
    lying("__eq__ always true, a set", **always("set", "Yes([5])", "{1, 2}"), outcome="failed"),
    lying("__eq__ always true, elements of a list", **always("int", "[Yes(5), Yes(6)]"), outcome="failed"),
    lying("__eq__ always true, keys of a dict", **always("str", "{Yes('b'): 1}", "{'a': 1}"), outcome="failed"),
    lying("unittest.mock.ANY", "from unittest.mock import ANY\ndef f(x):\n    return ANY", outcome="bad_type"),
    lying("nan", "def f(x):\n    return float('nan')", outcome="failed"),
    lying("nan in a check of a difference", "def f(x):\n    return float('nan')", CHECK, "f"),
    lying("a list of nan", "def f(x):\n    return [float('nan')] * 2", ["assert f(3) == [1.0, 2.0]"]),
    lying(
        "__repr__ that prints the answer",
        "class R:\n    def __repr__(self):\n        print('21')\n        return '21'\ndef f(x):\n    return R()",
        outcome="bad_type",
    ),
    lying("a str that looks like the number", "def f(x):\n    return str((x + 4) * 3)", outcome="failed"),
    lying("True instead of 1", "def f(x):\n    return x == 3", ["assert f(3) == 1"], outcome="failed"),
    lying("1 instead of True", "def f(x):\n    return 1", ["assert f(3) == True"], outcome="failed"),
    lying("a complex number instead of an integer", "def f(x):\n    return complex((x + 4) * 3)", outcome="failed"),
    lying(
        "a number that is only close",
        "def f(x):\n    return x + 10**15 + 1",
        ["assert f(0) == 10**15"],
        outcome="failed",
    ),
    lying(
        "an object that claims to be an int",
        f"class Meta(type):\n    def __eq__(self, other): return True\n    def __hash__(self): return hash(int)\n"
        f"    def __instancecheck__(self, x): return True\n    def __subclasscheck__(self, x): return True\n"
        f"class Yes(metaclass=Meta):{ALWAYS}\n    __class__ = int\ndef f(x):\n    return Yes()\n",
    ),
    lying(
        "a dict whose keys collide",
        "class K(str):\n    def __eq__(self, other): return False\n    def __hash__(self): return id(self)\n"
        "def f(x):\n    return {K('a'): 1, K('a'): 2, K('b'): 3}\n",
        ["assert f(3) == {'a': 1, 'b': 3}"],
    ),
    lying("a generator instead of a list", "def f(x):\n    yield 1\n    yield 2", ["assert f(3) == [1, 2]"]),
    lying("a range instead of a list", "def f(x):\n    return range(1, 3)", ["assert f(3) == [1, 2]"]),
    lying(
        "an iterator instead of a list",
        "def f(x):\n    return map(abs, [1, 2])",
        ["assert f(3) == [1, 2]"],
        outcome="failed|bad_type",
    ),
    lying(
        "zip instead of a list",
        "def f(x):\n    return zip([1], [2])",
        ["assert f(3) == [(1, 2)]"],
        outcome="failed|bad_type",
    ),
    lying(
        "the text of a range",
        "def f(x):\n    return range(1, 3)",
        ["assert f(3) == 'range(1, 3)'"],
        outcome="failed|bad_type",
    ),
    lying(
        "the text of a view",
        "def f(x):\n    return {}.keys()",
        ["assert f(3) == 'dict_keys([])'"],
        outcome="failed|bad_type",
    ),
    lying(
        "an iterator instead of a list, in a check",
        "def f(x):\n    return map(abs, [1, 2])",
        "def check(candidate):\n    y = candidate(3)\n    assert y == [1, 2]\n",
        "f",
    ),
    lying("a tuple instead of a list", "def f(x):\n    return (1, 2)", ["assert f(3) == [1, 2]"], outcome="failed"),
    lying("a lying Fraction", **always("__import__('fractions').Fraction", "Yes(1, 3)", "21")),
    lying("a lying Decimal", **always("__import__('decimal').Decimal", "Yes(1)", "21")),
    lying(
        "a generator that changes the returned value",
        in_function(
            "rows = [0]\n"
            "def later():\n    rows[0] = 21\n    rows.append(21)\n    yield 1\n"
            "rows.append(later())\nreturn rows"
        ),
        ["assert f(3) == [21]"],
    ),
]

CASES = EARLY_EXIT + LYING
