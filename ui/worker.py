"""The thread that owns the models (ui/models.py). It answers one request at a time, both sides stepping in turn.

Other requests wait in the order of their arrival. Only this thread imports torch.
"""

import contextlib
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from rl.run.reader import Runs
from ui.page import describe_error, import_models
from ui.turns import Answer, ChatRequest, Turn

UPDATE_SECONDS = 0.1  # time between two updates of an answer
WAIT_SECONDS = 0.2  # time between two updates of a request that waits for another one
IDLE_SECONDS = 5.0  # idle time after which the thread checks whether a run needs the GPU
OUT_OF_MEMORY = (
    "Out of memory. Ask for fewer samples (now {0.samples} of each question) or shorter answers (now up to {0.max_tokens} "
    "tokens), close other programs that use memory, or choose a run with a smaller model."
)


class Worker:
    """Start the thread. `answer` and `preload` may be called from any thread."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.models = None
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # functions to call in the thread
        threading.Thread(target=self._work, name="models", daemon=True).start()

    def answer(self, request: ChatRequest) -> Iterator[tuple[Answer, ...]]:
        """Yield the state of all sides until they have ended. Closing the iterator stops generation."""
        turns = [Turn(request, *side) for side in zip(request.sides, request.conversations, strict=True)]
        changed = threading.Event()
        self._inbox.put(functools.partial(self._answer, turns, changed))
        try:
            is_over = False
            while not is_over:
                changed.wait(WAIT_SECONDS)  # then Gradio can close the iterator of a visitor who has left
                changed.clear()
                for turn in turns:
                    if request.stop.is_set() and turn.answer.state == "waiting":
                        turn.answer = Answer("stopped", "stopped")
                answers = tuple(turn.answer for turn in turns)
                is_over = all(answer.is_over for answer in answers)
                yield answers
        finally:
            request.stop.set()

    def preload(self, run: str | None) -> None:
        """Load the base model of a run in the background if no model is loaded, to speed up the first question."""
        self._inbox.put(functools.partial(self._preload, run))

    # --- the thread

    def _work(self) -> None:
        import_models()
        from ui.models import Models

        self.models = Models(self.runs)
        while True:
            task = self.models.release_gpu
            with contextlib.suppress(queue.Empty):
                task = self._inbox.get(timeout=IDLE_SECONDS)
            try:
                task()
            except Exception:  # a bug in this file must not end the thread
                traceback.print_exc()

    def _preload(self, run: str | None) -> None:
        if not self.models.policy:
            with contextlib.suppress(Exception, SystemExit):  # the first question shows the error
                self.models.load(*self.models.settings(run))

    def _answer(self, turns: list[Turn], changed: threading.Event) -> None:
        """Answer all sides. Sides with the same base model step in turn; other base models are loaded after them."""
        try:
            for turn in turns:
                self._try(turn, self._configure)
            for key in dict.fromkeys(turn.base_key for turn in turns):
                self._answer_with_base([turn for turn in turns if turn.base_key == key], changed)
        finally:
            for turn in turns:
                if not turn.answer.is_over:
                    turn.update("failed", "Unexpected error: see the terminal.")
            changed.set()

    def _answer_with_base(self, turns: list[Turn], changed: threading.Event) -> None:
        adapters: set[str | None] = set()
        for turn in turns:
            if turn.config and turn.base_key != self.models.base_key:
                turn.update("loading", f"Loading {turn.config.model} ...")
        changed.set()
        for turn in turns:
            self._try(turn, functools.partial(self._begin, in_use=adapters))
            adapters.add(turn.adapter)
        next_update = 0.0
        while running := [turn for turn in turns if not turn.answer.is_over]:
            for turn in running:
                is_first = not turn.finished and not turn.seconds
                self._try(turn, Turn.step)
                if turn.steps and len(turn.finished) == turn.total:
                    turn.update("done")
                if is_first or turn.answer.is_over:
                    next_update = 0.0  # show this immediately
            if time.monotonic() >= next_update:
                for turn in turns:
                    if turn.steps:
                        turn.update("answering")
                changed.set()
                next_update = time.monotonic() + UPDATE_SECONDS

    def _try(self, turn: Turn, action: Callable[[Turn], None]) -> None:
        """Call an action unless this side is over. An error ends this side only."""
        from rl.model.oom import is_out_of_memory

        if turn.answer.is_over:
            return
        try:
            if turn.request.stop.is_set():
                turn.update("stopped", "stopped")
            else:
                action(turn)
        except (Exception, SystemExit) as error:
            turn.policy = None  # decoding the samples may fail too
            note = OUT_OF_MEMORY.format(turn.request) if is_out_of_memory(error) else describe_error(error)
            turn.update("failed", note)
        if turn.answer.state == "failed":  # outside the except block, since the error's frames hold memory
            self.models.free_memory()

    def _configure(self, turn: Turn) -> None:
        turn.config, turn.base_key = self.models.settings(turn.side[0] if turn.side else turn.request.run)

    def _begin(self, turn: Turn, in_use: set[str | None]) -> None:
        if self.models.base_key != turn.base_key:
            self.models.load(turn.config, turn.base_key)
        self.models.start_answer(turn, in_use)
        turn.update("answering")
