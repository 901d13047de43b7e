"""A question to the models, and the state of each model's answer. Does not import torch."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from grading import Score
from rl.config import Config

Side = tuple[str, str] | None  # run and checkpoint; None: the base model
MAX_STREAMED = 16  # with more completions, their texts are shown when all are finished


@dataclass
class ChatRequest:
    """Conversations that one or two models continue, with the sampling settings."""

    sides: tuple[Side, ...]
    conversations: tuple[list[str | list[dict]], ...]  # of each side: a question, or messages that end with it
    run: str | None = None  # run that sets the base model and its system prompt; None: data/tiny
    system_prompt: str = ""  # empty: that of the run
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    samples: int = 1  # of each conversation
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
    note: str = ""  # message for the user: what the side is doing, or the error
    samples: tuple[Sample, ...] = ()  # those of conversation i start at index i * ChatRequest.samples
    prompt: str = ""  # first conversation as the chat template renders it
    seconds: float = 0.0  # decode time of this side

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    @property
    def tokens_per_second(self) -> float:
        return sum(len(sample.token_ids) for sample in self.samples) / max(self.seconds, 1e-6)


@dataclass
class Turn:
    """One side of a request while it is being answered."""

    request: ChatRequest
    side: Side
    conversations: list[str | list[dict]]
    answer: Answer = Answer()
    config: Config | None = None
    base_key: tuple | None = None  # identifies the base model
    policy: object = None  # the base model with the system prompt
    adapter: str | None = None  # name of the adapter in the model
    engine: object = None
    steps: Iterator | None = None  # yields the completions that finish at each decode step
    prompt: str = ""
    prefixes: list[str] = field(default_factory=list)  # starts of the thinking, if the chat template writes them
    finished: dict = field(default_factory=dict)  # index -> (token ids, log-probabilities, truncated)
    seconds: float = 0.0

    def step(self) -> None:
        """Advance by one decode step; by several on CUDA."""
        start = time.perf_counter()
        self.finished |= next(self.steps)
        self.seconds += time.perf_counter() - start

    @property
    def total(self) -> int:
        """The number of completions."""
        return len(self.prefixes) * self.request.samples

    def update(self, state: str, note: str = "") -> None:
        """Set the answer, and release the model if the turn is over."""
        if state == "answering" and self.total > MAX_STREAMED:
            self.answer = Answer(state, f"{len(self.finished)} of {self.total} answered")
            return
        self.answer = Answer(state, note, self.samples() if self.policy else (), self.prompt, self.seconds)
        if self.answer.is_over:
            self.policy = self.engine = self.steps = None

    def samples(self) -> tuple[Sample, ...]:
        """Return the completions with the tokens generated up to now."""
        running = {row.index: (row.ids, [], None) for row in self.engine.rows} if self.engine else {}
        samples = []
        for index in range(self.total):
            ids, _, truncated = (running | self.finished).get(index, ([], [], None))
            text = self.prefixes[index // self.request.samples] + self.policy.decode(ids)
            if truncated is None:
                text = text.rstrip("\ufffd")  # the first bytes of an incomplete character
            samples.append(Sample(text, list(ids), truncated is not None, bool(truncated)))
        return tuple(samples)
