"""Read, rename and delete run folders, and no file outside the folder that holds them. Does not import torch.

A run may be in progress, truncated by --resume, or half a gigabyte in size. Roll-outs and tokens have one file per step
and are not cached. metrics.jsonl (2 KB per step) is read as a whole, and reduced to at most 1,000 steps.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import filelock

from data import load_questions
from rl.config import Config, RunError
from rl.run.files import write_atomic
from rl.run.read_config import read_yaml

MAX_POINTS = 500  # points of a curve
PROBE_LOCK = threading.Lock()  # two threads that probe a run's lock at once would mistake each other for the run


class Metrics(NamedTuple):
    """The metrics of a run, at most 2 * MAX_POINTS steps."""

    steps: list[int]
    columns: dict[str, array]  # metric -> its value in each step; nan if there is none
    alarms: dict[str, int]  # first step of each alarm, by its subject
    active: list[str]  # alarms of the last step

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Return the (step, value) pairs of a metric."""
        return [(step, value) for step, value in zip(self.steps, self.columns.get(metric, ())) if value == value]


METRICS: dict[Path, tuple[tuple, Metrics]] = {}  # run folder -> stamp of its metrics.jsonl, and what it contains


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
        """Return a run. Raises RunError if its name is not in `names`, so that no path leads outside the folder."""
        if not self._has(name):
            names = self.names()
            hint = f"Newest: {', '.join(names[:5])}." if names else f"{self.folder.name}/ has no runs: train one first."
            raise RunError(f"There is no run {name!r}. {hint}" if name else f"No run is selected. {hint}")
        return Run(self.folder / name)

    def running(self) -> list[str]:
        """Return the names of the runs in progress."""
        running = []
        for name in self.names():
            with contextlib.suppress(RunError):  # removed in the meantime, or a link
                if self.get(name).status() == "running":
                    running.append(name)
        return running

    def rename(self, name: str, new_name: str) -> None:
        """Rename the folder of a run. Raises RunError if the run is in progress or the new name cannot be used."""
        with self._idle(name) as path:
            is_plain = new_name and new_name.isprintable() and new_name == new_name.strip()
            if not is_plain or Path(new_name).name != new_name or new_name.startswith((".", "-")):
                raise RunError(f"{new_name!r} cannot be the name of a run. Enter a name without slashes.")
            if (self.folder / new_name).exists():
                raise RunError(f"{new_name} exists already. Choose another name.")
            path.rename(self.folder / new_name)
            METRICS.pop(path, None)

    def delete(self, name: str) -> None:
        """Delete the folder of a run. Raises RunError if the run is in progress."""
        with self._idle(name) as path:
            deleted = self.folder / f".deleted-{time.time_ns()}"
            path.rename(deleted)  # first: a run is never half deleted
            METRICS.pop(path, None)
            shutil.rmtree(deleted)

    @contextlib.contextmanager
    def _idle(self, name: str):
        """Hold the lock of a run, and yield its folder."""
        run = self.get(name)
        try:
            with filelock.FileLock(run.file("lock"), timeout=1.0):  # the page holds it briefly to check for a run
                yield run.path
        except filelock.Timeout:
            raise RunError(f"{name} is running. Stop it first.") from None
        except OSError as error:
            raise RunError(f"{name} cannot be changed: {error.strerror or error}.") from None

    def _has(self, name: str) -> bool:
        if not name or not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            return False
        config = self.folder / name / "config.yaml"
        return os.path.isfile(config) and is_inside(config, self.folder)


