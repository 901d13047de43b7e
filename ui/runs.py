"""Read the runs folder for the page, and no file outside it. Imports neither torch nor gradio.

A run may be in progress, truncated by --resume, or half a gigabyte in size, so metrics, roll-outs and tokens are not
cached. There is one file of roll-outs and one of tokens per step; metrics.jsonl (2 KB per step) is read as a whole.
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

MAX_POINTS = 500  # points of a curve
IMPORT_LOCK = threading.Lock()
PROBE_LOCK = threading.Lock()  # two threads that probe a run's lock at once would mistake each other for the run


class UiError(Exception):
    """An error to show on the page. Its message names the problem and the remedy."""


@dataclass
class Page:
    """The objects and settings that all tabs share."""

    runs: "Runs"
    worker: Any
    editable: bool  # whether the reward file can be edited, and runs can be started and stopped
    rewards_file: Path
    draft_owner: str | None = None  # session of the visitor whose edits are in the draft of the reward file


class Runs:
    """The run folders in `folder`: its subfolders with a config.yaml."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()

    def names(self) -> list[str]:
        """Return the names of the runs, the most recently started or resumed first."""
        start_times = {}
        for config in self.folder.glob("*/config.yaml"):
            with contextlib.suppress(OSError):  # removed in the meantime
                if self._has(config.parent.name):
                    start_times[config.parent.name] = config.stat().st_mtime
        return sorted(start_times, key=lambda name: (start_times[name], name), reverse=True)

    def get(self, name: str) -> "Run":
        """Return a run. Raises UiError if its name is not in `names`, so that no path leads outside the folder."""
        if not self._has(name):
            names = self.names()
            hint = f"Newest: {', '.join(names[:5])}." if names else f"{self.folder.name}/ has no runs: train one first."
            raise UiError(f"There is no run {name!r}. {hint}")
        return Run(self.folder / name)

    def running(self) -> list[str]:
        """Return the names of the runs in progress."""
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
    """One run folder. Every method reads the current files."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name

    def file(self, name: str) -> Path:
        """Return the path of a file of the run. Raises UiError if a link leads outside the runs folder."""
        path = self.path / name
        if not is_inside(path, self.path.parent):
            raise UiError(f"{self.name}/{name} links outside the runs folder. Replace the link with its target.")
        return path

    @property
    def config(self) -> Config:
        """The settings, shared by all callers: do not modify them. Raises ConfigError."""
        path = self.file("config.yaml")
        return config_of(path, path.stat().st_mtime_ns)

    def questions(self) -> tuple[list[dict], list[dict]]:
        """Return the training rows and the held-out rows. Raises ConfigError or DataError."""
        path = self.file("config.yaml")
        return questions_of(path, path.stat().st_mtime_ns)

    def summary(self) -> dict:
        """Return the contents of summary.json, or an empty dict if there is none or it is damaged."""
        try:
            summary = json.loads(self.file("summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, the newest last."""
        folders = self.file("checkpoints").glob("step_*")
        return sorted(f.name for f in folders if f.name[5:].isdecimal() and (f / "adapter_config.json").is_file())

    def status(self) -> str:
        """Return "running", "finished" or "stopped"."""
        if is_locked(self.file("lock")):
            return "running"
        return "finished" if self.summary().get("finished") else "stopped"

    def metrics(self, max_points: int = MAX_POINTS) -> list[dict]:
        """Return the metrics of each step.

        A long run is reduced to `max_points` evenly spaced steps and `max_points` steps with an evaluation.
        """
        lines = list(self._metrics_lines())
        evaluated = [i for i, line in enumerate(lines) if b'"eval/accuracy"' in line]
        indices = {*downsample(range(len(lines)), max_points), *downsample(evaluated, max_points)}
        return [parse_object(lines[i], "metrics.jsonl", "step") for i in sorted(indices)]

    def alarms(self) -> dict[str, int]:
        """Return the first step of each alarm, by its subject."""
        first_steps = {}
        for line in self._metrics_lines():
            if b'"alarms": []' in line:  # skips most lines, because parsing 5,000 of them takes 0.1 s
                continue
            metrics = parse_object(line, "metrics.jsonl", "step")
            for subject in metrics.get("alarms", []):
                first_steps.setdefault(subject, metrics["step"])
        return first_steps

    def evaluations(self) -> list[str]:
        """Return the names of the evaluations in order: before, step_000015, ..., after."""
        names = [path.stem for path in self.file("eval").glob("*.jsonl")]
        return sorted(names, key=lambda name: (name == "after", name != "before", name))

    def evaluation(self, name: str) -> list[dict]:
        """Return one record per held-out question (rl.evaluate.record). Raises UiError if the name is unknown."""
        if name not in (names := self.evaluations()):
            raise UiError(f"{self.name} has no evaluation {name!r}. Available: {', '.join(names) or 'none yet'}.")
        return self._read_records(f"eval/{name}.jsonl")

    def steps(self) -> list[int]:
        """Return the steps with a file of completions, in order."""
        files = self.file("rollouts").glob("*.jsonl")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def completions(self, step: int) -> list[dict]:
        """Return one record per completion of a step. Raises UiError if there are none or the file is damaged."""
        name = f"rollouts/{step:06d}.jsonl"
        records = self._read_records(name, "prompt_id", "prompt", "completion")
        if not records:
            raise UiError(
                f"{self.name} has no completions for step {step}: {name} is missing or empty. Choose another step."
            )
        return records

    def groups(self, step: int) -> list[list[dict]]:
        """Return the completions of a step, one list per group. Raises the same errors as `completions`."""
        groups = []
        for _, same_prompt in itertools.groupby(self.completions(step), key=lambda record: record["prompt_id"]):
            records = list(same_prompt)
            size = self.config.num_generations
            if len(records) % size:
                size = len(records)
            # A prompt that was drawn twice in a row gives two groups.
            groups += [records[i : i + size] for i in range(0, len(records), size)]
        return groups

    def tokens(self, step: int) -> dict | None:
        """Return {step, prompt_id, completions: [{tokens, logprobs, ...}]}, the token log of one group of a step.

        Returns None if the step has no token log. Raises UiError if the file is damaged.
        """
        name = f"tokens/{step:06d}.json"
        path = self.file(name)
        return parse_object(path.read_bytes(), name, "prompt_id", "completions") if path.is_file() else None

    def _metrics_lines(self) -> Iterator[bytes]:
        """Yield the complete lines of metrics.jsonl, one per step."""
        with open_or_empty(self.file("metrics.jsonl")) as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _read_records(self, name: str, *fields: str) -> list[dict]:
        with open_or_empty(self.file(name)) as file:
            return [parse_object(line, name, *fields) for line in file if line.strip()]


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path is inside a folder after its links are resolved."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # it belongs to another user, or its links form a cycle
        return False


