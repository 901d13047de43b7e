"""What a reward file is written with: completions, `@reward`, `@metric`, reasons, and what may be raised.

    @reward(weight=1.0, when="math")
    def correct(completion):                       # one completion at a time
        return grade_math(completion.answer, completion.row["answer"])

    @reward(weight=0.1)
    def rare(prompts, completions, **columns):     # a whole step at once, as in TRL: told by the parameter `completions`
        return [...]

For each completion a function returns a number, a bool, None (does not apply here), (number, "reason"), or a *process
reward*: a list of (position, number), each the worth of the step of the text that ends at the character `position`; the
sum counts. The beginning of a reason, up to a colon, may be one of OUTCOMES, which are counted. `Ungraded` may be raised by
a grader that could not do its work: such a completion takes no part in learning, instead of scoring a silent 0.

`Rewards` is what a reward file comes to in one run. It is loaded by grading/rewards/reward_file.py, checked by
grading/rewards/preflight.py and applied to completions by grading/rewards/scoring.py.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

OUTCOMES = (
    "right", "wrong", "no_answer", "gave_up",  # math and puzzles
    "passed", "failed", "timeout", "memory", "crash", "syntax", "no_code", "missing_entry", "bad_type", "output_limit",
    "unsupported", "sandbox_error", "reward_error",  # ungraded
)  # fmt: skip
SHAPING_SHARE = 0.2  # a reward of at most this share of the largest weight is shaping, and cannot judge a row alone


class RewardError(Exception):
    """A reward function or its file is at fault. The message names function, file:line and row.

    completions: those that the function was called with; none where the file itself is at fault.
    """

    def __init__(self, message: str, completions: "list[Completion]" = ()):
        super().__init__(message)
        self.completions = list(completions)


class Ungraded(Exception):
    """The grader could not do its work; says nothing about the completion."""


class Row(dict):
    """A data row that cannot be changed and whose KeyError names the columns that there are."""

    def __missing__(self, column):
        raise KeyError(f"the row has no column '{column}', only {', '.join(self)}.{did_you_mean(column, self)}")

    def _refuse(self, *args, **kwargs):
        raise TypeError("a data row cannot be changed, it is what completions are judged by: change a copy, dict(row)")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse


def row_kind(row: dict) -> str | None:
    """The kind of grader that a row is for: what its column `grader` says, else code (it has tests) or math (an answer)."""
    if row.get("grader"):
        return row["grader"]
    return "code" if row.get("tests") else "math" if row.get("answer") is not None else None


@dataclass
class Completion:
    """One answer of the model with everything that a reward function may look at."""

    prompt: str
    text: str  # everything the model wrote, the thinking included
    row: dict  # every column of the data row
    tokens: int = 0  # length in tokens
    truncated: bool = False  # cut at max_completion_length, no end-of-sequence token
    step: int = 0  # the training step, from 1
    token_ids: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.row = Row(copy.deepcopy(dict(self.row)))  # what a function does to a list in it is not done to the data

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
    metrics: dict[str, float | None]  # by metric, and by the names that TRL functions gave to log_metric
    reasons: dict[str, str]
    verdict: str  # right | wrong | ungraded
    judge: str | None = None  # the reward function that the verdict comes from
    error: str | None = None  # with reward_errors: skip, what a function failed with
    process: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by function: (position, value)
    extra: dict[str, object] = field(default_factory=dict)  # what TRL functions gave to log_extra
    seconds: float = 0.0  # spent in reward functions, waiting for the sandbox included

    @property
    def is_right(self) -> bool:
        return self.verdict == "right"


def outcome_of(reason: str) -> str | None:
    """The outcome that a reason begins with: "wrong" of "wrong: 5 is not 6"; None where it names none."""
    outcome = reason.partition(":")[0].strip()
    return outcome if outcome in OUTCOMES else None


def outcome_shares(scores: list[Score]) -> dict[str, float]:
    """Metrics `outcomes/NAME`: the share of completions with that outcome in one of their reasons."""
    found = Counter(outcome for s in scores for outcome in {outcome_of(reason) for reason in s.reasons.values()})
    return {f"outcomes/{name}": found[name] / len(scores) for name in OUTCOMES if found[name]}


@dataclass
class RewardFunction:
    """A function of the reward file with how it counts."""

    name: str
    function: Callable
    weight: float = 1.0  # 0: a metric
    when: str | Callable | None = None
    style: str | None = None  # of a batch function: "chat" or "text", once it is known (grading/rewards/trl.py)
    is_model = False  # True for a reward model, whose opinion never says whether a completion is right

    def applies_to(self, row: dict) -> bool:
        """`when` is a kind of row ("math", "code", ...: see row_kind), a task's name, or a function of the row."""
        if self.when is None:
            return True
        return bool(self.when(row)) if callable(self.when) else self.when in (row_kind(row), row.get("task"))

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    @functools.cached_property
    def is_batch(self) -> bool:
        """Whether it takes all completions at once, as TRL's reward functions do."""
        return "completions" in self.parameters

    @functools.cached_property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(self.function.__call__)

    @functools.cached_property
    def columns(self) -> dict[str, bool]:
        """Of a batch function: the columns of the data that its parameters name, and whether it needs them."""
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        named = [p for p in self.parameters.values() if p.kind in kinds and p.name not in TRL_ARGUMENTS]
        return {p.name: p.default is p.empty for p in named} if self.is_batch else {}

    @functools.cached_property
    def reads_row(self) -> bool:
        """Whether its code asks for the data row. What never does cannot know what is right."""
        return bool(self.columns) if self.is_batch else "row" in _names_in(self.code)

    @property
    def code(self):
        """The code object behind it, or None."""
        function = inspect.unwrap(self.function)
        return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)

    @property
    def line(self) -> int | str:
        """Where it is defined in its file."""
        return self.code.co_firstlineno if self.code else "?"


