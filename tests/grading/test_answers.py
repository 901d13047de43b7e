"""The math grader: extraction, verdicts on a table of cases, properties, hostile input, speed."""

import statistics
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grading import Completion, extract_answer, grade_math
from grading.__main__ import grade_cell, main, read_table
from grading.answers.math_grader import judge
from grading.answers.structures import parse

TABLE = Path(__file__).with_name("math_cases.tsv")
CASES = read_table(TABLE)


# --- thinking and answer


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a b</think>c", "a b", "c"),
        ("c", "", "c"),
        ("<think>a", "a", ""),  # thinking that does not end contains no answer
        ("a</think>c", "a", "c"),  # <think> is part of the prompt template
        ("<think>a</think>b</think>c", "a</think>b", "c"),  # the last end tag counts
        ("", "", ""),
    ],
)
def test_thinking_and_answer(text, thinking, answer):
    completion = Completion("q", text, {})
    assert (completion.thinking, completion.answer) == (thinking, answer)


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{4}. Wait, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),  # the last balanced one
        (r"\boxed{2 and the answer is 3", None),  # no other marker is used if a box is not closed
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"a } b { \boxed{5}", "5"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5} \boxed{ }", ""),
        (r"\boxed{" + "1" * 3000 + "}", None),
        ("#### 1,080.", "1,080."),
        ("#### 1\n#### 2\nBye", "2"),
        ("<answer> 7 </answer>", "7"),
        ("<answer>7</answer> <answer>8", "7"),
        ("<answer>7", None),
        ("The answer is 12.\nBye", "12"),
        ("The answer is 12. It was easy.", "12"),
        ("The answer is 1.5.", "1.5"),
        ("The correct answer is $x = 5$, as above", "x = 5"),
        ("Final answer: 3", "3"),
        ("Final answer:\n\\[ 3 \\]", "3"),
        ("The answer is: **5**.", "5"),
        ("**Final answer:** 5", "5"),
        ("İİİİ the answer is 5", "5"),
        ("The answer is 5\nThat is my final answer.", "5"),
        ("I cannot give a final answer yet", None),
        ("Answer: 42", "42"),
        ("**Answer:** 42", "42"),
        ("ANSWER： 42", "42"),
        ("#### Answer: 42", "42"),
        ("#### 42\n####", "42"),
        ("#### 42. This is the sum.", "42"),
        ("<answer>The answer is 42</answer>", "42"),
        (r"\boxed{\text{The answer is } 42}", "42"),
        ("**Final Answer**\n42", "42"),
        ("The answer is 42 because 6 times 7 is 42.", "42"),
        ("The answer is 42 apples in total.", "42 apples"),
        ("#### 18 dollars every day at the farmers' market", "18 dollars"),
        ("Answer: 42<|im_end|>", "42"),
        ("The answer is $8$ or $9$.", "$8$ or $9$"),  # both, not the first
        ("The answer is 7 or so", "7 or so"),  # not 7
        ("The answer is 18 apples for a total of 20", "18 apples for a total of 20"),
        (r"$\boxed{3}$ and $x=\boxed{4}$", "3, 4"),  # a list
        (r"\boxed{3}\boxed{4}", "4"),
        ("it is 7", None),  # the last number in the text is not used
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_extraction_takes_linear_time():
    start = time.perf_counter()
    for text in (
        "\\boxed{" * 30_000,
        "{" * 200_000,
        "\\boxed" * 30_000,
        "the answer is " * 15_000,
        "\\" * 200_000,
        "$" * 200_000,
        "\\boxed{1}, " * 20_000,
        "final answer" + " " * 200_000,
        "answer" + " *" * 100_000,
        "####" * 50_000,
        "<answer>" + " " * 200_000 + "x</answer>",
    ):
        extract_answer(text)
    assert time.perf_counter() - start < 2


# --- verdicts


def test_graded_table_matches_expected_verdicts():
    mismatches = []
    for row in CASES:
        is_right, reason = grade_cell(row["answer"], row["gold"], row["question"])
        if is_right != (row["expected"] == "accept"):
            mismatches.append((row["kind"], row["gold"], row["answer"], reason))
    assert not mismatches
    assert len(CASES) >= 120


