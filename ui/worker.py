"""The thread that owns the models (ui/models.py). It answers questions by interleaving a few decode steps of each.

Both sides and several visitors are answered concurrently. A side that needs another base model waits until all earlier
questions are answered. Only this thread imports torch.
"""

import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Iterator

from ui.runs import Runs, describe_error, import_models
from ui.turns import Answer, ChatRequest, Turn

MAX_CONCURRENT = 4  # questions answered at the same time; later ones wait
UPDATE_SECONDS = 0.1  # time between two updates of a question
IDLE_SECONDS = 5.0  # idle time after which the thread checks whether a run needs the GPU
OUT_OF_MEMORY = (
    "Out of memory. Reduce the samples per side (now {0.samples}) or the maximum answer length (now {0.max_tokens} "
    "tokens), close other programs that use memory, or choose a run with a smaller model."
)


class Worker:
    """Start the thread. `answer` and `preload` may be called from any thread."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.models = None
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # functions to call in the thread
        self._jobs: list[list[Turn]] = []  # unanswered questions in order of arrival
        threading.Thread(target=self._work, name="models", daemon=True).start()

    def answer(self, request: ChatRequest) -> Iterator[tuple[Answer, ...]]:
        """Yield the state of both sides until both have ended. Closing the iterator stops generation."""
        turns = [Turn(request, side, messages) for side, messages in zip(request.sides, request.messages, strict=True)]
        advanced = threading.Event()
        advance = functools.partial(self._advance, turns, advanced)
        self._jobs.append(turns)
        self._inbox.put(advance)
        try:
            is_over = False
            while not is_over:
                advanced.wait()
                advanced.clear()
                answers = tuple(turn.answer for turn in turns)
                is_over = all(answer.is_over for answer in answers)
                if not is_over:
                    if "answering" not in [answer.state for answer in answers]:
                        time.sleep(UPDATE_SECONDS)
                    self._inbox.put(advance)  # the thread continues while the page shows this update
                yield answers
        finally:
            request.stop.set()
            self._inbox.put(advance)  # releases the memory of sides that have not ended
            self._jobs.remove(turns)

    def preload(self, run: str | None) -> None:
        """Load the base model of a run in the background if no model is loaded, to speed up the first question."""
        self._inbox.put(functools.partial(self._preload, run))

    # --- the thread

    def _work(self) -> None:
        import_models()
        from ui.models import Models

        self.models = Models(self.runs)
        while True:
            task = self._release_if_idle
            with contextlib.suppress(queue.Empty):
                task = self._inbox.get(timeout=IDLE_SECONDS)
            try:
                task()
            except Exception:  # a bug in this file must not end the thread
                traceback.print_exc()

    def _release_if_idle(self) -> None:
        if not self._jobs:
            self.models.release_gpu()

    def _preload(self, run: str | None) -> None:
        if not self.models.policy:
            with contextlib.suppress(Exception, SystemExit):  # the first question shows the error
                self.models.load(*self.models.settings(run))

    def _advance(self, turns: list[Turn], advanced: threading.Event) -> None:
        """Advance all sides of a question for UPDATE_SECONDS, or until the state of one changes."""
        end = time.monotonic() + UPDATE_SECONDS
        is_answering = True
        try:
            while is_answering and time.monotonic() < end:
                before = [turn.answer for turn in turns]
                for turn in turns:
                    if not turn.answer.is_over:
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
        """Prepare a turn, or make one decode step (several on CUDA). An error fails this side only."""
        from rl.model.oom import is_out_of_memory

        try:
            if turn.request.stop.is_set():
                turn.update("stopped", "stopped")
            elif not turn.steps:
                self._begin(turn)
            else:
                self.models.step(turn)
                is_done = len(turn.finished) == turn.request.samples
                if is_done or not turn.answer.samples[0].token_ids:  # show the first token immediately
                    turn.update("done" if is_done else "answering")
        except (Exception, SystemExit) as error:
            turn.policy = None  # decoding the samples may fail too
            note = OUT_OF_MEMORY.format(turn.request) if is_out_of_memory(error) else describe_error(error)
            turn.update("failed", note)
        if turn.answer.state == "failed":  # outside the except block, since the error's frames hold memory
            self.models.free_memory()

    def _begin(self, turn: Turn) -> None:
        """Load the base model and the adapter of a side and start its answer, unless earlier questions block it."""
        if not turn.config:
            turn.config, turn.base_key = self.models.settings(turn.side[0] if turn.side else turn.request.run)
        if note := self._waiting_reason(turn):
            return turn.update("waiting", note)
        if self.models.base_key != turn.base_key:
            if turn.answer.state != "loading":  # show this on the page before loading blocks the thread
                return turn.update("loading", f"Loading {turn.config.model} ...")
            self.models.load(turn.config, turn.base_key)
        in_use = {other.adapter for turns in list(self._jobs) for other in turns if other.steps}
        self.models.start_answer(turn, in_use)
        turn.update("answering")

    def _waiting_reason(self, turn: Turn) -> str:
        """Return what a side has to wait for, or "" if it can begin. Questions are answered in order of arrival."""
        jobs = [turns for turns in list(self._jobs) if not turns[0].request.stop.is_set()]
        for position, turns in enumerate(jobs):
            if position >= MAX_CONCURRENT:
                return f"Waiting: {MAX_CONCURRENT} other questions are being answered"
            for other in turns:
                if other is turn:
                    return ""
                if not other.answer.is_over and other.base_key != turn.base_key:
                    return (
                        f"Waiting to load {turn.config.model}: "
                        f"{other.base_key[0] if other.base_key else 'another model'} is in use"
                    )
        return ""
