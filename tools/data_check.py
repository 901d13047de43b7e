"""`python -m data check SOURCE`: every gold through its own grader, and answers that must get nothing.

Each question's gold must get full marks. Wrong answers made from it, mutants of a gold program and junk
(grading/rewards/probes.py) must get nothing. A mutant that passes is no hole by itself: the change may make no difference
to any test. So mutants are tried until one gives a wrong value; those before are counted. If none does, the question is
listed. An answer that no grader here can judge is counted as ungraded: nothing was paid for it.
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

PATIENCE_SECONDS = 10.0  # for a gold program that is too slow for the usual limit


class Result(NamedTuple):
    """What the row's grader made of a probe."""

    probe: Probe
    score: float | None  # None: ungraded
    reason: str


@dataclass
class Report:
    """What the check of one source has found."""

    outcomes: dict[str, Counter] = field(default_factory=dict)  # by the probe's name: due, failed, ungraded
    without_gold: int = 0
    no_difference: int = 0  # mutants that pass: equal to the gold in every test
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on single questions: ungraded, or slow

    def add(self, row: dict, results: list[Result]) -> None:
        for probe, score, reason in results:
            outcome = "ungraded" if score is None else "due" if score == probe.is_right else "failed"
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
            lines.append(f"  {name:<22}  {n['due']} of {n['due'] + n['failed']} get {marks}{ungraded}")
        if self.without_gold:
            lines.append(f"  {'no gold':<22}  {self.without_gold} questions")
        if self.no_difference:
            lines.append(f"  {'no difference':<22}  {self.no_difference} mutants are right in every test")
        return lines + [f"  {note}" for note in self.notes] + [f"  FAIL     {failure}" for failure in self.failures]


def print_report(source: str, rows: list[dict]) -> bool:
    """Check a source and print what was found; whether nothing failed. Raises RewardError for tests that cannot run."""
    notes = [f"  note     {note}" for note in check_tests(rows)]
    report = check(rows)
    print("\n".join([f"{source}: {len(rows)} questions", *notes, *report.lines()]))
    return not report.failures


def check(rows: list[dict]) -> Report:
    """Grade golds, wrong answers, junk and mutants of rows, in parallel."""
    report = Report()
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        golds = list(pool.map(_try_golds, rows))
        slow = [i for i, tried in enumerate(golds) if any(result.reason.startswith("timeout") for result in tried)]
        if slow:  # whether a gold is right is one question, whether it is quick another
            sandbox.start(code_timeout=PATIENCE_SECONDS)
            for i, again in zip(slow, pool.map(_try_golds, [rows[i] for i in slow])):
                golds[i] = again
                if all(result.score == 1 for result in again):
                    report.notes.append(f"slow     {rows[i]['id']}: right, but only with more time than code_timeout")
            sandbox.start()
        report.without_gold = golds.count([])
        for row, tried in zip(rows, golds):
            report.add(row, tried)
        # Nothing can be told from wrong answers to a row whose gold is not right.
        judged = [
            row for row, tried in zip(rows, golds) if row_kind(row) and all(result.score == 1 for result in tried)
        ]
        for row, tried in zip(judged, pool.map(_try_wrongs, judged)):
            report.add(row, tried)
        programs = [row for row in judged if row_kind(row) == "code" and probes.gold_answer(row)]
        for row, (passing, last) in zip(programs, pool.map(_try_mutants, programs)):
            report.no_difference += passing
            report.add(row, [last])
    return report


def grader_style(row: dict) -> str:
    """The style of answers that the row's own grader reads."""
    return {"code": "```python", "reasoning_gym": "<answer>"}.get(row_kind(row), "\\boxed{}")


def _grade(row: dict, probe: Probe) -> Result:
    try:
        score, reason = grade_row(Completion("", probe.text, {}).answer, row)
    except (Ungraded, ValueError) as error:  # ValueError: a gold that is empty, a grader of the user's own
        return Result(probe, None, str(error))
    return Result(probe, score, reason)


def _try_golds(row: dict) -> list[Result]:
    return [_grade(row, Probe("gold", probe.text, True)) for probe in probes.right_probes(row, grader_style(row))[-1:]]


def _try_wrongs(row: dict) -> list[Result]:
    tried = [*probes.wrong_probes(row, grader_style(row)), *probes.hostile_probes(row, grader_style(row))]
    return [_grade(row, probe) for probe in tried if not probe.is_truncated]  # a program that is cut off may be right


def _try_mutants(row: dict) -> tuple[int, Result]:
    """Try mutants until one gives a wrong value: how many passed before, and the result of that one."""
    passing = 0
    others = []
    for program in probes.mutants(row):
        result = _grade(row, Probe("mutant", probes.write("```python", program)))
        if result.score == 1:
            passing += 1
        else:
            others.append(result)
        if result.reason.startswith("failed"):  # not merely a crash, or a loop without an end
            break
    wrong = [result for result in others if result.score == 0]
    if wrong or others:  # an ungraded one may be wrong too
        return passing, (wrong or others)[-1]
    reason = f"none of {passing} changes makes a difference to the tests"
    return passing, Result(Probe("mutant", ""), 1.0 if passing else None, reason)
