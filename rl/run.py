"""The run folder: everything that a run leaves behind, in files that other programs read.

config.yaml  rewards.py  metrics.jsonl  rollouts.jsonl  tokens.jsonl  eval/*.jsonl  checkpoints/  summary.json  curve.png
failed.jsonl, where a reward function has stopped the run
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from grading import Completion, RewardError, Rewards, Score
from rl.config import Config, ConfigError
from rl.rollout import Episode


def choose_folder(config: Config, name: str) -> Path:
    """output_dir, else runs/NAME-TIME. Raises ConfigError where it exists already: no run is written over."""
    path = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"output_dir: {path} exists already: choose another, or remove it")
    return path


class RunFolder:
    """Writes one run's files. Lines are appended whole; other files are written beside their place and renamed."""

    def __init__(self, path: Path, config: Config, rewards_file: Path):
        self.path = path
        try:
            for folder in (path / "eval", path / "checkpoints"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir: {path} cannot be made: {error.strerror}") from None
        settings = dataclasses.asdict(config) | {"output_dir": None}  # so that it can be used as a config again
        self._write("config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        shutil.copy(rewards_file, path / "rewards.py")

    def append(self, name: str, lines: list[dict]) -> None:
        """Add lines to a .jsonl file in one write, so that no reader meets half of them."""
        text = "".join(to_json(line) + "\n" for line in lines)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)

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

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def mark_last(self, checkpoint: Path) -> None:
        """checkpoints/last names the newest checkpoint."""
        self._write("checkpoints/last", checkpoint.name + "\n")

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
        figure.savefig(self.path / "curve.png", dpi=110)
        pyplot.close(figure)

    def _write(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)


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
        self.started = self._lap_started = time.perf_counter()
        self.seconds = dict.fromkeys(("rollout", "score", "update", "eval"), 0.0) | {"setup": self.started - started}
        self._at_lap = dict(self.seconds)

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
        total = time.perf_counter() - self.started + self.seconds["setup"]
        return {part: round(seconds, 2) for part, seconds in {"total": total, **self.seconds}.items()}


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GB)"
    return f"{os.cpu_count()} CPU cores"


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory in use so far: allocated on the GPU, else resident in this process (None where unknown)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "pydantic-monty")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