def _names_in(code) -> set[str]:
    """The names that a code object uses, in functions and comprehensions inside it too."""
    if not hasattr(code, "co_names"):
        return set()
    return set(code.co_names).union(*map(_names_in, code.co_consts))


TRL_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)  # to a batch function


@dataclass
class Rewards:
    """The reward functions of one file, as they count in one run."""

    path: Path
    functions: list[RewardFunction]
    reward_errors: str = "stop"  # what an exception in one of them does: stop the run | skip the completion
    max_steps: int | None = None  # of the run, for TRL functions
    examples: list = field(default_factory=list)  # the file's labelled completions, for the self-test
    notes: list[str] = field(default_factory=list)  # on the file
    scored: int = 0  # completions so far
    errors: int = 0  # completions that were skipped because a function raised

    @property
    def names(self) -> list[str]:
        """The rewards, without the metrics."""
        return [f.name for f in self.functions if f.weight]

    @property
    def heaviest(self) -> float:
        """The largest weight of a reward that is no reward model; 0 if there are only penalties."""
        return max([0.0, *(f.weight for f in self.functions if not f.is_model)])

    def can_judge(self, f: RewardFunction) -> bool:
        """Whether a reward can be the verdict on a completion: no reward model, and not so small that it is shaping."""
        return not f.is_model and f.weight > SHAPING_SHARE * self.heaviest

    def judge(self, reasons: dict[str, str]) -> RewardFunction | None:
        """The reward whose value, 1 or more, means that a completion is right; None if none of them can say.

        Preferred is a reward whose reason is a grader's outcome, then one that sees the row, then the largest weight,
        then the first in the file. Shaping, penalties and reward models do not judge.

        Args:
            reasons: By name, the reason of each reward that applies to the completion.
        """
        graders = {name for name, reason in reasons.items() if outcome_of(reason)}
        able = [f for f in self.functions if f.name in reasons and f.weight > 0]
        able = [f for f in able if f.name in graders or self.can_judge(f)]
        return max(able, key=lambda f: (f.name in graders, f.reads_row, f.weight), default=None)

    def state_dict(self) -> dict[str, int]:
        return {"scored": self.scored, "errors": self.errors}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.scored = state["scored"]
        self.errors = state["errors"]


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


# --- one reward function at a time


_lock = threading.Lock()  # held by the thread whose reward function runs
_thread = threading.local()


@contextlib.contextmanager
def reward_lock():
    """Reward functions run inside, one at a time in the whole process: they need not be thread-safe."""
    if getattr(_thread, "turn", False):
        yield
        return
    with _lock:
        _thread.turn = True
        try:
            yield
        finally:
            _thread.turn = False


@contextlib.contextmanager
def lock_released():
    """Around a blocking wait in a grader: other reward functions may run meanwhile. Nothing where none runs here."""
    if not getattr(_thread, "turn", False):
        yield
        return
    _thread.turn = False
    _lock.release()
    try:
        yield
    finally:
        _lock.acquire()
        _thread.turn = True


# --- words for messages


def prompt_text(prompt: str | list[dict]) -> str:
    """The question itself: the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def did_you_mean(name: str, names) -> str:
    """ " Did you mean 'x'?" for the nearest of some names; "" where none is near."""
    near = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
