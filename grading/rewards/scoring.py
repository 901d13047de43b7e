"""Score completions with reward functions while other completions are still being generated.

    scoring = Scoring(rewards)
    scoring.add(completion)         # as soon as it is generated; returns immediately
    scores = scoring.results()      # one Score per completion, in order

Only one reward function runs at a time. While it waits for the sandbox, the next completion is started (`lock_released`
in grading/base.py), so that many programs are graded concurrently. Completions are started in order, so a function that
never waits sees them one after the other. Async functions are awaited together. Batch functions run once, in the thread
that calls `results`, on all completions that they apply to.
"""

import math
import threading
import time
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from grading.base import (
    Completion,
    RewardError,
    RewardFunction,
    Rewards,
    Score,
    Turn,
    Ungraded,
    is_finite_number,
    lock_released,
    reward_lock,
    short_repr,
    to_number,
)
from grading.rewards import trl
from grading.rewards.verdicts import set_verdict

THREADS = 64  # most of them wait: the sandbox limits the number of running programs
# With reward_errors: skip, the run stops if more completions fail than this share and than this number.
MAX_ERROR_SHARE = 0.05
MAX_ERRORS = 4
EXPECTED = "a finite number, a bool, None, (number, 'reason') or a list of (position, number)"


def score_all(rewards: Rewards, completions: list[Completion]) -> list[Score]:
    """Return the scores of completions, in their order. Raise RewardError if a reward function fails."""
    scoring = Scoring(rewards)
    for completion in completions:
        scoring.add(completion)
    return scoring.results()


@dataclass
class _Entry:
    """A completion with its score so far."""

    completion: Completion
    index: int  # position in the results
    score: Score
    errors: list[RewardError] = field(default_factory=list)
    ungraded: set[str] = field(default_factory=set)  # names of the functions that gave no grade


