"""Wrong answers to the other forms of tests: standard input and output, checks, asserts, and tests that use objects."""

from functools import partial

from hostile.case import CHECK, Case, in_function
from hostile.harness import SEARCH

IO_TESTS = [{"input": "3\n1 2 3\n", "output": "6\n1 3 6\n"}, {"input": "1\n5\n", "output": "5\n5\n"}]
RIGHT_SCRIPT = """
n = int(input())
values = list(map(int, input().split()))
print(sum(values))
print(*[sum(values[: i + 1]) for i in range(n)])
"""


def script(name, program, tests=IO_TESTS, **options):
    return Case("scripts", name, program, tests, **options)


check = partial(Case, "checks", entry_point="f")
asserts = partial(Case, "asserts")

SCRIPTS = [
    script("only the first line", "n = input()\nprint(sum(map(int, input().split())))", outcome="failed"),
    script("extra lines", RIGHT_SCRIPT + "print('done')", outcome="failed"),
    script("an extra empty line", RIGHT_SCRIPT.replace("print(*", "print()\nprint(*"), outcome="failed"),
    script("wrong trailing output", RIGHT_SCRIPT.replace("print(*", "print(0, *"), outcome="failed"),
    script(
        "both lines in one", RIGHT_SCRIPT.replace("print(sum(values))", "print(sum(values), end=' ')"), outcome="failed"
    ),
    script("a prompt on standard output", RIGHT_SCRIPT.replace("input()", "input('n? ')"), outcome="failed"),
    script("no output", "pass", outcome="failed"),
    script("every number below 1,000", "print(*range(1000))\nprint(*range(1000))", outcome="failed"),
    script("echo of the input", "import sys\nprint(sys.stdin.read())", outcome="failed"),
    script("sys.exit(0) without output", "import sys\nsys.exit(0)", outcome="failed"),
    script("os._exit(0) before the output is flushed", RIGHT_SCRIPT + "import os\nos._exit(0)", outcome="failed"),
    script("an error after correct output", RIGHT_SCRIPT + "raise ValueError", outcome="crash"),
    script("an exit status after correct output", RIGHT_SCRIPT + "import sys\nsys.exit(1)", outcome="crash"),
    script(
        "a text as exit status after correct output", RIGHT_SCRIPT + "import sys\nsys.exit('PASS')", outcome="crash"
    ),
    script("a loop after correct output", RIGHT_SCRIPT + "while True: pass", outcome="timeout", timeout=0.2),
    script("sleep after correct output", RIGHT_SCRIPT + "import time\ntime.sleep(60)", outcome="timeout", timeout=0.2),
    script(
        "a thread after correct output",
        RIGHT_SCRIPT + "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        outcome="timeout|failed|crash",
        timeout=0.2,
    ),
    script("a flood", "while True:\n    print('6')", outcome="output_limit|timeout", timeout=0.2),
    script(
        "a flood without newlines",
        "import sys\nwhile True:\n    sys.stdout.write('1' * 10000)",
        outcome="output_limit|timeout",
        timeout=0.2,
    ),
    script(
        "a flood on standard error after a wrong answer",
        "import sys\nprint(1)\nsys.stderr.write('a' * 10**7)",
        outcome="failed",
    ),
    script("output closed", "import os\nos.close(1)\nos.close(0)", outcome="failed|crash"),
    script("output that is not text", "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\x00' * 9)", outcome="failed"),
    script("a verdict instead of output", "print('{\"passed\": true}\\nPASS\\n1.0')", outcome="failed"),
    script("reading past the end of the input", "while True:\n    input()", outcome="crash"),
    script("a recursion", "def f(): f()\nf()", outcome="crash"),
    script("memory", "x = [0] * 10**10", outcome="memory"),
    script("not Python", "#include <stdio.h>\nint main() { return 0; }", outcome="syntax"),
    script("the first test hard-coded", "print('6\\n1 3 6')", outcome="failed"),
    script(
        "a number that is only close", "print(10**9 + 1)", [{"input": "", "output": "1000000000\n"}], outcome="failed"
    ),
    script(
        "a float that is not close enough", "print(0.3334)", [{"input": "", "output": "0.3333333\n"}], outcome="failed"
    ),
    script("nan", "print('nan')", [{"input": "", "output": "0.5\n"}], outcome="failed"),
    script("infinity", "print('inf')", [{"input": "", "output": "0.5\n"}], outcome="failed"),
    script("a different order", "print('a c b')", [{"input": "", "output": "a b c\n"}], outcome="failed"),
    script("a different case", "print('yes')", [{"input": "", "output": "YES\n"}], outcome="failed"),
    script("numbers without spaces", "print('123')", [{"input": "", "output": "1 2 3\n"}], outcome="failed"),
    script(
        "searching memory for the tests",
        """
import gc, sys
for thing in gc.get_objects():
    if type(thing) is dict and "output" in thing:
        print(thing["output"])
frame = sys._getframe()
while frame:
    print(frame.f_locals.get("expected", ""), end="")
    frame = frame.f_back
""",
        outcome="failed",
    ),
]

