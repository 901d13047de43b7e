"""Checks before a run: test a reward file on its data, with completions that are known to be right or wrong.

`preflight` raises RewardError for errors and returns notes and warnings.
"""

import math
from dataclasses import replace

from grading.answers.math_grader import gold_answers, grade_math
from grading.base import (
    TRL_ARGUMENTS,
    RewardError,
    RewardFunction,
    Rewards,
    Row,
    Score,
    did_you_mean,
    outcome_of,
    row_kind,
    shorten,
)
from grading.rewards import probes
from grading.rewards.scoring import make_reward_error, score_all
from grading.rewards.trials import Trial, learn_payments, misfit, row_with_gold
from grading.rewards.verdicts import TOLERANCE, find_payment, reads_gold

MAX_WARNINGS = 4
NEEDED_COLUMNS = {  # the columns that the graders read, by kind
    "math": ("answer",),
    "code": ("tests",),
    "countdown": ("target", "nums"),
    "reasoning_gym": ("family", "entry"),
}
PROBED_KINDS = ("math", "code", "countdown", None)  # kinds of rows whose gold can be turned into a completion


def preflight(rewards: Rewards, rows: list[dict]) -> list[str]:
    """Call every function on rows of each task and kind, before a model is loaded.

    Returns:
        Notes for the user: unparsable gold answers, and wrong completions that can earn as much as a right one.

    Raises:
        RewardError: A column is misspelled, a row has no gold answer, or a function raises or returns an invalid value.
    """
    try:
        return _check(replace(rewards, reward_errors="stop"), rows)
    except RewardError as error:
        notes = [note for completion in error.completions if (note := _column_note(rewards, completion.row))]
        if not notes:
            raise
        raise RewardError(f"{error}. Note on the row: {notes[0]}", error.completions) from error.__cause__


def _check(rewards: Rewards, rows: list[dict]) -> list[str]:
    """Run the checks of `preflight`. Errors do not explain yet how a column `grader` or `task` contributes."""
    samples = {}  # one row for each task and set of filled columns, and one whose gold answer is refused
    ids = {}  # of the rows to which a note on their columns applies
    for row in rows:
        _check_applicable_rewards(rewards, row)
        filled = frozenset(column for column, value in row.items() if value not in (None, "", []))
        samples.setdefault((row.get("task"), filled, _is_refused(row)), row)
        if note := _column_note(rewards, row):
            ids.setdefault(note, []).append(row["id"])
    column_notes = [f"{len(names)} rows, such as {names[0]}: {note}" for note, names in ids.items()]
    texts = ("", "<think>two</think>2")
    scores = score_all(rewards, [probes.completion(row, text) for row in samples.values() for text in texts])
    trials = {}
    for (kind, task, names), group_trials in learn_payments(rewards, rows).items():
        trials.setdefault((kind or task, names), []).extend(group_trials)
    warnings = []
    thresholds = []
    for (kind, names), group_trials in trials.items():
        functions = [f for f in rewards.functions if f.name in names]
        warnings += _warnings(rewards, f"warning: on {kind} rows", functions, group_trials)
        thresholds += _threshold_notes(rewards, f"on {kind} rows", group_trials)
    thresholds += _untried_notes(rewards, list(samples.values()), scores[:: len(texts)])
    notes = column_notes[:MAX_WARNINGS] + _gold_warnings(rows) + warnings[:MAX_WARNINGS] + thresholds[:MAX_WARNINGS]
    return rewards.notes + notes


def _check_applicable_rewards(rewards: Rewards, row: dict) -> None:
    """Raise RewardError if a column of the row is missing, or if no reward that applies to it can judge it."""
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
                f"{row.get('id', '?')} has only {', '.join(row)}.{did_you_mean(missing[0], [*row, *TRL_ARGUMENTS])}",
                [probes.completion(row, "")],
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
            f"yours), or change the reward's when= (the row's task is '{row.get('task')}')",
            [probes.completion(row, "")],
        )


def _column_note(rewards: Rewards, row: dict) -> str:
    """Return how a column `grader` or `task` changes which rewards apply to a row; "" if it does not."""
    kind = row_kind(row)
    grader = row.get("grader")
    used = {f.when for f in rewards.functions if isinstance(f.when, str)}
    if grader and not isinstance(grader, str):
        return f"the column grader is of type {type(grader).__name__} and names no grader, so that it is ignored"
    if grader:
        other = row_kind({name: value for name, value in row.items() if name != "grader"})
        missing = [name for name in NEEDED_COLUMNS.get(grader, ()) if row.get(name) is None]
        if missing and grader in used:
            return f"the column grader is '{grader}', so that rewards with when='{grader}' apply, but {missing[0]} is missing"
        if other in used and grader not in used:
            return (
                f"the column grader is '{grader}', so that rewards with when='{other}' do not apply: rename the column if "
                "it does not name a grader of yours"
            )
        if other in used and grader in ("math", "code") and other != grader:
            return f"the column grader is '{grader}', so that rewards with when='{other}' do not apply"
    if (task := row.get("task")) in used & NEEDED_COLUMNS.keys() and task != kind:
        return (
            f"the task (the column task, or else the name of the file) is '{task}', so that rewards with when='{task}' "
            f"apply as well as those for {kind or 'other'} rows: rename it if that is not intended"
        )
    return ""


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


