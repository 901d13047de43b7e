"""The API of reward files: `Completion`, the decorators `@reward` and `@metric`, outcomes, and exceptions.

    @reward(weight=1.0, when="math")
    def correct(completion):                       # called once per completion
        return grade_math(completion.answer, completion.row["answer"], completion.prompt)

    @reward(weight=0.1)
    def rare(prompts, completions, **columns):     # has a parameter `completions`: called once per step, as in TRL
        return [...]

For each completion, a reward function returns one of:

    number or bool            the reward
    None                      the function does not apply to this completion
    (number, "reason")        the reward and an explanation, which is logged and displayed
    [(position, number)]      a process reward: the reward of each step of the text, which ends at the character
                              `position`; their sum is the reward of the completion
    [(turn, number)]          the same for turns of an episode, with elements of `completion.turns`

A reason may start with one of OUTCOMES, followed by a colon; outcomes are counted in the metrics. A grader that fails
raises `Ungraded`: the completion is then excluded from training instead of silently scoring 0.

`Rewards` holds the functions of one reward file during a run. grading/rewards/reward_file.py loads it,
grading/rewards/preflight.py checks it, and grading/rewards/scoring.py applies it to completions.
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
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

OUTCOMES = (
    "right", "wrong", "no_answer", "gave_up",  # math and puzzles
    "passed", "failed", "timeout", "memory", "crash", "syntax", "no_code", "missing_entry", "bad_type", "output_limit",
    "unsupported", "sandbox_error", "reward_error",  # ungraded
)  # fmt: skip
SHAPING_SHARE = 0.2  # a reward of at most this share of the largest weight is shaping: it does not decide the verdict


class RewardError(Exception):
    """An error in a reward function or reward file. The message names the function, file:line and row.

    Args:
        message: The error message.
        completions: The completions that the function was called with; empty if the file itself is at fault.
    """

    def __init__(self, message: str, completions: "list[Completion]" = ()):
        super().__init__(message)
        self.completions = list(completions)


class Ungraded(Exception):
    """Raised by a grader that failed. The completion is neither right nor wrong and is excluded from training."""


class Row(dict):
    """A read-only data row. Looking up a missing column raises a KeyError that lists the existing columns."""

    def __missing__(self, column):
        raise KeyError(f"the row has no column '{column}', only {', '.join(self)}.{did_you_mean(column, self)}")

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            "data rows are read-only, because completions are graded against them: change a copy, dict(row)"
        )

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __reduce__(self):  # to send it to another process
        return Row, (dict(self),)


def row_kind(row: dict) -> str | None:
    """Return the kind of grader for a row: its `grader` column, else "code" (has tests) or "math" (has an answer).

    Returns None if the row has none of these columns. A `grader` that is not text is some other data of the user.
    """
    if row.get("grader") and isinstance(row["grader"], str):
        return row["grader"]
    return "code" if row.get("tests") else "math" if row.get("answer") is not None else None


@dataclass
class Turn:
    """One turn of an episode with an environment."""

    text: str  # what the model wrote, including the thinking
    reply: str = ""  # what the environment answered
    score: float | None = None  # change of the environment's score, if it has one


@dataclass
class Completion:
    """One completion and all the information that is available to reward functions.

    In an episode of several turns (environments.py), `text` is the model's last turn.
    """

    prompt: str  # the question
    text: str  # the whole completion, including the thinking
    row: dict  # all columns of the data row, read-only
    tokens: int = 0  # length in tokens
    truncated: bool = False  # True if cut off at max_completion_length, without an end-of-sequence token
    step: int = 0  # training step, starting at 1
    token_ids: list[int] = field(default_factory=list, repr=False)  # token ids of the completion
    turns: list[Turn] = field(default_factory=list)  # all turns; empty without an environment
    environment: object = field(default=None, repr=False)  # the environment after the episode
    environment_reward: float | None = None  # what its get_reward() returned
    error: RewardError | None = None  # of the environment, with reward_errors: skip

    def __post_init__(self):
        self.row = Row(copy.deepcopy(dict(self.row)))  # a copy: changes to its lists do not reach the data set

    @functools.cached_property
    def thinking(self) -> str:
        """The text inside <think> ... </think>; "" if there is none."""
        before, end_tag, _ = self.text.rpartition("</think>")
        if not end_tag:
            before = self.text if "<think>" in self.text else ""
        return before.split("<think>", 1)[-1].strip()

    @functools.cached_property
    def answer(self) -> str:
        """The text after the last </think>, or all text if there are no think tags; "" if the thinking never ends."""
        if "</think>" in self.text:
            return self.text.rpartition("</think>")[2].strip()
        return "" if "<think>" in self.text else self.text.strip()


@dataclass
class Score:
    """The result of all reward functions for one completion."""

    total: float  # weighted sum of the rewards; nan if ungraded
    parts: dict[str, float | None]  # unweighted reward by function name; None if the function does not apply
    metrics: dict[str, float | None]  # value by metric name, including names passed to TRL's log_metric
    reasons: dict[str, str]  # explanation by function name
    verdict: str  # right | wrong | ungraded
    judge: str | None = None  # name of the reward function that the verdict comes from
    error: str | None = None  # error message of a function that raised, with reward_errors: skip
    process: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # (position, value) pairs by function
    turns: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # (index of the turn, value) by function
    extra: dict[str, object] = field(default_factory=dict)  # value by column name, from TRL's log_extra
    seconds: float = 0.0  # time spent in reward functions, including waits for the sandbox

    @property
    def is_right(self) -> bool:
        return self.verdict == "right"


def outcome_of(reason: str) -> str | None:
    """Return the outcome at the start of a reason, such as "wrong" for "wrong: 5 is not 6"; None if there is none."""
    outcome = reason.partition(":")[0].strip()
    return outcome if outcome in OUTCOMES else None


def outcome_shares(scores: list[Score]) -> dict[str, float]:
    """Return the metrics `outcomes/NAME`: the share of completions that have this outcome in one of their reasons."""
    counts = Counter(outcome for s in scores for outcome in {outcome_of(reason) for reason in s.reasons.values()})
    return {f"outcomes/{name}": counts[name] / len(scores) for name in OUTCOMES if counts[name]}


@dataclass
class RewardFunction:
    """A reward function or metric with its settings."""

    name: str  # name in the logs and in reward_funcs
    function: Callable  # the decorated function
    weight: float = 1.0  # factor in the weighted sum; 0 for a metric
    when: str | Callable | None = None  # restriction to some rows, see applies_to
    style: str | None = None  # form of completions for a batch function, "chat" or "text", once known (rewards/trl.py)
    used: tuple[set, set] | None = None  # names and strings in its code, once known (rewards/verdicts.py)
    is_model = False  # True for a reward model, which is never the judge of a completion

    def applies_to(self, row: dict) -> bool:
        """Return whether the row matches `when`: a row kind (see row_kind), a task name, or a predicate on the row."""
        if self.when is None:
            return True
        return bool(self.when(row)) if callable(self.when) else self.when in (row_kind(row), row.get("task"))

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the function by name."""
        return dict(inspect.signature(self.function).parameters)

    @functools.cached_property
    def is_batch(self) -> bool:
        """Whether the function takes all completions of a step in one call, as in TRL."""
        return "completions" in self.parameters

    @functools.cached_property
    def is_async(self) -> bool:
        """Whether the function, or its `__call__` method, is a coroutine function."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(self.function.__call__)

    @functools.cached_property
    def columns(self) -> dict[str, bool]:
        """The data columns among a batch function's parameters, each with whether it is required (has no default)."""
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        data_parameters = [p for p in self.parameters.values() if p.kind in kinds and p.name not in TRL_ARGUMENTS]
        return {p.name: p.default is p.empty for p in data_parameters} if self.is_batch else {}

    @property
    def code(self):
        """The code object of the unwrapped function, or None."""
        function = inspect.unwrap(self.function)
        return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)

    @property
    def line(self) -> int | str:
        """The line of the definition in its file, or "?"."""
        return self.code.co_firstlineno if self.code else "?"


