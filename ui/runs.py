"""Read the runs folder for the page, and nothing outside of it. Imports neither torch nor gradio.

A run may be in progress, cut back by --resume, or half a gigabyte long, so nothing that is read is kept in memory. Roll-outs
and tokens are one file a step; metrics.jsonl (2 KB a step) is read as a whole.
"""

import contextlib
import functools
import html
import inspect
import itertools
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from data import DataError, load_questions
from grading import RewardError
from grading.base import first_line
from rl.config import Config, ConfigError, RunError
from rl.run.read_config import read_yaml

POINTS = 500  # the most points of a curve
IMPORTING = threading.Lock()
PROBING = threading.Lock()  # two threads that try a run's lock at the same time would take each other for the run


class UiError(Exception):
    """An error for the person at the page: the message says what is wrong and what to do."""


@dataclass
class Page:
    """What every tab needs."""

    runs: "Runs"
    worker: Any
    editable: bool  # the reward file can be edited, and runs can be started and stopped
    rewards_file: Path
    draft_of: str | None = None  # the visitor whose edits are in the draft of the reward file


class Runs:
    """The run folders in `folder`: those that have a config.yaml."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()

    def names(self) -> list[str]:
        """The names of the runs, the one started or resumed last first."""
        started = {}
        for config in self.folder.glob("*/config.yaml"):
            with contextlib.suppress(OSError):  # removed in the meantime
                if self._has(config.parent.name):
                    started[config.parent.name] = config.stat().st_mtime
        return sorted(started, key=lambda name: (started[name], name), reverse=True)

    def get(self, name: str) -> "Run":
        """Return a run. Raises UiError for anything but one of `names`, so that no path leads out of the folder."""
        if not self._has(name):
            names = self.names()
            hint = f"There are {', '.join(names[:5])}." if names else f"{self.folder.name}/ has none: train one first."
            raise UiError(f"There is no run {name!r}. {hint}")
        return Run(self.folder / name)

    def running(self) -> list[str]:
        """The names of the runs that are in progress."""
        running = []
        for name in self.names():
            with contextlib.suppress(UiError):  # removed in the meantime, or a link
                if self.get(name).status() == "running":
                    running.append(name)
        return running

    def _has(self, name: str) -> bool:
        if not isinstance(name, str) or Path(name).name != name:
            return False
        config = self.folder / name / "config.yaml"
        return os.path.isfile(config) and is_inside(config, self.folder)


class Run:
    """One run folder. Every method reads the files as they are at that moment."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name

    def file(self, name: str) -> Path:
        """The path of a file. Raises UiError if a link leads out of the runs folder."""
        path = self.path / name
        if not is_inside(path, self.path.parent):
            raise UiError(f"{self.name}/{name} lies outside of the runs folder. Put the file itself there.")
        return path

    @property
    def config(self) -> Config:
        """The settings, not to be changed. Raises ConfigError."""
        path = self.file("config.yaml")
        return config_of(path, path.stat().st_mtime_ns)

    def questions(self) -> tuple[list[dict], list[dict]]:
        """The training rows and the held-out rows. Raises ConfigError or DataError."""
        path = self.file("config.yaml")
        return questions_of(path, path.stat().st_mtime_ns)

    def summary(self) -> dict:
        """The contents of summary.json; empty before the first evaluation."""
        try:
            summary = json.loads(self.file("summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints, the newest last."""
        folders = self.file("checkpoints").glob("step_*")
        return sorted(f.name for f in folders if f.name[5:].isdecimal() and (f / "adapter_config.json").is_file())

    def status(self) -> str:
        """running, finished or stopped."""
        if is_locked(self.file("lock")):
            return "running"
        return "finished" if self.summary().get("finished") else "stopped"

    def metrics(self, points: int = POINTS) -> list[dict]:
        """The metrics of each step; of a long run, of `points` evenly spaced steps and `points` evaluated ones."""
        lines = list(self._metrics())
        evaluated = [i for i, line in enumerate(lines) if b'"eval/accuracy"' in line]
        kept = {*thinned(range(len(lines)), points), *thinned(evaluated, points)}
        return [parsed(lines[i], "metrics.jsonl", "step") for i in sorted(kept)]

    def alarms(self) -> dict[str, int]:
        """The first step of each alarm, by its subject."""
        first_steps = {}
        for line in self._metrics():
            if (
                b'"alarms": []' in line
            ):  # most lines: not parsed, since that takes a tenth of a second for 5,000 of them
                continue
            metrics = parsed(line, "metrics.jsonl", "step")
            for subject in metrics.get("alarms", []):
                first_steps.setdefault(subject, metrics["step"])
        return first_steps

    def evaluations(self) -> list[str]:
        """The names of the evaluations in order: before, step_000015, ..., after."""
        names = [path.stem for path in self.file("eval").glob("*.jsonl")]
        return sorted(names, key=lambda name: (name == "after", name != "before", name))

    def evaluation(self, name: str) -> list[dict]:
        """One record a held-out question (rl.evaluate.record). Raises UiError if there is no evaluation of this name."""
        if name not in (names := self.evaluations()):
            raise UiError(f"{self.name} has no evaluation {name!r}. It has {', '.join(names) or 'none yet'}.")
        return self._records(f"eval/{name}.jsonl")

    def steps(self) -> list[int]:
        """The steps that have a file of completions, in order."""
        files = self.file("rollouts").glob("*.jsonl")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def completions(self, step: int) -> list[dict]:
        """The completions of a step, one record each. Raises UiError if there are none or the file is damaged."""
        name = f"rollouts/{step:06d}.jsonl"
        records = self._records(name, "prompt_id", "prompt", "completion")
        if not records:
            raise UiError(
                f"{self.name} has no completions of step {step}: {name} is missing or empty. Choose another step."
            )
        return records

    def groups(self, step: int) -> list[list[dict]]:
        """The completions of a step, one list a prompt. Raises UiError as `completions` does."""
        groups = []
        for _, same_prompt in itertools.groupby(self.completions(step), key=lambda record: record["prompt_id"]):
            records = list(same_prompt)
            size = self.config.num_generations
            if len(records) % size:
                size = len(records)
            groups += [
                records[i : i + size] for i in range(0, len(records), size)
            ]  # a prompt may be drawn twice in a row
        return groups

    def tokens(self, step: int) -> dict | None:
        """The group of a step that was logged token by token: {step, prompt_id, completions: [{tokens, logprobs, ...}]}.

        None if the step has none. Raises UiError if the file is damaged.
        """
        name = f"tokens/{step:06d}.json"
        path = self.file(name)
        return parsed(path.read_bytes(), name, "prompt_id", "completions") if path.is_file() else None

    def _metrics(self) -> Iterator[bytes]:
        """The complete lines of metrics.jsonl, one a step."""
        with opened(self.file("metrics.jsonl")) as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _records(self, name: str, *fields: str) -> list[dict]:
        with opened(self.file(name)) as file:
            return [parsed(line, name, *fields) for line in file if line.strip()]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in this folder once its links are resolved."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # it belongs to another user, or links form a circle
        return False


@functools.lru_cache(64)
def config_of(path: Path, modified: int) -> Config:
    """The settings in a file, read once for each time of modification."""
    return read_yaml(str(path))


@functools.lru_cache(4)
def questions_of(path: Path, modified: int) -> tuple[list[dict], list[dict]]:
    """The training rows and the held-out rows of the settings in a file, read once for each time of modification."""
    c = config_of(path, modified)
    return load_questions(c)[:2]


def thinned(values: Sequence, points: int = POINTS) -> list:
    """At most `points` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def opened(path: Path) -> BinaryIO:
    """Open a file for reading; a missing one reads as an empty one."""
    return open(path if path.is_file() else os.devnull, "rb")


def parsed(text: bytes, name: str, *fields: str) -> dict:
    """Parse a JSON object with these fields in the file `name`. Raises UiError if it is damaged."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        what = " with ".join(filter(None, ["not a JSON object", ", ".join(fields)]))
        raise UiError(f"{name} is damaged: {text[:40]!r} is {what}. Remove that line, or the file.")
    return value


def tail(path: Path, n: int) -> str:
    """The last n lines of a text file, at most 64 KB; empty if there is no file."""
    with opened(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-n:])


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock: it is taken for a moment and released."""
    with PROBING:
        try:
            if path.is_file():
                with filelock.FileLock(path, blocking=False):
                    pass
        except filelock.Timeout:
            return True
        except OSError:  # the folder belongs to another user
            pass
    return False


def import_models() -> None:
    """Import the packages that load models before a thread uses them: two threads that import transformers at the same
    time get incomplete modules."""
    with IMPORTING:
        import rl.evaluate  # noqa: F401


def describe_error(error: BaseException) -> str:
    """The message for the person at the page. An unexpected error is printed in full."""
    if isinstance(error, (UiError, ConfigError, DataError, RewardError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return f"Something went wrong: {type(error).__name__}: {first_line(error)}. The terminal has the rest."


@contextlib.contextmanager
def errors_shown() -> Iterator[None]:
    """Turn errors into what Gradio shows (gr.Error), with the text escaped: the page takes it for HTML."""
    import gradio as gr

    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(describe_error(error)), print_exception=False) from None


def shows_errors(function: Callable, *first) -> Callable:
    """An event handler or generator with its first arguments bound, whose errors are shown to the person at the page."""
    bound = functools.partial(function, *first)

    def call(*args):
        with errors_shown():
            return bound(*args)

    def generate(*args) -> Iterator:
        with errors_shown():
            yield from bound(*args)

    handler = functools.update_wrapper(generate if inspect.isgeneratorfunction(function) else call, function)
    handler.__signature__ = inspect.signature(
        bound
    )  # Gradio reads from it whether the handler takes an event or a request
    return handler