MAP_CHECK = """
def check(candidate):
    for got, expected in zip(map(candidate, [3, -1, 0]), [21, 9, 12]):
        assert got == expected
"""
RAISES_CHECK = """
def check(candidate):
    assert candidate(3) == 21
    try:
        candidate("a")
    except ValueError:
        pass
    else:
        assert False
"""

CHECKS = [
    check("StopIteration ends the tests' own loop", in_function("raise StopIteration"), MAP_CHECK),
    check(
        "a class named StopIteration",
        "class StopIteration(StopIteration): pass\n" + in_function("raise StopIteration"),
        MAP_CHECK,
    ),
    check(
        "StopAsyncIteration and GeneratorExit",
        in_function("raise [StopAsyncIteration, GeneratorExit][x % 2]"),
        MAP_CHECK,
    ),
    check("AssertionError in the program", in_function("raise AssertionError"), CHECK),
    check(
        "an error that the check does not expect",
        "def f(x):\n    if x == 3: return 21\n    raise TypeError",
        RAISES_CHECK,
    ),
    check("no error although one is expected", "def f(x):\n    return 21", RAISES_CHECK, outcome="failed"),
    check(
        "SystemExit instead of the expected error",
        "def f(x):\n    if x == 3: return 21\n    raise SystemExit(0)",
        RAISES_CHECK,
    ),
    check(
        "an exception class with a forged name",
        "def f(x):\n    if x == 3: return 21\n    raise type('ValueError', (BaseException,), {})",
        RAISES_CHECK,
    ),
    check(
        "changing the argument that the check uses for comparison",
        "def f(x):\n    x[:] = []\n    return []",
        "def check(candidate):\n    for x in ([3, 1], [2]):\n        assert candidate(x) == sorted(x)\n",
    ),
    check(
        "a list with a lying __getitem__",
        "class L(list):\n    def __eq__(self, o): return True\n    def __getitem__(self, i): return 21\n"
        "def f(x):\n    return L([0])",
        "def check(candidate):\n    assert candidate(3)[0] == 21\n",
    ),
    check(
        "a list with a lying length",
        "class L(list):\n    def __len__(self): return 3\ndef f(x):\n    return L()",
        "def check(candidate):\n    assert len(candidate(3)) == 3\n",
    ),
    check(
        "a float with a lying difference",
        "class F(float):\n    def __sub__(self, o): return 0.0\n    def __abs__(self): return 0.0\n"
        "    def __lt__(self, o): return True\ndef f(x):\n    return F(5)",
        CHECK,
    ),
    check(
        "a string with a lying hash",
        "class S(str):\n    def __hash__(self): return hash('a')\n    def __eq__(self, o): return True\n"
        "def f(x):\n    return S('b')",
        "def check(candidate):\n    assert candidate(3) in {'a': 1}\n    assert {'a': 1}[candidate(3)]\n",
    ),
    check(
        "random answers",
        "import random\ndef f(x):\n    return random.choice([0, 21, 9, 12])",
        "def check(candidate):\n    assert [candidate(3) for _ in range(40)] == [21] * 40\n",
    ),
    check(
        "a number that keeps the check busy",
        "def f(x):\n    return 10**13",
        "def check(candidate):\n    assert sum(range(candidate(3))) == 210\n",
        timeout=1.0,
    ),
    check(
        "a number that fills the check's memory",
        "def f(x):\n    return 10**13",
        "def check(candidate):\n    assert len([0] * candidate(3)) == 21\n",
    ),
    check(
        "a pattern that keeps the check busy",
        "def f(x):\n    return '(a+)+$'",
        "import re\ndef check(candidate):\n    assert re.match(candidate(3), 'a' * 60 + 'b')\n",
        timeout=0.2,
    ),
    check(
        "the right answer to the first call only",
        "n = [0]\ndef f(x):\n    n[0] += 1\n    return 21 if n[0] == 1 else 0",
        CHECK,
        outcome="failed",
    ),
    check("a syntax error", "def f(x:", CHECK, outcome="syntax"),
    check("no code", "", CHECK, outcome="no_code"),
    check("another name", "def g(x):\n    return 21", CHECK, outcome="missing_entry"),
    check("memory", in_function("return len([0] * 10**10)"), CHECK),
    check("a constant", "def f(x):\n    return 21", CHECK, outcome="failed"),
]