# Arguments of a batch function that are not data columns.
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "environments", "trainer_state", "log_extra", "log_metric")


@dataclass
class Rewards:
    """The reward functions of one file and their settings in one run."""

    path: Path  # the reward file
    functions: list[RewardFunction]  # rewards and metrics, in the order of the file
    reward_errors: str = "stop"  # effect of an exception in a function: stop the run | skip the completion
    max_steps: int | None = None  # training steps of the run, passed to TRL functions
    source: str = ""  # text of the file
    examples: list = field(default_factory=list)  # labeled completions in the file, for the self-test
    notes: list[str] = field(default_factory=list)  # remarks on the file, for the user
    payments: dict = field(default_factory=dict)  # what the functions pay for golds (rewards/verdicts.py)
    scored: int = 0  # number of completions scored so far
    errors: int = 0  # number of completions skipped because a function raised

    @property
    def names(self) -> list[str]:
        """The names of the rewards, without the metrics."""
        return [f.name for f in self.functions if f.weight]

    @property
    def heaviest(self) -> float:
        """The largest weight of all rewards except reward models; 0 if there are only penalties."""
        return max([0.0, *(f.weight for f in self.functions if not f.is_model)])

    def can_judge(self, f: RewardFunction) -> bool:
        """Return whether a reward may decide the verdict: not a reward model, and not so small that it is shaping."""
        return not f.is_model and f.weight > SHAPING_SHARE * self.heaviest

    def state_dict(self) -> dict[str, int]:
        return {"scored": self.scored, "errors": self.errors}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.scored = state["scored"]
        self.errors = state["errors"]


