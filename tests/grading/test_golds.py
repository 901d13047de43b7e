"""Gold answers of other types and forms, and answers that copy the question."""

import re
import struct
import time
from pathlib import Path

import pytest

from data import load
from grading import grade_math, grade_row, load_rewards, score_all
from grading.answers.question import repeats_question
from grading.rewards import probes
from grading.rewards.preflight import preflight

REWARDS = Path(__file__).resolve().parents[2] / "rewards.py"


def is_right(answer, gold, question=None):
    return grade_math(f"\\boxed{{{answer}}}", gold, question)[0] == 1.0


# --- types of gold answers


def test_any_item_of_a_list_is_right():
    for gold in (["5", "6"], ("5", 6), [[5], "6"]):
        assert is_right("5", gold) and is_right("6", gold) and not is_right("7", gold) and not is_right("5, 6", gold)
    assert is_right("5, 6", ["5, 6"])
    with pytest.raises(ValueError, match="empty list"):
        grade_math("\\boxed{5}", [])


def test_dict_is_refused():
    with pytest.raises(ValueError, match="a dict with the keys ground_truth, style"):
        grade_math("\\boxed{5}", {"ground_truth": "5", "style": "rule"})
    with pytest.raises(ValueError, match="a dict"):
        grade_math("\\boxed{5}", [{"a": 5}])


@pytest.mark.parametrize("gold", [float("nan"), float("inf"), -float("inf"), "nan", "NaN", ["5", float("nan")]])
def test_nan_and_infinity_are_refused(gold):
    with pytest.raises(ValueError, match="(?i)nan|inf"):
        grade_math("\\boxed{nan}", gold)


def test_infinity_as_text_is_a_gold_answer():
    assert is_right("\\infty", "\\infty") and is_right("-\\infty", "-\\infty")


