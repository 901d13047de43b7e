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

from grading import Completion, Ungraded, check_tests, grade_row, sandbox
from grading.base import row_kind, shorten
from grading.rewards import probes

PATIENCE_SECONDS = 10.0  # for a gold program that is too slow for the usual limit


@dataclass
class Result:
    """An answer to a row with what its grader made of it."""

    row: dict
    probe: probes.Probe
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

    def add(self, result: Result) -> None:
        row, probe, score = result.row, result.probe, result.score
        outcome = "ungraded" if score is None else "due" if score == probe.is_right else "failed"
        self.outcomes.setdefault(probe.name, Counter())[outcome] += 1
        if outcome == "failed":
            shown = "" if probe.is_right else f" {shorten(probe.text)!r}"
            self.failures.append(f"{row['id']}: {probe.name}{shown} gets {score:g}: {result.reason}")
        elif outcome == "ungraded" and probe.is_right:
            self.notes.append(f"ungraded {row['id']}: {result.reason}")

    def lines(self) -> list[str]:
        counts = {}
        for name, n in self.outcomes.items():
            ungraded = f", {n['ungraded']} ungraded" if n["ungraded"] else ""
            marks = "full marks" if name == "gold" else "nothing"
            counts[name] = f"{n['due']} of {n['due'] + n['failed']} get {marks}{ungraded}"
        if self.without_gold:
            counts["no gold"] = f"{self.without_gold} questions"
        if self.no_difference:
            counts["no difference"] = f"{self.no_difference} mutants are right in every test"
        lines = [f"  {name:<22}  {text}" for name, text in counts.items()]
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
        golds = [result for results in pool.map(_try_golds, rows) for result in results]
        slow = [result for result in golds if result.reason.startswith("timeout")]
        if slow:  # whether a gold is right is one question, whether it is quick another
            sandbox.start(code_timeout=PATIENCE_SECONDS)
            for result, score in zip(slow, pool.map(lambda result: _grade(result.row, result.probe).score, slow)):
                if score == 1:
                    result.score = score
                    report.notes.append(
                        f"slow     {result.row['id']}: right, but only with more time than code_timeout"
                    )
            sandbox.start()
        for result in golds:
            report.add(result)
        sound = {id(result.row) for result in golds if result.score == 1}
        unsound = {id(result.row) for result in golds} - sound  # here nothing can be told from wrong answers
        report.without_gold = len(rows) - len(sound | unsound)
        judged = [row for row in rows if row_kind(row) and id(row) not in unsound]
        for row, results in zip(judged, pool.map(_try_wrongs, judged)):
            for result in results:
                report.add(result)
            if all(result.score is None for result in results):
                report.notes.append(f"ungraded {row['id']}: {results[0].reason}")
        programs = [row for row in judged if row_kind(row) == "code" and id(row) in sound]
        for passing, result in pool.map(_try_mutants, programs):
            report.no_difference += passing
            report.add(result)
    return report


def _grade(row: dict, probe: probes.Probe) -> Result:
    try:
        score, reason = grade_row(Completion("", probe.text, {}).answer, row)
    except (Ungraded, ValueError) as error:  # ValueError: a gold that is empty, a grader of the user's own
        return Result(row, probe, None, str(error))
    return Result(row, probe, score, reason)


def _try_golds(row: dict) -> list[Result]:
    return [_grade(row, probe) for probe in probes.golds(row)]


def _try_wrongs(row: dict) -> list[Result]:
    style = probes.grader_style(row)
    tried = [*probes.answers(row, style), *probes.wrongs(row, style), *probes.hostile(row, style)]
    return [_grade(row, probe) for probe in tried if not probe.is_right and not probe.is_truncated]


def _try_mutants(row: dict) -> tuple[int, Result]:
    """Try mutants until one gives a wrong value: how many passed before, and the result of that one."""
    results = []
    for program in probes.mutants(row):
        results.append(_grade(row, probes.Probe("mutant", probes.write("```python", program))))
        if results[-1].reason.startswith("failed"):  # not merely a crash, or a loop without an end
            break
    passing = sum(result.score == 1 for result in results)
    wrong = [result for result in results if result.score == 0]
    ungraded = [result for result in results if result.score is None]  # each of them may be wrong
    if not wrong and not ungraded:
        reason = f"none of {passing} changes makes a difference to the tests"
        ungraded = [Result(row, probes.Probe("mutant", ""), 1.0 if passing else None, reason)]
    return passing, (wrong or ungraded)[-1]