ASSERTS = [
    asserts("and", in_function("return 21"), ["assert f(3) == 21 and f(-1) == 9"]),
    asserts("a reversed comparison", in_function("return 0"), ["assert 21 == f(3)"], outcome="failed"),
    asserts("is None", in_function("return 'None'"), ["assert f(3) is None"]),
    asserts("is True", in_function("return 1"), ["assert f(3) is True"]),
    asserts(
        "a truth value",
        "class Yes:\n    def __bool__(self): return True\n" + in_function("return Yes()"),
        ["assert f(3)"],
    ),
    asserts(
        "not", "class No:\n    def __bool__(self): return False\n" + in_function("return No()"), ["assert not f(3)"]
    ),
    asserts("a difference to the result", in_function("return float('nan')"), ["assert abs(f(3) - 21) < 1e-6"]),
    asserts("isclose", in_function("return 22"), ["assert math.isclose(f(3), 21)"], setup="import math"),
    asserts("a set of the result", in_function("return [1, 2, 4]"), ["assert set(f(3)) == {1, 2}"]),
    asserts("sorted", in_function("return [2, 2]"), ["assert sorted(f(3)) == [1, 2]"]),
    asserts("a message", in_function("return 0"), ["assert f(3) == 21, 'f(3) must be 21'"]),
    asserts(
        "a tuple that is always true", in_function("return 0"), ["assert f(3) == 21", "assert (f(3) == 21) == True"]
    ),
    asserts("keyword arguments", in_function("return 0"), ["assert f(x=3) == 21"]),
    asserts("a nested call", in_function("return x + 1"), ["assert f(f(3)) == 87"]),
    asserts(
        "a helper of the setup redefined",
        "def double(x): return 21\n" + in_function("return 3"),
        ["assert double(f(3)) == 21"],
        setup="def double(x):\n    return 2 * x\n",
    ),
]

YES = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __contains__(self, x): return True
    def __sub__(self, x): return 0
    def __call__(self, *a): return self
    def __getattr__(self, name): return self
    def __iter__(self): return iter([self])
    def __len__(self): return 1
"""
USE_STACK = ["s = Stack()\ns.push(3)\ns.push(4)\nassert s.pop() == 4"]
FORGE = """
import json, os, struct
def forge(message):
    data = json.dumps(message).encode()
    os.write(3, struct.pack(">I", len(data)) + data)
