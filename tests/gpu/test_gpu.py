"""Tests that need an NVIDIA GPU. They take less than eight minutes on a data-center GPU and need no network:

    python -m pytest tests/gpu -m gpu                       on a machine with a GPU; with Unsloth if it is installed
    GPU_TESTS_ON_CPU=1 python -m pytest tests/gpu -m gpu    dry run of this file: small models, no speed and memory limits

Printed figures begin with the name of the test and can be copied to bench/RESULTS.md. Each run of train.py is a separate
process, so that its memory can be measured and limited.
"""

import dataclasses
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import running
import torch
from conftest import ROOT, fill_lora

from bench.memory import make_random_model
from data import load
from rl.config import Config
from rl.run.read_config import read_config

pytestmark = pytest.mark.gpu
DRY = bool(os.environ.get("GPU_TESTS_ON_CPU"))
DEVICE = "cpu" if DRY else "cuda"
HAS_UNSLOTH = importlib.util.find_spec("unsloth") is not None and not DRY
GB = 2**30
BACKENDS = ["transformers", pytest.param("unsloth", marks=pytest.mark.skipif(not HAS_UNSLOTH, reason="no Unsloth"))]
SMALL = (
    "--max-steps 2 --prompts-per-step 2 --num-generations 2 --max-completion-length 12 --eval-questions 2 --eval-steps 0 "
    "--train-questions 20 --num-mini-batches 1 --critic-warmup-steps 0 --rollout-batch-size 4"
)
processes = multiprocessing.get_context("spawn")  # CUDA does not work in forked processes


@pytest.fixture(autouse=True)
def needs_gpu():
    if not DRY and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    yield
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


@pytest.fixture
def show(capsys, request):
    """Returns a function that prints figures immediately, bypassing pytest's capture."""

    def show(**figures) -> None:
        cells = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        with capsys.disabled():
            print(f"\n{request.node.name}: {', '.join(cells)}", flush=True)

    return show


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Returns a function from model names to folders. In a dry run, all names but `tiny` give a small model."""

    @functools.cache
    def make(name: str) -> str:
        if name == "tiny":
            return str(ROOT / "data/tiny")
        return make_random_model("qwen3-small" if DRY else name, str(tmp_path_factory.mktemp("model")))

    return make


@pytest.fixture
def load_model(model_folder):
    """Returns a function that loads a policy without Unsloth, and questions from the family `sums`."""

    def load_model(name: str, length: int, **settings):
        from rl.model.policy import load_policy

        settings = {"dtype": "float32"} | settings if DRY else settings
        config = Config(
            model=model_folder(name), device=DEVICE, backend="transformers", max_completion_length=length, **settings
        )
        policy = load_policy(config)
        return config, policy, policy.encode(load("sums", 16))

    return load_model


def train(folder: Path, settings: str, faults: dict | None = None) -> tuple[dict, list[dict]]:
    """Run train.py in a separate process, and return its summary and metrics."""
    exit_code = start(folder, f"{settings} --output-dir {folder} --device {DEVICE} {SMALL if DRY else ''}", faults)
    assert exit_code == 0, running.read_output(folder)[-3000:]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), metrics


def start(folder: Path, arguments: str, faults: dict | None = None) -> int:
    """Run train.py and return its exit status. Its output goes to FOLDER.txt. faults: see running.py."""
    process = processes.Process(
        target=running.work_with_output, args=(f"{folder}.txt", arguments.split(), faults or {})
    )
    process.start()
    process.join()
    return process.exitcode


# --- the model


@pytest.mark.parametrize(
    "name, dtype, load_in_4bit",
    [
        ("tiny", "float16", False),
        ("Qwen/Qwen3-0.6B", "bfloat16", False),
        ("Qwen/Qwen3-0.6B", "float16", False),
        ("Qwen/Qwen3-0.6B", "bfloat16", True),
        ("Qwen/Qwen2.5-0.5B", "bfloat16", True),
    ],
)
def test_sampler_agrees(load_model, show, name, dtype, load_in_4bit):
    """Roll-out, update and the model's own forward pass agree, and the roll-out agrees with a row-by-row fp32 forward."""
    from rl.model.sampling import Sampling
    from rl.rollout import rollout
    from rl.run.checks import check_sampler

    precision = {} if DRY else {"dtype": dtype}
    config, policy, questions = load_model(name, 32, load_in_4bit=load_in_4bit, **precision)
    agreement = check_sampler(policy, questions)
    assert policy.decoder, policy.fallback_reason
    prompts = [question.prompt_ids for question in questions[:8]]
    episodes = rollout(policy, prompts, 1, 32, Sampling(), torch.Generator(policy.device).manual_seed(0), 8)
    _, reference, _ = load_model(name, 32, load_in_4bit=load_in_4bit, dtype="float32")
    differences = []
    for episode in episodes:
        logprobs = plain_logprobs(reference, episode.prompt_ids, episode.completion_ids)
        differences += (logprobs.cpu() - torch.tensor(episode.sampler_logprobs)).abs().tolist()
    mean = sum(differences) / len(differences)
    show(**dataclasses.asdict(agreement), fp32_mean=mean, fp32_max=max(differences))
    assert mean <= 0.05  # nats per token


