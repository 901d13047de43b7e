"""Reward functions: how they are written, found in a file, checked before a run, and applied to completions.

    @reward(weight=1.0, when="math")
    def correct(completion):                 # one completion at a time
        return grade_math(completion.answer, completion.row["answer"])

A reward function returns a number, a bool, None (does not apply here) or (number, "reason"). A completion's reward is
the weighted sum over the functions that apply. Its *verdict* comes from the applying function with the largest
weight (shaping, a fifth of the largest weight or less, does not judge): "right" where that gave 1 or more, else "wrong". `Ungraded` may be raised by a grader that could not do its
work: such a completion takes no part in learning and is counted, instead of scoring a silent 0.
"""

import difflib
import functools
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

SHAPING_SHARE = 0.2  # a reward of at most this share of the largest weight is shaping, and cannot judge a row alone


class RewardError(Exception):
    """A reward function or its file is at fault. The message names function, file:line and row."""


class Ungraded(Exception):
    """The grader could not do its work; says nothing about the completion."""


class Row(dict):
    """A data row whose KeyError names the columns that there are."""

    def __missing__(self, column):
        near = difflib.get_close_matches(str(column), self, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise KeyError(f"the row has no column '{column}', only {', '.join(self)}.{hint}")


@dataclass
class Completion:
    """One answer of the model with everything that a reward function may look at."""

    prompt: str
    text: str  # everything the model wrote, the thinking included
    row: dict  # every column of the data row
    tokens: int = 0  # length in tokens
    truncated: bool = False  # cut at max_completion_length, no end-of-sequence token
    step: int = 0

    def __post_init__(self):
        self.row = Row(self.row)

    @functools.cached_property
    def thinking(self) -> str:
        """What stands inside <think> ... </think>; "" where there is no thinking."""
        before, closed, _ = self.text.rpartition("</think>")
        if not closed:
            before = self.text if "<think>" in self.text else ""
        return before.split("<think>", 1)[-1].strip()

    @functools.cached_property
    def answer(self) -> str:
        """What stands after the last </think>; "" where the thinking never ends."""
        if "</think>" in self.text:
            return self.text.rpartition("</think>")[2].strip()
        return "" if "<think>" in self.text else self.text.strip()


@dataclass
class Score:
    """What the reward functions made of one completion."""

    total: float  # weighted sum; nan where ungraded
    parts: dict[str, float | None]  # by reward function, unweighted; None where it does not apply
    metrics: dict[str, float | None]
    reasons: dict[str, str]
    verdict: str  # right | wrong | ungraded

    @property
    def is_right(self) -> bool:
        return self.verdict == "right"


@dataclass
class RewardFunction:
    """A function of the reward file with how it counts."""

    name: str
    function: Callable
    weight: float  # 0: a metric
    when: str | Callable | None = None

    def applies(self, row: dict) -> bool:
        """`when` is "math" (rows with an answer), "code" (rows with tests), a task's name, or a function of the row."""
        if self.when is None:
            return True
        if callable(self.when):
            return bool(self.when(row))
        kind = "code" if row.get("tests") else "math" if row.get("answer") is not None else None
        return self.when in (kind, row.get("task"))

    def __call__(self, completion: "Completion"):
        """What the function returns, None where it does not apply."""
        return self.function(completion) if self.applies(completion.row) else None


def reward(function: Callable | None = None, *, weight: float = 1.0, when: str | Callable | None = None):
    """Mark a function as a reward with its weight. As `@reward` or `@reward(weight=0.2, when="math")`."""

    def mark(function):
        function.reward = RewardFunction(function.__name__, function, float(weight), when)
        return function

    return mark(function) if function else mark


def metric(function: Callable | None = None, *, when: str | Callable | None = None):
    """Mark a function as a metric: logged, never trained on."""
    mark = reward(weight=0.0, when=when)
    return mark(function) if function else mark


@dataclass
class Rewards:
    """The reward functions of one file, as they count in one run."""

    path: Path
    functions: list[RewardFunction] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.functions if f.weight]

    @property
    def heaviest(self) -> float:
        """The largest weight; 0 where there are only penalties."""
        return max([0.0, *(f.weight for f in self.functions)])

    def can_judge(self, f: RewardFunction) -> bool:
        """Whether a reward weighs enough to be the verdict on a completion; a smaller one is shaping."""
        return f.weight > SHAPING_SHARE * self.heaviest

    def score(self, completion: Completion) -> Score:
        """Apply every function that applies to the completion's row. Raises RewardError where one of them fails."""
        score = Score(0.0, {}, {}, {}, "wrong")
        judge, ungraded = None, False
        for f in self.functions:
            values = score.parts if f.weight else score.metrics
            try:
                value, reason = self._call(f, completion)
            except Ungraded as error:
                value, reason, ungraded = None, str(error), ungraded or f.weight != 0
            values[f.name] = value
            if reason:
                score.reasons[f.name] = reason
            if f.weight and value is not None:
                score.total += f.weight * value
                if self.can_judge(f) and (judge is None or f.weight > judge.weight):
                    judge = f
        if ungraded:
            score.verdict, score.total = "ungraded", math.nan
        elif judge and score.parts[judge.name] >= 1:
            score.verdict = "right"
        return score

    def _call(self, f: RewardFunction, completion: Completion) -> tuple[float | None, str]:
        try:
            result = f(completion)
        except Ungraded:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == self.path), "?")
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise self._fault(f, completion, f"{type(error).__name__}: {message}", line) from error
        value, reason = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
        if value is not None and not is_finite_number(value):
            expected = "a finite number, a bool, None or (number, 'reason')"
            raise self._fault(f, completion, f"returned {short_repr(result)}, expected {expected}", _line_of(f))
        return None if value is None else float(value), str(reason or "")

    def _fault(self, f: RewardFunction, completion: Completion, problem: str, line) -> RewardError:
        row = completion.row.get("id", "?")
        return RewardError(
            f"reward function '{f.name}' ({self.path.name}:{line}), row {row}: {problem}. "
            f"The completion ended in {completion.text[-60:]!r}"
        )

    def check(self, rows: list[dict]) -> None:
        """Try every function on rows of each task and kind before a model is loaded. Raises RewardError.

        Catches what is wrong with the file or the data (a misspelt column, a row without its gold, a wrong return
        value) while nothing is lost.
        """
        tried = set()
        for row in rows:
            kind = row.get("task"), frozenset(column for column, value in row.items() if value not in (None, "", []))
            completion = Completion(prompt=prompt_text(row["prompt"]), text="", row=row)
            if kind not in tried:
                tried.add(kind)
                for text in ("", "<think>two</think>2"):
                    self.score(replace(completion, text=text, tokens=len(text)))
            applying = [f for f in self.functions if f.weight and f.applies(completion.row)]
            if self.heaviest and not any(self.can_judge(f) for f in applying):
                names = ", ".join(f.name for f in applying)
                judges = " or ".join(f.name for f in self.functions if self.can_judge(f))
                raise RewardError(
                    f"row {row['id']}: of the rewards in {self.path.name} {f'only {names}' if names else 'none'} applies, but "
                    f"not {judges}: the row needs the column answer or tests (columns: {{answer: YOUR_COLUMN}} maps yours), or the reward another "
                    f"when= (the row's task is '{row.get('task')}')"
                )


