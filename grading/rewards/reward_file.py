"""A file of reward functions: which of its functions count, the checks before a run, and `Rewards`, which applies them."""

import importlib.util
import inspect
import math
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from grading.answers.math_grader import grade_math
from grading.base import (
    GIVEN,
    Completion,
    RewardError,
    RewardFunction,
    Score,
    did_you_mean,
    outcome_of,
    row_kind,
    shorten,
)
from grading.rewards import probes
from grading.rewards.models import ModelReward
from grading.rewards.scoring import Scoring, describe_fault

SHAPING_SHARE = 0.2  # a reward of at most this share of the largest weight is shaping, and cannot judge a row alone
MAX_SHOWN = 4  # of notes of one kind


@dataclass
class Rewards:
    """The reward functions of one file, as they count in one run."""

    path: Path
    functions: list[RewardFunction]
    reward_errors: str = "stop"  # what an exception in one of them does: stop the run | skip the completion
    max_steps: int | None = None  # of the run, for TRL functions
    examples: list = field(default_factory=list)  # what the file calls so: completions with labels, for the self-test
    notes: list[str] = field(default_factory=list)  # on the file
    scored: int = 0  # completions so far
    errors: int = 0  # completions that were skipped because a function raised

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.functions if f.weight]

    @property
    def heaviest(self) -> float:
        """The largest weight of a reward that is no reward model; 0 where there are only penalties."""
        return max([0.0, *(f.weight for f in self.functions if not isinstance(f, ModelReward))])

    def can_judge(self, f: RewardFunction) -> bool:
        """Whether a reward can be the verdict on a completion: no reward model, and not so small that it is shaping."""
        return not isinstance(f, ModelReward) and f.weight > SHAPING_SHARE * self.heaviest

    def judge(self, reasons: dict[str, str]) -> RewardFunction | None:
        """Of the rewards that apply to a completion, the one whose value, 1 or more, means that it is right.

        reasons: of those rewards, by name. First comes one whose reason is a grader's outcome; then one that sees the
        row; then the largest weight; then the first in the file. Shaping, penalties and reward models do not judge.
        """
        graders = {name for name, reason in reasons.items() if outcome_of(reason)}
        able = [f for f in self.functions if f.name in reasons and f.weight > 0]
        able = [f for f in able if f.name in graders or self.can_judge(f)]
        return max(able, key=lambda f: (f.name in graders, f.sees_row, f.weight), default=None)

    def state_dict(self) -> dict:
        return {"scored": self.scored, "errors": self.errors}

    def load_state_dict(self, state: dict) -> None:
        self.scored = state["scored"]
        self.errors = state["errors"]

    def score(self, completion: Completion) -> Score:
        """What the functions make of one completion. Raises RewardError where one of them fails."""
        return self.score_all([completion])[0]

    def score_all(self, completions: list[Completion]) -> list[Score]:
        """The scores of a step's completions, in their order. To begin before all are there, use Scoring."""
        scoring = Scoring(self)
        for completion in completions:
            scoring.add(completion)
        return scoring.results()

    # --- before a run

    def check(self, rows: list[dict]) -> list[str]:
        """Try every function on rows of each task and kind before a model is loaded: notes for the person.

        Raises RewardError for what is wrong with the file or the data (a misspelt column, a row without its gold, a
        wrong return value) while nothing is lost.
        """
        trial = replace(self, reward_errors="stop")
        self._check_columns(rows)
        tried, trials = set(), []
        for row in rows:
            kind = row.get("task"), frozenset(column for column, value in row.items() if value not in (None, "", []))
            if kind not in tried:
                tried.add(kind)
                trials += [probes.completion(row, text) for text in ("", "<think>two</think>2")]
        trial.score_all(trials)
        groups = {}  # by kind and the rewards that apply: the rows
        for row in rows:
            applying = self._applying(row)
            is_meant = any(isinstance(f, ModelReward) and f.when for f in applying)  # for these rows, without a verdict
            if self.heaviest and not any(map(self.can_judge, applying)) and not is_meant:
                raise RewardError(self._no_judge(row, applying))
            groups.setdefault((row_kind(row) or row.get("task"), tuple(f.name for f in applying)), []).append(row)
        return self.notes + _notes_on_golds(rows) + self._notes_on_weights(trial, groups)

    def _check_columns(self, rows: list[dict]) -> None:
        for f in self.functions:
            needed = [column for column, is_needed in f.columns.items() if is_needed]
            lacking = [row for row in rows if any(c not in row for c in needed) and self._applies(f, row)]
            if lacking:
                row = lacking[0]
                column = next(column for column in needed if column not in row)
                rest = f" and {len(lacking) - 1} more rows lack" if len(lacking) > 1 else " lacks"
                raise RewardError(
                    f"reward function '{f.name}' ({self.path.name}:{f.line}) asks for the column '{column}', which row "
                    f"{row.get('id', '?')}{rest}; there are {', '.join(row)}.{did_you_mean(column, [*row, *GIVEN])}"
                )

    def _applies(self, f: RewardFunction, row: dict) -> bool:
        completion = probes.completion(row, "")
        try:
            return f.applies(completion.row)
        except Exception as error:
            raise describe_fault(self.path, f, [completion], error) from error

    def _applying(self, row: dict) -> list[RewardFunction]:
        """The rewards (no metrics) that apply to a row."""
        return [f for f in self.functions if f.weight and self._applies(f, row)]

    def _no_judge(self, row: dict, applying: list[RewardFunction]) -> str:
        names = ", ".join(f.name for f in applying)
        judges = " or ".join(f.name for f in self.functions if self.can_judge(f))
        return (
            f"row {row['id']}: of the rewards in {self.path.name} {f'only {names}' if names else 'none'} applies, but "
            f"not {judges}: the row needs the column answer or tests (columns: {{answer: YOUR_COLUMN}} maps yours), or "
            f"the reward another when= (the row's task is '{row.get('task')}')"
        )

    def _notes_on_weights(self, trial: "Rewards", groups: dict[tuple, list[dict]]) -> list[str]:
        """The largest total of each group of rows, and warnings where it can be had without being right.

        What tells a right answer from a wrong one is seen, not declared: it gives more to the gold than to another
        answer written in the same way.
        """
        totals, warnings = [], []
        by_name = {f.name: f for f in self.functions}
        for (kind, names), rows in groups.items():
            functions = [by_name[name] for name in names if by_name[name].weight > 0]
            warnings += self._notes_on_models(kind, [by_name[name] for name in names])
            largest, telling, judges = trial._try_golds(rows, functions)
            worth = {f.name: f.weight * largest[f.name] for f in functions}
            parts = " + ".join(f"{name} {value:g}" for name, value in worth.items())
            totals.append(f"{sum(worth.values()):g} on {kind} rows ({parts})")
            shaping = [f for f in functions if f not in telling]
            if not telling or not shaping:
                continue
            names_of = [" + ".join(f"{f.name} {worth[f.name]:g}" for f in part) for part in (shaping, telling)]
            if sum(worth[f.name] for f in shaping) >= sum(worth[f.name] for f in telling):
                warnings.append(
                    f"warning: on {kind} rows a wrong answer can earn as much as a right one: {names_of[0]} against "
                    f"{names_of[1]}. Keep shaping to a fifth of it, or give it only to what is right"
                )
            if judges <= {f.name for f in shaping}:
                warnings.append(
                    f"warning: on {kind} rows right or wrong is what {' or '.join(judges)} says, but it pays a wrong answer as "
                    f"well as a right one: give {telling[0].name} the largest weight"
                )
        shown = [*totals[:MAX_SHOWN], *(["..."] if len(totals) > MAX_SHOWN else [])]
        return [f"largest reward: {', '.join(shown)}", *warnings[:MAX_SHOWN]] if totals else []

    def _notes_on_models(self, kind: str, functions: list[RewardFunction]) -> list[str]:
        """What the person must know of the reward models among the rewards of a group of rows."""
        models = [f for f in functions if isinstance(f, ModelReward)]
        notes = [
            f"warning: on {kind} rows {f.name} is a reward model's raw score, which has no bound and can outweigh every "
            "other reward: sigmoid=True keeps it between 0 and 1" for f in models if f.function.is_unbounded
        ]  # fmt: skip
        if models and not any(map(self.can_judge, functions)):
            notes.append(
                f"warning: on {kind} rows nothing says what is right: a reward model ({models[0].name}) has an opinion, no "
                "verdict. All completions count as wrong there: look at the reward, not at the accuracy"
            )
        return notes

    def _try_golds(self, rows: list[dict], functions: list[RewardFunction]) -> tuple[dict[str, float], list, set[str]]:
        """The largest value by function (at least 1 for a decorated one), the functions that tell gold from wrong, judges."""
        largest = dict.fromkeys((f.name for f in functions), 0.0)
        telling, judges = [], set()
        row = min(rows, key=lambda row: len(probes.gold_of(row) or " " * 1000))  # the shortest: most likely a plain one
        if probes.gold_of(row) and row_kind(row) in ("math", "code", "countdown"):
            gold, wrong = probes.gold_of(row), probes.wrong_answer(row)
            pairs = [
                probes.completion(row, probes.STYLES[style](probes.THOUGHT, answer))
                for style in probes.styles_of(row)
                for answer in (gold, wrong)
            ]
            scores = self.score_all(pairs)
            judges = {score.judge for score in scores if score.judge}
            for f in functions:
                values = [score.parts[f.name] or 0.0 for score in scores]
                largest[f.name] = max(values)
                is_better = any(right > wrong for right, wrong in zip(values[::2], values[1::2]))
                if is_better and not isinstance(f, ModelReward):  # of which it may be chance
                    telling.append(f)
        for f in functions:
            if hasattr(f.function, "reward") or largest[f.name] <= 0:
                largest[f.name] = max(1.0, largest[f.name])
            if isinstance(f, ModelReward) and f.function.is_unbounded:
                largest[f.name] = math.inf
        return largest, telling, judges


