"""The sandbox's tiers: when a pass in Monty counts, which block is the program, and a bubblewrap that does not run."""

import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from grading import Ungraded, grade_code
from grading.sandbox.cases import parse_python
from grading.sandbox.code_grader import available, extract_code, use_only_tier
from grading.sandbox.differences import difference
from grading.sandbox.workers import run_in_worker


@pytest.mark.parametrize(
    "program, test",
    [
        ("def f(x):\n    return list(set(x))", "assert f([10, 1, 5, 1]) == [10, 1, 5]"),
        ("def f(x):\n    return ''.join(set(x))", "assert f('hgfedcba') == 'hgfedcba'"),
        ("def f(x):\n    return (y * 2 for y in x)", "assert f([1, 2]) == [2, 4]"),
        ("def f(x):\n    m = (int(y) for y in x)\n    return max(m) - min(m)", "assert f('12') == 1"),
        ("def f(x):\n    g = map\n    return g(str, x)", "assert f([1]) == ['1']"),
    ],
)
def test_program_that_is_right_in_monty_only_does_not_pass(program, test):
    """In Monty, sets keep their order and generators are lists."""
    for tier in available():
        with use_only_tier(tier):
            try:
                assert grade_code(program, [test])[0] == 0.0
            except Ungraded:
                assert tier == "monty"
    try:
        assert grade_code(program, [test])[0] == 0.0
    except Ungraded:
        assert available() == ("monty",)


PASSES_IN_MONTY_ONLY = [
    ("def f(x: List[int]) -> int:\n    return x[0]", "assert f([1]) == 1"),
    ("x: Foo = 1\ndef f(y):\n    return x", "assert f(1) == 1"),
    ("class A:\n    def g(self) -> A: return 1\ndef f(x):\n    return A().g()", "assert f(1) == 1"),
    ("from typing import List\ndef f(x: List[int, str]):\n    return x", "assert f(1) == 1"),
    ("def f(g: callable[[int], int]):\n    return g", "assert f(1) == 1"),
    (r"import re" "\n" r"def f(x): return re.findall(r'\p{L}+', x)", "assert f('ab1') == ['ab']"),
    (r"import re" "\n" r"def f(x): return re.findall(r'[a-z&&[^b]]+', x)", "assert f('abc') == ['a', 'c']"),
    (r"import re" "\n" r"def f(x): return re.findall(r'(?<name>a)', x)", "assert f('a') == ['a']"),
    (r"import re" "\n" r"p = r'a\z'" "\n" r"def f(x): return bool(re.search(p, x))", "assert f('a') is True"),
    (r"import re" "\n" r"def f(x): return re.findall('x*', x)", "assert f('axb') == ['', 'x', '']"),
    (r"import re" "\n" r"def f(x): return bool(re.match('a$', x))", r"assert f('a\n') is False"),
    ("def f(x): return round(x, 2)", "assert f(2.675) == 2.68"),
    ("def f(x): return [round(v / 1000, 2) for v in x]", "assert f([5, 15]) == [0.0, 0.02]"),
    (
        "def f(x):\n    try:\n        return next(y for y in x)\n    except Exception:\n        return 5",
        "assert f([1]) == 5",
    ),
    ("def f(x):\n    try:\n        import heapq\n    except ImportError:\n        return 5", "assert f(1) == 5"),
    ("def f(x):\n    m = map(str, x)\n    return list(m) + list(m)", "assert f([1]) == ['1', '1']"),
    ("def f(x): return list(x.keys() & {3, 1, 2})", "assert f({3: 0, 1: 0, 2: 0}) == [3, 1, 2]"),
    ("class A:\n    __x = 1\ndef f(x): return A().__x", "assert f(1) == 1"),
    ("class A:\n    x = [1]\n    y = [i + x[0] for i in range(2)]\ndef f(x): return A.y", "assert f(1) == [1, 2]"),
    ("def f(x): return x\nreturn 5", "assert f(1) == 1"),
]


@pytest.mark.parametrize("program, test", PASSES_IN_MONTY_ONLY)
def test_program_that_cpython_refuses_does_not_pass(program, test):
    try:
        assert grade_code(program, [test])[0] == 0.0
    except Ungraded:
        assert available() == ("monty",)


FAILS_IN_MONTY_ONLY = [
    ("def f(x): return next((y for y in x if y > 1), -1)", "assert f([1]) == -1"),
    ("def f(x): return tuple(set(x))", "assert f([3, 1, 2]) == (1, 2, 3)"),
    (
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
        "assert f(5000) == 5000",
    ),
    ("def f(n): return 0 if n == 0 else 1 + f(n - 1)", "assert f(950) == 950"),
    (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, 1)",
        "assert f(2) == (2, 1)",
    ),
    ("from collections import Counter\ndef f(x): return [Counter(x)]", "assert f('a') == [{'a': 1}]"),
    ("from collections import OrderedDict\ndef f(x): return OrderedDict(a=x)", "assert f(1) == {'a': 1}"),
    ("import time\ndef f(x):\n    time.sleep(0.15)\n    return x", "assert f(2) == 2"),
    ("class A:\n    def __len__(self): return 3\ndef f(x): return len(A())", "assert f(1) == 3"),
    ("def f(x): return f.__name__", "assert f(1) == 'f'"),
    ("def f(x): return f.memo[x]\nf.memo = {1: 2}", "assert f(1) == 2"),
    ("def f(x): return pow(x, -1, 7)", "assert f(3) == 5"),
    ("def f(x): return bytes([x])", "assert f(65) == b'A'"),
    ("def f(x):\n    x += (4,)\n    return x", "assert f([1]) == [1, 4]"),
    ("def f(x):\n    e = enumerate(x)\n    return next(e)", "assert f('a') == (0, 'a')"),
    ("def f(x): return round(x, 2)", "assert f(2.675) == 2.67"),
]


