"""The graders and the reward registry: hand-picked cases, hostile programs, and errors that say where."""

import math
import subprocess
import sys
import textwrap
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
    load_rewards,
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


# --- the registry


def write(tmp_path, source):
    path = tmp_path / "rewards.py"
    path.write_text("from grading import *\n" + textwrap.dedent(source))
    return str(path)


def test_weights_gates_metrics_and_verdict(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            @reward(weight=2.0, when="math")
            def right(c): return c.answer == c.row["answer"], "because"
            @reward(weight=0.5, when=lambda row: row["task"] == "t")
            def short(c): return len(c.text) < 5
            @reward
            def never(c): return None
            @metric
            def length(c): return len(c.text)
            """,
        )
    )
    score = rewards.score(completion("7", answer="7"))
    assert (score.total, score.verdict) == (2.5, "right")
    assert score.parts == {"right": 1.0, "short": 1.0, "never": None}
    assert score.metrics == {"length": 1.0} and score.reasons == {"right": "because"}
    score = rewards.score(completion("8", answer="7"))
    assert (score.total, score.verdict) == (0.5, "wrong")
    code_row = rewards.score(Completion("q", "8", {"id": 1, "task": "other", "tests": ["assert f(1) == 1"]}))
    assert code_row.parts["right"] is None and code_row.total == 0.0


def test_reward_funcs_and_weights_by_name(tmp_path):
    path = write(tmp_path, "@reward\ndef one(c): return 1\n@reward(weight=3)\ndef two(c): return 1\n")
    assert load_rewards(path).names == ["one", "two"]
    assert load_rewards(path, ["two"], {"two": 0.25}).score(completion("")).total == 0.25
    with pytest.raises(RewardError, match="reward_funcs: .* no reward function 'tow'; did you mean 'two'"):
        load_rewards(path, ["tow"])
    with pytest.raises(RewardError, match="reward_weights: .* no reward function 'oen'; did you mean 'one'"):
        load_rewards(path, None, {"oen": 1.0})


def test_ungraded_is_not_zero(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            @reward
            def grader(c): raise Ungraded("the sandbox is gone")
            @reward(weight=0.1)
            def shape(c): return 1
            """,
        )
    )
    score = rewards.score(completion("x"))
    assert score.verdict == "ungraded" and math.isnan(score.total)
    assert score.reasons == {"grader": "the sandbox is gone"}


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "'1'", "[1.0]", "(1, 2, 3)", "{}"])
def test_wrong_return_values_name_function_row_and_value(tmp_path, value):
    rewards = load_rewards(write(tmp_path, f"@reward\ndef odd(c): return {value}\n"))
    with pytest.raises(RewardError, match=r"'odd' \(rewards.py:\d+\), row r1: returned .*expected a finite number"):
        rewards.score(completion("x"))


