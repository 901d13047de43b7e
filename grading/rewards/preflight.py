"""Checks before a run: test a reward file on its data, with completions that are known to be right or wrong.

`preflight` raises RewardError for errors and returns notes and warnings. `try_rows` scores the probes of rows
(probes.py); the self-test prints the results as a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from grading.answers.math_grader import gold_answers, grade_math
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
from grading.rewards.scoring import make_reward_error, score_all

MAX_WARNINGS = 4
PROBED_KINDS = ("math", "code", "countdown")  # kinds of rows whose gold can be turned into a completion


def preflight(rewards: Rewards, rows: list[dict]) -> list[str]:
    """Call every function on rows of each task and kind, before a model is loaded.

    Returns:
        Notes for the user: unparsable gold answers, and wrong completions that can earn as much as a right one.

    Raises:
        RewardError: A column is misspelled, a row has no gold answer, or a function raises or returns an invalid value.
    """
    rewards = replace(rewards, reward_errors="stop")
    samples = {}  # one row for each task and set of filled columns, and one whose gold answer is refused
    groups = {}  # rows grouped by kind and by the rewards that apply
    for row in rows:
        names = tuple(f.name for f in _applicable_rewards(rewards, row))
        groups.setdefault((row_kind(row) or row.get("task"), names), []).append(row)
        filled = frozenset(column for column, value in row.items() if value not in (None, "", []))
        samples.setdefault((row.get("task"), filled, _is_refused(row)), row)
    texts = ("", "<think>two</think>2")
    score_all(rewards, [probes.completion(row, text) for row in samples.values() for text in texts])
    warnings = []
    for (kind, names), group in groups.items():
        functions = [f for f in rewards.functions if f.name in names]
        warnings += _warnings(rewards, f"warning: on {kind} rows", functions, group)
    return rewards.notes + _gold_warnings(rows) + warnings[:MAX_WARNINGS]


def _applicable_rewards(rewards: Rewards, row: dict) -> list[RewardFunction]:
    """Return the rewards (no metrics) that apply to a row. Raise RewardError for a missing column or if none can judge."""
    applicable = []
    for f in rewards.functions:
        try:
            applies = f.applies_to(Row(row))
        except Exception as error:
            raise make_reward_error(rewards.path, f, [probes.completion(row, "")], error) from error
        missing = [column for column, is_required in f.columns.items() if is_required and column not in row]
        if applies and missing:
            raise RewardError(
                f"reward function '{f.name}' ({rewards.path.name}:{f.line}) needs the column '{missing[0]}', but row "
                f"{row.get('id', '?')} has only {', '.join(row)}.{did_you_mean(missing[0], [*row, *TRL_ARGUMENTS])}"
            )
        if applies and f.weight:
            applicable.append(f)
    has_own_model = any(f.is_model and f.when for f in applicable)  # chosen with when= for rows without a verdict
    if rewards.heaviest and not has_own_model and not any(map(rewards.can_judge, applicable)):
        names = ", ".join(f.name for f in applicable)
        judges = " or ".join(f.name for f in rewards.functions if rewards.can_judge(f))
        raise RewardError(
            f"row {row['id']}: {rewards.path.name} cannot judge this row: {f'only {names}' if names else 'no reward'} "
            f"applies, but {judges} is needed. Add the column answer or tests (columns: {{answer: YOUR_COLUMN}} maps "
            f"yours), or change the reward's when= (the row's task is '{row.get('task')}')"
        )
    return applicable


def _is_refused(row: dict) -> bool:
    """Return whether the gold answer is of a kind that the math grader refuses, such as a dict or nan."""
    try:
        return row_kind(row) == "math" and not gold_answers(row["answer"])
    except ValueError:
        return True


def _gold_warnings(rows: list[dict]) -> list[str]:
    """Return a warning if the math grader does not accept gold answers themselves: too long, unclosed braces, empty."""
    math_rows = [row for row in rows if row_kind(row) == "math"]
    golds = {str(row["answer"]): row["answer"] for row in math_rows}
    problems = {text: _gold_problem(gold) for text, gold in golds.items()}
    bad = [row for row in math_rows if problems[str(row["answer"])]]
    if not bad:
        return []
    ids = ", ".join([*(str(row["id"]) for row in bad[:3]), *(["..."] if len(bad) > 3 else [])])
    return [
        f"warning: the math grader cannot parse {len(bad)} of {len(math_rows)} gold answers, so no completion can be "
        f"right: rows {ids} ({shorten(problems[str(bad[0]['answer'])])})"
    ]


def _gold_problem(gold) -> str:
    """Return why the math grader rejects a gold answer as an answer to itself; "" if it accepts it."""
    answer = probes.gold_answer({"answer": gold})
    if answer is None:
        return "the answer is empty"
    try:
        score, reason = grade_math(probes.write("\\boxed{}", answer), gold)
    except ValueError as error:
        return str(error)
    return "" if score == 1 else reason


def _warnings(rewards: Rewards, prefix: str, functions: list[RewardFunction], rows: list[dict]) -> list[str]:
    """Return warnings about overpaid wrong completions and about reward models, for rows with the same rewards."""
    warnings = []
    models = [f for f in functions if f.is_model]
    for f in models:
        if f.function.is_unbounded:
            warnings.append(
                f"{prefix} {f.name} is the raw score of a reward model, which is unbounded and can outweigh all other "
                "rewards: set sigmoid=True to keep it between 0 and 1"
            )
    if not any(map(rewards.can_judge, functions)):
        if models:
            warnings.append(
                f"{prefix} no reward checks correctness: the reward model {models[0].name} gives no verdict, so all "
                "completions count as wrong. Watch the reward, not the accuracy"
            )
        return warnings
    row = min(rows, key=lambda row: len(probes.gold_answer(row) or " " * 1000))  # prefer a short, plain gold
    if not probes.gold_answer(row) or row_kind(row) not in PROBED_KINDS:
        return warnings
    # No hostile probes: they could hang a function that evaluates the answer.
    _, trials = try_rows(rewards, [row], (probes.wrong_probes,))
    right = next(t.score for t in trials if t.probe.name == probes.RIGHT)
    wrong = next(t.score for t in trials if t.probe.name == probes.WRONG)
    gain = right.total - wrong.total
    overpaid = [t for t in trials if not t.probe.is_right and t.score.total >= gain - 1e-9]
    if overpaid:
        worst = max(overpaid, key=lambda t: t.score.total)
        parts = [f"{f.name} {f.weight * value:g}" for f in functions if (value := worst.score.parts[f.name])]
        warnings.append(
            f"{prefix} a wrong answer can earn as much as a right one: {worst.probe.name!r} gets "
            f"{' + '.join(parts) or 0}, and being right adds {gain:g}. Limit shaping to a fifth of that, or reward "
            f"only right answers; for details run the self-test of {rewards.path.name}"
        )
    if wrong.is_right:
        warnings.append(f"{prefix} the verdict comes from {wrong.judge}, which accepts a wrong answer as right")
    return warnings


# --- probes


@dataclass
class Trial:
    """A probe of a row, with the score that its completion got."""

    row: dict
    probe: probes.Probe
    score: Score


def try_probes(rewards: Rewards, row_probes: list[tuple[dict, probes.Probe]]) -> list[Trial]:
    """Score probes, each with its row."""
    scores = score_all(rewards, [probes.completion(row, p.text, p.is_truncated) for row, p in row_probes])
    return [Trial(row, probe, score) for (row, probe), score in zip(row_probes, scores)]


def try_rows(
    rewards: Rewards,
    rows: list[dict],
    wrong_probes: tuple[Callable, ...] = (probes.wrong_probes, probes.hostile_probes, probes.copy_probes),
) -> tuple[str, list[Trial]]:
    """Score the probes of rows of one kind, written in the style that the rewards pay best.

    Returns:
        The style, and the trials of the right probes and then the wrong ones.
    """
    by_style = {}
    for style in probes.answer_styles(rows[0]):
        by_style[style] = try_probes(
            rewards, [(row, probe) for row in rows for probe in probes.right_probes(row, style)]
        )
    totals = {style: [t.score.total for t in trials] for style, trials in by_style.items()}
    best = max(totals, key=lambda style: sum(total for total in totals[style] if not math.isnan(total)))
    wrong = [(row, probe) for row in rows for make_probes in wrong_probes for probe in make_probes(row, best)]
    return best, by_style[best] + try_probes(rewards, wrong)