@pytest.mark.parametrize("program, test", FAILS_IN_MONTY_ONLY)
def test_right_program_never_gets_zero_without_bubblewrap(program, test):
    for tier in available():
        with use_only_tier(tier):
            try:
                assert grade_code(program, [test])[0] == 1.0
            except Ungraded:
                assert tier == "monty"


TRUSTED = [
    "from typing import List, Optional\ndef f(x: List[int], y: Optional[str] = None) -> dict[str, int]:\n    return {}",
    "class A:\n    pass\ndef f(x: A, y: 'B', z: int | None = None):\n    k: Foo = 1\n    return k",
    "from __future__ import annotations\ndef f(x: Foo):\n    return x",
    "import re\ndef f(x):\n    return re.sub(r'[^a-z0-9_-]+', '', x) + re.findall(r'\\b(\\w+)\\s?', x)[0]",
    "import re\ndef f(x):\n    p = '^a(b*)c{2,3}'\n    return 'yes' if re.search(p, x) else 'no'",
    "def f(x):\n    try:\n        return int(x)\n    except (ValueError, KeyError):\n        return 0",
    "a, b = map(int, input().split())\nprint(a + b)",
]


@pytest.mark.parametrize("program", TRUSTED)
def test_common_features_are_left_to_monty(program):
    assert not difference(program)


@pytest.mark.parametrize(
    "program", ["x = " + "+".join(["a"] * 3000), "x = " + "-" * 900 + "1", "if 1:\n" * 90 + "(" * 150]
)
def test_deeply_nested_program_is_no_error(program):
    try:
        assert grade_code(f"{program}\ndef f(x): return 0", ["assert f(1) == 1"])[0] == 0.0
    except Ungraded:
        assert available() == ("monty",)


def test_programs_are_parsed_in_many_threads():
    """In Python 3.11, ast.parse raises SystemError if a garbage collection lets another thread parse meanwhile."""
    source = "\n".join(f"x{i} = [a + {i}, b.c(d)[{i}]]" for i in range(60))
    gc.callbacks.append(switch := lambda *_: time.sleep(0))
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: parse_python(source).body, range(200)))
    finally:
        gc.callbacks.remove(switch)


@pytest.mark.parametrize(
    "program, differs",
    [
        ("def f(x):\n    return sorted(set(x))", False),
        ("def f(x):\n    return sum(y for y in x) + len({1, 2})", False),
        ("def f(x):\n    for i, y in enumerate(x): print(*map(str, x))", False),
        ("def f(x):\n    return list(zip(x, x))", False),
        ("def f(x):\n    return [y for y in {1, 2}]", True),
        ("def f(x:", True),
    ],
)
def test_may_differ(program, differs):
    assert (difference(program) != "") is differs


@pytest.mark.parametrize(
    "answer, names, code",
    [
        ("```python\ndef f(x): return x\n```\n```python\ndef test(): f(1)\n```", ["f"], "def f(x): return x"),
        ("```python\ndef f(x): return x\n```\n```python\nprint(list(map(lambda x: f(x), [1])))\n```", ["f"], "def f(x): return x"),
        ("```python\nprint(6)\n```\nSample output\n```\n6\n```", [], "print(6)"),
        ("```python\nprint(6)\n```\nRun\n```bash\npython main.py\n```", [], "print(6)"),
        ("```python\nf = abs\n```\n```text\nwe def f\n```", ["f"], "f = abs"),
    ],
)  # fmt: skip
def test_extracts_the_block_that_defines_the_names(answer, names, code):
    assert extract_code(answer, names) == code


def test_reports_a_bubblewrap_that_does_not_run_and_uses_monty(tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    code = "from grading import sandbox; print(sandbox.describe()); print(sandbox.grade_code('def f(x): return x', ['assert f(1) == 1']))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.stderr == "" and "bubblewrap does not run here" in result.stdout
    assert "No permissions" in result.stdout and "(1.0, 'passed: all tests')" in result.stdout


def test_replaces_a_worker_that_died_while_idle():
    pid = run_in_worker("os:getpid", preload=("math",))
    os.kill(pid, 9)
    assert run_in_worker("math:sqrt", 4.0, preload=("math",)) == 2.0


def test_killed_interpreters_change_no_verdict():
    """Interpreters that were killed while idle are skipped; a program whose interpreter is killed runs again."""
    program = "def f(x):\n    n = 0\n    for i in range(20000): n += i\n    return x"
    with use_only_tier("monty"), ThreadPoolExecutor(16) as pool:
        for _ in range(6):
            verdicts = [pool.submit(grade_code, program, ["assert f(1) == 1"]) for _ in range(24)]
            time.sleep(0.02)
            for child in psutil.Process().children(recursive=True):
                if "monty" in child.name():
                    child.kill()
            assert [verdict.result()[0] for verdict in verdicts] == [1.0] * 24


def test_slow_pass_in_monty_is_held_to_the_same_rules():
    """The program passes only on the second try, with its full time."""
    program = "def f(x):\n    n = 0\n    for i in range(600000):\n        n += i\n    return (y * 2 for y in x)"
    with use_only_tier("monty"), pytest.raises(Ungraded, match="an iterator or a set"):
        grade_code(program, ["assert f([1, 2]) == [2, 4]"], timeout=5.0)
