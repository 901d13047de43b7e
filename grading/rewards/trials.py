"""Trials: score probes (probes.py) with a reward file, and learn from them what its functions pay for the gold.

`learn_payments` fills `Rewards.payments`, from which a completion's verdict follows (verdicts.py). It is called before
training, evaluation and rescoring, always with the rows of the run, so that all of them judge alike.
"""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from grading.base import RewardError, RewardFunction, Rewards, Row, Score, row_kind, shorten
from grading.rewards import probes
from grading.rewards.scoring import score_all
from grading.rewards.verdicts import (
    GOLD_COLUMNS,
    GOLD_NAMES,
    NO_GOLD,
    TOLERANCE,
    Payment,
    columns_read,
    find_payment,
    reads_gold,
    set_verdict,
)

MAX_GROUPS = 50  # with more tasks, rows are grouped by kind alone
NUM_ROWS = 3  # number of rows of a group whose golds are tried
BLANK = ("empty", "tags only", "no answer")  # probes without an answer
GOLD_ALONE, WRONG_ALONE = "gold", "wrong answer, without thinking"
COMPARED = {probes.RIGHT: probes.WRONG, GOLD_ALONE: WRONG_ALONE}  # pairs of probes that differ only in the answer
NAMED = {*COMPARED, *COMPARED.values(), *BLANK}
LONG_THOUGHT = " ".join([probes.THOUGHT] * 40)


@dataclass
class Trial:
    """A probe of a row, with the score that its completion got."""

    row: dict
    probe: probes.Probe
    score: Score

    def value(self, f: RewardFunction) -> float | None:
        return (self.score.parts if f.weight else self.score.metrics).get(f.name)


def try_probes(rewards: Rewards, row_probes: list[tuple[dict, probes.Probe]]) -> list[Trial]:
    """Score probes, each with its row."""
    scores = score_all(rewards, [probes.completion(row, p.text, p.is_truncated) for row, p in row_probes])
    return [Trial(row, probe, score) for (row, probe), score in zip(row_probes, scores)]


def try_rows(
    rewards: Rewards,
    rows: list[dict],
    wrong_probes: tuple[Callable, ...] = (probes.wrong_probes, probes.hostile_probes, probes.copy_probes),
    styles: list[str] | None = None,
) -> tuple[str, list[Trial]]:
    """Score the probes of rows of one kind, written in the style that the rewards pay best.

    The functions that read the gold choose the style by the most that they pay. A reward for the form alone may prefer a
    style in which they find no answer.

    Args:
        styles: The styles to try. By default the ones in probes.py, and those with tags of the reward file.

    Returns:
        The style, and the trials of the right probes and then the wrong ones.
    """
    with_gold = [row_with_gold(rewards, row) for row in rows]
    readers = [f for f in rewards.functions if f.weight and reads_gold(f, rows[0])]
    best = None
    if not styles:
        templates = {probes.STYLES[name]: name for name in probes.answer_styles(with_gold[0])}
        styles = [templates.setdefault(style, style) for style in (*templates, *probes.own_styles(rewards.source))]
    for style in styles:
        pairs = [(row, p) for row, gold_row in zip(rows, with_gold) for p in probes.right_probes(gold_row, style)]
        trials = try_probes(rewards, pairs)
        gold_reward = sum(
            max((f.weight * (t.value(f) or 0.0) for t in trials if t.row is row), default=0.0)
            for row in rows
            for f in readers
        )
        total = sum(t.score.total for t in trials if not math.isnan(t.score.total))
        if best is None or (gold_reward, total) > best[0]:
            best = (gold_reward, total), style, trials
    _, style, trials = best
    wrong = [
        (row, probe)
        for row, gold_row in zip(rows, with_gold)
        for make_probes in wrong_probes
        for probe in make_probes(gold_row, style)
    ]
    return style, trials + try_probes(rewards, wrong)


