"""Shared fixtures and helpers: the bundled tiny model as a policy, small settings, episodes and run folders."""

import json
import math
import os
import shutil
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from grading import Completion, Score, score_all
from grading.base import RewardFunction

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # tests must not download models
if os.environ.get("PYTEST_XDIST_WORKER"):  # one thread per process: more would compete for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Hide the GPU unless tests run with `pytest -m gpu`."""
    selected = config.option.markexpr
    if os.environ.get("GPU_TESTS_ON_CPU") or "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


HOW_TO_RUN = {  # part of a skip's reason -> the tests, and how to run them
    "bubblewrap": ("of the sandbox", "Linux with bubblewrap: apt install bubblewrap"),
    "gpu": ("for a GPU", "make test-gpu on a machine with an NVIDIA GPU"),
    "unsloth": ("of Unsloth", "make test-unsloth"),
    "mounting a disk": ("of full disks", "run as root on Linux"),
}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Name the skipped tests and how to run them, in one line."""
    groups = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = (
            report.longrepr[2].removeprefix("Skipped: ")
            if isinstance(report.longrepr, (tuple, list))
            else report.longrepr
        )
        known = (text for part, text in HOW_TO_RUN.items() if part in reason.lower())
        tests, how = next(known, ("", reason.splitlines()[0]))
        groups[tests, how] += 1
    if groups:
        parts = [f"{count} {tests or 'other'} ({how})" for (tests, how), count in groups.most_common()]
        terminalreporter.write_line(f"Skipped tests: {'; '.join(parts)}")


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def config():
    from rl.config import Config

    return Config(max_completion_length=24, num_generations=4, prompts_per_step=4, learning_rate=1e-3, device="cpu")


@pytest.fixture
def policy(config):
    """The tiny model in fp32. The LoRA's B matrices are small noise, so that policy and reference differ."""
    from rl.model.policy import load_policy

    policy = load_policy(config)
    fill_lora(policy, 0.02)
    return policy


def run_with_questions(tmp_path):
    """Return a file of five questions, its rows, and the empty folder of a run `mine` with these questions."""
    questions = tmp_path / "q.jsonl"
    folder = tmp_path / "runs" / "mine"
    rows = [{"id": f"q{i}", "prompt": f"{i} + 1?", "answer": str(i + 1), "task": "t"} for i in range(5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.mkdir(parents=True)
    return questions, rows, folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A runs folder with a stopped run `a` (watching.py)."""
    from watching import stopped_run

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return stopped_run(tmp_path)


@pytest.fixture
def page(folder):
    """What the pages share, over `folder`."""
    from watching import make_page

    return make_page(folder)


@pytest.fixture
def served(folder):
    """A function that returns a client of the Watch page over `folder`."""
    from watching import serving

    with serving(folder) as client:
        yield client


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_rollouts(folder):
    """Return the records of all roll-outs."""
    return [line for file in sorted((folder / "rollouts").iterdir()) for line in lines(file)]


def read_tokens(folder):
    return [json.loads(file.read_text()) for file in sorted((folder / "tokens").iterdir())]


def copy_tiny(folder, **changes):
    """Copy the bundled model, with changes to its JSON files (file stem -> entries)."""
    shutil.copytree("data/tiny", folder)
    for stem, entries in changes.items():
        path = folder / f"{stem}.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))
    return str(folder)


def completion(text, **row):
    """Return a completion. Its row has no gold answer unless given."""
    return Completion(prompt="q", text=text, row={"id": "r1", "task": "t"} | row)


def score_one(rewards, completion):
    (score,) = score_all(rewards, [completion])
    return score


def write(tmp_path, source):
    """Write a reward file that imports all of grading, and return its path."""
    path = tmp_path / "rewards.py"
    path.write_text("from grading import *\n" + textwrap.dedent(source))
    return str(path)


def bare_policy(model, eos_ids=(1,), **settings):
    """Return a policy over a model without a tokenizer, for forward passes on token ids."""
    import torch

    from rl.model.policy import Policy

    fields = {"tokenizer": None, "device": torch.device("cpu"), "dtype": torch.float32, "eos_ids": frozenset(eos_ids)}
    fields |= {"pad_id": 0, "temperature": 1.0, "system_prompt": None, "chat_template_kwargs": {}}
    return Policy(model=model, has_reference_adapter=False, **fields, **settings)


def fill_lora(policy, scale, seed=1):
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.device)


@pytest.fixture
def episodes(policy):
    """Sixteen completions of four questions, with different advantages; all are 0 in the third group."""
    import torch

    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    questions = [
        "What is 3 + 4 + 5?",
        "Compute 9 - 2 + 1.",
        "A bus has 3 riders. 4 get on. 2 get off. How many?",
        "1 + 1 = ?",
    ]
    prompts = [policy.encode_prompt(question) for question in questions]
    generator = torch.Generator().manual_seed(3)
    episodes = rollout(policy, prompts, 4, 24, Sampling(), generator, rollout_batch_size=16)
    for i, episode in enumerate(episodes):
        advantage = 0.0 if i // 4 == 2 else [1.2, -0.4, -0.9, 0.1][i % 4]
        episode.advantages = torch.full((len(episode.completion_ids),), advantage)
    return episodes


@pytest.fixture
def ppo(config):
    config.algorithm, config.cliprange_value = "ppo", None
    return config


class Rewards:
    """The part of a reward file that Advantages reads."""

    functions = [RewardFunction("correct", None, 1.0), RewardFunction("right_steps", None, 0.5)]


def with_rewards(episodes, rewards, process=None):
    """Set completions and scores with these rewards. process: (position, value) pairs for each episode."""
    for i, (episode, reward) in enumerate(zip(episodes, rewards)):
        verdict = "ungraded" if math.isnan(reward) else "right" if reward >= 1 else "wrong"
        parts = {"correct": None if math.isnan(reward) else reward}
        episode.completion = completion("x" * len(episode.completion_ids))
        episode.score = Score(reward, parts, {}, {}, verdict, judge="correct")
        if process:
            episode.score.process = {"right_steps": process[i]}
            episode.score.total += 0.5 * sum(value for _, value in process[i])
        episode.reward = episode.score.total
    return episodes


def vectors(parameters):
    import torch

    return torch.cat([p.detach().flatten().clone() for p in parameters])


def make_episodes(*lengths, truncated=()):
    from rl.rollout import Episode

    return [Episode([1], [2] * n, [0.0] * n, i in truncated) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory):
    """A function that returns the folder of an uninterrupted run of a method, and its duration in seconds."""
    runs = {}

    def get_run(method):
        if method not in runs:
            from running import finish

            folder = tmp_path_factory.mktemp("whole") / method
            start = time.monotonic()
            assert finish(folder, method) == 0
            runs[method] = folder, time.monotonic() - start
        return runs[method]

    return get_run