class Scoring:
    """Scores the completions of one step."""

    def __init__(self, rewards: Rewards):
        self.rewards = rewards
        self._entries: list[_Entry] = []  # in the order in which they were added
        self._single = [f for f in rewards.functions if not f.is_batch and not f.is_async]
        self._num_started = 0  # entries taken by a thread
        self._num_threads = 0
        self._num_idle = 0  # threads that wait for the lock for the first time
        self._stopped = False  # True after an error that ends the run
        self._fatal: BaseException | None = None  # raised again by `results`, such as KeyboardInterrupt
        self._changed = threading.Condition()

    def add(self, completion: Completion, index: int | None = None) -> None:
        """Start to score a completion.

        Args:
            index: Position of its score in the results. Defaults to the order of the calls.
        """
        parts = {f.name: None for f in self.rewards.functions if f.weight}
        metrics = {f.name: None for f in self.rewards.functions if not f.weight}
        score = Score(0.0, parts, metrics, {}, "wrong")
        entry = _Entry(completion, len(self._entries) if index is None else index, score)
        if completion.error:
            name = self.rewards.names[0]
            entry.errors.append(completion.error)
            entry.ungraded.add(name)
            score.reasons[name] = f"reward_error: {completion.error}"
        with self._changed:
            self._entries.append(entry)
            self._ensure_idle_thread()

    def _ensure_idle_thread(self) -> None:
        """Keep one thread ready for the next completion, in case the thread that holds the lock waits."""
        if (
            self._single
            and self._num_started < len(self._entries)
            and not self._num_idle
            and self._num_threads < THREADS
        ):
            self._num_threads += 1
            self._num_idle += 1
            threading.Thread(target=self._run_thread, daemon=True).start()

    def _run_thread(self) -> None:
        """Score completions until all have been started."""
        with reward_lock():  # released only while a function waits: then another thread takes the next completion
            with self._changed:
                self._num_idle -= 1
            while True:
                with self._changed:
                    if self._num_started == len(self._entries) or self._stopped:
                        self._num_threads -= 1
                        self._changed.notify_all()
                        return
                    entry = self._entries[self._num_started]
                    self._num_started += 1
                    self._ensure_idle_thread()
                for f in self._single:
                    if not self._stopped:
                        self._run_sync(self._apply(f, entry))

    def _run_sync(self, coroutine: Coroutine) -> None:
        """Run a coroutine that awaits nothing. A fatal error is stored: `results` raises it in its caller's thread."""
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        except BaseException as error:
            self._fatal = error
            self._stopped = True

    def results(self) -> list[Score]:
        """Wait for all completions and return their scores. Raise RewardError as `reward_errors` defines."""
        async_thread = threading.Thread(target=self._run_async, daemon=True)
        if any(f.is_async for f in self.rewards.functions):
            async_thread.start()
        with reward_lock():
            for f in self.rewards.functions:
                if f.is_batch and not f.is_async and not self._stopped:
                    self._run_sync(self._apply_batch(f))
        try:
            with lock_released():
                if async_thread.ident:
                    async_thread.join()
                with self._changed:
                    self._changed.wait_for(lambda: not self._num_threads)
        except BaseException:  # on Ctrl-C, start no further functions
            self._stopped = True
            raise
        if self._fatal:
            raise self._fatal
        entries = self._in_order()
        self._check_errors(entries)
        for entry in entries:
            self._finalize(entry)
        return [entry.score for entry in entries]

    def _in_order(self) -> list[_Entry]:
        return sorted(self._entries, key=lambda entry: entry.index)

    # --- function calls

    async def _apply(self, f: RewardFunction, entry: _Entry) -> None:
        """Call a function for one completion."""
        start = time.perf_counter()
        try:
            result = f.function(entry.completion) if f.applies_to(entry.completion.row) else None
            self._record(f, entry, await result if f.is_async and result is not None else result)
        except Ungraded as error:
            self._mark_ungraded(f, [entry], str(error))
        except (Exception, SystemExit) as error:
            self._record_error(f, [entry], error)
        entry.score.seconds += time.perf_counter() - start

    async def _apply_batch(self, f: RewardFunction) -> None:
        """Call a batch function for all completions that it applies to."""
        start = time.perf_counter()
        entries = []
        try:
            for entry in self._in_order():
                if f.applies_to(entry.completion.row):
                    entries.append(entry)
            if not entries:
                return
            values, log = await trl.call(f, [entry.completion for entry in entries], self.rewards.max_steps)
            if not isinstance(values, list):
                raise _InvalidValue(
                    f"returned {short_repr(values)}, expected a list of {len(entries)} values, one per completion"
                )
            if len(values) != len(entries):
                num_values = f"{len(values)} value{'s' if len(values) != 1 else ''}"
                raise _InvalidValue(f"returned {num_values} for {len(entries)} completions")
        except Ungraded as error:
            self._mark_ungraded(f, entries, str(error))
        except (Exception, SystemExit) as error:
            self._record_error(f, entries or [entry], error)
        else:
            means = {name: sum(logged) / len(logged) for name, logged in log.metrics.items()}
            for i, entry in enumerate(entries):
                entry.score.metrics |= means
                entry.score.extra |= {column: logged[i] for column, logged in log.extra.items()}
                try:
                    self._record(f, entry, values[i])
                except _InvalidValue as error:
                    self._record_error(f, [entry], error)
        for entry in entries:
            entry.score.seconds += (time.perf_counter() - start) / len(entries)

    def _run_async(self) -> None:
        """Await all async functions together, on an event loop that releases the reward lock while it waits."""
        import asyncio
        import selectors

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                with lock_released():
                    return super().select(timeout)

        async def run():
            semaphore = asyncio.Semaphore(THREADS)

            async def apply(f, entry):
                async with semaphore:
                    await self._apply(f, entry)

            functions = [f for f in self.rewards.functions if f.is_async]
            calls = [self._apply_batch(f) for f in functions if f.is_batch]
            calls += [apply(f, entry) for entry in self._in_order() for f in functions if not f.is_batch]
            await asyncio.gather(*calls)

        try:
            with reward_lock(), asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner:
                runner.run(run())
        except BaseException as error:
            self._fatal = error

    def _record(self, f: RewardFunction, entry: _Entry, result) -> None:
        """Store the result of a function for a completion. Raise _InvalidValue if it is invalid."""
        result, turns = split_turns(result, entry.completion)
        value, reason, process = parse_result(result, len(entry.completion.text))
        (entry.score.parts if f.weight else entry.score.metrics)[f.name] = value
        if reason:
            entry.score.reasons[f.name] = reason
        if process is not None:
            entry.score.process[f.name] = process
        if turns:
            entry.score.turns[f.name] = turns

    def _mark_ungraded(self, f: RewardFunction, entries: list[_Entry], reason: str) -> None:
        for entry in entries:
            entry.score.reasons[f.name] = reason
            entry.ungraded.add(f.name)

    def _record_error(self, f: RewardFunction, entries: list[_Entry], error: Exception) -> None:
        reward_error = make_reward_error(self.rewards.path, f, [entry.completion for entry in entries], error)
        for entry in entries:
            entry.errors.append(reward_error)
        self._mark_ungraded(f, entries, f"reward_error: {reward_error}")
        if self.rewards.reward_errors == "stop":
            self._stopped = True

    # --- results

    def _check_errors(self, entries: list[_Entry]) -> None:
        """Raise RewardError if a function failed (stop), or if too many completions failed (skip)."""
        errors = [entry.errors[0] for entry in entries if entry.errors]
        rewards = self.rewards
        if errors and rewards.reward_errors == "stop":
            raise errors[0] from errors[0].__cause__
        rewards.scored += len(entries)
        rewards.errors += len(errors)
        if errors and rewards.errors > max(MAX_ERRORS, MAX_ERROR_SHARE * rewards.scored):
            raise RewardError(
                f"reward functions failed on {rewards.errors} of {rewards.scored} completions, more than the "
                f"{MAX_ERROR_SHARE:.0%} that reward_errors: skip allows. First error of this step: {errors[0]}",
                errors[0].completions,
            ) from errors[0].__cause__

    def _finalize(self, entry: _Entry) -> None:
        """Complete a score: the weighted sum, and the verdict of the reward function that judges it."""
        score = entry.score
        names = [f.name for f in self.rewards.functions]  # the order of the file, not of completion
        score.reasons = {name: score.reasons[name] for name in names if name in score.reasons}
        score.process = {name: score.process[name] for name in names if name in score.process}
        score.turns = {name: score.turns[name] for name in names if name in score.turns}
        if entry.errors:
            score.error = str(entry.errors[0])
        applied = [f for f in self.rewards.functions if score.parts.get(f.name) is not None]
        if any(name in score.parts for name in entry.ungraded):
            score.verdict = "ungraded"
            score.total = math.nan
        elif not applied:  # not a reward of 0, which would be trained on
            score.verdict = "ungraded"
            score.total = math.nan
            score.reasons.setdefault(
                next(iter(score.parts)), "no reward function returned a value: is a return missing?"
            )
        else:
            score.total = sum(f.weight * score.parts[f.name] for f in applied)
            set_verdict(self.rewards, score, entry.completion.row)


