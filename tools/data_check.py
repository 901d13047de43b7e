"""`python -m data check SOURCE`: check that graders give golds full marks, and wrong answers nothing.

Wrong answers are made from the gold, are mutants of a gold program, or are junk (grading/rewards/probes.py). A mutant
that passes all tests may be equivalent to the gold. Therefore mutants are tried until one fails a test; those before it
are counted. If none fails, the question is reported as a failure. Answers that cannot be graded on this machine are
counted as ungraded.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from grading import Completion, Ungraded, check_tests, grade_row, sandbox
from grading.base import row_kind, shorten
from grading.rewards import probes
from grading.rewards.probes import Probe

SLOW_GOLD_TIMEOUT = 10.0  # seconds, for gold programs that exceed the default time limit


class Result(NamedTuple):
    """The grade of a probe."""

    probe: Probe
    score: float | None  # None: ungraded
    reason: str


@dataclass
class Report:
    """The results of checking one source."""

    outcomes: dict[str, Counter] = field(default_factory=dict)  # by name of the probe: passed, failed, ungraded
    without_gold: int = 0
    equivalent: int = 0  # mutants that pass every test
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # ungraded questions, and slow golds

    def add(self, row: dict, results: list[Result]) -> None:
        """Count the results of a row."""
        for probe, score, reason in results:
            outcome = "ungraded" if score is None else "passed" if score == probe.is_right else "failed"
            self.outcomes.setdefault(probe.name, Counter())[outcome] += 1
            if outcome == "failed":
                shown = "" if probe.is_right else f" {shorten(probe.text)!r}"
                self.failures.append(f"{row['id']}: {probe.name}{shown} gets {score:g}: {reason}")
        if results and all(result.score is None for result in results):
            self.notes.append(f"ungraded {row['id']}: {results[0].reason}")

    def lines(self) -> list[str]:
        lines = []
        for name, n in self.outcomes.items():
            marks = "full marks" if name == "gold" else "nothing"
            ungraded = f", {n['ungraded']} ungraded" if n["ungraded"] else ""
            lines.append(f"  {name:<22}  {n['passed']} of {n['passed'] + n['failed']} get {marks}{ungraded}")
        if self.without_gold:
            lines.append(f"  {'no gold':<22}  {self.without_gold} questions")
        if self.equivalent:
            lines.append(f"  {'equivalent':<22}  {self.equivalent} mutants pass every test")
        return lines + [f"  {note}" for note in self.notes] + [f"  FAIL     {failure}" for failure in self.failures]


def print_report(source: str, rows: list[dict]) -> bool:
    """Check a source and print the report. Return True if nothing failed. Raise RewardError if tests cannot run."""
    notes = [f"  note     {note}" for note in check_tests(rows)]
    report = check(rows)
    print("\n".join([f"{source}: {len(rows)} questions", *notes, *report.lines()]))
    return not report.failures


def check(rows: list[dict]) -> Report:
    """Grade the golds, wrong answers, junk and mutants of rows, in parallel."""
    report = Report()
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        golds = list(pool.map(_grade_gold, rows))
        slow = [i for i, results in enumerate(golds) if any(result.reason.startswith("timeout") for result in results)]
        if slow:  # a slow gold may still be right
            sandbox.start(code_timeout=SLOW_GOLD_TIMEOUT)
            for i, retried in zip(slow, pool.map(_grade_gold, [rows[i] for i in slow])):
                golds[i] = retried
                if all(result.score == 1 for result in retried):
                    report.notes.append(f"slow     {rows[i]['id']}: right, but takes longer than code_timeout")
            sandbox.start()
        report.without_gold = golds.count([])
        for row, results in zip(rows, golds):
            report.add(row, results)
        # If the gold of a row is not right, its wrong answers show nothing.
        sound_rows = [
            row for row, results in zip(rows, golds) if row_kind(row) and all(result.score == 1 for result in results)
        ]
        for row, results in zip(sound_rows, pool.map(_grade_wrong_answers, sound_rows)):
            report.add(row, results)
        code_rows = [row for row in sound_rows if row_kind(row) == "code" and probes.gold_answer(row)]
        for row, (num_passed, final_result) in zip(code_rows, pool.map(_grade_mutants, code_rows)):
            report.equivalent += num_passed
            report.add(row, [final_result])
    return report


def grader_style(row: dict) -> str:
    """Return the style of answers that the row's grader parses."""
    return {"code": "```python", "reasoning_gym": "<answer>"}.get(row_kind(row), "\\boxed{}")


def _grade(row: dict, probe: Probe) -> Result:
    try:
        score, reason = grade_row(Completion("", probe.text, {}).answer, row)
    except (Ungraded, ValueError) as error:  # ValueError: an empty gold, or a custom grader
        return Result(probe, None, str(error))
    return Result(probe, score, reason)


def _grade_gold(row: dict) -> list[Result]:
    """Grade the gold of a row. The list is empty if the row has no gold."""
    return [_grade(row, Probe("gold", probe.text, True)) for probe in probes.right_probes(row, grader_style(row))[-1:]]


def _grade_wrong_answers(row: dict) -> list[Result]:
    wrong = [*probes.wrong_probes(row, grader_style(row)), *probes.hostile_probes(row, grader_style(row))]
    return [_grade(row, probe) for probe in wrong if not probe.is_truncated]  # a truncated program may be right


def _grade_mutants(row: dict) -> tuple[int, Result]:
    """Grade mutants until one fails a test. Return how many passed before, and the result of the one that failed."""
    num_passed = 0
    not_passed = []
    for program in probes.mutants(row):
        result = _grade(row, Probe("mutant", probes.write("```python", program)))
        if result.score == 1:
            num_passed += 1
        else:
            not_passed.append(result)
        if result.reason.startswith("failed"):  # a crash or an endless loop does not count
            break
    failed = [result for result in not_passed if result.score == 0]
    if failed or not_passed:  # an ungraded mutant may also be wrong
        return num_passed, (failed or not_passed)[-1]
    reason = f"the tests reject none of {num_passed} mutants"
    return num_passed, Result(Probe("mutant", ""), 1.0 if num_passed else None, reason)
