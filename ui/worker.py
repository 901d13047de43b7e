"""The thread that owns the models (ui/models.py): it answers the questions of the page, a few decode steps of each in turn.

So two sides and several visitors are answered together. A side that needs another base model waits until the questions before
it are answered. Only the thread imports torch.
"""

import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Iterator

from ui.runs import Runs, describe_error, import_models
from ui.turns import Answer, Ask, Turn

AT_ONCE = 4  # questions that are answered together; later ones wait
UPDATE = 0.1  # seconds between two updates of a question
IDLE = 5.0  # seconds without work after which the thread looks whether a run needs the card
OUT_OF_MEMORY = (
    "Out of memory. Lower the samples a side (now {0.samples}) or the longest answer (now {0.max_tokens} tokens), close other "
    "programs that use the memory, or choose a run with a smaller model."
)


class Worker:
    """Starts the thread. `answer` and `load_ahead` may be called from any other."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.models = None
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # functions to call in the thread
        self._jobs: list[list[Turn]] = []  # the questions that are not answered yet, in the order of their arrival
        threading.Thread(target=self._work, name="models", daemon=True).start()

    def answer(self, ask: Ask) -> Iterator[tuple[Answer, ...]]:
        """Yield the state of the sides until all are over. Closing the iterator ends the answers."""
        turns = [Turn(ask, side, messages) for side, messages in zip(ask.sides, ask.messages, strict=True)]
        advanced = threading.Event()
        advance = functools.partial(self._advance, turns, advanced)
        self._jobs.append(turns)
        self._inbox.put(advance)
        try:
            over = False
            while not over:
                advanced.wait()
                advanced.clear()
                answers = tuple(turn.answer for turn in turns)
                over = all(answer.over for answer in answers)
                if not over:
                    if "answering" not in [answer.state for answer in answers]:
                        time.sleep(UPDATE)
                    self._inbox.put(advance)  # the thread continues while the page shows this update
                yield answers
        finally:
            ask.stop.set()
            self._inbox.put(advance)  # frees what the sides hold if they are not over
            self._jobs.remove(turns)

    def load_ahead(self, run: str | None) -> None:
        """Load the base model of a run if there is none yet, so that the first question need not wait. Returns at once."""
        self._inbox.put(functools.partial(self._load_first, run))

    # --- the thread

    def _work(self) -> None:
        import_models()
        from ui.models import Models

        self.models = Models(self.runs)
        while True:
            task = self._rest
            with contextlib.suppress(queue.Empty):
                task = self._inbox.get(timeout=IDLE)
            try:
                task()
            except Exception:  # a mistake in this file: the thread has to go on
                traceback.print_exc()

    def _rest(self) -> None:
        if not self._jobs:
            self.models.make_way()

    def _load_first(self, run: str | None) -> None:
        if not self.models.policy:
            with contextlib.suppress(Exception, SystemExit):  # the first question shows it
                self.models.load(*self.models.settings(run))

    def _advance(self, turns: list[Turn], advanced: threading.Event) -> None:
        """Advance the sides of a question, for UPDATE seconds or until the state of one changes."""
        end = time.monotonic() + UPDATE
        is_answering = True
        try:
            while is_answering and time.monotonic() < end:
                before = [turn.answer for turn in turns]
                for turn in turns:
                    if not turn.answer.over:
                        self._step(turn)
                if [turn.answer for turn in turns] != before:
                    break
                is_answering = any(turn.answer.state == "answering" for turn in turns)
            for turn in turns:
                if turn.answer.state == "answering":
                    turn.update("answering")
        finally:
            advanced.set()

    def _step(self, turn: Turn) -> None:
        """Make one decode step (a few on CUDA), or what comes before the first one. An error ends this side alone."""
        from rl.model.oom import is_out_of_memory

        try:
            if turn.ask.stop.is_set():
                turn.update("stopped", "stopped")
            elif not turn.steps:
                self._begin(turn)
            else:
                self.models.step(turn)
                is_done = len(turn.ended) == turn.ask.samples
                if is_done or not turn.answer.samples[0].token_ids:  # the first token is shown at once
                    turn.update("done" if is_done else "answering")
        except (Exception, SystemExit) as error:
            turn.policy = None  # it may not be able to decode the samples
            note = OUT_OF_MEMORY.format(turn.ask) if is_out_of_memory(error) else describe_error(error)
            turn.update("failed", note)
        if turn.answer.state == "failed":  # here the error is gone, and what its frames held
            self.models.free()

    def _begin(self, turn: Turn) -> None:
        """Load the model and the LoRA of a side and put its question, once no question before it is in the way."""
        if not turn.config:
            turn.config, turn.base = self.models.settings(turn.side[0] if turn.side else turn.ask.run)
        if note := self._waits_for(turn):
            return turn.update("waiting", note)
        if self.models.base != turn.base:
            if turn.answer.state != "loading":  # the page shows it before the thread is busy
                return turn.update("loading", f"loads {turn.config.model}")
            self.models.load(turn.config, turn.base)
        in_use = {other.adapter for turns in list(self._jobs) for other in turns if other.steps}
        self.models.put_question(turn, in_use)
        turn.update("answering")

    def _waits_for(self, turn: Turn) -> str:
        """What a side waits for, in words; empty if it can begin. First come, first served."""
        jobs = [turns for turns in list(self._jobs) if not turns[0].ask.stop.is_set()]
        for place, turns in enumerate(jobs):
            if place >= AT_ONCE:
                return f"{AT_ONCE} other questions are being answered: this one waits for its turn"
            for other in turns:
                if other is turn:
                    return ""
                if not other.answer.over and other.base != turn.base:
                    return (
                        f"waits for {turn.config.model}: {other.base[0] if other.base else 'another model'} is in use"
                    )
        return ""