def test_an_exception_names_function_line_row_and_completion(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef broken(c):\n    return 1 / 0\n"))
    with pytest.raises(RewardError, match=r"'broken' \(rewards.py:4\), row r1: ZeroDivisionError.*'the end'"):
        rewards.score(completion("the end"))


def test_a_misspelt_column_is_found_before_the_model_loads(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef right(c): return c.answer == c.row['anwser']\n"))
    with pytest.raises(RewardError, match="no column 'anwser'.*Did you mean 'answer'"):
        rewards.check([{"id": "r1", "task": "t", "prompt": "q", "answer": "1"}])


def test_rows_that_only_shaping_would_judge_are_found_before_the_model_loads(tmp_path):
    """A row without its gold must not be trained on its format alone, and called right for it."""
    rewards = load_rewards("rewards.py")
    good = {"id": "r1", "task": "t", "prompt": "q", "answer": "1"}
    rewards.check([good, {"id": "r2", "task": "t", "prompt": "q", "tests": ["assert f(1) == 1"]}])
    for bad in ({"gold": "1"}, {"answer": None}):
        with pytest.raises(
            RewardError, match="row r3: .* only format applies, but not correct or passes_tests.*columns"
        ):
            rewards.check([good, {"id": "r3", "task": "t", "prompt": "q"} | bad])
    misspelt = load_rewards(write(tmp_path, "@reward(when='maths')\ndef right(c): return 1\n"))
    with pytest.raises(RewardError, match="rewards.py none applies, but not right"):
        misspelt.check([good])
    load_rewards(write(tmp_path, "@reward\ndef any(c): return 1\n")).check([{"id": 1, "task": "t", "prompt": "q"}])


def test_a_row_whose_gold_is_empty_is_found_before_the_model_loads(tmp_path):
    """Also where the gold stands in a column of the person's own, and the first rows are whole."""
    rewards = load_rewards(write(tmp_path, "@reward\ndef right(c): return grade_math(c.answer, c.row['gold'])\n"))
    good = {"id": "r1", "task": "t", "prompt": "q", "gold": "1"}
    rewards.check([good, good])
    with pytest.raises(RewardError, match="row r2: ValueError: the gold answer is empty"):
        rewards.check([good, {"id": "r2", "task": "t", "prompt": "q", "gold": None}])
    with pytest.raises(RewardError, match="row r3: KeyError: .*no column 'gold'"):
        rewards.check([good, {"id": "r3", "task": "t", "prompt": "q"}])


def test_shaping_and_penalties_do_not_judge(tmp_path):
    row = {"id": "r1", "task": "t", "prompt": "q"}
    shaped = load_rewards(
        write(tmp_path, "@reward\ndef right(c): return None\n@reward(weight=0.1)\ndef form(c): return 1\n")
    )
    assert shaped.score(completion("x")).verdict == "wrong"
    penalty = load_rewards(write(tmp_path, "@reward(weight=-1)\ndef long(c): return 1\n@metric\ndef n(c): return 1\n"))
    penalty.check([row])
    assert penalty.score(completion("x")).total == -1


def test_a_gate_that_raises_names_the_function(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward(when=lambda row: row['level'] > 1)\ndef hard(c): return 1\n"))
    with pytest.raises(RewardError, match="'hard' .*no column 'level'"):
        rewards.check([{"id": "r1", "task": "t", "prompt": "q"}])


@pytest.mark.parametrize(
    "source, message",
    [
        ("def f(:\n", r"rewards.py:2: SyntaxError"),
        ("x = 1\ny = undefined\n", r"rewards.py:3: NameError"),
        ("def plain(c): return 1\n", "no reward with a weight"),
        ("@metric\ndef only(c): return 1\n", "no reward with a weight"),
    ],
)
def test_reward_files_that_cannot_be_used(tmp_path, source, message):
    with pytest.raises(RewardError, match=message):
        load_rewards(write(tmp_path, source))


def test_the_projects_own_rewards():
    rewards = load_rewards("rewards.py")

    def total(text, truncated=False, **row):
        c = completion(text, **row)
        c.truncated = truncated
        return round(rewards.score(c).total, 6)

    assert total("<think>3+4=7</think>\\boxed{7}", answer="7") == total("\\boxed{7}", answer="7") == 1.1
    assert total("<think>3+4=7</think>\\boxed{8}", answer="7") == 0.1
    assert total("<think>\\boxed{7}", answer="7") == 0.0  # no end of thinking, no answer
    assert total("a<think>b</think>\\boxed{7}", answer="7") == 1.0
    assert total("7", answer="7") == total("\\boxed{}", answer="7") == 0.0
    assert total("\\boxed{7}", truncated=True, answer="7") == 1.0
    code = {"tests": ["assert f(1) == 2"], "entry_point": "f"}
    assert total("<think>x+1</think>def f(x):\n    return x+1", **code) == 1.1
    assert total("def f(x):\n    return x", **code) == 0.1
    assert total("hello", **code) == 0.0


def test_rewards_import_no_torch_and_start_quickly():
    code = "import sys, rewards; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 5
