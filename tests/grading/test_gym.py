"""The grader of reasoning_gym: no probe wins in any family, right answers do in their usual forms, nothing is evaluated."""

import functools
import inspect
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import GRADERS, graders
from hostile.host import Host

pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")

from reasoning_gym.factory import DATASETS  # noqa: E402

from data import DataError, gym  # noqa: E402
from grading import Ungraded, grade_gym, grade_row  # noqa: E402
from grading.gym import _start_server  # noqa: E402
from grading.gym_verdicts import CHECKS, REFUSED, VERDICTS  # noqa: E402
from grading.sandbox.tiers import bubblewrap  # noqa: E402
from grading.sandbox.workers import run_in_worker  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GENERATED = sorted(set(DATASETS) - set(REFUSED) - {"composite"})  # composite only combines other families
FAST = [
    "arc_1d", "binary_matrix", "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "countdown",
    "fraction_simplification", "game_of_life", "gsm_symbolic", "intermediate_integration", "letter_jumble", "n_queens",
    "number_format", "number_sorting", "polynomial_equations", "polynomial_multiplication", "puzzle24", "simple_integration",
    "sokoban", "spell_backward", "spiral_matrix", "string_insertion", "word_sorting",
]  # fmt: skip
CONSTANTS = [
    "", "0", "1", "-1", "2", "17", "100", "0.5", "-0", "0.0", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "nanj",
    "nan+nanj", "None", "null", "True", "true", "False", "yes", "No", "A", "x", "C", "E", "pi", "I", "zoo", "[]", "{}", "()",
    '""', "[[]]", "[0]", "[NaN]", "[NaN, NaN, NaN]", "['nan', 'nan', 'nan', 'nan']", "[Infinity]", "{0: 1}", "*", "#", "?",
    "0/1", "0/0", "1/0", "0 0", "\n", "answer", "the answer", "qwertz", "6*4*1*1", "24+0*1*1", "Integral(x, x)", "Derivative(x)",
]  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp("home")) as host:
        yield host


def skip_without_bubblewrap():
    tier, problem = bubblewrap()
    if not tier:
        pytest.skip(problem)


@functools.cache
def rows_of(family: str, n: int = 3) -> list[dict]:
    state = random.getstate()
    try:
        return gym._generate(family, "train", n, 0)
    finally:
        random.setstate(state)


def copies(row: dict) -> list[str]:
    """Return answers made from the question alone, without solving it."""
    question = row["prompt"]
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    metadata = row["entry"]["metadata"]
    texts = [question, *lines, lines[-1].split(":")[-1].strip(), lines[-1].split()[-1].strip(".?")]
    if "integrand" in metadata:
        f, x = metadata["integrand"], metadata["variable"]
        texts += [
            f,
            f"({f})*{x}",
            f"Integral({f}, {x})",
            f"Integral({f}, {x}) + C",
            f"integrate({f}, {x})",
            f"Integral({f}).doit()",
        ]
        texts += [
            f"Add(Integral({f}, {x}), C)",
            f"antiderivative({f})",
            f"Subs(Integral({f}, {x}), C, 0)",
            f"{x}*Mean({f})",
        ]
    if "polynomial_expr" in metadata:
        f = metadata["polynomial_expr"]
        texts += [
            f,
            f"expand({f})",
            f"({f}).expand()",
            f"simplify({f})",
            f"Poly({f})",
            f"Mul({f})",
            f"factor({f})",
            f"S('{f}')",
        ]
    if "numbers" in metadata and isinstance(metadata["numbers"], list):
        numbers = metadata["numbers"]
        target = metadata.get("target", 24)
        texts += [f"{numbers}", f"{target}", f"{target}+0*({'+'.join(map(str, numbers))})"]
    if "premises" in metadata:
        texts += metadata["premises"]
    if "original_numbers" in metadata:
        texts += [
            json.dumps(metadata["original_numbers"]),
            json.dumps([float("nan")] * len(metadata["original_numbers"])),
        ]
    return texts


