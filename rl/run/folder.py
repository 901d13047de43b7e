"""The run folder: everything that a run leaves behind, in files that other programs read.

config.yaml  rewards.py  metrics.jsonl  rollouts.jsonl  tokens.jsonl  eval/*.jsonl  checkpoints/  summary.json  curve.png
console.log  lock  and failed.jsonl, where a reward function has stopped the run
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import filelock
import psutil
import torch
import yaml

from grading import Completion, RewardError, Rewards, Score
from rl.config import Config, ConfigError, RunError
from rl.evaluate import Answers
from rl.fit.memory import predict
from rl.fit.shapes import find_shape
from rl.model.engine import free_memory
from rl.model.policy import Policy
from rl.rollout import Episode
from rl.run.checkpoint import Checkpoints, bring_to_disk, cannot_write, write_whole
from rl.run.process import Console

LOGS = ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl")  # a step adds to each of them


def choose_folder(config: Config, name: str) -> Path:
    """output_dir, else runs/NAME-TIME. Raises ConfigError where a run is there already: none is written over."""
    path = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume or not config.output_dir:
        return path
    if path.exists() and (not path.is_dir() or {file.name for file in path.iterdir()} - BEFORE_A_RUN):
        hint = f", go on with it by --resume {path}" if (path / "config.yaml").exists() else ""
        raise ConfigError(f"output_dir: {path} exists already: choose another{hint}, or remove it")
    return path


# What a run that was killed at its very start leaves; config.yaml makes it a run.
BEFORE_A_RUN = {
    "eval",
    "checkpoints",
    "lock",
    "console.log",
    "rewards.py",
    "rewards.py.unfinished",
    "config.yaml.unfinished",
}


class RunFolder:
    """Writes one run's files. Lines are appended whole; other files are written beside their place and renamed.

    As a context manager it keeps other runs out of the folder, and copies the console into console.log. Every method raises
    RunError where something cannot be written.
    """

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config

    def __enter__(self) -> "RunFolder":
        try:
            if not self.config.output_dir:
                self.path = make_new_folder(self.path)
            for folder in (self.path / "eval", self.path / "checkpoints"):
                if not folder.is_dir():
                    folder.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path} cannot be made: {error.strerror}") from None
        self.checkpoints = Checkpoints(self.path, self.config.save_total_limit)
        self.lock = filelock.FileLock(self.path / "lock", timeout=1.0)  # the page tries it, for a moment
        self.console = Console(self.path / "console.log")
        with self.writing(self.path / "lock"):
            try:
                self.lock.acquire()
            except filelock.Timeout:
                raise RunError(
                    f"{self.path} is in use by a run that goes on; to end that one: touch {self.path / 'STOP'}"
                ) from None
            (self.path / "STOP").unlink(missing_ok=True)  # of before
            self.console.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.console.__exit__()
        self.lock.release()

    @contextmanager
    def writing(self, path: Path):
        """Turns what goes wrong with a file into one line."""
        try:
            yield
        except OSError as error:
            raise RunError(cannot_write(path, error)) from error

    def begin(self, settings: dict, rewards_file: Path, step: int) -> None:
        """Keep what the run is made with; what it was made with up to this step stays beside, where it was another."""
        settings = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
        for name, content in {"rewards.py": rewards_file.read_bytes(), "config.yaml": settings}.items():
            path = self.path / name
            before = path.with_stem(f"{path.stem}_until_step_{step:06d}")
            if path.exists() and step and not before.exists() and path.read_bytes() != content:
                self._write(before.name, path.read_bytes())
            self._write(name, content)

    def append(self, name: str, lines: list[dict]) -> None:
        """Add lines to a .jsonl file in one write, so that no reader meets half of them."""
        text = "".join(to_json(line) + "\n" for line in lines)
        with self.writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def log_sizes(self) -> dict[str, int]:
        """The bytes of each log and evaluation, brought to the disk: what belongs to the steps so far."""
        names = [name for name in LOGS if (self.path / name).exists()]
        names += [f"eval/{file.name}" for file in self.path.glob("eval/*.jsonl") if evaluated_at(file) is not None]
        with self.writing(self.path):
            for name in names:
                bring_to_disk(self.path / name)
        return {name: (self.path / name).stat().st_size for name in names}

    def cut_back(self, step: int, sizes: dict[str, int], max_steps: int) -> None:
        """Let the folder be as it was after a step: logs of these sizes, no later evaluation, no later checkpoint. A final
        evaluation becomes one among others where more than its steps are to come.

        Raises ConfigError where a log has less than that.
        """
        for name, size in sizes.items():
            present = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if present < size or (present > size and name not in LOGS):
                raise ConfigError(
                    f"resume: {self.path / name} has {present} bytes, but had {size} at step {step}: put back what it was, or "
                    "resume from an older checkpoint"
                )
        with self.writing(self.path):
            after = self.path / "eval/after.jsonl"
            if after.exists() and self.checkpoints.all()[-1:] == [self.checkpoints.folder(step)] and step < max_steps:
                after.replace(self.path / f"eval/step_{step:06d}.jsonl")
            after.unlink(missing_ok=True)
            self.checkpoints.drop_after(step)  # first: an older one does not miss what is cut off
            for name in LOGS:
                if (self.path / name).exists():
                    os.truncate(self.path / name, sizes.get(name, 0))
            for file in self.path.glob("eval/*.jsonl"):
                if (evaluated_at(file) or 0) > step:
                    file.unlink()

    def read(self, name: str) -> list[dict]:
        """The lines of a .jsonl file, none where it is not there."""
        path = self.path / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def history(self) -> list[dict]:
        """The metrics of each step so far, as they were before they became JSON."""
        lines = self.read("metrics.jsonl")
        return [{k: math.nan if v is None else v for k, v in line.items() if k != "alarms"} for line in lines]

    def check_unfinished(self, config: Config) -> None:
        """Raise ConfigError where the run has come to its end, or its checkpoints are gone, unless changes are accepted."""
        summary = {}
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        metrics = self.path / "metrics.jsonl"
        logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0  # its last line may be cut short
        if summary.get("finished") and not config.accept_changes:
            raise ConfigError(
                f"resume: {self.path} has finished, with step {logged}; to train on: --max-steps N --accept-changes"
            )
        if not self.checkpoints.all() and not config.accept_changes and 0 < config.save_steps < logged:
            raise ConfigError(
                f"resume: {self.path} has {logged} steps in its logs, but no checkpoint; to begin from its first step, and "
                "lose these: --accept-changes"
            )

    def evaluations(self) -> dict[int, Answers]:
        """The evaluations in the folder by their steps, in order."""
        files = {evaluated_at(file): file for file in self.path.glob("eval/*.jsonl")}
        return {
            step: Answers.from_lines(self.read(f"eval/{files[step].name}")) for step in sorted(files.keys() - {None})
        }

    def log_rollouts(
        self, episodes: list[Episode], completions: list[Completion], scores: list[Score], learned: list[float] | None
    ) -> None:
        """Every completion of a step, with what each reward made of it. learned: the rewards that were learned from,
        where they are others: the control's, or less for their length."""
        lines = [
            describe_completion(c) | {
                "reward": s.total, "rewards": s.parts, "metrics": s.metrics, "verdict": s.verdict, "reasons": s.reasons,
                "advantage": None if e.advantages is None else e.advantages.mean().item(),  # None: took no part
            } | ({"extra": s.extra} if s.extra else {})
            for e, c, s in zip(episodes, completions, scores)
        ]  # fmt: skip
        for line, reward in zip(lines, learned or []):
            line["learned_reward"] = reward
        self.append("rollouts.jsonl", lines)

    @contextmanager
    def keeping_failed(self, rewards: Rewards):
        """failed.jsonl gets the completions on which a reward function failed; the error says how to score them again."""
        try:
            yield
        except RewardError as error:
            if not error.completions:
                raise
            lines = [describe_completion(c) | {"row": dict(c.row)} for c in error.completions]
            self.append("failed.jsonl", lines)
            ours = rewards.path == Path("rewards.py").resolve()
            script = "rewards.py" if ours else f"-m grading self-test {shlex.quote(str(rewards.path))}"
            failed = shlex.quote(str(self.path / "failed.jsonl"))
            raise RewardError(f"{error}. To see it again: python {script} --rescore {failed}") from error

    def write_evaluation(self, name: str, lines: list[dict]) -> None:
        self._write(f"eval/{name}.jsonl", "".join(to_json(x) + "\n" for x in lines))

    def write_summary(self, summary: dict) -> None:
        self._write("summary.json", to_json(summary, indent=2) + "\n")

    def draw_curve(self, evaluations: dict[int, dict], history: list[dict]) -> None:
        """curve.png: held-out accuracy with its intervals and the share that thinks, reward, and length, by step.

        evaluations: summaries by step. history: the metrics of each step.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        steps = list(evaluations)
        for name, label in (("accuracy", "right (greedy)"), ("accuracy_sampled", "right (sampled)")):
            rate = [100 * evaluations[s][name] for s in steps]
            low, high = zip(*(evaluations[s][name.replace("accuracy", "ci95")] for s in steps))
            left.plot(steps, rate, "o-", label=label)
            left.fill_between(steps, [100 * x for x in low], [100 * x for x in high], alpha=0.15)
        left.plot(steps, [100 * evaluations[s]["thinking_sampled"] for s in steps], "--", c="grey", label="thinks")
        left.set(title="held-out questions", ylabel="%", ylim=(-2, 102))
        left.legend(loc="lower right")
        steps = [metrics["step"] for metrics in history]
        middle.plot(steps, [metrics["reward"] for metrics in history])
        middle.set(title="reward (training completions)")
        right.plot(steps, [metrics["completions/mean_length"] for metrics in history])
        right.set(title="length (training completions)", ylabel="tokens")
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        with self.writing(self.path / "curve.png"):
            figure.savefig(self.path / "curve.png.unfinished", format="png", dpi=110)
            os.replace(self.path / "curve.png.unfinished", self.path / "curve.png")
        pyplot.close(figure)

    def _write(self, name: str, content: str | bytes) -> None:
        with self.writing(self.path / name):
            write_whole(self.path / name, content)


def make_new_folder(path: Path) -> Path:
    """Make it, under another number where another run has begun in the same second, or the clock was set back."""
    for other in itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            other.mkdir(parents=True)
            return other


def evaluated_at(file: Path) -> int | None:
    """The step of eval/before.jsonl or eval/step_000050.jsonl; None of eval/after.jsonl, which is of the last one."""
    if file.stem == "before":
        return 0
    return int(file.stem[5:]) if file.stem.startswith("step_") and file.stem[5:].isdigit() else None


def describe_completion(completion: Completion) -> dict:
    """The fields of rollouts.jsonl that a completion can be scored from again, with its data row."""
    return {
        "step": completion.step, "prompt_id": completion.row["id"], "task": completion.row["task"],
        "prompt": completion.prompt, "completion": completion.text,
        "finish_reason": "length" if completion.truncated else "stop", "tokens": completion.tokens,
    }  # fmt: skip


def to_json(value, indent: int | None = None) -> str:
    """JSON with null for nan and inf, and text for what JSON does not know (a date, a decimal)."""
    return json.dumps(finite(value), ensure_ascii=False, indent=indent, default=str)


def finite(value):
    """The value with null in place of nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds spent in each named part of the run; what passed from `started` until now is the setup."""

    def __init__(self, started: float):
        self._lap_started = time.perf_counter()
        self._zero = started  # of the total
        self.seconds = dict.fromkeys(("rollout", "score", "update", "eval"), 0.0)
        self.seconds["setup"] = self._lap_started - started
        self._at_lap = dict(self.seconds)

    def go_on(self, seconds: dict[str, float]) -> None:
        """Add what the run had taken before it was stopped: a `summary`."""
        self._zero -= seconds["total"]
        self.seconds = {part: present + seconds[part] for part, present in self.seconds.items()}

    @contextmanager
    def time(self, part: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[part] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, in all and by part, as metrics."""
        now = time.perf_counter()
        parts = {
            f"time/{part}": seconds - self._at_lap[part] for part, seconds in self.seconds.items() if part != "setup"
        }
        step_time = now - self._lap_started
        self._lap_started, self._at_lap = now, dict(self.seconds)
        return {name: round(value, 4) for name, value in {"step_time": step_time, **parts}.items()}

    def summary(self) -> dict[str, float]:
        total = time.perf_counter() - self._zero
        return {part: round(seconds, 2) for part, seconds in {"total": total, **self.seconds}.items()}


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GB)"
    return f"{os.cpu_count()} CPU cores"


