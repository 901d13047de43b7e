"""The example process reward, rewards.right_steps: positions and values computed by hand, and hostile texts."""

import time

import pytest
from conftest import completion, score_one
from hypothesis import given
from hypothesis import strategies as st

from grading import load_rewards, preflight
from rewards import right_steps


def steps(text):
    return right_steps(completion(text))


def test_truncated_lines_are_not_judged():
    sample = completion("<think>2+5=7\n7+6=1")
    assert right_steps(sample) == [(18, -1.0)]
    sample.truncated = True
    assert right_steps(sample) == [(12, 0.0)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>2+5=7\n7+6=13</think>\\boxed{13}", [(19, 0.0)]),  # 7 + 5 characters, a newline, 6 more
        ("<think>2+5=8\n8+6=14</think>\\boxed{14}", [(12, -1.0)]),  # lines after the first error are not judged
        ("<think>2+5=7\n7+6=14\n1+1=3</think>\\boxed{14}", [(19, -1.0)]),
        ("<think>\n  2 + 5 = 7  \n</think>x", [(19, 0.0)]),  # the thinking is stripped
        ("<think>\n  2 + 5 = 7  \n1+1=2\n</think>x", [(27, 0.0)]),
        ("<think>\n  2 + 5 = 8  \n1+1=2\n</think>x", [(21, -1.0)]),  # a line ends at its newline
        ("<think>-5+7=2</think>", [(13, 0.0)]),
        ("<think>-5+7=-2</think>", [(14, -1.0)]),
        ("<think>2-5=-3\r\n3*4=12\r\n</think>", [(21, 0.0)]),
        ("<think>3*4=13</think>", [(13, -1.0)]),
        ("<think>So:\n2+5=7\nwell, 1+1=3\n1+1=3 no", [(16, 0.0)]),  # truncated; only whole lines are judged
        ("2+5=7</think>7", [(5, 0.0)]),  # <think> is part of the prompt
        ("1+1=2<think>1+1=2</think>", [(17, 0.0)]),  # the same text also occurs outside
        ("<think>1+1=2</think>1+1=3", [(12, 0.0)]),  # the answer is not a step
        ("<think>1+1=2</think><think>1+1=3</think>", None),  # lines with tags are not steps
        ("\\boxed{7}", None),
        ("2+5=8", None),
        ("", None),
        ("<think></think>7", None),
        ("</think>2+5=8", None),
        ("<think>let me see</think>7", None),
        ("<think>2+5=7.5\n2/1=3\n1+2+3=7\n1=2\n1 2+3=4</think>7", None),
    ],
)
def test_values_and_positions(text, expected):
    assert steps(text) == expected


@pytest.mark.parametrize(
    "line",
    [
        f"{'9' * 10**5}+1=2",
        f"{'9' * 5000}+1={'9' * 5000}",
        f"2+{'9' * 31}=1",
        "٣+٤=٨",
        "3+4=٨",
        "3²+4=8",
        f"3{' ' * 10**5}+{' ' * 10**5}4 ={' ' * 10**5}x",
        "-" * 10**5,
        "1+" * 10**5 + "=3",
        "1=" * 10**5,
    ],
    ids=range(10),
)
def test_hostile_lines_are_not_steps(line):
    start = time.perf_counter()
    assert steps(f"<think>{line}\n1+1=2</think>") == [(7 + len(line) + 6, 0.0)]
    assert time.perf_counter() - start < 1


def test_thirty_digits_are_exact():
    assert steps(f"<think>{10**29}*{10**29 - 1}={10**29}</think>")[0][1] == -1
    assert steps(f"<think>{10**29 - 1}+1={10**29}</think>")[0][1] == 0


def test_ten_thousand_lines_give_one_value():
    start = time.perf_counter()
    lines = "1+1=2\n" * 10_000
    assert steps(f"<think>{lines}1+1=3</think>") == [(7 + 60_000 + 5, -1.0)]
    assert steps(f"<think>{lines}</think>") == [(7 + 60_000 - 1, 0.0)]
    assert time.perf_counter() - start < 1


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "1+1=2", "1+1=3", "\n", " ", "-5*2 = -10", "é", "a"]), max_size=12)
)
def test_positions_are_at_the_end_of_a_line(pieces):
    text = "".join(pieces)
    result = steps(text)
    if result is None:
        return
    ((position, value),) = result
    line = text[:position].rpartition("\n")[2].rpartition(">")[2].strip()
    assert value == {"1+1=2": 0, "-5*2 = -10": 0, "1+1=3": -1}[line]
    assert (text[position:].lstrip(" ") + "\n")[0] in "\n<"


def test_counts_only_if_named_in_reward_funcs():
    text = "<think>2+5=7\n7+6=14</think>\\boxed{13}"
    assert "right_steps" not in score_one(load_rewards("rewards.py"), completion(text, answer="13")).parts
    rewards = load_rewards("rewards.py", ["correct", "format", "right_steps"], {"right_steps": 0.2})
    score = score_one(rewards, completion(text, answer="13"))
    assert score.process == {"right_steps": [(19, -1.0)]} and round(score.total, 6) == 0.9
    assert (score.judge, score.verdict) == ("correct", "right")
    assert score_one(rewards, completion("\\boxed{13}", answer="13")).parts["right_steps"] is None
    preflight(rewards, [{"id": "r1", "task": "sums", "prompt": "2 + 5 + 6 = ?", "answer": "13"}])