def is_same(text: str, gold: str | None) -> bool:
    """Return True if a probe happens to be the gold, as in a puzzle with two answers."""
    if gold is None:
        return False
    try:
        return float(text) == float(gold)
    except ValueError:
        return "".join(text.lower().split()) == "".join(gold.lower().split())


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in GENERATED])
def test_gold_wins_and_no_constant_and_no_copy_of_the_question_does(family):
    for row in rows_of(family):
        gold = row["answer"]
        if gold is not None:
            for text in (f"<answer>{gold}</answer>", f"<answer>\n{gold}\n</answer>", gold or "<answer></answer>"):
                assert grade_gym(text, row) == (1.0, "right"), gold
        wins = [
            text
            for text in dict.fromkeys([*CONSTANTS, *copies(row)])
            if not is_same(text, gold) and grade_gym(f"<answer>{text}</answer>", row)[0]
        ]
        assert wins == [], f"{row['prompt'][-300:]}\ngold {gold}"


@pytest.mark.parametrize("grader", graders.ROWS)
def test_hostile_answers_read_nothing_and_score_nothing(grader, host):
    row = graders.row_of(grader)
    assert grade_row(f"<answer>{graders.ROWS[grader][1]}</answer>", row)[0] == 1.0
    for case in GRADERS:
        if case.grader == grader:
            score, reason = grade_row(f"<answer>{host.fill(case.answer)}</answer>", row)
            assert score == 0.0 and host.secret not in reason, case
    assert host.traces() == []


@pytest.mark.parametrize("name", graders.REACHING)
def test_even_an_evaluated_answer_reaches_nothing_in_the_sandbox(name, host):
    """`score_answer` of spiral_matrix gives 0.1 to a list that it has evaluated. It is called here without the grader."""
    skip_without_bubblewrap()
    entry = {"answer": "1 2 3", "metadata": {}}

    def score(text):
        return run_in_worker("gym_scorer:score", "spiral_matrix", None, text, entry, start=_start_server)[0]

    assert score("[1, 2, 3] if 1 else 0") == 0.1
    assert score(host.fill(f"[1, 2, 3] if ({graders.REACHING[name]}) else 0")) == 0.0
    assert host.traces() == []


def test_without_bubblewrap_the_verdicts_are_the_same(tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    code = (
        "import json, sys\nfrom grading import grade_gym\nfrom grading.sandbox.tiers import bubblewrap\n"
        "rows, texts = json.load(sys.stdin)\nprint(json.dumps([[grade_gym(t, r)[0] for r in rows for t in texts], bubblewrap()[1]]))"
    )
    rows = [graders.row_of(grader) for grader in ("simple_integration", "intermediate_integration")]
    texts = [graders.ROWS[grader][1] for grader in ("simple_integration", "intermediate_integration")]
    texts += [text for text in graders.right_if("__import__('os')", "simple_integration")]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, input=json.dumps([rows, texts]), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    scores, problem = json.loads(run.stdout or "null") or pytest.fail(run.stderr)
    assert scores == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0] and "bubblewrap does not run here" in problem


# --- verdicts by family


def entry_of(family: str, answer: str = "", **metadata) -> dict:
    return {"family": family, "entry": {"answer": answer, "metadata": metadata}}


SIMPLE = entry_of("simple_integration", variable="x", integrand="21*x**6/4 - 10*x")
TRIG = entry_of("intermediate_integration", variable="X", integrand="-3*sin(6*X + 1)*cos(6*X + 1)")
POWER = entry_of("intermediate_integration", variable="x", integrand="-4*sqrt(3*x + 1)")
PRODUCT = entry_of("polynomial_multiplication", "6*x**2*y - 8*y + 2", variables=["x", "y"])
GSM = entry_of("gsm_symbolic", "1234")
NEGATIVE = entry_of("gsm_symbolic", "-2")
FLIP = entry_of("coin_flip", "0.02734375")
RARE = entry_of("coin_flip", "6.103515625e-05")
COMPLEX = entry_of("complex_arithmetic", "3.0 - 1.0i", result=(3.0, -1.0))
SORTING = entry_of(
    "number_sorting", "['1.2', '1.9', '30.5']", sorted_numbers=["1.2", "1.9", "30.5"], direction="ascending"
)
TWENTY_FOUR = entry_of("puzzle24", "6*(10 + 1 - 7)", numbers=[10, 1, 7, 6])
COUNTDOWN = entry_of("countdown", "7*88*(42 - 10)/56", numbers=[42, 10, 88, 56, 7], target=352)
ROOTS = entry_of("polynomial_equations", "-1.0947, 11.2")
NO_ROOTS = entry_of("polynomial_equations", "")
PICK = entry_of("number_format", "4000.005", solution=4000.005)
BOARD = entry_of("game_of_life", "[[0,1],[1,0]]")
POOL = entry_of("pool_matrix", "5.0 0.11", solution=[[5.0, 1 / 9]])
LETTERS = entry_of("letter_jumble", "It will never")
BACKWARD = entry_of("spell_backward", "nus")
FONT = entry_of("figlet_font", "NUMIDANUMIDA")
WORDS = entry_of("word_sorting", "a, b", sorted_words=["a", "b"])
MATRIX = entry_of("spiral_matrix", "1 2 3")
GRID = entry_of("binary_matrix", "0 1\n1 2")
QUEENS = entry_of("n_queens", "Q _\n_ Q", valid_answers=["Q _\n_ Q", "_ Q\nQ _"])
DAYS = entry_of("calendar_arithmetic", "-1", task="recurring_event_day")
FRACTION = entry_of(
    "fraction_simplification",
    "$\\frac{1}{2}$",
    simplified_numerator=1,
    simplified_denominator=2,
    numerator=4,
    denominator=8,
)
PALINDROMES = entry_of("palindrome_partitioning", '[["a", "b"]]', string="ab", solution=[["a", "b"]])