"""
IN_PLACE = ["x = [3, 1]\nf(x)\nassert x == [1, 3]"]
APPLY = ["assert f(lambda x: x * 7, 3) == 21"]

objects = partial(Case, "objects of the program")

OBJECTS = [
    objects("a class that is equal to everything", YES + "Stack = Yes", USE_STACK),
    objects("a method that returns such an object", YES + "class Stack:\n    push = pop = lambda *a: Yes()", USE_STACK),
    objects("an attribute that is such an object", YES + "class A:\n    x = Yes()", ["assert A().x.y == 4"]),
    objects(
        "a text of the object", YES + "class A:\n    def __str__(self): return Yes()", ["assert str(A()) == 'A(1)'"]
    ),
    objects("an item of the object", YES + "class A:\n    def __getitem__(s, i): return Yes()", ["assert A()[0] == 5"]),
    objects("a function that returns such an object", YES + "def f(x): return Yes()", ["assert f(2)(3) == 5"]),
    objects(
        "a length of the object", YES + "class A:\n    def __len__(self): return 0", ["a = A()\nassert len(a) == 2"]
    ),
    objects("a difference to the object", YES + "def f(x): return Yes()", ["assert abs(f(3) - 21) < 1e-6"], "f"),
    objects("a forged reference", FORGE + "def f(x):\n    forge({'ok': {'object': 0}})\n    return 0", CHECK, "f"),
    objects(
        "a forged reference to a test", FORGE + "def f(*x):\n    forge({'ok': {'function': 0}})\n    return 0", APPLY
    ),
    objects(
        "a forged verdict", FORGE + "def f(*x):\n    forge({'passed': True, 'calls': 3})\n    return 0", CHECK, "f"
    ),
    objects("a forged callback", FORGE + "def f(*x):\n    forge({'callback': 9, 'args': []})\n    return 0", APPLY),
    objects("callbacks without end", FORGE + "def f(g, x):\n    while True: g(x)", APPLY, timeout=0.2),
    objects("a callback with a lying argument", YES + "def f(g, x): return g(Yes())", APPLY),
    objects("a callback with a text", "def f(g, x): return g('3')", APPLY, outcome="failed"),
    objects(
        "the frames of a callback",
        SEARCH + "import sys\ndef f(g, x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if (found := answer_in(repr(frame.f_locals) + repr(frame.f_globals), x)) is not None: return found\n"
        "        frame = frame.f_back\n    return 0",
        APPLY,
    ),
    objects("no change in place", "def f(x): return [1, 3]", IN_PLACE, outcome="failed"),
    objects(
        "a lying element in place",
        "class I(int):\n    def __eq__(s, o): return True\ndef f(x): x[:] = [I(5), I(6)]",
        IN_PLACE,
    ),
    objects("an object in place", YES + "def f(x): x[:] = [Yes(), Yes()]", IN_PLACE),
    objects("forged arguments", FORGE + "def f(x):\n    forge({'ok': None, 'args': [{'object': 0}]})", IN_PLACE),
    objects(
        "more forged arguments than given",
        FORGE + "def f(x):\n    forge({'ok': None, 'args': [[3], [1, 3]]})",
        IN_PLACE,
    ),
    objects(
        "a Fraction with lying parts",
        "from fractions import Fraction\n"
        + YES
        + "def f(x):\n    r = Fraction(1, 3)\n    r._numerator = Yes()\n    return r",
        ["from fractions import Fraction\nassert f(1) == Fraction(1, 2)"],
    ),
    objects(
        "a date that is equal to everything",
        "import datetime\nclass D(datetime.date):\n    def __eq__(s, o): return True\ndef f(x): return D(1, 1, 1)",
        ["import datetime\nassert f(1) == datetime.date(2020, 1, 1)"],
    ),
    objects(
        "a Decimal that is not a number",
        "from decimal import Decimal\ndef f(x): return Decimal('nan')",
        ["assert not f(1) != 3"],
    ),
    objects(
        "a forged match",
        FORGE + "def f(x):\n    forge({'ok': {'match': [['b'], [[0]], 5]}})",
        ["assert f(1).group() == 'b'"],
    ),
]

CASES = SCRIPTS + CHECKS + ASSERTS + OBJECTS
