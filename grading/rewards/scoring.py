"""Reward functions applied to completions: many at once, while others are still being generated, results in order.

    scoring = Scoring(rewards)
    scoring.add(completion)         # as soon as it has ended; returns at once
    scores = scoring.results()      # one Score for each completion, in their order

Only one reward function runs at a time; where one waits for the sandbox, the next completion's turn comes (`lock_released` in
grading/base.py), so that many programs are judged at once. Completions are begun in order, so a function that waits for
nothing sees them one after the other. Async functions are awaited together. Batch functions run once, in `results`, in the
thread that called it, with all the completions that they apply to.
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
    Ungraded,
    is_finite_number,
    lock_released,
    reward_lock,
    short_repr,
)
from grading.rewards import trl

THREADS = 64  # most of them wait: the sandbox itself limits how many programs run
SKIPPED_SHARE = 0.05  # with reward_errors: skip, more failures than this (and more than SKIPPED_FEW) stop the run
SKIPPED_FEW = 4
EXPECTED = "a finite number, a bool, None, (number, 'reason') or a list of (position, number)"


def score_all(rewards: Rewards, completions: list[Completion]) -> list[Score]:
    """The scores of completions that are all there, in their order. Raises RewardError."""
    scoring = Scoring(rewards)
    for completion in completions:
        scoring.add(completion)
    return scoring.results()


@dataclass
class _Entry:
    """A completion with its score, as far as the functions have made it."""

    completion: Completion
    place: int  # in the results
    score: Score
    faults: list[RewardError] = field(default_factory=list)
    ungraded: set[str] = field(default_factory=set)  # functions that gave no grade


class Scoring:
    """The completions of one step while they are scored."""

    def __init__(self, rewards: Rewards):
        self.rewards = rewards
        self._entries: list[_Entry] = []  # in the order in which they were added
        self._single = [f for f in rewards.functions if not f.is_batch and not f.is_async]
        self._begun = 0  # entries that a thread has taken
        self._threads = 0
        self._spare = 0  # threads that wait for their first turn
        self._stopped = False  # an error has been found that ends the run
        self._broken: BaseException | None = None  # what a function raised beyond Exception, such as SystemExit
        self._changed = threading.Condition()

    def add(self, completion: Completion, place: int | None = None) -> None:
        """Start to score a completion.

        Args:
            place: Its place in the results; by default the order of adding.
        """
        parts = {f.name: None for f in self.rewards.functions if f.weight}
        metrics = {f.name: None for f in self.rewards.functions if not f.weight}
        score = Score(0.0, parts, metrics, {}, "wrong")
        with self._changed:
            self._entries.append(_Entry(completion, len(self._entries) if place is None else place, score))
            self._provide_thread()

    def _provide_thread(self) -> None:
        """Keep one thread ready for the next completion, in case the thread that has the turn waits."""
        if self._single and self._begun < len(self._entries) and not self._spare and self._threads < THREADS:
            self._threads += 1
            self._spare += 1
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        """Score completions until none is left that no thread has begun."""
        with reward_lock():  # released only while a function waits: then another thread takes the next completion
            with self._changed:
                self._spare -= 1
            while True:
                with self._changed:
                    if self._begun == len(self._entries) or self._stopped:
                        self._threads -= 1
                        self._changed.notify_all()
                        return
                    entry = self._entries[self._begun]
                    self._begun += 1
                    self._provide_thread()
                for f in self._single:
                    if not self._stopped:
                        self._try(self._apply(f, entry))

    def _try(self, coroutine: Coroutine) -> None:
        """Run a coroutine that awaits nothing. What ends the program is kept for the thread that calls `results`."""
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        except BaseException as error:
            self._broken = error
            self._stopped = True

    def results(self) -> list[Score]:
        """Wait for all completions. Raises RewardError as `reward_errors` says."""
        awaited = threading.Thread(target=self._run_async, daemon=True)
        if any(f.is_async for f in self.rewards.functions):
            awaited.start()
        with reward_lock():
            for f in self.rewards.functions:
                if f.is_batch and not f.is_async and not self._stopped:
                    self._try(self._apply_batch(f))
        try:
            with lock_released():
                if awaited.ident:
                    awaited.join()
                with self._changed:
                    self._changed.wait_for(lambda: not self._threads)
        except BaseException:  # Ctrl-C: functions that have not begun must not begin
            self._stopped = True
            raise
        if self._broken:
            raise self._broken
        entries = self._in_order()
        self._settle_errors(entries)
        for entry in entries:
            self._settle(entry)
        return [entry.score for entry in entries]

    def _in_order(self) -> list[_Entry]:
        return sorted(self._entries, key=lambda entry: entry.place)

    # --- calling

    async def _apply(self, f: RewardFunction, entry: _Entry) -> None:
        """Call a function for one completion."""
        started = time.perf_counter()
        try:
            result = f.function(entry.completion) if f.applies_to(entry.completion.row) else None
            self._keep(f, entry, await result if f.is_async and result is not None else result)
        except Ungraded as error:
            self._leave_ungraded(f, [entry], str(error))
        except (Exception, SystemExit) as error:
            self._fail(f, [entry], error)
        entry.score.seconds += time.perf_counter() - started

    async def _apply_batch(self, f: RewardFunction) -> None:
        """Call a batch function for all completions that it applies to."""
        started = time.perf_counter()
        entries = []
        try:
            for entry in self._in_order():
                if f.applies_to(entry.completion.row):
                    entries.append(entry)
            if not entries:
                return
            values, log = await trl.call(f, [entry.completion for entry in entries], self.rewards.max_steps)
            if not isinstance(values, (list, tuple)):
                raise _WrongValue(
                    f"returned {short_repr(values)}, expected a list of {len(entries)}: one value for each"
                )
            if len(values) != len(entries):
                values_given = f"{len(values)} value{'s' if len(values) != 1 else ''}"
                raise _WrongValue(f"returned {values_given} for {len(entries)} completions")
        except Ungraded as error:
            self._leave_ungraded(f, entries, str(error))
        except (Exception, SystemExit) as error:
            self._fail(f, entries or [entry], error)
        else:
            means = {name: sum(logged) / len(logged) for name, logged in log.metrics.items()}
            for i, entry in enumerate(entries):
                entry.score.metrics |= means
                entry.score.extra |= {column: logged[i] for column, logged in log.extra.items()}
                try:
                    self._keep(f, entry, values[i])
                except _WrongValue as error:
                    self._fail(f, [entry], error)
        for entry in entries:
            entry.score.seconds += (time.perf_counter() - started) / len(entries)

    def _run_async(self) -> None:
        """Await all async functions together, on an event loop that lets other functions run while it waits."""
        import asyncio
        import selectors

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                with lock_released():
                    return super().select(timeout)

        async def run():
            places = asyncio.Semaphore(THREADS)

            async def apply(f, entry):
                async with places:
                    await self._apply(f, entry)

            functions = [f for f in self.rewards.functions if f.is_async]
            jobs = [self._apply_batch(f) for f in functions if f.is_batch]
            jobs += [apply(f, entry) for entry in self._in_order() for f in functions if not f.is_batch]
            await asyncio.gather(*jobs)

        try:
            with reward_lock(), asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner:
                runner.run(run())
        except BaseException as error:
            self._broken = error

    def _keep(self, f: RewardFunction, entry: _Entry, result) -> None:
        """Enter what a function returned for a completion. Raises _WrongValue."""
        value, reason, process = read(result, len(entry.completion.text))
        (entry.score.parts if f.weight else entry.score.metrics)[f.name] = value
        if reason:
            entry.score.reasons[f.name] = reason
        if process is not None:
            entry.score.process[f.name] = process

    def _leave_ungraded(self, f: RewardFunction, entries: list[_Entry], reason: str) -> None:
        for entry in entries:
            entry.score.reasons[f.name] = reason
            entry.ungraded.add(f.name)

    def _fail(self, f: RewardFunction, entries: list[_Entry], error: Exception) -> None:
        fault = describe_fault(self.rewards.path, f, [entry.completion for entry in entries], error)
        for entry in entries:
            entry.faults.append(fault)
        self._leave_ungraded(f, entries, f"reward_error: {fault}")
        if self.rewards.reward_errors == "stop":
            self._stopped = True

    # --- the result

    def _settle_errors(self, entries: list[_Entry]) -> None:
        """Raise RewardError if a function failed and none may (stop), or if too many did (skip)."""
        faults = [entry.faults[0] for entry in entries if entry.faults]
        rewards = self.rewards
        if faults and rewards.reward_errors == "stop":
            raise faults[0] from faults[0].__cause__
        rewards.scored += len(entries)
        rewards.errors += len(faults)
        if faults and rewards.errors > max(SKIPPED_FEW, SKIPPED_SHARE * rewards.scored):
            raise RewardError(
                f"reward functions failed on {rewards.errors} of {rewards.scored} completions, over {SKIPPED_SHARE:.0%}, too "
                f"many for reward_errors: skip. The first of this step: {faults[0]}",
                faults[0].completions,
            ) from faults[0].__cause__

    def _settle(self, entry: _Entry) -> None:
        """Complete a score: the weighted sum, and the verdict of the function that judges it."""
        score = entry.score
        names = [f.name for f in self.rewards.functions]  # in the file's order, whichever function was done first
        score.reasons = {name: score.reasons[name] for name in names if name in score.reasons}
        score.process = {name: score.process[name] for name in names if name in score.process}
        if entry.faults:
            score.error = str(entry.faults[0])
        given = [f for f in self.rewards.functions if score.parts.get(f.name) is not None]
        if any(name in score.parts for name in entry.ungraded):
            score.verdict, score.total = "ungraded", math.nan
        elif not given:  # 0 would be a wrong reward
            score.verdict, score.total = "ungraded", math.nan
            score.reasons.setdefault(next(iter(score.parts)), "no reward function gave a value: is a return missing?")
        else:
            score.total = sum(f.weight * score.parts[f.name] for f in given)
            judge = self.rewards.judge({f.name: score.reasons.get(f.name, "") for f in given})
            if judge:
                score.judge, score.verdict = judge.name, "right" if score.parts[judge.name] >= 1 else "wrong"


class _WrongValue(Exception):
    """What a function returned is none of what it may return."""


def read(result, length: int) -> tuple[float | None, str, list[tuple[int, float]] | None]:
    """The value, the reason and the process reward in what a function returned. Raises _WrongValue.

    Args:
        length: Characters of the completion, the largest position of a process reward.
    """
    value, reason = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    process = None
    if isinstance(value, list) and all(isinstance(step, (list, tuple)) and len(step) == 2 for step in value):
        process = [(position, number) for position, number in value]
        for position, _ in process:
            if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= length:
                raise _WrongValue(
                    f"returned the position {short_repr(position)}, expected a whole number from 0 to the text's {length}"
                )
        wrong = next((number for _, number in process if not is_finite_number(number)), None)
        value = wrong if wrong is not None else float(sum(number for _, number in process))
    if (value is not None and not is_finite_number(value)) or not isinstance(reason, (str, type(None))):
        raise _WrongValue(f"returned {short_repr(result)}, expected {EXPECTED}")
    return None if value is None else float(value), reason or "", process


def describe_fault(path: Path, f: RewardFunction, completions: list[Completion], error: Exception) -> RewardError:
    """A RewardError that says where a function failed, on which rows, and what the first completion ends in."""
    if isinstance(error, _WrongValue):
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
    fault = RewardError(
        f"reward function '{f.name}' ({path.name}:{line}), {rows}: {problem.rstrip('.')}. "
        f"The completion ended in {completions[0].text[-60:]!r}",
        completions,
    )
    fault.__cause__ = error
    return fault
