"""Honest programs, which must pass: in bubblewrap, and in Monty unless it lacks a feature that they use."""

from functools import partial

from hostile.case import CHECK, RIGHT, Case
from hostile.forms import IO_TESTS, RAISES_CHECK, RIGHT_SCRIPT
from hostile.processes import LEAVE

honest = partial(Case, "honest", score=1.0, outcome="passed", timeout=1.0)
cpython = partial(honest, monty="unsupported")

FILL = """
for i in range(20):
    with open(f"fill{i}", "wb") as file:
        file.write(bytes(2**20 * 4))
def f(x): return 0
"""

CASES = [
    honest("a small function", RIGHT, monty="passed"),
    honest("prints", 'def f(x):\n    print("working on", x)\n    return (x + 4) * 3\nprint("ready")', monty="passed"),
    honest("many prints", "def f(x):\n    for i in range(5000):\n        print(i)\n    return (x + 4) * 3"),
    honest("text around a fence", f"Add four, then:\n```python\n{RIGHT}```\nThat is **all**.", monty="passed"),
    honest("an unclosed fence", f"```python\n{RIGHT}", monty="passed"),
    honest(
        "two fences, the last is an example",
        f"```python\n{RIGHT}```\nFor example:\n```\n>>> f(3)\n21\n```",
        monty="passed",
    ),
    honest(
        "thinking with another program in it",
        f"<think>```python\ndef f(x): return 0\n```</think>```python\n{RIGHT}```",
        monty="passed",
    ),
    honest(
        "a fence within a list",
        "1. Add four:\n\n   ```python\n   def f(x):\n       return (x + 4) * 3\n   ```\n\n2. Done.",
        monty="passed",
    ),
    honest("Windows line ends", RIGHT.replace("\n", "\r\n")),
    honest(
        "a comment in other alphabets", "# -*- coding: utf-8 -*-\n# Größe, 大きさ, размер\n" + RIGHT, monty="passed"
    ),
    honest("its tests below it", RIGHT + "\nassert f(3) == 21\nprint(f(0))\n", monty="passed"),
    honest("a __main__ guard", RIGHT + 'if __name__ == "__main__":\n    print(f(int(input())))\n'),
    cpython(
        "threads",
        """
import threading
def f(x):
    found = []
    threads = [threading.Thread(target=lambda: found.append((x + 4) * 3)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0]
""",
    ),
    cpython(
        "a pool of threads",
        """
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda i: x + 4, range(3)))
""",
    ),
    cpython(
        "deep recursion",
        """
import sys
sys.setrecursionlimit(20000)
def down(n):
    return 0 if n == 0 else 1 + down(n - 1)
def f(x):
    return (x + down(9000) - 8996) * 3
""",
    ),
    cpython(
        "deep recursion in a thread with a large stack",
        """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)
def down(n):
    return 0 if n == 0 else 1 + down(n - 1)
def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(down(20000)))
    thread.start()
    thread.join()
    return (x + found[0] - 19996) * 3
""",
    ),
    honest(
        "asyncio",
        """
import asyncio
async def later(x):
    await asyncio.sleep(0.01)
    return (x + 4) * 3
def f(x):
    return asyncio.run(later(x))
""",
    ),
    cpython(
        "tempfile",
        """
import os, tempfile
def f(x):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.txt")
        with open(path, "w") as file:
            file.write("12")
        with tempfile.NamedTemporaryFile("w+") as file, open(path) as other:
            file.write(other.read())
            file.seek(0)
            return int(file.read()) + x * 3
""",
    ),
    cpython(
        "requesting a larger stack",
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\nsys.setrecursionlimit(10**6)\n"
        + RIGHT,
    ),
    cpython(
        "tempfile after another program filled the folder",
        """
import tempfile
def f(x):
    with tempfile.TemporaryFile() as file:
        file.write(bytes(2**20))
        return (x + 4) * 3
""",
        previous=FILL,
    ),
    cpython(
        "heapq after another program left one",
        """
import heapq
def f(x):
    rows = [5, 4 + x, 9]
    heapq.heapify(rows)
    return heapq.nsmallest(1, [3 * (x + 4)])[0]
""",
        previous=LEAVE,
    ),
    honest(
        "100 MB of data",
        "def f(x):\n    data = list(range(3_000_000))\n    return (x + len(data) - 2_999_996) * 3",
        monty="",
    ),
    cpython(
        "100 MB of bytes",
        "def f(x):\n    data = bytearray(10**8)\n    data[-1] = 4\n    return (x + data[10**8 - 1]) * 3\nimport heapq",
    ),
    cpython("generators", "def numbers(x):\n    yield x\n    yield 4\ndef f(x):\n    return sum(numbers(x)) * 3"),
    cpython(
        "classes with inheritance",
        """
class Shape:
    def area(self): return self.a * 3
class Square(Shape):
    def __init__(self, a): self.a = a
    def area(self): return super().area()
def f(x):
    return Square(x + 4).area()
""",
    ),
    cpython(
        "dataclasses, enumerations and caches",
        """
import enum, functools
from dataclasses import dataclass
class Sign(enum.IntEnum):
    THREE = 3
@dataclass(frozen=True)
class P:
    x: int
@functools.lru_cache(maxsize=None)
def f(x):
    return (P(x).x + 4) * Sign.THREE
""",
    ),
    cpython(
        "a Counter",
        "from collections import Counter\nimport heapq\ndef f(x):\n    return Counter(x)",
        ["assert f('aab') == {'a': 2, 'b': 1}"],
    ),
    cpython(
        "a defaultdict",
        "from collections import defaultdict\nimport heapq\n"
        "def f(x):\n    d = defaultdict(list)\n    d[x].append(1)\n    return d",
        ["assert f(3) == {3: [1]}"],
    ),
    cpython(
        "a namedtuple",
        "from collections import namedtuple\nimport heapq\nP = namedtuple('P', 'a b')\ndef f(x):\n    return P(x, 4)",
        ["assert f(3) == (3, 4)"],
    ),
    honest(
        "every plain type",
        "def f(x):\n    return [x, 1.5, 'a', b'b', None, True, (1,), {2: [3]}, {4}]",
        ["assert f(3) == [3, 1.5, 'a', b'b', None, True, (1,), {2: [3]}, {4}]"],
    ),
    honest("a float that is close", "def f(x):\n    return sum([0.1] * 10)", ["assert f(3) == 1.0"], monty="passed"),
    honest("an integer instead of a float", "def f(x):\n    return 6 // 2", ["assert f(3) == 3.0"], monty="passed"),
    honest(
        "a large int and a long text",
        "def f(x):\n    return [2**200, 'a' * 20000]",
        ["assert f(3) == [2**200, 'a' * 20000]"],
    ),
    honest(
        "argument and result are the same list",
        "def f(x):\n    x.append(1)\n    return x",
        ["assert f([1]) == [1, 1]"],
        monty="passed",
    ),
    honest("a check", RIGHT, CHECK, "f"),
    honest("an error that the check expects", "def f(x):\n    return (int(x) + 4) * 3", RAISES_CHECK, "f"),
    honest(
        "a starter that the answer continues",
        "    return (x + 4) * 3",
        CHECK,
        "f",
        starter="def f(x):\n    '''Add four, times three.'''\n",
    ),
    honest("a helper of the setup", "def f(x):\n    return triple(x + 4)", setup="def triple(x):\n    return 3 * x\n"),
    honest(
        "tests as arguments and results", RIGHT, [{"args": [3], "expected": 21}, {"args": [-1], "expected": 9}], "f"
    ),
    *(
        honest(name, program, tests)
        for name, program, tests in [
            ("a script", RIGHT_SCRIPT, IO_TESTS),
            ("a script with sys.exit(0)", RIGHT_SCRIPT + "import sys\nsys.exit(0)", IO_TESTS),
            (
                "a script with a __main__ guard",
                "def main():\n" + RIGHT_SCRIPT.replace("\n", "\n    ") + "\nif __name__ == '__main__':\n    main()",
                IO_TESTS,
            ),
            (
                "a script that leaves with os._exit",
                "import os\nimport sys\n" + RIGHT_SCRIPT + "sys.stdout.flush()\nos._exit(0)",
                IO_TESTS,
            ),
            (
                "a script that reads everything at once",
                "import sys\nn, *v = map(int, sys.stdin.read().split())\nprint(sum(v))\n"
                "print(*[sum(v[:i + 1]) for i in range(n)])",
                IO_TESTS,
            ),
            (
                "a script that reads bytes",
                "import sys\nn, *v = map(int, sys.stdin.buffer.read().split())\n"
                "sys.stdout.write(f'{sum(v)}\\n' + ' '.join(str(sum(v[:i + 1])) for i in range(n)))",
                IO_TESTS,
            ),
            (
                "a script that writes to standard error",
                RIGHT_SCRIPT + "import sys\nprint('done', file=sys.stderr)",
                IO_TESTS,
            ),
            (
                "a script whose work is in a thread",
                "import threading\ndef main():\n"
                + RIGHT_SCRIPT.replace("\n", "\n    ")
                + "\nthreading.Thread(target=main).start()",
                IO_TESTS,
            ),
            (
                "a script that writes at exit",
                "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
                "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n" + RIGHT_SCRIPT,
                IO_TESTS,
            ),
            (
                "a script that reopens its output",
                "import sys\nsys.stdout = open(1, 'w', closefd=False)\n" + RIGHT_SCRIPT,
                IO_TESTS,
            ),
            (
                "a script that redefines input",
                "import sys, os\ninput = iter(os.read(0, 10**6).decode().splitlines()).__next__\n" + RIGHT_SCRIPT,
                IO_TESTS,
            ),
            (
                "a script with trailing spaces",
                RIGHT_SCRIPT.replace("print(sum(values))", "print(sum(values), '')"),
                IO_TESTS,
            ),
            ("a script with a float that is close", "print(1 / 3)", [{"input": "", "output": "0.33333333\n"}]),
            ("a script with another number format", "print('1.50 2')", [{"input": "", "output": "1.5 2\n"}]),
        ]
    ),
]