def row_with_gold(rewards: Rewards, row: dict) -> dict:
    """Return a row whose column `answer` holds the gold, if only a column of another name does.

    That column is the only number or text that the reward functions read, or the first one in GOLD_NAMES.
    """
    if probes.gold_answer(row) is not None or row_kind(row) is not None or GOLD_COLUMNS["countdown"] <= row.keys():
        return row
    read = set().union(*(columns_read(f, row) for f in rewards.functions)) - NO_GOLD
    golds = [name for name in read if isinstance(row[name], (str, int, float))]
    golds = [name for name in GOLD_NAMES if name in golds] or golds
    return row | {"answer": row[golds[0]]} if golds and (len(golds) == 1 or golds[0] in GOLD_NAMES) else row


def example_probes(rewards: Rewards) -> list[tuple[dict, probes.Probe]]:
    """Return the examples of a reward file as rows and probes. Raise RewardError for an invalid example."""
    row_probes = []
    for number, example in enumerate(rewards.examples, 1):
        text = example.get("text") if isinstance(example, dict) else None
        if not isinstance(text, str) or example.get("label") not in ("right", "wrong"):
            raise RewardError(
                f"{rewards.path.name}: example {number} must be a dict with label ('right' or 'wrong'), text, and the "
                "columns of its row, such as prompt and answer"
            )
        row = {"id": f"example {number}", "task": "examples", "prompt": ""} | example
        label, text = row.pop("label"), row.pop("text")
        name = f"{number}. {shorten(' '.join(text.split()), 20)}"
        row_probes.append((row, probes.Probe(name, text, label == "right", row.pop("truncated", False))))
    return row_probes


# --- what the functions pay for the gold


def learn_payments(rewards: Rewards, rows: list[dict]) -> dict[tuple, list[Trial]]:
    """Set `rewards.payments` from trials of golds, or of the examples in the file if no probe fits.

    Returns:
        The trials of each group of rows with the same kind, task and applicable rewards.
    """
    groups = _group(rewards, rows)
    trials_of_group = {}
    payments_of_rows = defaultdict(list)  # by function, kind and task
    for key, group in groups.items():
        trials_of_group[key] = []
        functions = rewards.functions
        wrong_probes = probes.wrong_probes
        styles = None
        for row in _sample(rewards, group):
            some = replace(rewards, functions=functions)
            style, trials = try_rows(some, [row], (wrong_probes, _more_probes), styles)
            trials_of_group[key] += trials
            for f in functions:
                if payment := _payment(f, trials):
                    payments_of_rows[f.name, *key[:2]].append(payment)
            # The other rows need fewer trials. Functions may be slow, reward models in particular.
            functions = [f for f in rewards.functions if not f.is_model]
            wrong_probes = _few_probes
            styles = [style]
    payments = {key: _combine(row_payments) for key, row_payments in payments_of_rows.items()}
    examples = example_probes(rewards)
    examples += [(row, probes.Probe(BLANK[0], "")) for row, probe in examples if probe.is_right]
    trials = try_probes(rewards, examples)
    example_keys = [(row_kind(row), row["task"]) for row, _ in examples]
    for f in rewards.functions:
        if payment := _payment(f, trials, are_examples=True):
            for kind, task in [*example_keys, *(key[:2] for key in groups if f.name in key[2])]:
                payments.setdefault((f.name, kind, task), payment)
    rewards.payments.clear()
    rewards.payments.update(payments)
    for trials in trials_of_group.values():
        for trial in trials:
            if not math.isnan(trial.score.total):
                set_verdict(rewards, trial.score, trial.row)
    return trials_of_group


def try_to_learn_payments(rewards: Rewards, rows: list[dict]) -> None:
    """Learn payments without the checks before a run: errors, and what the functions print, are ignored."""
    with contextlib.suppress(RewardError), contextlib.redirect_stdout(io.StringIO()):
        learn_payments(replace(rewards, reward_errors="skip"), rows)


def _group(rewards: Rewards, rows: list[dict]) -> dict[tuple, list[dict]]:
    """Group rows by kind, by task (None if there are too many), and by the names of the rewards that apply."""
    has_many_tasks = len({row.get("task") for row in rows}) > MAX_GROUPS
    groups = {}
    for row in rows:
        names = []
        for f in rewards.functions:
            with contextlib.suppress(Exception):  # raised again, with its place, when the row is scored
                if f.weight and f.applies_to(Row(row)):
                    names.append(f.name)
        key = (row_kind(row), None if has_many_tasks else row.get("task"), tuple(names))
        groups.setdefault(key, []).append(row)
    return groups