@torch.no_grad()
def plain_logprobs(policy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the log-probabilities of a completion's tokens, (C,), by the model's own forward pass on this row alone."""
    ids = torch.tensor([prompt + completion], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


@pytest.fixture
def set_graphs(monkeypatch):
    """Returns a function that switches CUDA graphs on or off. A dry run replaces them by an eager decode step."""
    from rl.model import engine

    def switch(use_graphs: bool) -> None:
        monkeypatch.setattr(engine, "uses_graphs", lambda device: use_graphs)
        if DRY:
            monkeypatch.setattr(engine.Engine, "graph", lambda self, *size: lambda: self.decode(*size))

    return switch


def test_graphs_decode_like_the_eager_step(load_model, set_graphs, show):
    """Greedy decoding in fp32, with fewer slots than rows, so that rows are admitted and moved."""
    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    _, policy, questions = load_model("tiny", 64, dtype="float32")
    fill_lora(policy, 0.02)
    prompts = [question.prompt_ids for question in questions]
    episodes = {}
    for use_graphs in (True, False):
        set_graphs(use_graphs)
        episodes[use_graphs] = rollout(policy, prompts, 2, 64, Sampling(0), torch.Generator(policy.device), 12)
    pairs = [(a, b) for a, b in zip(episodes[True], episodes[False]) if a.completion_ids == b.completion_ids]
    difference = max(abs(x - y) for a, b in pairs for x, y in zip(a.sampler_logprobs, b.sampler_logprobs))
    show(same=f"{len(pairs)} of {len(episodes[True])}", largest_difference=difference)
    assert len(pairs) >= 0.95 * len(episodes[True])  # rounding may decide a tie
    assert difference < 1e-3


def test_graphs_sample_from_the_policy(load_model, set_graphs, show):
    """The expected sum of -log p minus the entropy is 0 for samples from the policy. Detects a stuck random generator."""
    from rl.model.logprobs import completion_logprobs
    from rl.model.sampling import Sampling
    from rl.rollout import rollout
    from rl.update import prompt_and_completion_ids

    _, policy, questions = load_model("tiny", 32, dtype="float32")
    set_graphs(True)
    prompts = [question.prompt_ids for question in questions]
    generator = torch.Generator(policy.device).manual_seed(1)
    episodes = rollout(policy, prompts, 4 if DRY else 64, 32, Sampling(), generator, 512)
    with torch.no_grad():
        logprobs, mask, entropy = completion_logprobs(policy, *prompt_and_completion_ids(episodes), with_entropy=True)
    surprise = (-logprobs - entropy)[mask]
    z = (surprise.sum() / surprise.square().sum().sqrt()).item()
    show(tokens=len(surprise), z=z, distinct=len({tuple(episode.completion_ids) for episode in episodes}))
    assert abs(z) < 4


def test_decoding_speed(load_model, set_graphs, show):
    """64 rows of 128 tokens with CUDA graphs, the eager decode step, and the fallback to `generate`."""
    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    _, policy, questions = load_model("Qwen/Qwen3-0.6B", 128)
    prompts = [question.prompt_ids for question in questions[:8]]
    speed = {}
    for path in ("graphs", "plain", "generate"):
        set_graphs(path == "graphs")
        if path == "generate":
            policy.decoder = None
        for _ in range(2):  # the first roll-out loads kernels
            generator = torch.Generator(policy.device).manual_seed(0)
            started = time.perf_counter()
            episodes = rollout(policy, prompts, 8, 128, Sampling(), generator, 64)
            seconds = time.perf_counter() - started  # the tokens are on the host, so the GPU has finished
        speed[path] = sum(len(episode.completion_ids) for episode in episodes) / seconds
    show(**{f"{path}, tokens/s": tokens for path, tokens in speed.items()})
    assert DRY or speed["graphs"] > max(speed["plain"], speed["generate"])


@pytest.mark.skipif(not HAS_UNSLOTH and not DRY, reason="no Unsloth")
@pytest.mark.parametrize("options", [[], ["load_in_4bit"]], ids=["bf16", "NF4"])
def test_unsloth_kernels(model_folder, tmp_path, show, options):
    """Unsloth's kernels give the same log-probabilities and gradients as transformers."""
    sides = {}
    for backend in ("transformers", "transformers" if DRY else "unsloth"):
        file = tmp_path / "side.pt"
        command = [
            sys.executable,
            "tests/gpu/backend_side.py",
            backend,
            model_folder("Qwen/Qwen3-0.6B"),
            str(file),
            *options,
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])}
        subprocess.run(command, check=True, env=environment)
        sides[len(sides)] = torch.load(file)
    a, b = sides.values()
    difference = (a["logprobs"] - b["logprobs"]).abs().mean().item()
    assert a["gradients"].keys() == b["gradients"].keys()
    vectors = [torch.cat([gradient.flatten() for gradient in side["gradients"].values()]) for side in (a, b)]
    cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0).item()
    show(mean_difference=difference, gradient_cosine=cosine)
    assert difference <= 0.05 and cosine >= 0.99


