"""A question to two sides, and what each side has answered so far. Imports no torch."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from grading import Score
from rl.config import Config

Side = tuple[str, str] | None  # run and checkpoint; None: the base model


@dataclass
class Ask:
    """A question to two sides."""

    sides: tuple[Side, ...]
    messages: tuple[list[dict], ...]  # the conversation of each side, which ends with the question
    run: str | None = None  # gives the base model and its system prompt; None: data/tiny
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    samples: int = 1
    stop: threading.Event = field(default_factory=threading.Event, repr=False)  # set it to end the answers


@dataclass(frozen=True)
class Sample:
    """What a side has written so far."""

    text: str  # raw, with the beginning of the thinking that the chat template has written
    token_ids: list[int]
    ended: bool
    truncated: bool  # at max_tokens
    score: Score | None = None  # by the reward functions, once they have judged


@dataclass(frozen=True)
class Answer:
    """The state of one side."""

    state: str = "waiting"  # loading, answering; done, stopped, failed
    note: str = ""  # for the visitor: what it waits for, or what went wrong
    samples: tuple[Sample, ...] = ()

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


@dataclass
class Turn:
    """One side while it is being answered."""

    ask: Ask
    side: Side
    messages: list[dict]
    answer: Answer = Answer()
    config: Config | None = None
    base: tuple | None = None  # identifies the base model
    policy: object = None  # the base model with the system prompt of this run
    adapter: str | None = None  # its name in the model
    engine: object = None
    steps: Iterator | None = None  # yields the samples that end with each decode step
    completion_prefix: str = ""  # the beginning of the thinking that the chat template has written
    ended: dict = field(default_factory=dict)  # by sample: (token ids, log-probabilities, truncated)

    def update(self, state: str, note: str = "") -> None:
        self.answer = Answer(state, note, self.samples() if self.policy else ())
        if self.answer.over:
            self.policy = self.engine = self.steps = None

    def samples(self) -> tuple[Sample, ...]:
        drawn = {row.place: (row.ids, [], None) for row in self.engine.rows} if self.engine else {}
        samples = []
        for place in range(self.ask.samples):
            ids, _, truncated = (drawn | self.ended).get(place, ([], [], None))
            text = self.completion_prefix + self.policy.decode(ids)
            if truncated is None:
                text = text.rstrip("\ufffd")  # the first bytes of a character that is not complete
            samples.append(Sample(text, list(ids), truncated is not None, bool(truncated)))
        return tuple(samples)