def _sample(rewards: Rewards, rows: list[dict]) -> list[dict]:
    """Return a few rows with a gold, the same ones for every order of the rows; the shortest gold comes first."""
    golds = [(probes.gold_answer(row_with_gold(rewards, row)), row) for row in rows]
    ordered = sorted((len(gold), gold, str(row.get("id")), i) for i, (gold, row) in enumerate(golds) if gold)
    return [rows[i] for *_, i in ordered[:: max(1, len(ordered) // NUM_ROWS)][:NUM_ROWS]]


def _few_probes(row: dict, style: str) -> Iterator[probes.Probe]:
    """Yield only those wrong probes that `_payment` uses."""
    return (probe for probe in probes.wrong_probes(row, style) if probe.name in NAMED)


def _more_probes(row: dict, style: str) -> Iterator[probes.Probe]:
    """Yield a wrong answer without a thought, and the gold after a long one, for functions that depend on the length."""
    if gold := probes.gold_answer(row):
        yield probes.Probe(WRONG_ALONE, probes.write(style, probes.wrong_answers(row)[0]))
        yield probes.Probe("gold, with long thinking", probes.write(style, gold, LONG_THOUGHT), True)


def _payment(f: RewardFunction, trials: list[Trial], are_examples: bool = False) -> Payment | None:
    """Return what a function pays for right and wrong completions; None if it does not pay more for the right ones.

    Args:
        trials: The trials of one row, or of the examples of a reward file.
    """
    values = defaultdict(list)  # by name of the probe
    for t in trials:
        name = t.probe.name if t.probe.name in NAMED else t.probe.is_right
        value = t.score.parts.get(f.name)
        if not f.is_model and (value is not None or name in (*COMPARED.values(), *BLANK)):
            values[name].append(math.copysign(1, f.weight) * (value or 0.0))
    blank = [value for name in BLANK for value in values[name]]
    right = values[True] + values[probes.RIGHT] + values[GOLD_ALONE]
    wrong = values[probes.WRONG] + values[WRONG_ALONE] + (values[False] if are_examples else [])
    pairs = [(right, sorted(wrong) or blank)] if are_examples else [(values[a], values[b]) for a, b in COMPARED.items()]
    if not any(r and w and max(r) > max([w[0], *blank]) + TOLERANCE for r, w in pairs):
        return None
    partial = max(value for value in wrong + blank if value < max(right) - TOLERANCE)
    lowest = min(value for value in right if value > partial + TOLERANCE)
    return Payment(lowest, (wrong or blank)[0], partial, are_examples)


def _combine(payments: list[Payment]) -> Payment:
    """Return the payment of a function on several rows: the lowest value for a gold that no wrong answer gets."""
    partial = max(payment.partial for payment in payments)
    right = [payment.right for payment in payments]
    lowest = min((value for value in right if value > partial + TOLERANCE), default=max(right))
    return Payment(lowest, payments[0].wrong, partial)


def misfit(rewards: Rewards, trials: list[Trial]) -> str:
    """Return why the probes of rows of one kind do not show what a right answer earns; "" if they do."""
    judges = [f for t in trials if t.probe.is_right for f in rewards.functions if f.name == t.score.judge]
    payment = judges and find_payment(rewards, judges[0], trials[0].row)
    if not judges or not reads_gold(judges[0], trials[0].row) or (payment and not payment.from_examples):
        return ""
    f = judges[0]
    gold = max(t.value(f) for t in trials if t.probe.is_right and t.score.judge == f.name)
    blank = max((v for t in trials if t.probe.name in BLANK and (v := t.value(f)) is not None), default=-math.inf)
    wrong = next((v for t in trials if t.probe.name == probes.WRONG and (v := t.value(f)) is not None), gold)
    if wrong < gold <= blank:
        return f"{f.name} pays the gold {gold:g} and a completion without an answer {blank:g}: pay less for the latter"
    return (
        f"no probe fits {f.name}: it pays the gold {gold:g}, in every form that was tried, and a wrong answer as much. "
        f"Add completions of your model to `examples = [...]` in {rewards.path.name}, labeled right and wrong"
    )
