"""Time and memory that a run uses, and the machine and packages it runs on."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path

import psutil
import torch

from rl.config import Config, ConfigError
from rl.fit.memory import predict
from rl.fit.shapes import find_shape
from rl.model.oom import free_memory
from rl.model.policy import Policy, Question


class Stopwatch:
    """Seconds spent in each part of the run, in total and in the current step. started: perf_counter() at its start."""

    def __init__(self, started: float):
        self.started = started
        self.seconds_before_resume = 0.0
        self.seconds = dict.fromkeys(("setup", "cold_start", "rollout", "update", "eval"), 0.0)
        self.step_seconds = {}
        self.step_started = started

    def state_dict(self) -> dict:
        return {"total": self.total, "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict) -> None:
        """Add the seconds that the run took before it was resumed."""
        self.seconds_before_resume = state["total"]
        for part, seconds in state["seconds"].items():
            self.seconds[part] += seconds

    @property
    def total(self) -> float:
        return self.seconds_before_resume + time.perf_counter() - self.started

    def end_setup(self) -> None:
        self.seconds["setup"] += time.perf_counter() - self.started

    def begin_step(self) -> None:
        self.step_seconds = dict.fromkeys(("rollout", "update", "eval"), 0.0)
        self.step_started = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, part: str):
        """Add the seconds in this context to a part of the run."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            self.seconds[part] += seconds
            self.step_seconds[part] = self.step_seconds.get(part, 0.0) + seconds

    def step_metrics(self) -> dict[str, float]:
        """Return the seconds of the current step so far, in total (without its evaluation) and by part."""
        total = time.perf_counter() - self.step_started - self.step_seconds["eval"]
        parts = {f"time/{part}": round(seconds, 4) for part, seconds in self.step_seconds.items()}
        return {"step_time": round(total, 4)} | parts

    def summary(self) -> dict[str, float]:
        return {part: round(seconds, 2) for part, seconds in {"total": self.total, **self.seconds}.items()}


class MemoryUse:
    """The peak memory of a run, predicted (rl/fit/memory.py) and measured.

    On a GPU, allocated memory is measured; on a CPU, the growth of resident memory since this object was created, which
    should be after the imports.
    """

    def __init__(self):
        self.before_mb = psutil.Process().memory_info().rss / 2**20
        self.predicted_mb: float | None = None

    def predict(self, config: Config, policy: Policy, questions: list[Question], held_out: list[Question]) -> None:
        """Predict the peak, unless the dimensions of the model are unknown."""
        device = policy.device
        dtype = str(policy.dtype).removeprefix("torch.")
        longest = max(len(question.prompt_ids) for question in questions + held_out)
        config = dataclasses.replace(config, eval_questions=len(held_out))
        resident = psutil.Process().memory_info().rss - self.before_mb * 2**20
        allocated = torch.cuda.memory_allocated() if device.type == "cuda" else resident
        free = free_memory(device) + allocated  # before the policy was loaded
        with contextlib.suppress(ConfigError):
            prediction = predict(config, find_shape(config.model), device.type, dtype, longest, free)
            self.predicted_mb = round(prediction.peak_mb, 1)

    def figures(self, device: torch.device) -> dict[str, float | None]:
        """Return the measured and the predicted peak in MB, as written to summary.json."""
        peak = peak_memory_mb(device)
        measured = peak if peak is None or device.type == "cuda" else round(peak - self.before_mb, 1)
        return {"measured_mb": measured, "predicted_mb": self.predicted_mb}


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the peak memory so far, in MB: allocated on the GPU, or resident in this process; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with contextlib.suppress(OSError):  # Linux, where ru_maxrss would include the parent process
        status = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GB)"
    return f"{os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    packages = ["torch", "transformers", "peft", "bitsandbytes", "pydantic-monty"]
    packages += [name for name in ("unsloth", "unsloth_zoo") if name in sys.modules]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
