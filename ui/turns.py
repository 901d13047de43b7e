"""A question to both sides of the Compare tab, and the state of each side's answer. Does not import torch."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from grading import Score
from rl.config import Config

Side = tuple[str, str] | None  # run and checkpoint; None: the base model


@dataclass
class ChatRequest:
    """A question to both sides, with its sampling settings."""

    sides: tuple[Side, ...]
    messages: tuple[list[dict], ...]  # the conversation of each side, ending with the question
    run: str | None = None  # run that sets the base model and its system prompt; None: data/tiny
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    samples: int = 1
    stop: threading.Event = field(default_factory=threading.Event, repr=False)  # set to stop generation


@dataclass(frozen=True)
class Sample:
    """One completion, possibly still being generated."""

    text: str  # raw text, including the start of the thinking if the chat template writes it
    token_ids: list[int]
    finished: bool
    truncated: bool  # cut off at max_tokens
    score: Score | None = None  # None until the reward functions have run


@dataclass(frozen=True)
class Answer:
    """The state of one side."""

    state: str = "waiting"  # waiting, loading, answering, done, stopped, failed
    note: str = ""  # message for the user: what the side is waiting for, or the error
    samples: tuple[Sample, ...] = ()

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


@dataclass
class Turn:
    """One side of a request while it is being answered."""

    request: ChatRequest
    side: Side
    messages: list[dict]
    answer: Answer = Answer()
    config: Config | None = None
    base_key: tuple | None = None  # identifies the base model
    policy: object = None  # the base model with this run's system prompt
    adapter: str | None = None  # name of the adapter in the model
    engine: object = None
    steps: Iterator | None = None  # yields the samples that finish at each decode step
    completion_prefix: str = ""  # start of the thinking, if the chat template writes it
    finished: dict = field(default_factory=dict)  # sample index -> (token ids, log-probabilities, truncated)

    def update(self, state: str, note: str = "") -> None:
        """Set the answer, and release the model if the turn is over."""
        self.answer = Answer(state, note, self.samples() if self.policy else ())
        if self.answer.is_over:
            self.policy = self.engine = self.steps = None

    def samples(self) -> tuple[Sample, ...]:
        """Return the samples with the tokens generated up to now."""
        running = {row.index: (row.ids, [], None) for row in self.engine.rows} if self.engine else {}
        samples = []
        for index in range(self.request.samples):
            ids, _, truncated = (running | self.finished).get(index, ([], [], None))
            text = self.completion_prefix + self.policy.decode(ids)
            if truncated is None:
                text = text.rstrip("\ufffd")  # the first bytes of an incomplete character
            samples.append(Sample(text, list(ids), truncated is not None, bool(truncated)))
        return tuple(samples)
