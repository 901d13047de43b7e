"""Checks of a reward file and its data before a run: what do the rewards pay for right and wrong completions?

`preflight` raises RewardError for what is wrong and returns notes. `try_rows` scores the probes of rows (probes.py): the
self-test prints what it returns as a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from grading.answers.math_grader import grade_math
from grading.base import (
    TRL_ARGUMENTS,
    RewardError,
    RewardFunction,
    Rewards,
    Row,
    Score,
    did_you_mean,
    row_kind,
    shorten,
)
from grading.rewards import probes
from grading.rewards.scoring import describe_fault, score_all

MAX_WARNINGS = 4
TRIED_KINDS = ("math", "code", "countdown")  # of rows: a completion can be made from the gold


def preflight(rewards: Rewards, rows: list[dict]) -> list[str]:
    """Try every function on rows of each task and kind before a model is loaded.

    Returns:
        Notes for the user: golds that cannot be read, and warnings if a wrong completion earns as much as a right one.

    Raises:
        RewardError: A misspelt column, a row without its gold, an exception or a wrong return value.
    """
    rewards = replace(rewards, reward_errors="stop")
    samples = {}  # a row of each task and set of columns
    groups = {}  # rows by kind and by the rewards that apply
    for row in rows:
        names = tuple(f.name for f in _applying(rewards, row))
        groups.setdefault((row_kind(row) or row.get("task"), names), []).append(row)
        filled = frozenset(column for column, value in row.items() if value not in (None, "", []))
        samples.setdefault((row.get("task"), filled), row)
    texts = ("", "<think>two</think>2")
    score_all(rewards, [probes.completion(row, text) for row in samples.values() for text in texts])
    warnings = []
    for (kind, names), group in groups.items():
        functions = [f for f in rewards.functions if f.name in names]
        warnings += _warnings(rewards, f"warning: on {kind} rows", functions, group)
    return rewards.notes + _notes_on_golds(rows) + warnings[:MAX_WARNINGS]


def _applying(rewards: Rewards, row: dict) -> list[RewardFunction]:
    """The rewards (no metrics) that apply to a row. Raises RewardError if they lack a column, or none can judge it."""
    applying = []
    for f in rewards.functions:
        try:
            applies_to = f.applies_to(Row(row))
        except Exception as error:
            raise describe_fault(rewards.path, f, [probes.completion(row, "")], error) from error
        lacking = [column for column, is_needed in f.columns.items() if is_needed and column not in row]
        if applies_to and lacking:
            raise RewardError(
                f"reward function '{f.name}' ({rewards.path.name}:{f.line}) asks for the column '{lacking[0]}', which row "
                f"{row.get('id', '?')} lacks; there are {', '.join(row)}.{did_you_mean(lacking[0], [*row, *TRL_ARGUMENTS])}"
            )
        if applies_to and f.weight:
            applying.append(f)
    is_meant = any(f.is_model and f.when for f in applying)  # for such rows, without a verdict
    if rewards.heaviest and not is_meant and not any(map(rewards.can_judge, applying)):
        names = ", ".join(f.name for f in applying)
        judges = " or ".join(f.name for f in rewards.functions if rewards.can_judge(f))
        raise RewardError(
            f"row {row['id']}: of the rewards in {rewards.path.name} {f'only {names}' if names else 'none'} applies, but "
            f"not {judges}: the row needs the column answer or tests (columns: {{answer: YOUR_COLUMN}} maps yours), or "
            f"the reward another when= (the row's task is '{row.get('task')}')"
        )
    return applying


def _notes_on_golds(rows: list[dict]) -> list[str]:
    """A note if the math grader cannot match golds even with themselves: too long, open braces, empty."""
    math_rows = [row for row in rows if row_kind(row) == "math"]
    problems = {gold: _problem_with(gold) for gold in {str(row["answer"]) for row in math_rows}}
    bad = [row for row in math_rows if problems[str(row["answer"])]]
    if not bad:
        return []
    ids = ", ".join([*(str(row["id"]) for row in bad[:3]), *(["..."] if len(bad) > 3 else [])])
    return [
        f"warning: {len(bad)} of {len(math_rows)} answers cannot be read by the math grader, so that nothing can be right: "
        f"rows {ids} ({shorten(problems[str(bad[0]['answer'])])})"
    ]


def _problem_with(gold: str) -> str:
    """Why the math grader does not take a gold for right; empty if it does."""
    answer = probes.gold_answer({"answer": gold})
    if answer is None:
        return "it is empty"
    score, reason = grade_math(probes.write("\\boxed{}", answer), gold)
    return "" if score == 1 else reason


def _warnings(rewards: Rewards, on: str, functions: list[RewardFunction], rows: list[dict]) -> list[str]:
    """Warnings about the rewards that apply to the same rows: what a wrong completion earns, and reward models."""
    warnings = []
    models = [f for f in functions if f.is_model]
    for f in models:
        if f.function.is_unbounded:
            warnings.append(
                f"{on} {f.name} is a reward model's raw score, which has no bound and can outweigh every other reward: "
                "sigmoid=True keeps it between 0 and 1"
            )
    if not any(map(rewards.can_judge, functions)):
        if models:
            warnings.append(
                f"{on} nothing says what is right: a reward model ({models[0].name}) has an opinion, no verdict. All "
                "completions count as wrong there: look at the reward, not at the accuracy"
            )
        return warnings
    row = min(rows, key=lambda row: len(probes.gold_answer(row) or " " * 1000))  # the shortest: most likely a plain one
    if not probes.gold_answer(row) or row_kind(row) not in TRIED_KINDS:
        return warnings
    _, trials = try_rows(
        rewards, [row], (probes.wrong_probes,)
    )  # a hostile answer may hang a function that evaluates it
    right = next(t.score for t in trials if t.probe.name == probes.RIGHT)
    wrong = next(t.score for t in trials if t.probe.name == probes.WRONG)
    gain = right.total - wrong.total
    cheap = [t for t in trials if not t.probe.is_right and t.score.total >= gain - 1e-9]
    if cheap:
        most = max(cheap, key=lambda t: t.score.total)
        parts = [f"{f.name} {f.weight * value:g}" for f in functions if (value := most.score.parts[f.name])]
        warnings.append(
            f"{on} a wrong answer can earn as much as a right one: {most.probe.name!r} gets {' + '.join(parts) or 0}, and "
            f"being right adds {gain:g}. Keep shaping to a fifth of that, or give it only to what is right; the self-test "
            f"of {rewards.path.name} shows more"
        )
    if wrong.is_right:
        warnings.append(f"{on} right or wrong is what {wrong.judge} says, and it takes a wrong answer for right")
    return warnings


# --- trying completions of known worth


@dataclass
class Trial:
    """One completion with what it should be and what it got."""

    row: dict
    probe: probes.Probe
    score: Score


def try_probes(rewards: Rewards, tried: list[tuple[dict, probes.Probe]]) -> list[Trial]:
    scores = score_all(rewards, [probes.completion(row, p.text, p.is_truncated) for row, p in tried])
    return [Trial(row, probe, score) for (row, probe), score in zip(tried, scores)]


def try_rows(
    rewards: Rewards,
    rows: list[dict],
    wrong_probes: tuple[Callable, ...] = (probes.wrong_probes, probes.hostile_probes),
) -> tuple[str, list[Trial]]:
    """Score the probes of rows of one kind, their answers written in the style that the rewards pay best; that style."""
    by_style = {}
    for style in probes.answer_styles(rows[0]):
        by_style[style] = try_probes(
            rewards, [(row, probe) for row in rows for probe in probes.right_probes(row, style)]
        )
    totals = {style: [t.score.total for t in trials] for style, trials in by_style.items()}
    best = max(totals, key=lambda style: sum(total for total in totals[style] if not math.isnan(total)))
    wrong = [(row, probe) for row in rows for make in wrong_probes for probe in make(row, best)]
    return best, by_style[best] + try_probes(rewards, wrong)
