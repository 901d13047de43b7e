"""Short runs in separate processes, which can be killed during a given call, and their results."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

import train

SHORT = "--max-steps 8 --prompts-per-step 4 --num-generations 4 --eval-questions 8 --eval-steps 3 --save-steps 2 --train-questions 30 --max-completion-length 40 --learning-rate 2e-3 --lr-scheduler-type linear --log-completions-steps 0 --device cpu"
METHODS = {
    "grpo": "--num-mini-batches 2 --num-iterations 2 --save-total-limit 2",
    "ppo": "--algorithm ppo --num-mini-batches 2 --num-iterations 2 --beta 0.02 --beta-target-kl 0.5 --critic-warmup-steps 2",
    "running": "--algorithm reinforce --num-mini-batches 1 --baseline running --control random-reward --curriculum-steps 4 --train-data sums",
    "episodes": "--train-data environments.py:IceMaze --eval-data environments.py:IceMaze --reward-funcs wins --max-turns 3 --max-turn-length 12 --max-completion-length 100",
}

# Children of a fork server start with all modules imported, and are not forked from a process with threads.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    "train rl.advantages rl.critic rl.run.checks rl.run.session rl.run.commands tqdm matplotlib.pyplot "
    "matplotlib.backends.backend_agg transformers.models.qwen3.modeling_qwen3 pydantic_monty".split()
)


def work(arguments: list[str], faults: dict[str, tuple[int, object]]):
    """Train in this process, with faults in the nth call of functions, each named "module:class:function"."""
    import torch

    torch.set_num_threads(1)
    os.setsid()
    for name, (nth, fault) in faults.items():
        inject(name, nth, fault)
    try:
        train.main(arguments)
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
    except (train.ConfigError, train.DataError, train.RewardError, train.RunError) as error:
        print(f"error: {error}")
        sys.exit(1)


def inject(name: str, nth: int, fault) -> None:
    """Replace the nth call. fault: a signal to this process, an exception, or a function that gets the arguments."""
    module, owner, function = name.split(":")
    owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    original = getattr(owner, function)
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            if isinstance(fault, signal.Signals):
                os.kill(os.getpid(), fault)
            elif isinstance(fault, BaseException):
                raise fault
            else:
                return fault(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, function, wrapper)


def start(folder: Path, method: str, faults=None, resume=False, more: str = ""):
    """Start a process that trains in this folder, or resumes there. Its output is in FOLDER.txt."""
    arguments = [*SHORT.split(), *METHODS[method].split(), "--output-dir", str(folder), *more.split()]
    if resume:
        arguments = ["--resume", str(folder), *more.split()]
    process = processes.Process(target=work_with_output, args=(f"{folder}.txt", arguments, faults or {}))
    process.start()
    return process


def work_with_output(file: str, arguments: list[str], faults: dict) -> None:
    """Call `work` with its output in a file."""
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    work(arguments, faults)


def finish(folder: Path, method: str, **options) -> int:
    """Run such a process and return its exit status. Negative: the signal that killed it."""
    process = start(folder, method, **options)
    process.join()
    return process.exitcode


def read_output(folder: Path) -> str:
    """Return the output of the last process."""
    return Path(f"{folder}.txt").read_text()


def result(folder: Path) -> dict:
    """Return all results of a run except times and memory."""
    excluded = ("time", "memory")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "peak_memory_mb", "memory"):
        summary.pop(name, None)
    last = folder / "checkpoints/step_000008"
    return {
        "metrics": [{k: v for k, v in m.items() if not any(t in k for t in excluded)} for m in metrics],
        "config": (folder / "config.yaml").read_text(),
        "steps": step_files(folder),
        "evaluations": {file.name: file.read_text() for file in folder.glob("eval/*")},
        "summary": summary,
        "adapter": (last / "adapter_model.safetensors").read_bytes(),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "best": (folder / "checkpoints/best").read_text() if (folder / "checkpoints/best").exists() else None,
    }


def step_files(folder: Path) -> dict[str, str]:
    """Return the roll-out and token files of a run."""
    files = [*folder.glob("rollouts/*"), *folder.glob("tokens/*")]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def assert_same(folder: Path, expected: Path):
    actual = result(folder)
    wanted = result(expected)
    for part in wanted:
        assert actual[part] == wanted[part], part


def count_logged_steps(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def last_checkpoint(folder):
    return (folder / "checkpoints/last").read_text().strip()


def resume_error(folder, more="", resume=None):
    """Return the message of a refused --resume, and check that the folder is unchanged."""

    def contents():
        return {
            str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("console.log", "lock")
        }

    before = contents()
    with pytest.raises((train.ConfigError, train.RunError, train.RewardError)) as error:
        train.main(["--resume", str(resume or folder), *more.split()])
    assert contents() == before
    assert "\n" not in str(error.value)
    return str(error.value)