class _InvalidValue(Exception):
    """The result of a reward function is invalid."""


def split_turns(result, completion: Completion) -> tuple[object, list[tuple[int, float]]]:
    """Return a result with the sum in place of a list of (turn, number), and this list with the turns' indices.

    Other results are returned unchanged, with an empty list. Raise _InvalidValue for a turn of another completion.
    """
    has_reason = isinstance(result, tuple) and len(result) == 2
    pairs = result[0] if has_reason else result
    if not isinstance(pairs, list) or not pairs or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        return result, []
    if not all(isinstance(turn, Turn) for turn, _ in pairs):
        return result, []
    indices = {id(turn): i for i, turn in enumerate(completion.turns)}
    values = [(indices.get(id(turn)), to_number(number)) for turn, number in pairs]
    if any(i is None or not is_finite_number(number) for i, number in values):
        raise _InvalidValue(
            f"returned {short_repr(pairs)}, expected pairs of an element of completion.turns and a number"
        )
    total = float(sum(number for _, number in values))
    return (total, result[1]) if has_reason else total, values


def parse_result(result, length: int) -> tuple[float | None, str, list[tuple[int, float]] | None]:
    """Return the value, the reason and the process reward in a function's result. Raise _InvalidValue if it is invalid.

    Args:
        length: Number of characters of the completion: the largest position of a process reward.
    """
    value, reason = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    value = to_number(value)
    process = None
    if isinstance(value, list) and all(isinstance(step, (list, tuple)) and len(step) == 2 for step in value):
        process = [(to_number(position), to_number(number)) for position, number in value]
        for position, _ in process:
            if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= length:
                raise _InvalidValue(
                    f"returned the position {short_repr(position)}, expected an integer from 0 to {length} (text length)"
                )
        invalid = next((number for _, number in process if not is_finite_number(number)), None)
        value = invalid if invalid is not None else float(sum(number for _, number in process))
    if (value is not None and not is_finite_number(value)) or not isinstance(reason, (str, type(None))):
        raise _InvalidValue(f"returned {short_repr(result)}, expected {EXPECTED}")
    return None if value is None else float(value), reason or "", process


def make_reward_error(path: Path, f: RewardFunction, completions: list[Completion], error: Exception) -> RewardError:
    """Return a RewardError that names the function, file:line and rows, and quotes the end of the first completion."""
    if isinstance(error, _InvalidValue):
        line, problem = f.line, str(error)
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == path), f.line)
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        problem = f"{type(error).__name__}: {message}"
    rows = f"row {completions[0].row.get('id', '?')}"
    if len(completions) > 1:
        rows += f" and {len(completions) - 1} more"
        problem += f" (with completions as {'messages' if f.style == 'chat' else 'text'})" if f.is_batch else ""
    reward_error = RewardError(
        f"reward function '{f.name}' ({path.name}:{line}), {rows}: {problem.rstrip('.')}. "
        f"The completion ends with {completions[0].text[-60:]!r}",
        completions,
    )
    reward_error.__cause__ = error
    return reward_error