@pytest.mark.parametrize(
    "row, answers",
    [
        (SIMPLE, ["3*x**7/4 - 5*x**2 + C", "(3/4)*x**7 - 5*x**2 + C", "-5*x**2 + 3/4*x**7", "C + x**7*3/4 - 5*x**2 + 2",
                  "(3*x**7 - 20*x**2)/4 + C", "x**2*(3*x**5/4 - 5) + C", "0.75*x**7 - 5*x**2", "(3*x**7)/4-5*(x**2)+c"]),
        (TRIG, ["-sin(6*X + 1)**2/4 + C", "cos(6*X + 1)**2/4 + C", "cos(12*X + 2)/8 + C", "-(1/4)*sin(6*X+1)**2"]),
        (POWER, ["-8*(3*x + 1)**(3/2)/9 + C", "-(8/9)*(3*x + 1)*sqrt(3*x + 1)"]),
        (PRODUCT, ["6*x**2*y - 8*y + 2", "2 - 8*y + 6*y*x**2", "6*x^2*y-8*y+2"]),
        (GSM, ["1234", "1,234", "$1,234.00", "1234 apples", "\\boxed{1234}", "The answer is 1234."]),
        (NEGATIVE, ["-2", "−2", "-2.0"]),
        (FLIP, ["0.02734375", "0.0273", "7/256", "28/1024", "2.734375%"]),
        (RARE, ["6.103515625e-05", "1/16384", "0.000061"]),
        (COMPLEX, ["3.0 - 1.0i", "3-i", "3 - 1j", "(3-i)"]),
        (SORTING, ["['1.2', '1.9', '30.5']", '["1.20", "1.9", "30.5"]', "[1.2, 1.9, 30.5]"]),
        (TWENTY_FOUR, ["6*(10 + 1 - 7)", "(10+1-7)*6", "6 × (10 + 1 − 7)", "6*(10+1-7) = 24"]),
        (COUNTDOWN, ["7*88*(42 - 10)/56", "(42-10)*88*7/56"]),
        (ROOTS, ["-1.0947, 11.2", "11.2, -1.0947", "-1.0948,11.2000", "[-1.0947, 11.2]"]),
        (NO_ROOTS, ["", '""', "no real solutions"]),
        (PICK, ["4000.005", "4,000.005", "4.000005000000000e+03"]),
        (BOARD, ["[[0,1],[1,0]]", "[[0, 1],\n [1, 0]]"]),
        (POOL, ["5.0 0.11", "5 0.1111"]),
        (LETTERS, ["It will never", "it  will never"]),
        (BACKWARD, ["nus", "Nus"]),
        (FONT, ["NUMIDANUMIDA", "numida numida"]),
        (WORDS, ["a, b", "a,b"]),
        (MATRIX, ["1 2 3", "1  2 3 "]),
        (GRID, ["0 1\n1 2", "0 1 \n1 2 "]),
        (QUEENS, ["Q _\n_ Q", "_ Q\nQ _"]),
        (DAYS, ["-1"]),
        (FRACTION, ["$\\frac{1}{2}$", "1/2", "\\dfrac{1}{2}"]),
        (PALINDROMES, ['[["a", "b"]]']),
    ],
)  # fmt: skip
def test_right_answers_in_usual_forms(row, answers):
    for answer in answers:
        assert grade_gym(f"<answer>{answer}</answer>", row) == (1.0, "right"), answer