class MemoryUse:
    """The peak of a run, as predicted (rl/fit/memory.py) and as measured: allocated on the GPU, or on a CPU resident above what
    the process had when this was made, which is to be after the imports."""

    def __init__(self):
        self.before_mb = psutil.Process().memory_info().rss / 2**20
        self.predicted_mb: float | None = None

    def predict(self, config: Config, policy: Policy, train_prompts: list[list[int]], eval_prompts: list[list[int]]):
        """Nothing is predicted for a model whose dimensions cannot be told. The prompts are token ids."""
        dtype, longest = str(policy.dtype).removeprefix("torch."), max(map(len, train_prompts + eval_prompts))
        config, device = dataclasses.replace(config, eval_questions=len(eval_prompts)), policy.device
        resident = psutil.Process().memory_info().rss - self.before_mb * 2**20
        own = torch.cuda.memory_allocated() if device.type == "cuda" else resident
        free = free_memory(device) + own  # as it was before the policy was loaded
        with contextlib.suppress(ConfigError):
            found = predict(config, find_shape(config.model), device.type, dtype, longest, free)
            self.predicted_mb = round(found.peak_mb, 1)

    def figures(self, device: torch.device) -> dict[str, float | None]:
        """As they stand in the summary."""
        peak = peak_memory_mb(device)
        measured = peak if peak is None or device.type == "cuda" else round(peak - self.before_mb, 1)
        return {"measured_mb": measured, "predicted_mb": self.predicted_mb}


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory in use so far: allocated on the GPU, else resident in this process (None where unknown)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss is also that of the process which started this one
        status = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ["torch", "transformers", "peft", "bitsandbytes", "pydantic-monty"]
    packages += [name for name in ("unsloth", "unsloth_zoo") if name in sys.modules]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
