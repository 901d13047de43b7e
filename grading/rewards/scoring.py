"""Reward functions applied to completions: many at once, while others are still being generated, results in order.

    scoring = Scoring(rewards)
    scoring.add(completion)         # as soon as it has ended; returns at once
    scores = scoring.results()      # one Score for each completion, in their order

Only one reward function runs at a time; where one waits for the sandbox, the next completion's turn comes (`waiting` in
grading/base.py), so that many programs are judged at once. Completions are begun in order, so a function that waits for
nothing sees them one after the other. Async functions are awaited together. Batch functions run once, in `results`, in the
thread that called it, with all the completions that they apply to.
"""

import math
import threading
import time
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from grading.base import (
    Completion,
    RewardError,
    RewardFunction,
    Score,
    Ungraded,
    alone,
    is_finite_number,
    short_repr,
    waiting,
)
from grading.rewards import trl

if TYPE_CHECKING:
    from grading.rewards.reward_file import Rewards

THREADS = 64  # most of them wait: the sandbox itself limits how many programs run
SKIPPED_SHARE = 0.05  # with reward_errors: skip, more failures than this (and more than SKIPPED_FEW) stop the run
SKIPPED_FEW = 4
EXPECTED = "a finite number, a bool, None, (number, 'reason') or a list of (position, number)"


class Part(NamedTuple):
    """What one function made of one completion."""

    value: float | None = None
    reason: str = ""
    process: list[tuple[int, float]] | None = None
    is_ungraded: bool = False