@pytest.mark.parametrize(
    "text, gold, outcome",
    [
        (r"\boxed{5}", 5, "right"),
        (r"\boxed{1e-07}", 1e-7, "right"),
        (r"\boxed{72}", "48+24=<<48+24=72>>72\n#### 72", "right"),
        (r"\boxed{4}", r"so \boxed{4}.", "right"),
        (r"<think>\boxed{4}</think>\boxed{5}", "5", "right"),  # a whole completion may be passed
        (r"\boxed{6}", "5", "wrong: 6 is not 5"),
        (r"\boxed{2+3}", "5", "wrong: 2+3 is not fully evaluated"),
        ("5", "5", "no_answer: no \\boxed{}, ####, <answer> or 'the answer is'"),
        (r"\boxed{}", "5", "no_answer: the answer is empty"),
        ("#### " + "1" * 401, "5", "gave_up: the answer has 401 characters, over 400"),
        ("#### " + "1" * 401, "1" * 401, "right"),  # equal text is not parsed
        (r"\boxed{9^{9^{9^9}}}", "5", "gave_up: a tower of powers"),
        (r"\boxed{x^2+3x^3+x^4}", "x^4+3x^3+x^2", "right"),  # three powers are no tower
        (r"\boxed{99999999!}", "5", "gave_up: the factorial of a number over 1000 is too large to be compared"),
    ],
)
def test_outcomes(text, gold, outcome):
    assert grade_math(text, gold) == (float(outcome == "right"), outcome)


def test_empty_gold_answer_raises():
    for gold in (None, "", "  "):
        with pytest.raises(ValueError, match="gold answer is empty"):
            grade_math("\\boxed{None}", gold)


def boxed(text):
    return f"\\boxed{{{text}}}"


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4), st.integers(-5, 5))
def test_fractions_are_compared_exactly(value, shift):
    latex = f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert parse(latex).rational == parse(str(value)).rational == value
    other = value + Fraction(shift, 7)
    assert grade_math(boxed(latex), str(other))[0] == float(shift == 0)


@given(st.integers(-99_999, 99_999), st.integers(-3, 3))
def test_short_decimals_are_compared_exactly(cents, shift):
    assert grade_math(boxed(f"{cents / 100:,.2f}"), f"{(cents + shift) / 100:.2f}")[0] == float(shift == 0)


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9), st.integers(-2, 2))
def test_formulas_are_compared_by_value(a, b, c, shift):
    product = f"{c}(x{a:+d})(x{b:+d})"
    expanded = f"{c}x^2{c * (a + b):+d}x{c * a * b + shift:+d}"
    assert grade_math(boxed(product), expanded)[0] == float(shift == 0)
    assert grade_math(boxed(f"\\frac{{{expanded}}}{{x{b:+d}}}"), f"{c}(x{a:+d})")[0] == float(shift == 0)


@given(st.integers(1, 40), st.integers(2, 400), st.integers(-1, 1))
def test_roots_are_compared_exactly(a, b, shift):
    assert grade_math(boxed(f"\\sqrt{{{a * a * b + shift}}}"), f"{a}\\sqrt{{{b}}}")[0] == float(shift == 0)
    assert grade_math(boxed(f"\\frac{{{b + shift}}}{{\\sqrt{{{b}}}}}"), f"\\sqrt{{{b}}}")[0] == float(shift == 0)


