"""The sandbox's tiers: when a pass in Monty counts, which block is the program, and a bubblewrap that does not run."""

import os
import subprocess
import sys

import pytest

from grading import Ungraded, grade_code
from grading.sandbox.code_grader import _may_differ, available, extract_code, use_only_tier
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
    assert _may_differ(program) is differs


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


def test_slow_pass_in_monty_is_held_to_the_same_rules():
    """The program passes only on the second try, with its full time."""
    program = "def f(x):\n    n = 0\n    for i in range(600000):\n        n += i\n    return (y * 2 for y in x)"
    with use_only_tier("monty"), pytest.raises(Ungraded, match="an iterator or a set"):
        grade_code(program, ["assert f([1, 2]) == [2, 4]"], timeout=5.0)