def _notes_on_golds(rows: list[dict]) -> list[str]:
    """A note where the math grader cannot match golds even with themselves: too long, braces that do not close, empty."""
    problems = {}  # by gold
    bad = []
    math_rows = [row for row in rows if row_kind(row) == "math"]
    for row in math_rows:
        gold = str(row["answer"])
        if gold not in problems:
            ideal = gold if "####" in gold or "\\boxed{" in gold else f"\\boxed{{{gold}}}"
            try:
                score, reason = grade_math(ideal, gold)
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


# --- loading


def load_rewards(
    path: str,
    reward_funcs: list[str] | None = None,
    reward_weights: dict[str, float] | None = None,
    reward_errors: str = "stop",
    max_steps: int | None = None,
    source: str | None = None,
) -> Rewards:
    """The reward functions of a file, in the order of the file. source: what is to be in it, where that is not saved yet.

    Those count that are decorated, and those that the file's own list `reward_funcs = [...]` names, as in TRL.
    reward_funcs: names to use; empty for all of them. reward_weights: weights by name that replace the file's own.
    Raises RewardError where the file is missing, does not import, has no reward, or a name is unknown.
    """
    file = Path(path).resolve()
    if source is None and not file.is_file():
        raise RewardError(f"rewards_file: there is no file {path}")
    module = _import_file(file, source)
    found = _find_functions(module, file)
    plain = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    chosen = reward_funcs or list(found)
    functions = []
    for name in [*chosen, *(reward_weights or {})]:
        if name in chosen and name not in found and name in plain:  # named by the person: that is enough
            found[name] = RewardFunction(name, plain[name])
        if name not in found:
            setting = "reward_funcs" if name in chosen else "reward_weights"
            hint = did_you_mean(name, found).strip() or f"It has {', '.join(found) or 'none'}"
            hint = hint[0].lower() + hint[1:]
            raise RewardError(f"{setting}: {file.name} has no reward function '{name}'; {hint}")
    for name in chosen:
        weight = float((reward_weights or {}).get(name, found[name].weight))
        functions.append(replace(found[name], weight=weight))
    examples = getattr(module, "examples", [])
    rewards = Rewards(file, functions, reward_errors, max_steps, examples if isinstance(examples, list) else [])
    if not rewards.names:
        raise RewardError(
            f"{file.name} has no reward with a weight: mark a function with @reward, or name it in reward_funcs = [...]"
        )
    if not reward_funcs:
        ignored = [
            name for name, f in plain.items() if name not in found and "completions" in inspect.signature(f).parameters
        ]
        rewards.notes += [
            f"{name} in {file.name} has a parameter completions, but is neither decorated nor named in reward_funcs: "
            "it does not count" for name in ignored
        ]  # fmt: skip
    return rewards