@given(st.integers(-9, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans())
def test_inequalities_equal_intervals(low, length, has_low, has_high, is_swapped):
    high = low + length
    chain = [str(low), "\\le" if has_low else "<", "x", "\\le" if has_high else "<", str(high)]
    if is_swapped:
        chain = [part.replace("\\le", "\\ge").replace("<", ">") for part in reversed(chain)]
    interval = f"{'[' if has_low else '('}{low},{high}{']' if has_high else ')'}"
    assert grade_math(boxed(" ".join(chain)), interval)[0] == 1.0
    outside = (
        rf"x {'<' if has_low else chr(92) + 'le'} {low} \text{{ or }} x {'>' if has_high else chr(92) + 'ge'} {high}"
    )
    assert grade_math(boxed(rf"\mathbb{{R}} \setminus {interval}"), outside)[0] == 1.0
    assert grade_math(boxed(outside), interval)[0] == 0.0


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=6), st.randoms())
def test_order_matters_in_tuples_only(numbers, random):
    shuffled = random.sample(numbers, len(numbers))
    texts = [", ".join(map(str, items)) for items in (numbers, shuffled)]
    for opening, closing in (("", ""), (r"\{", r"\}")):
        assert grade_math(boxed(opening + texts[1] + closing), opening + texts[0] + closing)[0] == 1.0
    assert grade_math(boxed(f"({texts[1]})"), f"({texts[0]})")[0] == float(numbers == shuffled)
    assert grade_math(boxed(texts[0] + ", 21"), texts[0])[0] == 0.0


PIECES = [
    "7", "8", "x", "-", "+", "*", "/", "^", "_", "=", "<", r"\le", ",", ":", "|", "(", ")", "[", "]", r"\{", r"\}", "{", "}", " ", "%", "$", "!",
    r"\frac", r"\sqrt", r"\pm", r"\infty", r"\cup", r"\in", r"\mathbb{R}", r"\text{ or }", r"\text{cm}", r"\sin", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\\", "&", r"\ldots", r"\overline{3}", r"\binom", r"\setminus", "and", "about", "\u200b", "½", "٣",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(PIECES), max_size=9).map("".join),
    st.sampled_from(["7", "x", "(7,8)", r"x \le 7", r"\{7,8\}", "E", r"7\%", "3.141593", r"f(7)<f(8)"]),
    st.sampled_from([None, "Compute $7 + 8x$.", r"Is it \frac{7}{8} or 7|8!?"]),
)
def test_every_answer_gets_a_verdict(answer, gold, question):
    score, reason = grade_math(f"#### {answer}", gold, question)
    assert reason.split(":")[0] in ("right", "wrong", "no_answer", "gave_up") and (score == 1.0) == (reason == "right")


@given(st.text(max_size=300))
def test_every_text_is_graded(text):
    assert grade_math(text, "17")[0] in (0.0, 1.0)


# --- hostile input

HOSTILE = [
    "9^{9^{9^9}}", "9^9^9^9", "9**9**9**9", "{9^9}^{9^9}", "(9^9)^{(9^9)}", "x^{9^{9^9}}", "10^{10^{10}}", r"e^{e^{e^{e^{e}}}}", "2^{99999999999}",
    r"\exp(\exp(\exp(\exp(99))))", "99999999!", "(9999!)!", "((99!)!)!", "99999999!!", r"\left(99999999\right)!", r"\text{99999999}!", "1/(99999999!)",
    r"\prod_{k=1}^{10^9} k", r"\sum_{k=1}^{99999999} \frac{1}{k}", r"\binom{10^9}{5\cdot 10^8}", r"{99999999 \choose 4444444}", "{" * 5000, "\\boxed{" * 5000,
    "(" * 200 + "1" + ")" * 200, "(" * 200 + "1", "1" * 100_000, "1," * 199 + "1", "0." + "1" * 100_000, "1e999999999", "1e4000", "10^{4000}",
    r"1\times 10^{9999}", "(x+1)^{99999}", "(x+y+z+w)^{50}", "(a+b)(c+d)(g+h)(j+k)(l+m)(n+o)(p+q)(r+s)(t+u)(v+w)", "(x+1)^{50}" * 20,
    r"\frac{" * 60 + "1" + "}{2}" * 60, r"\sqrt{" * 40 + "2" + "}" * 40, r"\sqrt" * 70 + "2", "|" * 300, "-" * 399 + "1", r"\pm" * 100 + "1",
    ",".join([r"\pm 1"] * 50), r"\sin(" * 39 + "x" + ")" * 39, "=" * 300, "x=" * 150 + "1", "1=" * 150 + "1", r"\begin{pmatrix}" * 20, r"\text{" * 80,
    r"\sin(10^{4000})", r"(10^{4000}\pi, 10^{4000}e)", r"\cup".join(["(1,2)"] * 45), " or ".join(["x>1"] * 45), r"\overline{9}" * 30, "\x00" * 100, "\\" * 399,
]  # fmt: skip
GOLD_ANSWERS = ["5", r"\sqrt{2}+\sin x", "(-\\infty,3)"]