# --- runs of train.py


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ["tiny", "tiny_ppo"])
def test_learns_to_think(tmp_path, show, config, backend):
    """Trains the bundled model in NF4 for 24 steps."""
    if (config, backend) == ("tiny_ppo", "unsloth"):
        pytest.skip("one run with Unsloth is enough")
    settings = f"--config configs/{config}.yaml --backend {backend} --load-in-4bit --max-steps 24 --eval-questions 201"
    summary, _ = train(tmp_path / "run", f"{settings} --eval-steps 0 --save-steps 0")
    before, after = (summary["eval"][when]["accuracy"] for when in ("before", "after"))
    show(before=before, after=after, seconds=summary["seconds"]["total"], **summary["memory"])
    assert DRY or after >= 0.9


@pytest.mark.parametrize("optim", ["adamw_torch"] if DRY else ["paged_adamw_8bit"])
def test_resumed_run_is_bitwise_identical(tmp_path, optim):
    """The run is killed in the update of step 6 and resumed from the checkpoint of step 4."""
    settings = (
        f"{running.SHORT} {running.METHODS['grpo']} --device {DEVICE} --eval-steps 0 --load-in-4bit --optim {optim}"
    )
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    assert start(whole, f"{settings} --output-dir {whole}") == 0, running.read_output(whole)[-3000:]
    faults = {"rl.update:Updater:update": (6, signal.SIGKILL)}
    assert start(run, f"{settings} --output-dir {run}", faults) == -signal.SIGKILL
    assert start(run, f"--resume {run}") == 0, running.read_output(run)[-3000:]
    running.assert_same(run, whole)


