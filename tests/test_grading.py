"""The graders: hand-picked cases, properties, and hostile programs."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grading import (
    Completion,
    RewardError,
    Ungraded,
    check_tests,
    extract_answer,
    extract_code,
    grade_code,
    grade_math,
)
from grading.answers import to_fraction
from grading.sandbox import is_same, parse_tests


def completion(text, **row):
    return Completion(prompt="q", text=text, row={"id": "r1", "task": "t"} | row)


# --- what a completion is made of


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a b</think>c", "a b", "c"),
        ("c", "", "c"),
        ("<think>a", "a", ""),  # thinking without an end is no answer
        ("a</think>c", "a", "c"),  # the template opened it
        ("<think>a</think>b</think>c", "a</think>b", "c"),  # the last end counts
        ("", "", ""),
    ],
)
def test_thinking_and_answer(text, thinking, answer):
    assert (completion(text).thinking, completion(text).answer) == (thinking, answer)


# --- math


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{4}. Wait, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),  # the last balanced one
        ("#### 1,080.", "1,080."),
        ("<answer> 7 </answer>", "7"),
        ("<answer>7", None),
        ("The answer is 12.\nBye", "12"),
        ("Final answer: 3", "3"),
        ("The answer is: **5**.", "5"),
        ("**Final answer:** 5", "5"),
        ("İİİİ the answer is 5", "5"),
        ("The final answer is 5.", "5"),
        ("The answer is 5\nThat is my final answer.", "5"),
        ("I cannot give a final answer yet", None),
        ("it is 7", None),  # never simply the last number
        ("", None),
        ("\\boxed{" * 5000, None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("17", "17"), ("17", 17), ("+17", "17"), ("-3", "-3"), ("17.0", "17"), ("1,080", "1080"), ("$1{,}080$", "1080"),
        (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("2 2/3", "8/3"), ("50%", "0.5"),
        ("0.3333333333", "1/3"), ("x", "x"), (r"12\text{ cm}", "12"), (r"\text{Yes}", r"\text{Yes}"), (r"\text{B}", "B"), ("1e-07", 1e-7), (r"\frac{1,080}{7}", "1080/7"), (r"12\text{cm}", r"12\text{ cm}."), ("4", r"so \boxed{4}."),
        (r"(1, 200)", "(1, 200)"), ("72", "48+24=<<48+24=72>>72\n#### 72"),
    ],
)  # fmt: skip
def test_equal_answers(answer, gold):
    assert grade_math(f"\\boxed{{{answer}}}", gold) == (1.0, "right")


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("17", "18"), ("7", "-7"), ("4 = 5", "5"), ("2 2/3", "2"), ("1/0", "1"), ("0.5", "0.50001"), ("12", "1"),
        ("1e3", "1000.0001"), ("9" * 41, "9" * 42), ("9**9**9**9", "1"), ("99999999!", "1"), ("(" * 200 + "1", "1"),
        ("1" * 100_000, "1"), ("nan", "nan1"), ("inf", "1"), ("٣", "4"), (r"3\text{ or }4", "34"), (r"12\text{ pm}", r"12\text{ am}"), (r"3\text{A}", r"3\text{B}"), ("(1,200)", "(1200)"), ("1e999", "1"),
    ],
)  # fmt: skip
def test_different_answers(answer, gold):
    start = time.perf_counter()
    assert grade_math(f"\\boxed{{{answer}}}", gold)[0] == 0.0
    assert time.perf_counter() - start < 1


def test_an_empty_gold_is_an_error_not_a_match():
    for gold in (None, "", "  "):
        with pytest.raises(ValueError, match="gold answer is empty"):
            grade_math("\\boxed{None}", gold)


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4), st.integers(-5, 5))
def test_fractions_are_exact(value, shift):
    latex = f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert to_fraction(latex) == to_fraction(str(value)) == value
    other = value + Fraction(shift, 7)
    assert grade_math(f"\\boxed{{{latex}}}", str(other))[0] == float(shift == 0)


@given(st.text(max_size=300))
def test_any_text_is_graded(text):
    assert grade_math(text, "17")[0] in (0.0, 1.0)


# --- code


@pytest.mark.parametrize(
    "answer, code",
    [
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("Here:\n```python\na = 1\n```\nbye", "a = 1"),
        ("```\na = 1\n```\nor\n```py\nb = 2\n```", "b = 2"),
        ("```python\na = 1", "a = 1"),  # not closed
        ("```python3\ndef f(x): return x\n```\nFor example:\n```text\n>>> f(1)\n1\n```\nDone.", "def f(x): return x"),
        ("```python\ndef f(x): return x\n```\n```\nf(1)\n```", "def f(x): return x"),
        ("", ""),
    ],
)
def test_extract_code(answer, code):
    assert extract_code(answer) == code


TESTS = ["assert f(3) == 21", "assert f(-1) == 9"]


def test_right_and_wrong_programs():
    assert grade_code("def f(x):\n    return (x + 4) * 3", TESTS) == (1.0, "passed 2 tests")
    assert grade_code("def f(x):\n    return x + 4 * 3", TESTS) == (0.0, "test 1 of 2: f(3) gave 15")
    assert grade_code("", TESTS)[0] == 0.0
    assert grade_code("def f(x):\n    x.append(1)\n    return x", ["assert f([1]) == [1, 1]"])[0] == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "def f(x:\n    return 1",
        "def g(x):\n    return 21",
        "f = 21",
        "raise SystemExit",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "class Yes:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Yes()",
        "def f(x):\n    return True",
        "def f(x):\n    return float('nan')",
        "def f(x):\n    return '21'",
        "def f(x):\n    print('passed 2 tests')\n    return 0",
        "def f(x):\n    while True: pass",
        "def f(x):\n    import time\n    time.sleep(60)\n    return 21",
        "def f(x):\n    return [0] * 10**10",
        "def f(x):\n    return f(x)",
        "def f(x):\n    return 10**100000",
        "def f(x):\n    r = []\n    for _ in range(900):\n        r = [r]\n    return r",
        "def f(x):\n    r = []\n    for _ in range(100000):\n        r = [r]\n    return r",
        "def f(x):\n    r = []\n    r.append(r)\n    return r",
        "def f(x):\n    print('a' * 10**7)\n    return 21",
        "def f(x):\n    return open('/etc/passwd').read()",
        "arguments_ = [3]\ndef f(x):\n    raise AssertionError",
        "x = " + "(" * 5000,
        "\x00",
        "def f(x):\n    return 21 if x == 3 else 8",  # the visible example only
    ],
)
def test_hostile_and_broken_programs_fail(program):
    start = time.perf_counter()
    score, reason = grade_code(program, TESTS, timeout=0.3)
    assert score == 0.0 and reason
    assert time.perf_counter() - start < 3


def test_the_sandbox_works_after_hostile_programs():
    for _ in range(3):
        grade_code("def f(x):\n    return [0] * 10**10", TESTS)
        assert grade_code("def f(x):\n    return (x + 4) * 3", TESTS)[0] == 1.0


def test_what_the_sandbox_cannot_run_is_ungraded_not_wrong():
    with pytest.raises(Ungraded, match="cannot run"):
        grade_code("def f(x):\n    yield x", TESTS)
    with pytest.raises(Ungraded, match="cannot run"):
        grade_code("import heapq\ndef f(x):\n    return 21", TESTS)


@pytest.mark.parametrize(
    "error",
    [
        "NotImplementedError('The monty syntax parser does not yet support yield expressions')",
        "ImportError(\"No module named 'heapq'\")",
    ],
)
def test_a_program_cannot_declare_itself_ungraded(error):
    assert grade_code(f"def f(x):\n    raise {error}", TESTS)[0] == 0.0


def test_code_is_extracted_in_linear_time():
    start = time.perf_counter()
    for text in ("```" + " " * 300_000, "```\n" * 100_000, "`" * 300_000):
        extract_code(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "result, expected, same",
    [
        (1, 1, True), (1, True, False), (1, 1.0, True), (1.0 + 1e-8, 1.0, True), (1.001, 1.0, False), (10**400, 1.0, False),
        (2**60 + 1, 2**60, False), (math.nan, math.nan, False), ("a", "a", True), ([1, 2], (1, 2), False),
        ([1, [2.0]], [1, [2]], True), ([True], [1], False), ({"a": 1}, {"a": 1}, True), ({"a": True}, {"a": 1}, False),
        ({1, 2}, {2, 1}, True), ({1}, {True}, False), ({1: 1}, {True: 1}, False), (None, None, True), (None, 0, False), (object, object, False),
    ],
)  # fmt: skip
def test_same_by_exact_type(result, expected, same):
    assert is_same(result, expected) is same


def test_tests_that_cannot_be_run_are_errors_not_passes():
    for bad in (
        (),
        ("",),
        ("assert f(3)",),
        ("assert f(3) > 2",),
        ("assert f(g(3)) == 2",),
        ("f(3) == 2",),
        ("assert (",),
    ):
        with pytest.raises(ValueError):
            parse_tests(bad)
    with pytest.raises(RewardError, match="row 7, column tests.*assert name"):
        check_tests([{"id": 7, "tests": ["assert f(3)"]}])
    with pytest.raises(RewardError, match="row 8, column tests.*empty"):
        check_tests([{"id": 8, "tests": []}])
    check_tests([{"id": 9, "answer": "1", "tests": None}, {"id": 10}])