def check_hostile(answers, failures):
    for answer in answers:
        for gold in GOLD_ANSWERS:
            start = time.perf_counter()
            score, reason = grade_math(f"#### {answer}", gold)
            seconds = time.perf_counter() - start
            if score or seconds > 3.5:
                failures.append((answer[:60], gold, seconds, reason))


def test_hostile_answers_are_rejected_in_eight_threads():
    judge.cache_clear()
    failures = []
    threads = [threading.Thread(target=check_hostile, args=(HOSTILE[i::8], failures)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert grade_math(boxed(r"\sec^2 y"), r"\tan^2 y + 1") == (1.0, "right")  # the workers still run


def test_symbolic_grader_is_killed_after_timeout(monkeypatch):
    monkeypatch.setattr("grading.answers.math_grader.SYMBOLIC_SECONDS", 0.3)
    hard = r"\int_0^{\pi} \frac{x^{9} \sin^{9} x \ln(1+x)}{1+\cos^{8} x + \tan^{7} x}\,dx"
    start = time.perf_counter()
    assert judge.__wrapped__("1", hard) == ("gave_up", "math-verify took over 0.3 s")
    assert time.perf_counter() - start < 3.5
    assert judge.__wrapped__("10", r"\sum_{k=1}^{4} k")[0] in ("right", "gave_up")


def test_plain_numbers_are_graded_fast():
    seconds = []
    for answer in range(1000, 1300):
        start = time.perf_counter()
        assert grade_math(f"so \\boxed{{{answer:,}}}", str(answer)) == (1.0, "right")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1e-4


# --- python -m grading math-table


def run_table(monkeypatch, capsys, path):
    monkeypatch.setattr(sys, "argv", ["grading", "math-table", str(path)])
    main()
    return capsys.readouterr().out.splitlines()


def test_math_table_prints_mismatches_and_counts(monkeypatch, capsys, tmp_path):
    rows = [
        "kind\tgold\tanswer\texpected\tnote\tquestion",
        "num\t5\t5\taccept\ta note",
        "num\t5\t6\taccept",
        "num\t5\t5.0\treject",
        "num\t5\t@the answer is 5\taccept",
        "num\t5\t#### 5\\n####\taccept",  # a whole completion, with an escaped line break
        "num\t25\t5^2\taccept\t\tCompute $5^2$.",
    ]
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
    *mismatches, last = run_table(monkeypatch, capsys, tmp_path / "t.tsv")
    assert mismatches == [
        "false reject: num: 6 for 5: wrong: 6 is not 5",
        "false accept: num: 5.0 for 5",
        "false reject: num: 5^2 for 25: wrong: 5^2 repeats the question and is not evaluated",
    ]
    assert last.startswith("right 3 of 6, false accepts 1, false rejects 2, seconds ")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"t.tsv: No such file or directory"),
        ("", r"t.tsv:1: no column kind, gold, answer, expected"),
        ("kind\tgold\tanswer\n", r"t.tsv:1: no column expected"),
        (
            "kind\tgold\tanswer\texpected\nnum\t5\t5\tyes\n",
            r"t.tsv:2: expected is 'yes'",
        ),
        ("kind\tgold\tanswer\texpected\nnum\t5\n", r"t.tsv:2: expected is None"),
        ("kind\tgold\tanswer\texpected\nnum\t\t5\taccept\n", r"t.tsv:2: the gold answer is empty"),
    ],
)
def test_malformed_table_raises_one_line_error(monkeypatch, capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(SystemExit, match=message):
        run_table(monkeypatch, capsys, tmp_path / "t.tsv")


def test_digit_group_inside_a_formula_does_not_crash():
    assert grade_math(r"\boxed{\frac{1,000}{3}}", "1, 2")[0] == grade_math(r"\boxed{\sqrt{1,000}}", "(3,4)")[0] == 0.0