class Scoring:
    """The completions of one step while they are scored."""

    def __init__(self, rewards: "Rewards"):
        self.rewards = rewards
        self.completions: list[Completion] = []  # as they came
        self._places: list[int] = []  # of each in the results
        self._parts: list[dict[str, Part | RewardError]] = []  # for each completion, by function
        self._seconds: list[float] = []
        self._logs: list[tuple[list[int], trl.Log]] = []  # of batch functions, with the numbers of their completions
        self._at_once = [f for f in rewards.functions if not f.is_batch and not f.is_async]
        self._begun = 0  # completions that a thread has taken
        self._threads = 0
        self._spare = 0  # threads that wait for their first turn
        self._stopped = False  # an error has been found that ends the run
        self._broken: BaseException | None = None  # what a function raised beyond Exception, such as SystemExit
        self._changed = threading.Condition()

    def add(self, completion: Completion, place: int | None = None) -> None:
        """Start to score a completion. place: its place in the results, where it is not the order of adding."""
        with self._changed:
            self._places.append(len(self.completions) if place is None else place)
            self.completions.append(completion)
            self._parts.append({})
            self._seconds.append(0.0)
            self._provide_thread()

    def _provide_thread(self) -> None:
        """Have one thread ready to go on where the one that has the turn waits."""
        if self._at_once and self._begun < len(self.completions) and not self._spare and self._threads < THREADS:
            self._threads, self._spare = self._threads + 1, 1
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        """Score completions until none is left that nobody has begun."""
        with alone():  # given up only while a function waits: then the next thread takes the next completion
            with self._changed:
                self._spare -= 1
            while True:
                with self._changed:
                    if self._begun == len(self.completions) or self._stopped:
                        self._threads -= 1
                        self._changed.notify_all()
                        return
                    number, self._begun = self._begun, self._begun + 1
                    self._provide_thread()
                for f in self._at_once:
                    if not self._stopped:
                        self._try(self._apply(f, number))

    def _try(self, coroutine: Coroutine) -> None:
        """Run a coroutine that awaits nothing. What ends the program is kept for the thread that asks for the results."""
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        except BaseException as error:
            self._broken, self._stopped = error, True

    def results(self) -> list[Score]:
        """Wait for all completions. Raises RewardError, by the rule of `reward_errors`."""
        batch = [f for f in self.rewards.functions if f.is_batch and not f.is_async]
        awaited = threading.Thread(target=self._run_async, daemon=True)
        if any(f.is_async for f in self.rewards.functions):
            awaited.start()
        with alone():
            for f in batch:
                if not self._stopped:
                    self._try(self._apply_batch(f))
        try:
            with waiting():
                if awaited.ident:
                    awaited.join()
                with self._changed:
                    self._changed.wait_for(lambda: not self._threads)
        except BaseException:  # Ctrl-C: what has not begun is not begun
            self._stopped = True
            raise
        if self._broken:
            raise self._broken
        order = self._order()
        self._settle_errors([self._parts[number] for number in order])
        scores = [self._score(*both) for both in zip(self._parts, self._seconds)]
        for numbers, log in self._logs:
            for place, number in enumerate(numbers):
                scores[number].metrics |= {name: sum(values) / len(values) for name, values in log.metrics.items()}
                scores[number].extra |= {column: values[place] for column, values in log.extra.items()}
        return [scores[number] for number in order]

    def _order(self) -> list[int]:
        """The numbers of the completions by their places."""
        return sorted(range(len(self.completions)), key=self._places.__getitem__)

    # --- calling

    async def _apply(self, f: RewardFunction, number: int) -> None:
        """Call a function for one completion."""
        started, completion = time.perf_counter(), self.completions[number]
        try:
            result = f.function(completion) if f.applies(completion.row) else None
            self._keep(f, number, await result if f.is_async and result is not None else result)
        except Ungraded as error:
            self._parts[number][f.name] = Part(reason=str(error), is_ungraded=True)
        except (Exception, SystemExit) as error:
            self._fail(f, [number], error)
        self._seconds[number] += time.perf_counter() - started

    async def _apply_batch(self, f: RewardFunction) -> None:
        """Call a batch function for all completions that it applies to."""
        started, numbers = time.perf_counter(), []
        try:
            for number in self._order():
                if f.applies(self.completions[number].row):
                    numbers.append(number)
                else:
                    self._keep(f, number, None)
            if not numbers:
                return
            values, log = await trl.call(f, [self.completions[i] for i in numbers], self.rewards.max_steps)
            if not isinstance(values, (list, tuple)):
                raise _WrongValue(
                    f"returned {short_repr(values)}, expected a list of {len(numbers)}: one value for each"
                )
            if len(values) != len(numbers):
                values_given = f"{len(values)} value{'s' if len(values) != 1 else ''}"
                raise _WrongValue(f"returned {values_given} for {len(numbers)} completions")
            self._logs.append((numbers, log))
        except Ungraded as error:
            for number in numbers:
                self._parts[number][f.name] = Part(reason=str(error), is_ungraded=True)
        except (Exception, SystemExit) as error:
            self._fail(f, numbers or [number], error)
        else:
            for number, value in zip(numbers, values):
                try:
                    self._keep(f, number, value)
                except _WrongValue as error:
                    self._fail(f, [number], error)
        for number in numbers:
            self._seconds[number] += (time.perf_counter() - started) / len(numbers)

    def _run_async(self) -> None:
        """All that is async, awaited together on an event loop that lets other functions run while it waits."""
        import asyncio
        import selectors

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                with waiting():
                    return super().select(timeout)

        async def run():
            places = asyncio.Semaphore(THREADS)

            async def apply(f, number):
                async with places:
                    await self._apply(f, number)

            functions = [f for f in self.rewards.functions if f.is_async]
            jobs = [self._apply_batch(f) for f in functions if f.is_batch]
            jobs += [apply(f, i) for i in self._order() for f in functions if not f.is_batch]
            await asyncio.gather(*jobs)

        try:
            with alone(), asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner:
                runner.run(run())
        except BaseException as error:
            self._broken = error

    def _keep(self, f: RewardFunction, number: int, result) -> None:
        self._parts[number][f.name] = read(result, len(self.completions[number].text))

    def _fail(self, f: RewardFunction, numbers: list[int], error: Exception) -> None:
        fault = describe_fault(self.rewards.path, f, [self.completions[i] for i in numbers], error)
        for number in numbers:
            self._parts[number][f.name] = fault
        if self.rewards.reward_errors == "stop":
            self._stopped = True

    # --- putting together

    def _settle_errors(self, all_parts: list[dict[str, Part | RewardError]]) -> None:
        """Raise RewardError where functions failed and none may (stop), or too many (skip)."""
        faults = [[part for part in parts.values() if isinstance(part, RewardError)] for parts in all_parts]
        first = [found[0] for found in faults if found]
        if first and self.rewards.reward_errors == "stop":
            raise first[0] from first[0].__cause__
        rewards = self.rewards
        rewards.scored += len(self.completions)
        rewards.errors += len(first)
        if first and rewards.errors > max(SKIPPED_FEW, SKIPPED_SHARE * rewards.scored):
            raise RewardError(
                f"reward functions failed on {rewards.errors} of {rewards.scored} completions, over {SKIPPED_SHARE:.0%}, too "
                f"many for reward_errors: skip. The first of this step: {first[0]}",
                first[0].completions,
            ) from first[0].__cause__

    def _score(self, parts: dict[str, Part | RewardError], seconds: float) -> Score:
        """The parts of a completion, weighted, with the verdict of the function that judges it."""
        score = Score(0.0, {}, {}, {}, "wrong", seconds=seconds)
        is_ungraded, reasons = False, {}
        for f in self.rewards.functions:
            part = parts[f.name]
            if isinstance(part, RewardError):
                score.error = score.error or str(part)
                part = Part(reason=f"reward_error: {part}", is_ungraded=True)
            (score.parts if f.weight else score.metrics)[f.name] = part.value
            if part.reason:
                score.reasons[f.name] = part.reason
            if part.process is not None:
                score.process[f.name] = part.process
            is_ungraded = is_ungraded or (part.is_ungraded and f.weight != 0)
            if part.value is not None:
                score.total += f.weight * part.value
                reasons[f.name] = part.reason
        judge = self.rewards.judge(reasons)
        if not is_ungraded and all(value is None for value in score.parts.values()):  # a zero would be a lie
            is_ungraded, first = True, next(iter(score.parts))
            score.reasons.setdefault(first, "no reward function gave a value: is a return missing?")
        if is_ungraded:
            score.verdict, score.total = "ungraded", math.nan
        elif judge:
            score.judge, score.verdict = judge.name, "right" if score.parts[judge.name] >= 1 else "wrong"
        return score


class _WrongValue(Exception):
    """What a function returned is none of what it may return."""


def read(result, length: int) -> Part:
    """What a function returned for a completion of `length` characters. Raises _WrongValue."""
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
    return Part(None if value is None else float(value), reason or "", process)


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
