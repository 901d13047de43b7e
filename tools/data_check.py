"""`python -m data check SOURCE`: every gold through its own grader, and answers that must get nothing.

Each question's gold is put as an ideal completion would put it and must get full marks. Then come wrong answers made from
the gold (another number, off by one, the sign, another word; for code a constant, None, an object that equals everything,
an operator swapped) and junk. A changed program that passes is no hole by itself: the change may make no difference to any
test. So changes are tried until one gives a wrong value; those before are counted. Where none does, the question is listed.
"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

from grading import Ungraded, extract_answer, grade_row, sandbox
from grading.base import row_kind, shorten
from tools.mutants import changed_programs, constant_programs

PATIENCE_SECONDS = 10.0  # for a gold program that is too slow for the usual limit
EMPTY = ("\\boxed{}", "<think></think><answer></answer>")  # junk, but for a gold that is empty
JUNK = (
    *EMPTY,
    "",
    "```python\n```",
    "Let me see. It could be many things, and I am sure that it is one of them.",
    "```python\nimport sys\nsys.exit(0)\n```",
    "\\boxed{" * 3000,
    "\\boxed{" + "(" * 200 + "123456789" + ")" * 200 + "}",
    "\\boxed{9^{9^{9^{9^{9}}}}}",
    "\\boxed{99999999!}",
    "\\boxed{" + "9" * 100_000 + "}",
    "\x00\x1b[2J\ud800 <answer>\x00</answer>",
)


@dataclass
class Report:
    """What came of one source."""

    tried: Counter = field(default_factory=Counter)  # answers by what they are: gold, constant, junk, ...
    as_due: Counter = field(default_factory=Counter)  # of them, those that got what they should
    ungraded: Counter = field(default_factory=Counter)  # of them, those that no grader here can judge
    deciders: Counter = field(default_factory=Counter)  # golds that are programs, by the tier that decided
    without_gold: int = 0
    no_difference: int = 0  # changed programs that pass: equal to the gold in every test
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on single golds: ungraded, or slow

    def lines(self) -> list[str]:
        lines = []
        for what, n in self.tried.items():
            due = "full marks" if what == "gold" else "nothing"
            apart = f", {self.ungraded[what]} ungraded" if self.ungraded[what] else ""
            lines.append(f"  {what:<16} {self.as_due[what]} of {n - self.ungraded[what]} get {due}{apart}")
        if self.without_gold:
            lines.append(f"  no gold          {self.without_gold} questions")
        if self.no_difference:
            lines.append(f"  no difference    {self.no_difference} changed programs are right in every test")
        if self.deciders:
            total = self.deciders.total()
            shares = [f"{name} {count / total:.1%}" for name, count in self.deciders.most_common()]
            lines.append(f"  decided by       {', '.join(shares)} of {total} golds")
        return [*lines, *(f"  {note}" for note in self.notes), *(f"  FAIL     {row}" for row in self.failures)]


def check(rows: list[dict]) -> Report:
    """Grade golds, wrong answers and junk of rows, in parallel."""
    report = Report()
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:

        def grade(cases: list[tuple[dict, str, str]]) -> list[tuple[float | None, str]]:
            """Score and reason of each (row, what, answer)."""
            return list(pool.map(lambda case: _grade(case[2], case[0]), cases))

        golds = [(row, "gold", text) for row in rows for text in ideal_answers(row)]
        report.without_gold = len(rows) - len({id(row) for row, _, _ in golds})
        before = Counter(sandbox.decided)
        results = grade(golds)
        report.deciders = sandbox.decided - before
        slow = [i for i, (_, reason) in enumerate(results) if reason.startswith("timeout")]
        if slow:  # whether a gold is right is one question, whether it is quick another
            sandbox.start(code_timeout=PATIENCE_SECONDS)
            for i, result in zip(slow, grade([golds[i] for i in slow])):
                if result[0] == 1:
                    results[i] = result
                    report.notes.append(
                        f"slow     {golds[i][0]['id']}: right, but only with more time than code_timeout"
                    )
            sandbox.start()
        _count(report, golds, results, 1.0)
        right = {
            id(row): row for (row, _, _), (score, _) in zip(golds, results) if score == 1
        }  # else nothing can be told
        wrong = [(row, what, text) for row in right.values() for what, text in wrong_answers(row)]
        _count(report, wrong, grade(wrong), 0.0)
        programs = [row for row in right.values() if row_kind(row) == "code"]
        tried = list(pool.map(_change_until_wrong, programs))
        report.no_difference = sum(passing for passing, _ in tried)
        _count(report, [(row, "changed", "") for row in programs], [result for _, result in tried], 0.0)
        judged = [row for row in rows if row_kind(row)]
        junk = [(row, "junk", text) for row in judged for text in JUNK if row.get("answer") != "" or text not in EMPTY]
        _count(report, junk, grade(junk), 0.0)
    return report


def _grade(answer: str, row: dict) -> tuple[float | None, str]:
    try:
        return grade_row(answer, row)
    except (Ungraded, ValueError) as error:  # ValueError: a gold that is empty, a grader of the person's own
        return None, str(error)


def _count(report: Report, cases: list[tuple], results: list[tuple], due: float) -> None:
    """Enter into the report whether each case got the score that it is due."""
    for (row, what, answer), (score, reason) in zip(cases, results):
        report.tried[what] += 1
        if score is None:
            report.ungraded[what] += 1
            if what == "gold":
                report.notes.append(f"ungraded {row['id']}: {reason}")
        elif score == due:
            report.as_due[what] += 1
        else:
            shown = f" {shorten(answer)!r}" if answer and not due else ""
            report.failures.append(f"{row['id']}: {what}{shown} gets {score:g}: {reason}")


def ideal_answers(row: dict) -> list[str]:
    """The gold as completions would put it: in a box or in tags, as a program, and as the source's own solution."""
    kind, gold, solution = row_kind(row), row.get("answer"), row.get("solution")
    if kind == "code":
        return [fenced(solution)] if solution else []
    if kind == "countdown":
        return [f"\\boxed{{{solution}}}"] if solution else []
    if gold is None:
        return []
    if kind == "reasoning_gym":
        return [f"<answer>{gold}</answer>"]
    is_worked_out = _is_worked_out(str(gold))
    answers = [str(gold) if is_worked_out else f"\\boxed{{{gold}}}"]
    return answers + ([solution] if isinstance(solution, str) and _is_worked_out(solution) else [])