@pytest.mark.parametrize(
    "row, answers",
    [
        (SIMPLE, ["Integral(21*x**6/4 - 10*x, x)", "integrate(21*x**6/4 - 10*x, x)", "3*x**7/4 - 5*x**2 + Integral(0, x)",
                  "21*x**7/(4*7) - 10*x**2/2", "21*x**7/28 - 10*x**(1+1)/2", "21*x**(6+1)/28 - 5*x**2", "3*x*x**6/4 - 5*x**2",
                  "(1+2)*x**7/4 - 5*x**2", "3*x**7/4 - 5*x**2 or 1", "x**(6+x/x)*3/4 - 5*x**2", "21*x**7/4/7 - 5*x**2",
                  "3*x**7/4 - exp(log(5))*x**2", "3*x**7/4 - 5*x**2 if 1 else 0", "nan", "zoo", "3*x**7/4", "x**7", "C",
                  "21*x**7/(4*(6+sin(x)**2+cos(x)**2)) - 5*x**2", "diff(x**8, x)", "3*x**7/4 - 5*x**2; 0", "S('3*x**7/4 - 5*x**2')"]),
        (TRIG, ["Integral(-3*sin(6*X + 1)*cos(6*X + 1), X)", "-sin(6*X + 1)**(1+1)/4", "-sin(6*X + 1)**2/(2*2)", "nan"]),
        (PRODUCT, ["(2*x**2 - 4)*(3*y)+2", "expand((3*x**2 - 4)*2*y + 2)", "2*3*x**2*y - 8*y + 2", "6*x*x*y - 8*y + 2",
                   "6*x**2*y - 4*y - 4*y + 2", "6*x**2*y - 8*y + 1 + 1", "6*x**2*y - 8*y + 2*1", "6*x**(1+1)*y - 8*y + 2", "nan"]),
        (GSM, ["1", "-1234", "1234 or 7", "1,2340", "1230+4", "nan", "1234, 5678"]),
        (NEGATIVE, ["2", "+2", "0", "1-3"]),
        (FLIP, ["0", "0.0", "2", "17", "0.03", "nan", "7/25.6", "0/1", "1/0", "comb(8,2)/1024", "0.02734375, 7"]),
        (RARE, ["0", "0.0001", "1e-9", "0%"]),
        (COMPLEX, ["nan", "NaN", "nanj", "nan+nanj", "3-1i+nan", "inf", "1e999", "3+i", "3-i junk", "", "complex(3,-1)"]),
        (SORTING, ["[NaN, NaN, NaN]", "['nan', 'nan', 'nan']", "[1.5, 1.5, 30]", "[2, 2, 31]", "['1.9', '1.2', '30.5']",
                   "sorted([30.5, 1.2, 1.9])", "{}", "[true, true, true]", "['1.2', '1.9']", "1"]),
        (TWENTY_FOUR, ["6*4*1*1", "24+1-1*1", "24", "6*(10 + 1 - 7) + 0.9", "10*1*7/6+13", "6*(10+7-1)", "6*(10+1-7)*1", "factorial(4)",
                       "10 + 1 + 7 + 6.5"]),
        (COUNTDOWN, ["352", "42+10+88+56+7", "352+0*(42+10+88+56+7)", "7*88*(42 - 10)//56", "7*88*(42-10)/56 + 1/1000"]),
        (ROOTS, ["-1.0947", "-1.0947, 11.2, 11.2", "-1.0947, 11.2, junk", "-1.0947, 11.21", "nan, nan", "nan", ""]),
        (NO_ROOTS, ["qwertz", "0", "nan", "x", "1, 2"]),
        (PICK, ["4000", "4000.0", "4000.013", "nan", "0"]),
        (BOARD, ["[[0,1],[1,0],[0,0]]", "[[0,1,0],[1,0]]", "[[false,true],[true,false]]", "[[0,0],[0,0]]", "[[NaN]]", "{}"]),
        (POOL, ["5.0 0.12", "5.04 0.11", "nan nan", "5.0\n0.11", "5.0"]),
        (LETTERS, ["It will never fail", "It will never It will never", "It will", "never will It"]),
        (BACKWARD, ["nusX", "nu", "sun"]),
        (FONT, ["NUMIDANUMI", "NUMIDANUMIxx", "NUMIDANUMIDAX"]),
        (WORDS, ["a, b, c", "a, b, a, b", "b, a", "a"]),
        (MATRIX, ["[1, 2, 3]", "1 2", "range(1, 4)", "['1 2 3'][0]"]),
        (GRID, ["[[0, 1], [1, 2]]", "0 1 1 2"]),
        (QUEENS, ["[['Q', '_'], ['_', 'Q']]", "Q Q\nQ Q"]),
        (DAYS, ["5", "0", "-1 or 5", "1"]),
        (FRACTION, ["4/8", "\\frac{1}{2} or \\frac{1}{3}", "1/2/1", "0.5", "2/4"]),
        (PALINDROMES, ['["ab"]', '[["ab"]]', "[]"]),
    ],
)  # fmt: skip
def test_wrong_answers_that_a_scorer_of_the_package_may_accept(row, answers):
    for answer in answers:
        score, reason = grade_gym(f"<answer>{answer}</answer>", row)
        assert score == 0.0, answer
        assert reason.startswith("wrong: "), reason


