"""The one thread that owns the models: it answers what the page asks, everybody's sides in turn, a decode step at a time.

There is one base model at a time. Base and checkpoints are the same weights: each checkpoint is a LoRA beside the others,
and every step of a side is made with its own switched on, or with none for the base. So two sides and several visitors are
answered together. A side that needs another base waits until nobody is being answered with the one that is there.

What is not used of a run's settings: its backend (the base is loaded by transformers, the engine is the project's own), and
the adapter that it may have started from: the base is the model without any. Torch is imported by the thread.
"""

import contextlib
import dataclasses
import gc
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rl.config import Config, ConfigError
from rl.fit.shapes import find_shape
from ui.runs import Runs, UiError, describe_error, import_models

AT_ONCE = 4  # questions that are answered together; others wait
STALE = 2.0  # seconds after which a question is dropped whose page gives no sign of life
UPDATE, BEAT = 0.1, 0.5  # seconds: between two updates of a side at the least, between two signs of life at the most
ADAPTERS = 6  # checkpoints kept beside the base
SMALL = 1e9  # parameters of a model that may answer from the CPU while a run holds the card

Side = tuple[str, str] | None  # run and checkpoint; None: the base model


@dataclass
class Ask:
    """A question to two sides."""

    sides: tuple[Side, ...]
    messages: tuple[list[dict], ...]  # of each side: its conversation, which ends with the question
    run: str | None = None  # whose base model is meant, and whose system prompt the base gets; None: data/tiny
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    samples: int = 1
    stop: threading.Event = field(default_factory=threading.Event, repr=False)  # set it, and the answers end


@dataclass(frozen=True)
class Sample:
    """What a side has written so far."""

    text: str  # raw, with what the chat template had already opened of the thinking
    token_ids: list[int]
    ended: bool
    truncated: bool  # at max_tokens


@dataclass(frozen=True)
class Answer:
    """One side of a question as it stands."""

    state: str = "waiting"  # loading, answering; done, stopped, failed
    note: str = ""  # in words: what it waits for, or what went wrong
    samples: tuple[Sample, ...] = ()

    @property
    def over(self) -> bool:
        return self.state in ("done", "stopped", "failed")


@dataclass
class Turn:
    """The worker's side of a side."""

    ask: Ask
    side: Side
    messages: list[dict]
    changed: threading.Event
    answer: Answer = Answer()
    config: Config | None = None
    policy: object = None  # the base's, with this run's system prompt
    adapter: str | None = None  # its name in the model
    engine: object = None
    steps: Iterator | None = None  # advances it; None: not begun, or over
    opening: str = ""
    ended: dict = field(default_factory=dict)  # as the engine yields them
    shown: float = 0.0

    @property
    def base(self) -> tuple:
        """What is loaded for it."""
        return self.config.model, self.config.load_in_4bit, self.config.dtype, self.config.device

    def say(self, state: str, note: str = "") -> None:
        """How it stands: at once where that is new, else now and then. Where it is the end, what it held is free."""
        now, is_new = time.monotonic(), (self.answer.state, self.answer.note) != (state, note)
        if is_new or now - self.shown > UPDATE:
            self.answer = Answer(state, note, self.samples() if self.policy else ())
            self.shown = 0.0 if is_new else now  # the first token is shown at once too
            if self.answer.over:
                self.policy = self.engine = self.steps = None
            self.changed.set()

    def samples(self) -> tuple[Sample, ...]:
        drawn = {row.place: (row.ids, [], None) for row in self.engine.rows} if self.engine else {}
        found = []
        for place in range(self.ask.samples):
            ids, _, truncated = (drawn | self.ended).get(place, ([], [], None))
            text = self.opening + self.policy.decode(ids)
            if truncated is None:
                text = text.rstrip("\ufffd")  # of a character only some bytes are there
            found.append(Sample(text, list(ids), truncated is not None, bool(truncated)))
        return tuple(found)


class Job:
    """A question with its turns, and when the page last gave a sign."""

    def __init__(self, ask: Ask):
        self.ask, self.changed, self.beat = ask, threading.Event(), time.monotonic()
        self.turns = [Turn(ask, *both, self.changed) for both in zip(ask.sides, ask.messages, strict=True)]

    @property
    def over(self) -> bool:
        return all(turn.answer.over for turn in self.turns)