def _find_functions(module, file: Path) -> dict[str, RewardFunction]:
    """The reward functions that a module has, by name."""
    decorated = [value for value in vars(module).values() if isinstance(getattr(value, "reward", None), RewardFunction)]
    functions = [value.reward for value in decorated if value.__module__ == module.__name__]
    listed = getattr(module, "reward_funcs", [])
    if not isinstance(listed, (list, tuple)):
        raise RewardError(f"{file.name}: reward_funcs is {shorten(repr(listed))}, expected a list of functions")
    for entry in listed:
        function = getattr(module, entry, None) if isinstance(entry, str) else entry
        name = getattr(function, "__name__", type(function).__name__)
        if not callable(function) or name == "<lambda>":
            hint = did_you_mean(entry, vars(module)) if isinstance(entry, str) else " Write it as a function with def."
            raise RewardError(f"{file.name}: reward_funcs names {shorten(repr(entry))}, which is no function.{hint}")
        f = getattr(function, "reward", None)
        functions.append(f if isinstance(f, RewardFunction) else RewardFunction(name, function))
    found = {}
    for f in functions:
        if f.name in found and found[f.name].function is not f.function:
            raise RewardError(
                f"{file.name}: two reward functions are called {f.name}: rename one (of a reward model: name=)"
            )
        found[f.name] = f
    return found


def _import_file(file: Path, source: str | None):
    name = f"rewards_of_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up by name
    try:
        # not by the loader, whose cache of bytecode takes a file of the same second and size for the same
        exec(compile(file.read_bytes() if source is None else source, file, "exec"), vars(module))
    except Exception as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
            line = lines[-1] if lines else "?"
        raise RewardError(f"{file.name}:{line}: {type(error).__name__}: {error}") from error
    return module