def _is_worked_out(text: str) -> bool:
    return "####" in text or "\\boxed{" in text


def wrong_answers(row: dict) -> list[tuple[str, str]]:
    """(what, completion): answers made from the gold that are not right."""
    kind = row_kind(row)
    if kind == "code":
        return [(what, fenced(program)) for what, program in constant_programs(row)]
    if kind == "countdown":
        used, solution, target = row["nums"], row["solution"], row["target"]
        wrong = [f"{solution} + 1", f"-({solution})", str(target), str(used[0]), f"{solution} = {target + 1}"]
        return [("wrong", f"\\boxed{{{expression}}}") for expression in wrong]
    gold = str(row["answer"])
    gold = (extract_answer(gold) if _is_worked_out(gold) else None) or gold.strip()
    texts = wrong_numbers(gold) or ["a wrong word"]
    if kind == "reasoning_gym":  # a text with another number or letter may be a right answer to a puzzle, too
        return [("wrong", f"<answer>{text}</answer>") for text in texts]
    return [("wrong", f"\\boxed{{{text}}}") for text in texts + changed_texts(gold)]


def wrong_numbers(gold: str) -> list[str]:
    """Where the gold is a number: off by one (a decimal by a tenth of it), with its sign flipped, another one."""
    if not re.fullmatch(r"[+-]?\d[\d,]*(\.\d+)?", gold):
        return []
    number = Fraction(gold.replace(",", ""))
    step = 1 if number.denominator == 1 else max(1, abs(number) / 10)
    others = [number + step, number - step, -number, 10 * number + 7]
    return [str(int(n) if n.denominator == 1 else float(n)) for n in dict.fromkeys(others) if n != number]


def changed_texts(gold: str) -> list[str]:
    """A gold that is no plain number, with its last number or letter changed."""
    if wrong_numbers(gold):
        return []
    changed = [gold[:-1] + ("b" if gold[-1] != "b" else "c")] if gold.isalpha() else []
    for last in list(re.finditer(r"\d+", gold))[-1:]:
        changed.append(gold[: last.start()] + str(int(last[0]) + 1) + gold[last.end() :])
    return changed


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def _change_until_wrong(row: dict) -> tuple[int, tuple[float | None, str]]:
    """Try changed programs until one gives a wrong value: how many passed before, and its score with the reason."""
    passing, result = 0, (None, "unsupported: no changed program could be run")
    for program in changed_programs(row):
        score, reason = _grade(fenced(program), row)
        if score == 1:
            passing += 1
        elif score == 0:
            result = score, reason
            if reason.startswith("failed"):  # not merely a crash, or a loop without an end
                break
    if passing and result[0] is None:
        result = 1.0, f"none of {passing} changes makes a difference to the tests"
    return passing, result
