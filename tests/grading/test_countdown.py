"""Countdown: expressions that must reach a target."""

import time

import pytest

from grading import Completion
from grading.countdown import grade_countdown

NUMS = [3, 4, 5, 7]


@pytest.mark.parametrize(
    "answer",
    [
        r"\boxed{(3 + 4) * 5 - 7}", "<answer>(3+4)*5-7</answer>", "<answer> 5*(3+4) - 7 = 28 </answer>", r"\boxed{(3+4) \times 5 - 7 = 28}",
        r"\boxed{$\left(3+4\right)\cdot 5 - 7$}", r"The answer is (3+4)×5−7.", r"\boxed{-7 + 5*(4+3)}",
    ],
)  # fmt: skip
def test_countdown_accepts_right_expressions(answer):
    assert grade_countdown(answer, 28, NUMS) == (1.0, "right")


def test_countdown_is_exact_and_accepts_fractions():
    assert grade_countdown(r"\boxed{\frac{8}{3 - \frac{8}{3}}}", 24, [3, 3, 8, 8])[0] == 1.0
    assert grade_countdown("<answer>8/(3-8/3)</answer>", 24, [8, 3, 8, 3])[0] == 1.0
    assert grade_countdown("<answer>1/3*3</answer>", 1, [1, 3, 3])[0] == 1.0


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("(3+4)*5-7", "no_answer"), ("", "no_answer"), ("<think><answer>(3+4)*5-7</answer>", "no_answer"),
        ("<answer>28</answer>", "wrong: it uses 28"), ("<answer>(3+4)*5-7 = 29</answer>", "wrong: 29 is not the target"),
        ("<answer>(3+4)*5+7</answer>", "wrong: (3+4)*5+7 is 42"), ("<answer>4*7</answer>", "wrong: it uses 4, 7"),
        ("<answer>(3+4)*5-7+3-3</answer>", "wrong: it uses"), ("<answer>34-5-7</answer>", "wrong: it uses"), ("<answer>2**3</answer>", "wrong"),
        ("<answer>9**9**9**9</answer>", "wrong"), ("<answer>28//1</answer>", "wrong"), ("<answer>3/(4-4)*5*7</answer>", "wrong"),
        ("<answer>__import__('os')</answer>", "wrong"), ("<answer>3(4)</answer>", "wrong"), ("<answer>3 4</answer>", "wrong"),
        ("<answer>(3+4)*5-7 or 28</answer>", "wrong"), ("<answer>(3+4)*5-7 = 28 = 28</answer>", "wrong"), ("<answer>= 28</answer>", "wrong"),
        ("<answer>" + "(" * 90 + "3" + ")" * 90 + "</answer>", "wrong"), ("<answer>" + "-" * 190 + "3</answer>", "wrong"),
        ("<answer>" + "3+" * 5000 + "3</answer>", "gave_up"), ("<answer>" + "9" * 190 + "</answer>", "wrong"), ("<answer>0x1c</answer>", "wrong"),
        ("<answer>3,4,5,7</answer>", "wrong"), ("<answer>(3, 4)</answer>", "wrong"), ("<answer>٣+4</answer>", "wrong"), ("<answer>3.0*4</answer>", "wrong"),
    ],
)  # fmt: skip
def test_countdown_rejects_wrong_expressions(answer, reason):
    start = time.perf_counter()
    score, actual_reason = grade_countdown(Completion("", answer, {}).answer, 28, NUMS)
    assert score == 0.0 and actual_reason.startswith(reason)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "1+2+3 = 6.", "1+2+3.", "6=1+2+3", "6 = 1+2+3.", "1x2x3", "1 X (2 x 3)", "1+2+3=6.0", "1 \u2217 2 \u2217 3", "6 = 1 \\times 2 \\times 3",
        "\uff11\uff0b2\uff0b3",
    ],
)  # fmt: skip
def test_countdown_reads_common_notation(answer):
    assert grade_countdown(f"<answer>{answer}</answer>", 6, [1, 2, 3]) == (1.0, "right")


@pytest.mark.parametrize(
    "answer", ["6", "6=6", "=6", "6=", "7=1+2+3", "6=1+2+3=6", "1+2+3=6!", "0x6", "6x", "1+2+3 = 6 or 7"]
)
def test_countdown_rejects_false_equations(answer):
    assert grade_countdown(f"<answer>{answer}</answer>", 6, [1, 2, 3])[0] == 0.0


@pytest.mark.parametrize("target, nums", [("6", [1, 2, 3]), (6, ["1", "2", "3"]), (6.0, "[1, 2, 3]"), (" 6 ", "1 2 3")])
def test_countdown_reads_numbers_stored_as_text(target, nums):
    assert grade_countdown("<answer>1+2+3</answer>", target, nums) == (1.0, "right")
    assert grade_countdown("<answer>1+2*3</answer>", target, nums)[0] == 0.0


def test_countdown_names_the_column_that_is_not_a_number():
    for target, nums, message in [
        ("six", [1], "target contains 'six'"),
        (None, [1], "target contains None"),
        (1, ["x"], "nums contains 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            grade_countdown("<answer>1</answer>", target, nums)
