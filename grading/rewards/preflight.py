"""Checks of a reward file and its data before a run, and the judge of what rewards tell right from wrong.

`preflight` raises RewardError for what is wrong and returns notes. `try_rows` scores the probes of rows (probes.py), and
`overpaid` lists the wrong ones that earn as much as a right one: the self-test prints both as a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from grading.answers.math_grader import grade_math
from grading.base import GIVEN, RewardError, RewardFunction, Rewards, Row, Score, did_you_mean, row_kind, shorten
from grading.rewards import probes
from grading.rewards.scoring import describe_fault, score_all

MAX_SHOWN = 4  # of notes of one kind
TRIED_KINDS = ("math", "code", "countdown")  # of rows: a completion can be made from the gold


def preflight(rewards: Rewards, rows: list[dict]) -> list[str]:
    """Try every function on rows of each task and kind before a model is loaded.

    Returns:
        Notes for the user: golds that cannot be read, the largest total, and warnings if a wrong completion can earn it.

    Raises:
        RewardError: A misspelt column, a row without its gold, an exception or a wrong return value.
    """
    rewards = replace(rewards, reward_errors="stop")
    samples = {}  # a row of each task and set of columns
    groups = {}  # rows by kind and by the rewards that apply
    for row in rows:
        applying = [f for f in rewards.functions if _applies(rewards, f, row) and f.weight]
        _check_judge(rewards, row, applying)
        groups.setdefault((row_kind(row) or row.get("task"), tuple(f.name for f in applying)), []).append(row)
        filled = frozenset(column for column, value in row.items() if value not in (None, "", []))
        samples.setdefault((row.get("task"), filled), row)
    texts = ("", "<think>two</think>2")
    score_all(rewards, [probes.completion(row, text) for row in samples.values() for text in texts])
    totals, warnings = [], []
    for (kind, names), group in groups.items():
        total, found = _notes_on_group(rewards, kind, [f for f in rewards.functions if f.name in names], group)
        totals.append(total)
        warnings += found
    if len(totals) > MAX_SHOWN:
        totals[MAX_SHOWN:] = ["..."]
    largest = [f"largest reward: {', '.join(totals)}"] if totals else []
    return rewards.notes + _notes_on_golds(rows) + largest + warnings[:MAX_SHOWN]


def _applies(rewards: Rewards, f: RewardFunction, row: dict) -> bool:
    """Whether a function applies to a row. Raises RewardError if it needs a column that the row lacks."""
    try:
        applies = f.applies(Row(row))
    except Exception as error:
        raise describe_fault(rewards.path, f, [probes.completion(row, "")], error) from error
    lacking = [column for column, is_needed in f.columns.items() if is_needed and column not in row]
    if applies and lacking:
        raise RewardError(
            f"reward function '{f.name}' ({rewards.path.name}:{f.line}) asks for the column '{lacking[0]}', which row "
            f"{row.get('id', '?')} lacks; there are {', '.join(row)}.{did_you_mean(lacking[0], [*row, *GIVEN])}"
        )
    return applies


def _check_judge(rewards: Rewards, row: dict, applying: list[RewardFunction]) -> None:
    """Raise RewardError if no reward that applies to a row can judge it, unless a reward model is meant for such rows."""
    is_meant = any(f.is_model and f.when for f in applying)
    if is_meant or not rewards.heaviest or any(map(rewards.can_judge, applying)):
        return
    names = ", ".join(f.name for f in applying)
    judges = " or ".join(f.name for f in rewards.functions if rewards.can_judge(f))
    raise RewardError(
        f"row {row['id']}: of the rewards in {rewards.path.name} {f'only {names}' if names else 'none'} applies, but "
        f"not {judges}: the row needs the column answer or tests (columns: {{answer: YOUR_COLUMN}} maps yours), or "
        f"the reward another when= (the row's task is '{row.get('task')}')"
    )


def _notes_on_golds(rows: list[dict]) -> list[str]:
    """A note if the math grader cannot match golds even with themselves: too long, open braces, empty."""
    problems = {}  # by gold
    bad = []
    math_rows = [row for row in rows if row_kind(row) == "math"]
    for row in math_rows:
        gold = str(row["answer"])
        if gold not in problems:
            try:
                score, reason = grade_math(gold if probes.is_worked_out(gold) else f"\\boxed{{{gold}}}", gold)
                problems[gold] = "" if score == 1 else reason
            except ValueError as error:
                problems[gold] = str(error)
        if problems[gold]:
            bad.append(row)
    if not bad:
        return []
    shown = ", ".join(str(row["id"]) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")
    return [
        f"warning: {len(bad)} of {len(math_rows)} answers cannot be read by the math grader, so that nothing can be right: "
        f"rows {shown} ({shorten(problems[str(bad[0]['answer'])])})"
    ]


def _notes_on_group(rewards: Rewards, kind: str, functions: list[RewardFunction], rows: list[dict]):
    """The largest total on rows to which these functions apply, and warnings if it can be had without being right."""
    on = f"warning: on {kind} rows"
    warnings = _notes_on_models(rewards, on, functions)
    functions = [f for f in functions if f.weight > 0]
    row = min(rows, key=lambda row: len(probes.gold_of(row) or " " * 1000))  # the shortest: most likely a plain one
    best, trials = "", {}
    if probes.gold_of(row) and row_kind(row) in TRIED_KINDS:
        best, trials = try_rows(rewards, [row], (probes.wrongs,))  # a hostile answer may hang a function that runs it
    worth = {f.name: f.weight * _largest(f, trials) for f in functions}
    parts = " + ".join(f"{name} {value:g}" for name, value in worth.items())
    total = f"{sum(worth.values()):g} on {kind} rows ({parts})"
    telling = {f.name: worth[f.name] for f in functions if _tells(f, trials)}
    if not telling:
        return total, warnings
    shaping = {name: value for name, value in worth.items() if name not in telling}
    if sum(shaping.values()) >= sum(telling.values()):
        parts = [" + ".join(f"{name} {value:g}" for name, value in part.items()) for part in (shaping, telling)]
        warnings.append(
            f"{on} a wrong answer can earn as much as a right one: {parts[0]} against {parts[1]}. Keep shaping to a "
            "fifth of it, or give it only to what is right"
        )
    elif paid := overpaid(trials[best]):
        warnings.append(
            f"{on} a completion that is wrong earns as much as a right one: {', '.join(paid)}. The self-test of "
            f"{rewards.path.name} shows it"
        )
    fooled = {t.score.judge for t in trials[best] if t.probe.name == probes.WRONG and t.score.is_right}
    if fooled:
        warnings.append(
            f"{on} right or wrong is what {' or '.join(fooled)} says, but it pays a wrong answer as well as a right one: "
            f"give {next(iter(telling))} the largest weight"
        )
    return total, warnings


def _notes_on_models(rewards: Rewards, on: str, functions: list[RewardFunction]) -> list[str]:
    """Warnings about the reward models among the functions that apply to the same rows."""
    models = [f for f in functions if f.is_model]
    notes = []
    for f in models:
        if f.function.is_unbounded:
            notes.append(
                f"{on} {f.name} is a reward model's raw score, which has no bound and can outweigh every other reward: "
                "sigmoid=True keeps it between 0 and 1"
            )
    if models and not any(map(rewards.can_judge, functions)):
        notes.append(
            f"{on} nothing says what is right: a reward model ({models[0].name}) has an opinion, no verdict. All "
            "completions count as wrong there: look at the reward, not at the accuracy"
        )
    return notes


# --- the judge


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
    rewards: Rewards, rows: list[dict], others: tuple[Callable, ...] = (probes.wrongs, probes.hostile)
) -> tuple[str, dict[str, list[Trial]]]:
    """Score the probes of rows of one kind.

    Returns:
        The style that the rewards pay best, and the trials by style: answers in each, `others` in the best one.
    """
    trials = {}
    for style in probes.styles_of(rows[0]):
        trials[style] = try_probes(rewards, [(row, probe) for row in rows for probe in probes.answers(row, style)])

    def paid(style: str) -> float:
        totals = [t.score.total for t in trials[style] if t.probe.is_right]
        return sum(total for total in totals if not math.isnan(total))

    best = max(trials, key=paid)
    for make in others:
        trials[best] += try_probes(rewards, [(row, probe) for row in rows for probe in make(row, best)])
    return best, trials


def _largest(f: RewardFunction, trials: dict[str, list[Trial]]) -> float:
    """The largest value that a function may give: as seen, but at least 1 if it is decorated."""
    if f.is_model and f.function.is_unbounded:
        return math.inf
    seen = max((t.score.parts[f.name] or 0.0 for tried in trials.values() for t in tried), default=0.0)
    return max(1.0, seen) if seen <= 0 or hasattr(f.function, "reward") else seen


def _tells(f: RewardFunction, trials: dict[str, list[Trial]]) -> bool:
    """Whether a function gives more to the gold than to the first wrong answer written in the same way."""
    if f.is_model:  # it may be chance
        return False
    for tried in trials.values():
        first = {t.probe.name: t.score.parts[f.name] or 0.0 for t in reversed(tried)}
        if first[probes.RIGHT] > first[probes.WRONG]:
            return True
    return False


def overpaid(trials: list[Trial], best_example: float = math.nan) -> dict[str, list[tuple[Trial, float]]]:
    """The wrong completions that earn as much as the best right one to their prompt.

    Without a right one only an empty completion is judged: against `best_example`, else against the best of all.

    Returns:
        By the probe's name: each trial, with the total that it should have stayed below.
    """
    found = {}
    for prompt in dict.fromkeys(str(t.row["prompt"]) for t in trials):
        tried = [t for t in trials if str(t.row["prompt"]) == prompt]
        wrong = [t for t in tried if not t.probe.is_right]
        totals = [t.score.total for t in tried if t.probe.is_right]
        best = max((total for total in totals if not math.isnan(total)), default=math.nan)
        if not totals:
            wrong_totals = [t.score.total for t in wrong]
            differ = max(wrong_totals) > min(wrong_totals)
            best = max(wrong_totals) if math.isnan(best_example) and differ else best_example
            wrong = [t for t in wrong if t.probe.name == "empty"]
        for t in wrong:
            if t.score.total >= best - 1e-9:
                found.setdefault(t.probe.name, []).append((t, best))
    return found