def reward(function: Callable | None = None, *, weight: float = 1.0, when: str | Callable | None = None):
    """Mark a function as a reward. Use as `@reward` or `@reward(weight=0.2, when="math")`.

    Args:
        function: The reward function; see the top of this file for its arguments and return value.
        weight: Factor in the weighted sum of the rewards.
        when: Restriction to some rows: a row kind ("math", "code", ...: see row_kind), a task name, or a predicate on
            the row. None applies the function to all rows.
    """

    def mark(function):
        function.reward = RewardFunction(function.__name__, function, float(weight), when)
        return function

    return mark(function) if function else mark


def metric(function: Callable | None = None, *, when: str | Callable | None = None):
    """Mark a function as a metric, which is logged but not trained on. See `reward` for `when`."""
    mark = reward(weight=0.0, when=when)
    return mark(function) if function else mark


# --- the lock of reward functions


_lock = threading.Lock()  # held by the thread whose reward function runs
_thread = threading.local()


@contextlib.contextmanager
def reward_lock():
    """Hold the lock under which reward functions run, one at a time per process, so they need not be thread-safe."""
    if getattr(_thread, "holds_lock", False):
        yield
        return
    with _lock:
        _thread.holds_lock = True
        try:
            yield
        finally:
            _thread.holds_lock = False


@contextlib.contextmanager
def lock_released():
    """Release the lock during a blocking wait in a grader, so that others run. No effect if this thread has no lock."""
    if not getattr(_thread, "holds_lock", False):
        yield
        return
    _thread.holds_lock = False
    _lock.release()
    try:
        yield
    finally:
        _lock.acquire()
        _thread.holds_lock = True


# --- text for messages


def prompt_text(prompt: str | list[dict]) -> str:
    """Return the question as text: of a conversation, the last message that is not the start of the answer."""
    if isinstance(prompt, str):
        return prompt
    questions = [message for message in prompt if message.get("role") != "assistant"]
    return str((questions or prompt)[-1]["content"])


def did_you_mean(name: str, names) -> str:
    """Return " Did you mean 'x'?" for the closest match among the names; "" if none is close."""
    matches = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the name of the error type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def to_number(value):
    """Return a NumPy scalar, a tensor with one element, a Fraction or a Decimal as a number; other values unchanged."""
    if isinstance(value, (Fraction, Decimal)):
        return float(value)
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError, TypeError):  # more than one element
        return value


def is_finite_number(value) -> bool:
    """Return whether a value is a bool, or an int or float that is finite as a float."""
    try:
        return isinstance(value, (bool, int, float)) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


def shorten(text: str, limit: int = 60) -> str:
    """Return the text, cut to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short_repr(value) -> str:
    """Return a shortened repr of a value, or its type if the value is too large or too deeply nested for repr."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):
        return f"a very large {type(value).__name__}"
