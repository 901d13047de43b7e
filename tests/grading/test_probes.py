"""Probes: the completions made from a row's gold are right or wrong as labelled."""

import ast

from grading import grade_code
from grading.rewards import probes
from grading.rewards.probes import changed_texts, hostile_probes, mutants, wrong_answers, wrong_numbers

CODE = {
    "id": "c", "prompt": "Write add.", "task": "code", "solution": "def add(a, b):\n    return a + b",
    "tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
}  # fmt: skip


def run(program, *arguments):
    scope = {}
    exec(program, scope)
    return scope["add"](*arguments)


def test_wrong_numbers_are_other_numbers():
    assert wrong_numbers("18") == ["19", "17", "-18", "187"]
    assert wrong_numbers("-1,080") == ["-1079", "-1081", "1080", "-10793"]
    assert wrong_numbers("0") == ["1", "7", "-1"]  # as long as the gold: first
    assert wrong_numbers("9") == ["8", "10", "-9", "97"]
    assert wrong_numbers("0.5") == ["1.5", "-0.5", "12"]
    assert wrong_numbers("-1/2") == ["-3/2", "1/2", "2"]
    assert wrong_numbers("\\frac{3}{4}") == wrong_numbers("red") == wrong_numbers("9" * 5000) == []


def test_changed_texts_differ_from_the_gold():
    assert changed_texts("\\frac{3}{4}") == ["\\frac{3}{5}"]
    assert changed_texts("Eva") == ["Evb"] and changed_texts("b") == ["c"]
    assert changed_texts("a" + "9" * 5000) == ["a" + "9" * 4985 + "1" + "0" * 15] and changed_texts("\\pi") == []


def test_wrong_programs_return_wrong_values():
    constant, returns_none = wrong_answers(CODE)
    assert run(constant, 1, 2) == run(constant, 2, 2) not in (3, 4) and run(returns_none, 1, 2) is None
    always_equal = next(probe.text for probe in hostile_probes(CODE, "plain") if "always equal" in probe.name)
    assert run(always_equal, 1, 2) == 17
    *swapped, off_by_one = mutants(CODE)
    assert [run(program, 5, 3) for program in swapped] == [2] and run(off_by_one, 5, 3) == 9
    assert all(ast.unparse(ast.parse(program)) for program in [constant, returns_none, always_equal, *swapped])


def test_programs_that_read_standard_input():
    row = CODE | {"solution": "print(int(input()) + 1)", "tests": [{"input": "1\n", "output": "2\n"}]}
    assert wrong_answers(row) == ["print(987654321)", "print(None)"]
    assert list(mutants(row)) == ["print(int(input()) - 1)", "print(int(input()) + 2)"]


def test_mutants_of_loops_come_last():
    row = CODE | {"solution": "def add(a, b):\n    while b > 0:\n        a += 1\n        b -= 1\n    return a - 0"}
    first, *_ = mutants(row)
    assert "return a + 0" in first or "return a - 1" in first


def test_wrong_programs_fail_every_form_of_tests():
    forms = [
        {"tests": ["assert g(2) == 4"], "solution": "def g(x):\n    return 2*x"},
        {"tests": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "g", "solution": "def g(x):\n    return x+x"},
        {"tests": [{"args": [2], "expected": 4}], "entry_point": "g", "solution": "def g(x):\n    return x*x"},
        {"tests": [{"input": "2\n", "output": "4\n"}], "solution": "print(2 * int(input()))"},
    ]  # fmt: skip
    for form in forms:
        row = {"id": 1, "task": "t", "prompt": "q"} | form
        answers = [probes.gold_answer(row), *probes.wrong_answers(row)]
        assert [grade_code(a, row["tests"], row.get("entry_point"))[0] for a in answers] == [1.0, 0.0, 0.0]
    custom = {"id": 1, "task": "t", "prompt": "q", "tests": ["look at it"], "entry_point": "g"}
    assert "def g(" in probes.wrong_answers(custom)[0] and probes.right_probes(custom, "plain") == []


def test_wrong_answers_differ_from_the_gold():
    for gold, wrong in {"7": "8", "1,080": "1081", "-1/2": "-3/2", "0.5": "1.5", "Paris": "Parib"}.items():
        assert probes.wrong_answers({"answer": gold})[0] == wrong and gold not in probes.wrong_answers({"answer": gold})
    assert probes.gold_answer({"answer": "3+4=7\n#### 7"}) == "7" == probes.gold_answer({"answer": "so \\boxed{7}"})
    assert probes.gold_answer({"answer": ""}) is None and probes.gold_answer({"prompt": "q"}) is None
    countdown = {"grader": "countdown", "target": 6, "nums": [2, 3], "solution": "2 * 3"}
    assert (probes.gold_answer(countdown), probes.wrong_answers(countdown)[0]) == ("2 * 3", "6")
    puzzle = {"grader": "reasoning_gym", "answer": ""}
    assert probes.gold_answer(puzzle) == "" and not {"empty", "tags only"} & {
        p.name for p in probes.wrong_probes(puzzle, "plain")
    }
