"""Reads the runs folder for the page, and nothing outside of it. Imports neither torch nor gradio.

A run may be under way, cut back by --resume, or half a gigabyte long, so none of it is kept. Steps ascend in rollouts.jsonl
and tokens.jsonl, so the lines of one are found by bisection; metrics.jsonl is small (2 KB a step) and read as a whole.
"""

import bisect
import contextlib
import functools
import html
import inspect
import itertools
import json
import math
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from data import DataError
from grading import RewardError
from rl.config import Config, ConfigError, RunError, first_line
from rl.run.read_config import read_yaml

POINTS = 500  # of a curve
IMPORTING = threading.Lock()
PROBING = threading.Lock()  # two threads that try a run's lock at once would take each other for the run


class UiError(Exception):
    """What happened, and what to do, in words for the person at the page."""


@dataclass
class Page:
    """What every tab needs. editable: reward files can be changed, and runs started and stopped."""

    runs: "Runs"
    worker: Any
    editable: bool
    rewards_file: Path
    draft_of: str | None = None  # the visitor whose edits the draft of the reward file has


class Runs:
    """The folders in `folder` that have a config.yaml."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()

    def names(self) -> list[str]:
        """The newest first, by when it was begun or resumed."""
        began = {}
        for config in self.folder.glob("*/config.yaml"):
            with contextlib.suppress(OSError):  # removed since
                if self._has(config.parent.name):
                    began[config.parent.name] = config.stat().st_mtime
        return sorted(began, key=lambda name: (began[name], name), reverse=True)

    def get(self, name: str) -> "Run":
        """Raises UiError for anything but one of `names`, so that no path leads out of the folder."""
        if not self._has(name):
            names = self.names()
            there = f"There are {', '.join(names[:5])}." if names else f"{self.folder.name}/ has none: train one first."
            raise UiError(f"There is no run {name!r}. {there}")
        return Run(self.folder / name)

    def running(self) -> list[str]:
        """Those of `names` that go on at this moment."""
        running = []
        for name in self.names():
            with contextlib.suppress(UiError):  # removed since, or a link
                if self.get(name).status() == "running":
                    running.append(name)
        return running

    def _has(self, name: str) -> bool:
        if not isinstance(name, str) or Path(name).name != name:
            return False
        config = self.folder / name / "config.yaml"
        return os.path.isfile(config) and is_inside(config, self.folder)


class Run:
    """One run folder. What is read is as the files are at that moment."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name

    def file(self, name: str) -> Path:
        """Raises UiError where a link leads out of the runs folder."""
        path = self.path / name
        if not is_inside(path, self.path.parent):
            raise UiError(f"{self.name}/{name} lies outside of the runs folder. Put the file itself there.")
        return path

    @property
    def config(self) -> Config:
        """Not to be changed. Raises ConfigError."""
        path = self.file("config.yaml")
        return config_of(str(path), path.stat().st_mtime_ns)

    def summary(self) -> dict:
        """Empty before the first evaluation has ended."""
        try:
            found = json.loads(self.file("summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def checkpoints(self) -> list[str]:
        """Those that were written to their end, the newest last."""
        folders = self.file("checkpoints").glob("step_*")
        return sorted(f.name for f in folders if f.name[5:].isdecimal() and (f / "adapter_config.json").is_file())

    def status(self) -> str:
        """running, finished or stopped."""
        if is_held(self.file("lock")):
            return "running"
        return "finished" if self.summary().get("finished") else "stopped"

    def steps_done(self) -> int:
        return sum(1 for _ in self._metrics())

    def metrics(self, points: int = POINTS) -> list[dict]:
        """The metrics of each step; where these are more, of so many evenly spaced ones and so many with an evaluation."""
        lines = list(self._metrics())
        evaluated = [i for i, line in enumerate(lines) if b'"eval/accuracy"' in line]
        kept = {*thinned(range(len(lines)), points), *thinned(evaluated, points)}
        return [parsed(lines[i], "metrics.jsonl") for i in sorted(kept)]

    def alarms(self) -> dict[str, int]:
        """The step at which each alarm was first up, by subject."""
        found = {}
        # They are the last of a line: of those that end alike the first one will do.
        for _, alike in itertools.groupby(self._metrics(), key=lambda line: line[line.rfind(b'"alarms"') :]):
            metrics = parsed(next(alike), "metrics.jsonl")
            for subject in metrics.get("alarms", []):
                found.setdefault(subject, metrics.get("step"))
        return found

    def _metrics(self) -> Iterator[bytes]:
        """The lines of metrics.jsonl that are there in full, a step each."""
        with opened(self.file("metrics.jsonl")) as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def evaluations(self) -> list[str]:
        """before, step_000015, ..., after: those there are, in this order."""
        names = [path.stem for path in self.file("eval").glob("*.jsonl")]
        return sorted(names, key=lambda name: (name == "after", name != "before", name))

    def evaluation(self, name: str) -> list[dict]:
        """One record a held-out question (rl.evaluate.record). Raises UiError where there is none of this name."""
        if name not in (names := self.evaluations()):
            raise UiError(f"{self.name} has no evaluation {name!r}. It has {', '.join(names) or 'none yet'}.")
        lines = self.file(f"eval/{name}.jsonl").read_bytes().split(b"\n")
        return [parsed(line, f"eval/{name}.jsonl") for line in lines if line]

    def steps(self) -> range:
        """The steps of which there are roll-outs: all from the first to the last one."""
        with opened(self.file("rollouts.jsonl")) as file:
            whole = end_of_lines(file)
            return range(step_at(file, 0), step_at(file, end_of_lines(file, whole - 1)) + 1) if whole else range(0)

    def groups(self, step: int) -> list[list[dict]]:
        """The lines of rollouts.jsonl of a step, one list a prompt; none where the step has none."""
        lines, size = self._lines("rollouts.jsonl", step), self.config.num_generations
        groups = []
        for _, same in itertools.groupby(lines, key=lambda line: line.get("prompt_id")):
            same = list(same)
            of = size if len(same) % size == 0 else len(same)  # one prompt may be asked twice in a row
            groups += [same[i : i + of] for i in range(0, len(same), of)]
        return groups

    def group(self, step: int, number: int) -> list[dict]:
        """One prompt's completions. Raises UiError where there are none."""
        groups = self.groups(step)
        if not 0 <= number < len(groups):
            raise UiError(f"{self.name} has no completions {number + 1} of step {step}. Choose another step or prompt.")
        return groups[number]

    def tokens(self, step: int) -> dict | None:
        """The line of tokens.jsonl of a step: {step, prompt_id, completions: [{tokens, logprobs, advantages, ...}]}."""
        return next(iter(self._lines("tokens.jsonl", step)), None)

    def log_tail(self, n: int = 20) -> str:
        """The last n lines of console.log."""
        return tail(self.file("console.log"), n)

    def _lines(self, name: str, step: int) -> list[dict]:
        with opened(self.file(name)) as file:
            whole = end_of_lines(file)
            start, end = (seek_step(file, s, whole) for s in (step, step + 1))
            file.seek(start)
            return [parsed(line, name) for line in file.read(end - start).split(b"\n") if line]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether it lies in this folder, where no link has led to."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # of somebody else, or links in a circle
        return False


@functools.lru_cache(64)
def config_of(path: str, written: int) -> Config:
    """The settings in a file. written: when, so that it is read once."""
    return read_yaml(path)


def thinned(values, points: int = POINTS) -> list:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def opened(path: Path) -> BinaryIO:
    """For reading; as if empty where it is not there yet."""
    return open(path if path.is_file() else os.devnull, "rb")


def end_of_lines(file: BinaryIO, before: int | None = None) -> int:
    """Where the last line that is there in full ends, before a place or at all: one may be being written."""
    end = file.seek(0, os.SEEK_END) if before is None else before
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def step_at(file: BinaryIO, place: int) -> int:
    """The step of the line that begins there; it is the first of its fields. Raises UiError where it has none."""
    file.seek(place)
    found = re.match(rb'\{"step": ?(\d+)', file.read(40))
    if not found:
        raise UiError(f"{Path(file.name).name} cannot be read at byte {place}. Remove the line there, or the file.")
    return int(found[1])


def seek_step(file: BinaryIO, step: int, whole: int) -> int:
    """The place of the first line whose step is not less, `whole` where there is none. whole: from `end_of_lines`."""

    def line_from(place: int) -> int:
        """Where the first line begins that does not begin before this place."""
        if place:
            file.seek(place - 1)
            file.readline()
            return min(file.tell(), whole)
        return 0

    def step_from(place: int) -> float:
        return step_at(file, start) if (start := line_from(place)) < whole else math.inf

    return line_from(bisect.bisect_left(range(whole), step, key=step_from))


def parsed(line: bytes, name: str) -> dict:
    """One line of a .jsonl file. Raises UiError where it is damaged."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UiError(f"{name} has a line that is not a JSON object: {line[:40]!r}. Remove that line.")
    return found


def tail(path: Path, n: int) -> str:
    """The last n lines of a text, as far as 64 KB hold them; empty where there is none."""
    with opened(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-n:])


def is_held(path: Path) -> bool:
    """Whether a process holds this lock: it is tried, and given back at once."""
    with PROBING:
        try:
            if path.is_file():
                with filelock.FileLock(path, blocking=False):
                    pass
        except filelock.Timeout:
            return True
        except OSError:  # a folder that belongs to somebody else
            pass
    return False


def import_models() -> None:
    """Import what loads and asks models, before a thread uses any of it: two threads that begin with transformers at once
    get half of it each."""
    with IMPORTING:
        import rl.evaluate  # noqa: F401


def in_words(error: BaseException) -> str:
    """What the page says of an error. One that is a fault of this program is printed in full."""
    if isinstance(error, (UiError, ConfigError, DataError, RewardError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return f"Something went wrong: {type(error).__name__}: {first_line(error)}. The terminal has the rest."


@contextlib.contextmanager
def errors_said() -> Iterator[None]:
    """Errors become what Gradio shows (gr.Error), with their text escaped: the page takes it for HTML."""
    import gradio as gr

    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(in_words(error)), print_exception=False) from None


def said(function: Callable, *first) -> Callable:
    """An event handler, or a generator, with its first arguments, whose errors are said to the person."""
    bound = functools.partial(function, *first)

    def call(*args):
        with errors_said():
            return bound(*args)

    def generate(*args) -> Iterator:
        with errors_said():
            yield from bound(*args)

    handler = functools.update_wrapper(generate if inspect.isgeneratorfunction(function) else call, function)
    handler.__signature__ = inspect.signature(bound)  # by which Gradio knows what it wants to be told
    return handler
