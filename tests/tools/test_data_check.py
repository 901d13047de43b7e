"""`python -m data check`: the graders must give golds full marks, and wrong answers and junk nothing."""

import json
import subprocess
import sys

import pytest

import tools.data_check
from data import gym, load
from data.tasks import questions
from grading import Ungraded, grade_row, sandbox
from grading.gym import final_answer, grade_gym
from grading.rewards.probes import gold_answer, mutants, write, wrong_answers
from tools.data_check import check

CODE = {
    "id": "c", "prompt": "Write add.", "task": "code", "solution": "def add(a, b):\n    return a + b",
    "tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
}  # fmt: skip


def count_junk(report):
    """Return the numbers of all, failed and ungraded completions that do not depend on the gold."""
    names = {"very long", "empty", "tags only", "no answer"}
    counts = [n for name, n in report.outcomes.items() if name in names or name.startswith("hostile")]
    return sum(n.total() for n in counts), sum(n["failed"] for n in counts), sum(n["ungraded"] for n in counts)


# --- the report


@pytest.mark.parametrize("family", ["sums", "functions", "countdown"])
def test_the_built_in_families_are_sound(family):
    rows = questions(family, "eval", 5, seed=0)
    report = check(rows)
    assert report.failures == [] and report.notes == [] and report.without_gold == 0
    assert report.outcomes["gold"] == {"passed": 5}
    total, failed, ungraded = count_junk(report)
    assert failed == 0 and total >= 5 * 7
    # Without bubblewrap, programs that Monty cannot run are ungraded: here one per question, which imports sys.
    assert ungraded == (5 if family == "functions" and "bubblewrap" not in sandbox.available() else 0)
    if family == "functions":
        assert report.outcomes["mutant"] == {"passed": 5}


def test_the_gold_of_a_solution_is_its_final_answer(tmp_path):
    row = {"question": "3 + 4?", "answer": "It is <<3+4=7>>7.\n#### 7"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (row,) = load(str(tmp_path / "q.jsonl"))
    boxed = {"id": "w", "prompt": "3 + 4?", "answer": "So \\boxed{7}"}
    assert gold_answer(row) == gold_answer(boxed) == "7" and "8" in wrong_answers(boxed)
    assert check([row, boxed]).outcomes["gold"] == {"passed": 2}


def test_reports_wrong_golds_and_loose_tests():
    wrong = CODE | {"id": "w", "solution": "def add(a, b):\n    return a * b"}
    loose = CODE | {
        "id": "l",
        "tests": ["assert type(add(1, 2)) == int"],
        "solution": "def add(a, b):\n    return a + b",
    }
    report = check([wrong, loose])
    assert any(line.startswith("w: gold gets 0: failed") for line in report.failures)
    assert report.outcomes["gold"] == {"passed": 1, "failed": 1}
    assert any(line.startswith("l: wrong answer") for line in report.failures)


def test_notes_slow_golds(monkeypatch):
    limits = [1.0]

    def grade(answer, row):
        is_gold = row["solution"] in answer and "before_" not in answer
        return (0.0, "timeout: too slow") if is_gold and limits[-1] < 5 else grade_row(answer, row)

    monkeypatch.setattr(tools.data_check, "grade_row", grade)
    monkeypatch.setattr(tools.data_check.sandbox, "start", lambda code_timeout=1.0: limits.append(code_timeout))
    report = check([CODE])
    assert report.outcomes["gold"] == {"passed": 1} and not report.failures and limits == [1.0, 10.0, 1.0]
    (note,) = report.notes
    assert note.startswith("slow     c: ") and "code_timeout" in note


def test_counts_rows_without_a_gold():
    report = check([{"id": "a", "prompt": "Write.", "task": "t", "tests": ["assert f(1) == 2"]}])
    total, failed, ungraded = count_junk(report)
    assert report.without_gold == 1 and not report.failures and total > 5 and failed == 0
    assert ungraded == (0 if "bubblewrap" in sandbox.available() else 1)
    assert any("no gold" in line for line in report.lines())
    assert any("ungraded" in line for line in report.lines()) == bool(ungraded)
    report = check([{"id": "a", "prompt": "Hi", "task": "t"}, {"id": "b", "prompt": "1?", "task": "t", "answer": " "}])
    assert report.without_gold == 2 and not report.failures
    assert report.notes == ["ungraded b: the gold answer is empty: nothing could be right"]


@pytest.mark.parametrize("verdicts, expected", [
    ([1.0, 1.0], "failed"), ([1.0, None], "ungraded"), ([None, None], "ungraded"), ([1.0, 0.0], "passed"),
    ([None, 0.0], "passed"),
])  # fmt: skip
def test_undetected_mutants_are_a_failure_only_if_all_are_graded(monkeypatch, verdicts, expected):
    """An ungraded mutant may be wrong, so it is no evidence against the tests."""
    texts = [write("```python", program) for program in mutants(CODE)]

    def grade(answer, row):
        if answer not in texts:
            return grade_row(answer, row)
        verdict = verdicts[texts.index(answer)]
        if verdict is None:
            raise Ungraded("unsupported")
        return verdict, "passed" if verdict else "failed"

    monkeypatch.setattr(tools.data_check, "grade_row", grade)
    report = check([CODE])
    assert report.outcomes["mutant"] == {expected: 1}
    assert bool(report.failures) == (expected == "failed") and report.equivalent == verdicts.count(1.0)


def test_command_line_output_and_exit_status(tmp_path):
    def run_check(*rows):
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [sys.executable, "-m", "data", "check", str(tmp_path / "q.jsonl")]
        return subprocess.run(command, capture_output=True, text=True)

    good = run_check(CODE)
    assert good.returncode == 0 and "q.jsonl: 1 questions" in good.stdout
    assert any(line.split() == "gold 1 of 1 get full marks".split() for line in good.stdout.splitlines())
    bad = run_check(CODE, CODE | {"id": "b", "solution": "def add(a, b):\n    return b"})
    assert bad.returncode == 1 and "FAIL     b: gold gets 0: failed" in bad.stdout
    broken = run_check(CODE | {"tests": ["assert True"]})
    assert broken.returncode == 1 and broken.stderr.startswith("error: ") and len(broken.stderr.splitlines()) == 1


# --- reasoning_gym


def test_extracts_final_answers():
    assert final_answer("thus <answer>\n0 1\n1 0\n</answer>.") == "0 1\n1 0"
    assert final_answer("<answer>1</answer> no, <answer>\\boxed{2}</answer>") == "2"
    assert final_answer("so \\boxed{3}") == "3" and final_answer(" A B \n") == "A B"
    assert final_answer("<answer></answer>") == "" and final_answer("\\boxed{}") == ""
    assert final_answer("  ") is None


@pytest.mark.parametrize("family", ["chain_sum", "arc_1d", "rearc", "prime_factorization", "rectangle_count"])
def test_reasoning_gym_golds_and_junk(family):
    """rearc compares tuples, prime_factorization raises on junk, and rectangle_count rewards close numbers."""
    pytest.importorskip("reasoning_gym")
    for row in gym._generate(family, "train", 2, 0):
        assert grade_row(f"Thus <answer>{row['answer']}</answer>", row) == (1.0, "right")
        for junk in ("<answer>qwertz</answer>", "\\boxed{-1}", "\x00\ud800", "[" * 9000, '{"a": 1}'):
            score, reason = grade_gym(junk, row)
            assert score == 0 and reason.startswith("wrong: score_answer")
        assert grade_gym("", row)[1].startswith("no_answer")
        assert grade_gym("9" * 20_000, row)[1].startswith("no_answer")