def _threshold_notes(rewards: Rewards, place: str, trials: list[Trial]) -> list[str]:
    """Return notes on functions that do not pay 1 for the gold, and therefore decide from another value on."""
    values = {}
    for trial in trials:
        f = next((f for f in rewards.functions if f.name == trial.score.judge), None)
        if f and (payment := find_payment(rewards, f, trial.row)) and abs(payment.right - 1) > TOLERANCE:
            values[f.name] = math.copysign(1, f.weight) * payment.right
    return [
        f"{place} a completion is right if {name} pays {value:g}, as for the gold" for name, value in values.items()
    ]


def _untried_notes(rewards: Rewards, rows: list[dict], scores: list[Score]) -> list[str]:
    """Return notes on rows without a gold, if the function that judges them is not one of the graders."""
    notes = {}
    for row, score in zip(rows, scores):
        f = next((f for f in rewards.functions if f.name == score.judge), None)
        has_outcome = outcome_of(score.reasons.get(score.judge, "")) is not None
        has_gold = probes.gold_answer(row_with_gold(rewards, row)) is not None
        if f and not has_outcome and reads_gold(f, row) and not has_gold and not find_payment(rewards, f, row):
            kind = row_kind(row) or row.get("task")
            notes[kind] = f"on {kind} rows, which have no gold to try, a completion is right if {f.name} pays 1"
    return list(notes.values())


def _warnings(rewards: Rewards, place: str, functions: list[RewardFunction], trials: list[Trial]) -> list[str]:
    """Return warnings and notes about what functions pay for right and wrong answers to rows of one group.

    Args:
        place: Text that names the rows.
        functions: The rewards that apply to the rows.
        trials: Trials of some of the rows; empty without a gold.
    """
    warnings = []
    models = [f for f in functions if f.is_model]
    for f in models:
        if f.function.is_unbounded:
            warnings.append(
                f"{place} {f.name} is the raw score of a reward model, which is unbounded and can outweigh all "
                "other rewards: set sigmoid=True to keep it between 0 and 1"
            )
    if not any(map(rewards.can_judge, functions)):
        if models:
            warnings.append(
                f"{place} no reward checks correctness: the reward model {models[0].name} gives no verdict, so "
                "all completions count as wrong. Watch the reward, not the accuracy"
            )
        return warnings
    if not trials:
        return warnings
    row = min((t.row for t in trials), key=lambda row: len(probes.gold_answer(row_with_gold(rewards, row))))
    trials = [t for t in trials if t.row is row]
    right = next(t.score for t in trials if t.probe.name == probes.RIGHT)
    wrong = next(t.score for t in trials if t.probe.name == probes.WRONG)
    judge = next((f for f in functions if f.name == right.judge), None)
    payment = judge and find_payment(rewards, judge, row)
    problem = misfit(rewards, trials)
    if judge and not payment and row_kind(row) != "reasoning_gym":  # an answer of a puzzle may get less than full marks
        most = max(t.value(judge) for t in trials if t.value(judge) is not None)
        if problem or most < 1:
            limit = f"a completion is right if {judge.name} pays 1"
            if most < 1:
                limit = f"no completion may count as right: {limit}, and it pays at most {most:g} in the trials"
            warnings.append(f"{place} {'. Until then '.join(filter(None, [problem, limit]))}")
    if problem or row_kind(row) not in PROBED_KINDS:
        return warnings
    # No hostile probes: they could hang a function that evaluates the answer.
    gain = right.total - wrong.total
    overpaid = [t for t in trials if not t.probe.is_right and t.score.total >= gain - 1e-9]
    if overpaid:
        worst = max(overpaid, key=lambda t: t.score.total)
        parts = [f"{f.name} {f.weight * value:g}" for f in functions if (value := worst.score.parts[f.name])]
        warnings.append(
            f"{place} a wrong answer can earn as much as a right one: {worst.probe.name!r} gets "
            f"{' + '.join(parts) or 0}, and being right adds {gain:g}. Limit shaping to a fifth of that, or reward "
            f"only right answers; for details run the self-test of {rewards.path.name}"
        )
    if wrong.is_right:
        warnings.append(f"{place} the verdict comes from {wrong.judge}, which accepts a wrong answer as right")
    return warnings