def single(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def test_floats_from_data_equal_the_decimals_that_they_stand_for():
    for gold, right, wrong in [
        (1.1 + 2.2, "3.3", "3.2"), (0.1 * 3, "\\frac{3}{10}", "0.31"), (sum([0.1] * 10), "1", "1.1"), (single(0.1), "0.1", "0.11"),
        (single(2.6), "2.6", "2.61"), (single(1234.56), "1234.56", "1234.57"), (1e-7, "0.0000001", "0.0000002"), (1e16, "10^{16}", "10^{15}"),
        (5.0, "5", "5.1"), (2.5, "2.50", "2.51"), (1000001.0, "1000001", "1000000.5"),
    ]:  # fmt: skip
        assert is_right(right, gold) and not is_right(wrong, gold), gold
        assert is_right(right, str(gold)) and not is_right(wrong, str(gold)), gold


def test_arrays_are_lists():
    numpy = pytest.importorskip("numpy")
    assert is_right("5", numpy.array([5, 6])) and is_right("0.1", numpy.float32(0.1)) and is_right("7", numpy.int64(7))
    assert is_right("0.1", numpy.array([0.1, 0.7], dtype="float32"))


@pytest.mark.parametrize(
    "gold",
    [
        "The answer is 5",
        "Answer: 5",
        "**Final answer:** $5$.",
        "so \\boxed{5}",
        "1+4=5\n#### 5",
        "<answer>5</answer>",
        "$5$",
    ],
)
def test_text_around_a_gold_answer_is_removed(gold):
    assert is_right("5", gold) and not is_right("6", gold)


def test_preflight_names_rows_whose_gold_is_no_answer():
    rows = [
        {"id": "a", "task": "t", "prompt": "q", "answer": ["5", "6"]},
        {"id": "b", "task": "t", "prompt": "q", "answer": "7"},
    ]
    rewards = load_rewards(str(REWARDS))
    assert not any("cannot parse" in note for note in preflight(rewards, rows))
    with pytest.raises(Exception, match="(?s)row c.*a dict with the keys x"):
        preflight(rewards, [*rows, {"id": "c", "task": "t", "prompt": "q", "answer": {"x": 5}}])


# --- answers that copy the question


@pytest.mark.parametrize("source", ["sums", "long_sums", "words", "countdown", "functions"])
def test_copying_the_question_earns_no_more_than_a_wrong_answer(source):
    rewards = load_rewards(str(REWARDS))
    for row in load(source, 4):
        copies = [
            probe.text for probe in probes.copy_probes(row, "\\boxed{}" if source != "functions" else "```python")
        ]
        assert len(copies) == (1 if source == "functions" else 10)
        wrong = next(iter(probes.wrong_probes(row, "\\boxed{}"))).text
        *scores, wrong_score = score_all(rewards, [probes.completion(row, text) for text in [*copies, wrong]])
        assert all(score.total <= wrong_score.total and score.verdict == "wrong" for score in scores), row


WRAPPINGS = [
    "Q", "(Q)", "\\lfloor Q\\rfloor", "\\lceil{Q}\\rceil", "\\left|Q\\right|", "\\binom{Q}{1}", "\\frac{Q}{1}", "1\\cdot(Q)", "(Q)^1", "Q+0", "0+Q",
    "Q+\\sin 0", "\\sqrt{(Q)^2}", "\\log_2 2^{Q}", "e^{\\ln(Q)}", "\\max(Q,0)", "x=Q", "Q\\text{ units}", "\\text{Q}", "{Q}", "$Q$", "\\lfloor\\lceil Q\\rceil\\rfloor",
    "\\mathbf{Q}", "\\color{red}{Q}", "Q=Q", "\\frac{2(Q)}{2}", "--(Q)",
]  # fmt: skip


@pytest.mark.parametrize(
    "question, expression, gold",
    [
        ("9 + 9 + 4 - 9 + 9 - 6 = ?", "9+9+4-9+9-6", "16"), ("Compute $115^2$ in your head.", "115^2", "13225"), ("What is 12 / 3?", "12/3", "4"),
        ("Compute $\\dbinom{31}{28}$.", "\\binom{31}{28}", "4495"), ("What is $6!$?", "6!", "720"), ("Evaluate $\\lfloor 5.7 \\rfloor$.", "\\lfloor 5.7\\rfloor", "5"),
        ("Evaluate $\\log_{625} 5$.", "\\log_{625} 5", "\\frac14"), ("Express $0.45$ as a fraction.", "0.45", "\\frac{9}{20}"),
    ],
)  # fmt: skip
def test_copies_are_wrong_in_every_wrapping(question, expression, gold):
    for wrapping in WRAPPINGS:
        answer = wrapping.replace("Q", expression)
        assert not is_right(answer, gold, question), answer
    assert is_right(gold, gold, question)


@pytest.mark.parametrize(
    "answer",
    [
        "9+x+9-x",
        "9+\\pi+9-\\pi",
        "9\\text{ kg}+9\\text{ kg}",
        "2x\\cdot\\frac{9}{x}",
        "\\ln(e^9e^9)",
        "(9+9)\\%",
        "\\sqrt{324}\\cdot 1",
    ],
)
def test_arithmetic_on_numbers_is_not_an_answer(answer):
    assert not is_right(answer, "18")


def test_closed_forms_are_answers_unless_the_question_has_them():
    for answer, gold in [("4!", "24"), ("\\binom52", "10"), ("2^5", "32"), ("\\sqrt{25}", "5"), ("\\log_2 32", "5")]:
        assert is_right(answer, gold) and is_right(answer, gold, "How many are there?")
        assert not is_right(answer, gold, f"Compute ${answer}$.")


def test_gold_answers_with_the_form_of_the_question_are_right():
    for gold in [
        "2^{10}",
        "x^2-9",
        "\\frac{14}{6}",
        "3\\cdot 4",
        "7+5",
        "\\sqrt{180}",
        "4!",
        "0.45",
        "x>2",
        "(x+3)(x-3)",
        "\\sum_{k=1}^4 k",
    ]:
        assert is_right(gold, gold, f"Is it ${gold}$?"), gold
    assert is_right("(x-3)(x+3)", "(x+3)(x-3)", "Is it $(x-3)(x+3)$?")  # up to the order


def test_numbers_units_and_choices_of_the_question_may_be_repeated():
    for answer, gold, question in [
        ("5 cm", "5", "A square has a side of 5 cm. How long is it?"), ("\\$36.00", "36", "He pays $36.00."), ("(E) 7", "E", "(D) 6 (E) 7"),
        ("No", "no", "Yes or No?"), ("60\\%", "60", "He answered 60\\%."), ("x=2, y=3", "(2,3)", "Let x = 2 and y = 3."), ("1,080", "1080", "He has 1,080."),
    ]:  # fmt: skip
        assert is_right(answer, gold, question), answer


def test_very_long_questions_are_searched_quickly():
    start = time.perf_counter()
    for question in ("1" * 50_000, "{" * 50_000, "x+1 " * 20_000, "\\frac" * 20_000, "((" * 20_000):
        repeats_question("x + 1" * 60, "x+1", question)
    assert time.perf_counter() - start < 4


def test_grade_row_passes_the_question():
    row = {"answer": "13225", "prompt": [{"role": "user", "content": "Compute $115^2$."}]}
    assert grade_row("\\boxed{115^2}", row) == (0.0, "wrong: 115^2 repeats the question and is not evaluated")
    assert not is_right("115^2", "13225", row["prompt"])
    assert grade_row("\\boxed{115^2}", {"answer": "13225"}) == grade_row("\\boxed{13225}", row) == (1.0, "right")
    assert re.search("grade_math.*completion.prompt", REWARDS.read_text())