@functools.lru_cache(64)
def config_of(path: Path, modified: int) -> Config:
    """Read the settings from a file. Cached until `modified`, its modification time, changes."""
    return read_yaml(str(path))


@functools.lru_cache(4)
def questions_of(path: Path, modified: int) -> tuple[list[dict], list[dict]]:
    """Load the training rows and the held-out rows for the settings in a file. Cached like `config_of`."""
    config = config_of(path, modified)
    return load_questions(config)[:2]


def downsample(values: Sequence, max_points: int = MAX_POINTS) -> list:
    """Return at most `max_points` evenly spaced values, including the first and the last."""
    if len(values) <= max_points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (max_points - 1))] for i in range(max_points)]


def open_or_empty(path: Path) -> BinaryIO:
    """Open a file for reading. A missing file reads as empty."""
    return open(path if path.is_file() else os.devnull, "rb")


def parse_object(text: bytes, name: str, *fields: str) -> dict:
    """Parse a JSON object from the file `name`. Raises UiError if it is damaged or lacks one of the fields."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        problem = " with ".join(filter(None, ["not a JSON object", ", ".join(fields)]))
        raise UiError(f"{name} is damaged: {text[:40]!r} is {problem}. Delete that line or the file.")
    return value


def tail(path: Path, n: int) -> str:
    """Return the last n lines of a text file, at most 64 KB. Returns an empty string if there is no file."""
    with open_or_empty(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-n:])


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock, by trying to acquire it."""
    with PROBE_LOCK:
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
    """Import the packages that load models.

    Call this before a thread uses them: two threads that import transformers at the same time get incomplete modules.
    """
    with IMPORT_LOCK:
        import rl.evaluate  # noqa: F401


def describe_error(error: BaseException) -> str:
    """Return the message to show on the page. The traceback of an unexpected error is printed."""
    if isinstance(error, (UiError, ConfigError, DataError, RewardError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return f"Unexpected error: {type(error).__name__}: {first_line(error)}. The traceback is in the terminal."


@contextlib.contextmanager
def raise_as_gradio_error() -> Iterator[None]:
    """Convert exceptions to gr.Error, which Gradio shows. The text is escaped, because the page renders it as HTML."""
    import gradio as gr

    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(describe_error(error)), print_exception=False) from None


def shows_errors(function: Callable, *first) -> Callable:
    """Wrap an event handler or generator: its first arguments are bound, and its errors are shown on the page."""
    bound = functools.partial(function, *first)

    def call(*args):
        with raise_as_gradio_error():
            return bound(*args)

    def generate(*args) -> Iterator:
        with raise_as_gradio_error():
            yield from bound(*args)

    handler = functools.update_wrapper(generate if inspect.isgeneratorfunction(function) else call, function)
    handler.__signature__ = inspect.signature(bound)  # tells Gradio whether the handler takes an event or a request
    return handler