def test_every_family_that_evaluates_its_answer_has_a_verdict_or_a_check():
    evaluating = re.compile(r"\b(?:eval|exec|sympify|parse_expr|literal_eval)\(")
    families = {name for name, (kind, _) in DATASETS.items() if evaluating.search(inspect.getsource(kind.score_answer))}
    assert families >= {"spiral_matrix", "simple_integration", "countdown"}
    assert families <= {*VERDICTS, *CHECKS}
    assert {*VERDICTS, *CHECKS, *REFUSED} <= set(DATASETS) and not set(VERDICTS) & set(CHECKS)


@pytest.mark.parametrize("family", REFUSED)
def test_refuses_families_that_a_copy_or_a_constant_wins(family):
    with pytest.raises(DataError, match=f"{family} cannot be trained on: {REFUSED[family]}"):
        gym._generate(family, "train", 1, 0)
    with pytest.raises(Ungraded, match=family):
        grade_gym("<answer>P</answer>", entry_of(family, "P"))


def test_grades_with_the_settings_of_the_level():
    """The default settings of word_ladder have no words of five letters."""
    for row in gym._generate("word_ladder@1", "train", 2, 0):
        assert grade_gym(f"<answer>{row['answer']}</answer>", row) == (1.0, "right")


def test_evaluates_the_integrals_in_golds():
    rows = rows_of("intermediate_integration", 40)
    assert any("Integral" in row["entry"]["answer"] for row in rows)
    assert not any("Integral" in row["answer"] for row in rows)


@pytest.mark.parametrize("family, moves", [("sokoban", "LR" * 200), ("rush_hour", "A+1 " * 400)])
def test_random_walks_are_refused(family, moves):
    """A walk of thousands of random moves solves a share of the small puzzles."""
    for row in rows_of(family):
        score, reason = grade_gym(f"<answer>{moves}{row['answer'] or ''}</answer>", row)
        assert score == 0.0 and "moves, over" in reason
    assert "9 squares" in grade_gym("<answer>A+999999999</answer>", rows_of("rush_hour")[0])[1]


@pytest.mark.parametrize(
    "family, tail",
    [("kakurasu", "\nor 7"), ("survo", "\nor x"), ("quantum_lock", " or D"), ("time_intervals", " or 7"), ("word_sorting", ", z"),
     ("letter_jumble", " z"), ("fraction_simplification", " or 1/2"), ("pool_matrix", "\n0"), ("shortest_path", " up"), ("advanced_geometry", ", 7")],
)  # fmt: skip
def test_right_answer_with_a_tail_is_wrong(family, tail):
    for row in rows_of(family):
        assert grade_gym(f"<answer>{row['answer']}{tail}</answer>", row)[0] == 0.0


def test_grades_long_right_answers():
    board = json.dumps([[0, 1] * 60] * 120)
    assert grade_gym(f"<answer>{board}</answer>", entry_of("game_of_life", board)) == (1.0, "right")
    assert grade_gym(f"<answer>{board * 3}</answer>", entry_of("game_of_life", board))[1].startswith("no_answer")


def test_workers_receive_plain_data_unchanged():
    value = {(1, 2.5): [{"a"}, None, True], "b": b"c"}
    assert run_in_worker("builtins:repr", value) == repr(value)