class Worker:
    """Starts the thread. `answer` may be called from any other."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._jobs: list[Job] = []  # as they came
        self._policy = self._base = None  # what is loaded, and what Turn.base that is
        self._adapters: dict[tuple, str] = {}  # names in the model, the one that was used last at the end
        self._on: str | None = "default"  # the adapter that is switched on
        self._numbers, self._looked = itertools.count(1), time.monotonic()
        threading.Thread(target=self._work, name="models", daemon=True).start()

    # --- called by the page

    def answer(self, ask: Ask) -> Iterator[tuple[Answer, ...]]:
        """The sides as they grow, at least twice a second, until all are over. Whoever stops asking for more stops them."""
        job = Job(ask)
        self._inbox.put(job)
        try:
            over = False
            while not over:
                job.changed.wait(BEAT)
                job.changed.clear()
                job.beat, over = time.monotonic(), job.over
                yield tuple(turn.answer for turn in job.turns)
        finally:
            if not job.over:
                ask.stop.set()

    def load_ahead(self, run: str | None) -> None:
        """Load a run's base model, if there is none yet: the first question need not wait for it. Returns at once."""
        job = Job(Ask((None,), ([],), run, samples=0))
        job.beat = float("inf")
        self._inbox.put(job)

    # --- the thread

    def _work(self) -> None:
        import_models()
        import torch

        self._threads = torch.get_num_threads()
        with torch.no_grad():
            while True:
                try:
                    self._receive()
                    self._drop()
                    self._round()
                except (Exception, SystemExit) as error:  # a fault of this file: nobody is to wait for ever
                    for turn in (turn for job in self._jobs for turn in job.turns):
                        self._fail(turn, error)

    def _round(self) -> None:
        """Begin what can be begun, and advance each side that is being answered."""
        turns = [turn for job in self._jobs[:AT_ONCE] for turn in job.turns if not turn.answer.over]
        for turn in [turn for job in self._jobs[AT_ONCE:] for turn in job.turns]:
            turn.say("waiting", f"{AT_ONCE} other questions are being answered: this one waits for its turn")
        going = [turn for turn in turns if turn.steps]
        for turn in turns:
            if turn.steps or not self._try(turn, self._settle):
                continue
            if going and turn.base != self._base:  # first come, first served
                turn.say("waiting", f"waits for {turn.config.model}: {self._base[0]} is still being asked")
                break
            if self._try(turn, self._begin):
                going.append(turn)
        for turn in going:
            self._try(turn, self._advance)

    def _receive(self) -> None:
        """Take in what was asked; wait for it where there is nothing else to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._inbox.get(block=not self._jobs, timeout=5)
                if job.ask.samples or not self._policy:
                    self._jobs.append(job)
        if not self._jobs and self._policy and self._policy.device.type == "cuda" and self._run_on_card():
            self._unload()  # the run gets the memory that an idle page holds

    def _drop(self) -> None:
        """End what was stopped, or whose page is gone, and forget what is over."""
        now = time.monotonic()
        busy, self._looked = now - self._looked, now  # while this thread loads a model, a page may not come to its turn
        for job in self._jobs:
            if job.ask.stop.is_set() or now - job.beat > STALE + busy:
                for turn in job.turns:
                    if not turn.answer.over:
                        turn.say("stopped", "stopped")
        self._jobs = [job for job in self._jobs if not job.over]

    def _try(self, turn: Turn, work: Callable[[Turn], None]) -> bool:
        """Do a part of a turn's work, and say whether there is more to do; what goes wrong ends this turn alone."""
        try:
            work(turn)
        except (Exception, SystemExit) as error:
            self._fail(turn, error)
        if turn.answer.state == "failed":  # the error is gone, and with it what its frames held
            self._free()
        return not turn.answer.over

    def _fail(self, turn: Turn, error: Exception) -> None:
        from rl.model.oom import is_out_of_memory

        turn.policy = None  # it is not asked any more for what was written
        out_of_memory = (
            f"Out of memory. Lower the samples a side (now {turn.ask.samples}) or the longest answer (now "
            f"{turn.ask.max_tokens} tokens), close what else uses the memory, or take a run with a smaller model."
        )
        turn.say("failed", out_of_memory if is_out_of_memory(error) else describe_error(error))

    # --- what a turn goes through

    def _settle(self, turn: Turn) -> None:
        """Find its run's settings, and where its model is to be."""
        if turn.config:
            return
        name = turn.side[0] if turn.side else turn.ask.run
        config = self.runs.get(name).config if name else Config()
        device = self._device(config)
        turn.config = dataclasses.replace(
            config, adapter=None, backend="transformers", optim="adamw_torch", gradient_checkpointing=False,
            device=device, dtype="auto" if device == "cpu" and config.device != "cpu" else config.dtype,
        )  # fmt: skip

    def _device(self, config: Config) -> str:
        """cpu or cuda. Raises UiError where a run holds the card and the model is too large for the CPU."""
        import torch

        if config.device == "cpu" or not torch.cuda.is_available():
            return "cpu"
        run = self._run_on_card()
        if run and find_shape(config.model).parameters() > SMALL:
            raise UiError(
                f"{run} is training on the card, and {config.model} is too large to answer from the CPU. Wait for its end, or "
                "stop it in the tab Watch: it saves."
            )
        return "cpu" if run else "cuda"

    def _run_on_card(self) -> str | None:
        for name in self.runs.running():
            with contextlib.suppress(UiError, ConfigError):
                if self.runs.get(name).config.device != "cpu":
                    return name
        return None

    def _begin(self, turn: Turn) -> None:
        """Have its model and its LoRA there, and put the question."""
        import torch

        from rl.model.engine import Engine
        from rl.model.hf_generate import Batches
        from rl.model.sampling import Sampling

        if self._base != turn.base:
            turn.say("loading", f"loads {turn.config.model}")
            self._load(turn)
        ask, config = turn.ask, turn.config
        if not ask.samples:
            return turn.say("done")
        policy = dataclasses.replace(
            self._policy, system_prompt=config.system_prompt, chat_template_kwargs=config.chat_template_kwargs
        )
        turn.adapter = self._adapter(*turn.side) if turn.side else None
        prompt, room = policy.encode_prompt(turn.messages), policy.context_length or 2**31
        if len(prompt) >= room:
            raise UiError(
                f"The question with the chat so far has {len(prompt):,} tokens, and the model reads {room:,} at most, with its "
                "answer. Start a new chat, or shorten the question."
            )
        room -= len(prompt)
        self._switch(turn.adapter)  # the engine may fold it into scratch weights of its own
        sampling, generator = Sampling(ask.temperature, top_p=ask.top_p), torch.Generator(policy.device)
        generator.manual_seed(ask.seed)
        how = policy, [prompt], ask.samples, min(ask.max_tokens, room), sampling, generator, ask.samples
        turn.engine = Engine(*how) if policy.decoder else None  # without one the answer comes as a whole
        turn.steps = turn.engine.steps() if turn.engine else Batches(*how).run()
        turn.policy, turn.opening = policy, policy.opened_thinking(turn.messages)
        turn.say("answering")

    def _advance(self, turn: Turn) -> None:
        """One decode step; on CUDA a few."""
        self._switch(turn.adapter)
        turn.ended |= next(turn.steps)
        turn.say("done" if len(turn.ended) == turn.ask.samples else "answering")

    # --- the model

    def _load(self, turn: Turn) -> None:
        import torch

        from rl.fit.memory import KEPT_BELOW
        from rl.model.policy import load_policy

        self._unload()
        self._policy = load_policy(turn.config)
        self._base = turn.base
        # Of a small model a second thread costs more than it does, twenty times where a run trains on the same cores.
        is_small = self._policy.model.config.get_text_config().hidden_size < KEPT_BELOW
        torch.set_num_threads(1 if is_small else self._threads)

    def _unload(self) -> None:
        self._policy = self._base = None
        self._adapters, self._on = {}, "default"
        self._free()

    def _free(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _switch(self, adapter: str | None) -> None:
        """Let this LoRA be on; None: no LoRA at all."""
        if adapter == self._on:
            return
        model, self._on = self._policy.model, adapter
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter, inference_mode=True)

    def _adapter(self, run: str, checkpoint: str) -> str:
        """The name in the model of a checkpoint's LoRA, which is loaded if it is not there. Raises ConfigError."""
        found = self.runs.get(run)
        if checkpoint not in (there := found.checkpoints()):
            raise UiError(f"{run} has no checkpoint {checkpoint!r}. It has {', '.join(there) or 'none yet'}.")
        weights = found.file(f"checkpoints/{checkpoint}/adapter_model.safetensors")
        folder = weights.parent
        if not weights.is_file():
            raise ConfigError(f"adapter: {folder} has no adapter_model.safetensors: choose another checkpoint")
        key = weights, weights.stat().st_mtime_ns
        name = self._adapters.pop(key, None) or self._read(folder)
        self._adapters[key] = name
        return name

    def _read(self, folder: Path) -> str:
        """Load a LoRA beside the others, of which one that nobody asks is dropped where there are many."""
        from safetensors import SafetensorError

        model, name = self._policy.model, f"checkpoint{next(self._numbers)}"
        self._switch("default")
        used = {turn.adapter for job in self._jobs for turn in job.turns if turn.steps}
        for key, old in list(self._adapters.items()):
            if len(self._adapters) >= ADAPTERS and old not in used:
                model.delete_adapter(self._adapters.pop(key))
        try:
            found = model.load_adapter(folder, name, torch_device=str(self._policy.device))
            if found.missing_keys or found.unexpected_keys:
                raise ValueError("some of its matrices have no counterpart")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if name in model.peft_config:
                model.delete_adapter(name)
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"adapter: {folder} cannot be put on {model.config.name_or_path}: {why}") from error
        return name