class Run:
    """One run folder. Every method reads the current files."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name

    def file(self, name: str) -> Path:
        """Return the path of a file of the run. Raises RunError if a link leads outside the runs folder."""
        path = self.path / name
        if not is_inside(path, self.path.parent):
            raise RunError(f"{self.name}/{name} links outside the runs folder. Replace the link with its target.")
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
        with contextlib.suppress(RunError):  # a link that leads outside: reading the run raises it
            if is_locked(self.file("lock")):
                return "running"
            if self.summary().get("finished"):
                return "finished"
        return "stopped"

    def stamp(self, name: str) -> tuple[str, int, int]:
        """Return the path, size and modification time of a file, which identify its contents; zeros if it is missing."""
        path = self.path / name
        try:
            status = path.stat()
        except OSError:
            return str(path), 0, 0
        return str(path), status.st_size, status.st_mtime_ns

    def metrics(self) -> Metrics:
        """Return the metrics, cached until the file changes. Raises RunError if the file is damaged."""
        stamp = self.stamp("metrics.jsonl")
        if METRICS.get(self.path, (None,))[0] != stamp:
            METRICS[self.path] = stamp, read_metrics(self.file("metrics.jsonl"))
        return METRICS[self.path][1]

    def note(self) -> str:
        return read_text(self.file("note.txt"))

    def write_note(self, text: str) -> None:
        try:
            write_atomic(self.file("note.txt"), text.encode(errors="replace"))
        except OSError as error:
            raise RunError(f"{self.name}: the note cannot be saved: {error.strerror or error}.") from None

    def evaluations(self) -> list[str]:
        """Return the names of the evaluations in order: before, step_000015, ..., after."""
        names = [path.stem for path in self.file("eval").glob("*.jsonl")]
        return sorted(names, key=lambda name: (name == "after", name != "before", name))

    def evaluation(self, name: str) -> list[dict]:
        """Return one record per held-out question (rl.evaluate.record). Raises RunError if the name is unknown."""
        if name not in (names := self.evaluations()):
            raise RunError(f"{self.name} has no evaluation {name!r}. Available: {', '.join(names) or 'none yet'}.")
        return self._read_records(f"eval/{name}.jsonl")

    def steps(self) -> list[int]:
        """Return the steps with a file of completions, in order."""
        files = self.file("rollouts").glob("*.jsonl")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def completions(self, step: int) -> list[dict]:
        """Return one record per completion of a step. Raises RunError if there are none or the file is damaged."""
        name = f"rollouts/{step:06d}.jsonl"
        records = self._read_records(name, "prompt_id", "prompt", "completion")
        if not records:
            raise RunError(
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

        Returns None if the step has no token log. Raises RunError if the file is damaged.
        """
        name = f"tokens/{step:06d}.json"
        path = self.file(name)
        return parse_object(path.read_bytes(), name, "prompt_id", "completions") if path.is_file() else None

    def _read_records(self, name: str, *fields: str) -> list[dict]:
        with open_or_empty(self.file(name)) as file:
            return [parse_object(line, name, *fields) for line in file if line.strip()]


def read_metrics(path: Path) -> Metrics:
    """Read the complete lines of a metrics.jsonl.

    A long run is reduced to MAX_POINTS evenly spaced steps and MAX_POINTS steps with an evaluation.
    """
    with open_or_empty(path) as file:
        lines = [line for line in file if line.endswith(b"\n")]
    evaluated = [i for i, line in enumerate(lines) if b'"eval/accuracy"' in line]
    kept = {*downsample(range(len(lines))), *downsample(evaluated)}
    records = []
    alarms = {}
    active = []
    for i, line in enumerate(lines):
        if i not in kept and b'"alarms": []' in line:  # parsing 5,000 lines would take 0.1 s
            continue
        record = parse_object(line, "metrics.jsonl", "step")
        active = record.get("alarms", [])
        for subject in active:
            alarms.setdefault(subject, record["step"])
        if i in kept:
            records.append({k: v if isinstance(v, (int, float)) else math.nan for k, v in record.items()})
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: array("d", (record.get(name, math.nan) for record in records)) for name in names}
    return Metrics([int(record["step"]) for record in records], columns, alarms, active)


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
    """Parse a JSON object from the file `name`. Raises RunError if it is damaged or lacks one of the fields."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        problem = " with ".join(filter(None, ["not a JSON object", ", ".join(fields)]))
        raise RunError(f"{name} is damaged: {text[:40]!r} is {problem}. Delete that line or the file.")
    return value


def read_text(path: Path) -> str:
    """Return the contents of a text file, or an empty string if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


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
