"""Verdicts: which reward function judges a completion, and from which value on the completion is right.

A completion is right if its judge pays at least what it pays for the gold itself: 1 for most graders, but also 5 for a
function with partial credit, or 0 if a wrong answer costs -1. The checks before a run find this value by scoring golds
(trials.py). Until then, or without a gold, a completion is right from 1.
"""

import dis
import functools
import math
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

from grading.base import RewardFunction, Rewards, Score, outcome_of, row_kind

GOLD_COLUMNS = {"math": {"answer"}, "code": {"tests", "solution"}, "countdown": {"target", "nums"}}
GOLD_NAMES = ("solution", "ground_truth", "gold", "target", "label", "expected", "reference", "reward_model")
NO_GOLD = {"id", "task", "prompt", "question", "problem", "grader", "level"}  # columns that hold no gold
TOLERANCE = 1e-9


class Payment(NamedTuple):
    """What a reward function pays, unweighted; negated for a penalty, that is a negative weight."""

    right: float  # the lowest value for a gold
    wrong: float  # the value for a wrong answer
    partial: float  # the highest value below that for a gold
    from_examples: bool = False  # learned from the examples in the reward file, because no probe fits


def find_payment(rewards: Rewards, f: RewardFunction, row: dict) -> Payment | None:
    """Return what a function pays on rows of this kind and task; None if it is unknown."""
    keys = [(f.name, row_kind(row), task) for task in (row.get("task"), None)]
    return next((rewards.payments[key] for key in keys if key in rewards.payments), None)


def set_verdict(rewards: Rewards, score: Score, row: dict) -> None:
    """Set the judge of a graded score, and whether the completion is right."""
    f = find_judge(rewards, score, row)
    if f:
        payment = find_payment(rewards, f, row)
        threshold = payment.right if payment else 1.0
        value = math.copysign(1, f.weight) * score.parts[f.name]
        score.judge = f.name
        score.verdict = "right" if value >= threshold - TOLERANCE * max(1, abs(threshold)) else "wrong"


def judge_range(rewards: Rewards, judges: set[str]) -> tuple[float, float]:
    """Return the weighted rewards of a wrong and of a right answer, for the judge with the largest difference."""
    ranges = []
    for f in rewards.functions:
        if f.name in judges:
            payments = [payment for (name, *_), payment in rewards.payments.items() if name == f.name]
            payments = payments or [Payment(1.0, 0.0, 0.0)]
            ranges += [(abs(f.weight) * payment.wrong, abs(f.weight) * payment.right) for payment in payments]
    return max(ranges, key=lambda ends: ends[1] - ends[0], default=(0.0, 0.0))


def payments_to_lists(rewards: Rewards) -> list[list]:
    """Return the payments of a reward file in a form that JSON can store."""
    return [[*key, *payment] for key, payment in rewards.payments.items()]


def payments_from_lists(lists: list[list]) -> dict[tuple, Payment]:
    """Return the payments from the result of `payments_to_lists`."""
    return {(name, kind, task): Payment(*values) for name, kind, task, *values in lists}


def find_judge(rewards: Rewards, score: Score, row: dict) -> RewardFunction | None:
    """Return the reward that decides the verdict; None if no reward qualifies.

    Rewards whose reason has a grader's outcome take precedence, then those that pay the gold more than a wrong answer or
    read it, then those that are not shaping, then those that pay the gold more, then those that read it, then those that
    read another column, then those with the largest weight, then the first in the file. Shaping and penalties that
    neither read the gold nor pay it more are never the judge, nor are reward models. If a reward pays the gold more but
    does not apply to the completion, one that does not know the gold is not the judge instead.
    """
    best = None
    is_gold_known = any(find_payment(rewards, f, row) for f in rewards.functions)
    for f in rewards.functions:
        if score.parts.get(f.name) is None or f.is_model:
            continue
        can_judge = rewards.can_judge(f)
        has_outcome = f.weight > 0 and outcome_of(score.reasons.get(f.name, "")) is not None
        pays_gold = find_payment(rewards, f, row) is not None
        columns = columns_read(f, row)
        is_reader = _hold_gold(columns, row)
        knows_gold = pays_gold or (is_reader and can_judge)
        rank = has_outcome, knows_gold, can_judge, pays_gold, is_reader, bool(columns), abs(f.weight)
        if (has_outcome or knows_gold or (can_judge and not is_gold_known)) and (best is None or rank > best[0]):
            best = rank, f
    return best and best[1]


# --- what a reward function reads


def columns_read(f: RewardFunction, row: dict) -> set[str]:
    """Return the columns of a row that the code of a function, or of a helper that it calls, refers to."""
    if f.is_model:
        return set()
    names, texts = _used_by(f)
    if f.is_batch:
        return {name for name in row if (name in f.columns and name in names) or (_takes_all(f) and name in texts)}
    return {name for name in row if name in texts} if "row" in names else set()


def reads_gold(f: RewardFunction, row: dict) -> bool:
    """Return whether the function reads a column that holds the gold of the row."""
    return _hold_gold(columns_read(f, row), row)


def _hold_gold(columns: set[str], row: dict) -> bool:
    """Return whether one of the columns of a row holds its gold."""
    known = GOLD_COLUMNS.get(row_kind(row))
    return not columns.isdisjoint(known.union(GOLD_NAMES)) if known else not columns <= NO_GOLD


def _takes_all(f: RewardFunction) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in f.parameters.values())


def _used_by(f: RewardFunction) -> tuple[set[str], set[str]]:
    """Return the names and the strings in the code of a reward function and of the helpers that it calls."""
    if f.used is None:
        f.used = _names_and_strings(f.function)
    return f.used


def _names_and_strings(function) -> tuple[set[str], set[str]]:
    """Return the names and the strings in the code of a function, its closures, and helpers in files of its folder."""
    names = set()
    texts = set()
    visited = set()
    pending = [function]
    while pending:
        value = pending.pop()
        if isinstance(value, functools.partial):
            pending += [value.func, *value.keywords.values()]
        elif isinstance(value, str):
            texts.add(value)
        elif isinstance(value, (tuple, frozenset)):
            pending += value
        elif isinstance(value, CodeType):
            for instruction in dis.get_instructions(value):
                argument = instruction.argval
                if "CONST" in instruction.opname:
                    pending.append(argument)
                elif isinstance(argument, (str, tuple)):
                    names.update([argument] if isinstance(argument, str) else argument)
        elif id(value) not in visited and callable(value):
            visited.add(id(value))
            if not isinstance(value, FunctionType):
                pending += [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, str)]
            code = getattr(value, "__code__", None) or getattr(type(value).__call__, "__code__", None)
            if code is None:
                continue
            pending.append(code)
            pending += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if _has_contents(cell)]
            folder = Path(code.co_filename).parent
            scope = getattr(value, "__globals__", {})
            global_names = _global_names(code)
            modules = [vars(m) for name in global_names if _is_module_in(m := scope.get(name), folder)]
            for used in [namespace.get(name) for namespace in (scope, *modules) for name in global_names]:
                if isinstance(used, str) or (
                    isinstance(used, FunctionType) and Path(used.__code__.co_filename).parent == folder
                ):
                    pending.append(used)
    return names, texts


def _global_names(code: CodeType) -> set[str]:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_global_names, nested))


def _is_module_in(value, folder: Path) -> bool:
    return isinstance(value, ModuleType) and Path(getattr(value, "__file__", None) or "").parent == folder


def _has_contents(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False