@pytest.fixture(scope="session")
def measured_run(model_folder, tmp_path_factory):
    """Returns a function that trains a model in NF4 for three steps, and returns summary and metrics."""

    @functools.cache
    def run(name: str, backend: str) -> tuple[dict, list[dict]]:
        settings = (
            f"--model {model_folder(name)} --backend {backend} --load-in-4bit --max-steps 3 --prompts-per-step 8 "
            "--max-completion-length 256 --eval-questions 16 --eval-steps 0 --save-steps 0 --train-data sums "
            "--control random-reward --log-completions-steps 0"
        )
        return train(tmp_path_factory.mktemp("measured") / "run", settings)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"])
def test_memory_prediction(measured_run, show, name, backend):
    summary, metrics = measured_run(name, backend)
    memory = summary["memory"]
    ratio = memory["predicted_mb"] / memory["measured_mb"]
    seconds = {part: metrics[-1][f"time/{part}"] for part in ("rollout", "update")}
    show(predicted_mb=memory["predicted_mb"], measured_mb=memory["measured_mb"], ratio=ratio, **seconds)
    assert DRY or 0.85 <= ratio <= 1.15


@pytest.mark.skipif(not HAS_UNSLOTH, reason="no Unsloth")
def test_step_speed_against_transformers(measured_run, show):
    """Shows ratios of seconds; above 1, Unsloth is faster."""
    ours, unsloth = (measured_run("Qwen/Qwen3-1.7B", backend)[1][-1] for backend in ("transformers", "unsloth"))
    show(**{part: ours[part] / unsloth[part] for part in ("time/rollout", "time/update", "step_time")})


def test_recipe_fits_its_card(model_folder, tmp_path, show):
    """Two steps of the smallest Qwen3 recipe fit in 6 GB with prompts of about 256 tokens. No batch setting is halved."""
    config, _ = read_config(["--config", "configs/qwen3_0.6b_gsm8k.yaml"], "configs/tiny.yaml")
    settings = (
        f"--config configs/qwen3_0.6b_gsm8k.yaml --model {model_folder('Qwen/Qwen3-0.6B')} --system-prompt {'x' * 200} --max-steps 2 "
        "--eval-questions 8 --eval-steps 0 --save-steps 0 --train-data sums --control random-reward"
    )
    faults = {} if DRY else {"rl.model.policy::load_policy": (1, load_in_six_gigabytes)}
    summary, metrics = train(tmp_path / "run", settings + (" --optim adamw_torch" if DRY else ""), faults)
    memory = summary["memory"]
    show(step_time=metrics[-1]["step_time"], **memory)
    assert DRY or memory["rollout_batch_size"] == config.rollout_batch_size
    assert memory["max_tokens_per_micro_batch"] == config.max_tokens_per_micro_batch
    assert DRY or 0.85 <= memory["predicted_mb"] / memory["measured_mb"] <= 1.15


def test_out_of_memory_halves_the_batches(model_folder, tmp_path, show):
    """The run has 4 GB, and its micro-batches need far more."""
    requested = 32768
    settings = (
        f"--model {model_folder('Qwen/Qwen3-0.6B')} --backend transformers --load-in-4bit --max-steps 2 --eval-questions 8 --eval-steps 0 "
        f"--max-completion-length 128 --max-tokens-per-micro-batch {requested} --train-data sums --control random-reward"
    )
    fault = torch.OutOfMemoryError("CUDA out of memory") if DRY else load_in_four_gigabytes
    place = "rl.update::completion_logprobs" if DRY else "rl.model.policy::load_policy"
    summary, metrics = train(tmp_path / "run", settings, {place: (1, fault)})
    show(**summary["memory"])
    assert summary["finished"] and len(metrics) == 2
    assert summary["memory"]["max_tokens_per_micro_batch"] < requested


def load_in_four_gigabytes(config):
    return load_capped(config, 4)


def load_in_six_gigabytes(config):
    return load_capped(config, 6)


def load_capped(config, gigabytes: float):
    """Load the policy in a process that can allocate only the memory that a card of this size offers."""
    from rl.model.policy import load_policy

    total = torch.cuda.get_device_properties(0).total_memory
    context = 0.5 * GB  # memory of the CUDA context, outside of PyTorch's allocator
    torch.cuda.set_per_process_memory_fraction((gigabytes * GB - context) / total)
    return load_policy(config)