def prompt_text(prompt: str | list[dict]) -> str:
    """The question itself: the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def load_rewards(path: str, reward_funcs: list[str] | None = None, reward_weights: dict[str, float] | None = None):
    """The reward functions of a file, in the order of the file.

    reward_funcs: names to use; empty for all that are decorated. reward_weights: weights by name that replace the
    file's own. Raises RewardError where the file is missing, does not import, has no reward, or a name is unknown.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise RewardError(f"rewards_file: there is no file {path}")
    module = _import_file(file)
    found = {}
    for value in vars(module).values():
        if isinstance(getattr(value, "reward", None), RewardFunction) and value.__module__ == module.__name__:
            found[value.reward.name] = value.reward
    chosen = reward_funcs or list(found)
    for name in [*chosen, *(reward_weights or {})]:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(found) or 'none'}"
            setting = "reward_funcs" if name in chosen else "reward_weights"
            raise RewardError(f"{setting}: {file.name} has no reward function '{name}'; {hint}")
    functions = []
    for name in chosen:
        f = found[name]
        functions.append(RewardFunction(name, f.function, float((reward_weights or {}).get(name, f.weight)), f.when))
    rewards = Rewards(file, functions)
    if not rewards.names:
        raise RewardError(f"{file.name} has no reward with a weight: mark a function with @reward")
    return rewards


def _import_file(file: Path):
    name = f"rewards_of_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
            line = lines[-1] if lines else "?"
        raise RewardError(f"{file.name}:{line}: {type(error).__name__}: {error}") from error
    return module


def _line_of(f: RewardFunction):
    code = getattr(f.function, "__code__", None)
    return code.co_firstlineno if code else "?"


def is_finite_number(value) -> bool:
    try:
        return isinstance(value, (bool, int, float)) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def shorten(text: str, limit: int = 60) -> str:
    """Text of at most `limit` characters, for a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short_repr(value) -> str:
    """A value for a message, also where it is too large or too deep to be written out."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"
