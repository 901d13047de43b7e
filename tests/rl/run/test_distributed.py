"""Several processes of one run: equal gradients, one run folder, and no process that waits forever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, fill_lora, lines

from rl.advantages import Advantages
from rl.config import Config
from rl.critic import Critic
from rl.model import distributed
from rl.model.policy import load_policy
from rl.rollout import collect
from rl.update import Updater

SETTINGS = "--max-steps 4 --prompts-per-step 5 --num-generations 4 --eval-questions 7 --eval-steps 2 --save-steps 1 --train-questions 30 --max-completion-length 40 --log-completions-steps 0 --device cpu"


def small_config(algorithm):
    settings = {"beta": 0.02} if algorithm in ("ppo", "dpo") else {}
    return Config(
        algorithm=algorithm, prompts_per_step=5, num_generations=4, max_completion_length=32, device="cpu", **settings
    )


def make_parts(config):
    """Return the objects of a step, with noise in the LoRA, so that policy and reference differ."""
    from data import QuestionSampler, load_questions
    from grading import load_rewards

    policy = load_policy(config)
    fill_lora(policy, 0.02)
    rows, _, _ = load_questions(config)
    torch.manual_seed(0)
    updater = Updater(policy, Critic(policy, config) if config.has_critic else None, config)
    rewards = load_rewards("rewards.py")
    return policy, QuestionSampler(policy.encode(rows), 0, 0), rewards, updater


def gradients(config, policy, rewards, updater, episodes):
    """Return the gradients of one optimizer step over the episodes, of the policy and of the critic, and the counts."""
    updater.fill_values(episodes)
    Advantages(policy, rewards, config).compute(episodes)
    if updater.uses_pairs:
        with policy.reference():
            updater.fill_logprobs(episodes, "reference_logprobs")
    backward = updater.backward_pairs if updater.uses_pairs else updater.backward
    counts = dict(updater.accumulate(updater.optimizer, backward, episodes))
    found = [p.grad.clone() for p in updater.optimizer.parameters]
    if updater.critic:
        with updater.critic.active():
            updater.accumulate(updater.critic_optimizer, updater.backward_values, episodes)
        found += [p.grad.clone() for p in updater.critic_optimizer.parameters]
    return found, counts


ALGORITHMS = ("grpo", "ppo", "reinforce_plus_plus", "dpo")


def work(rank, world_size, port, folder):
    """In a process of several: compute the gradients of the saved episodes; process 0 writes them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.join(Config(device="cpu"))
    for algorithm in ALGORITHMS:
        config = small_config(algorithm)
        policy, _, rewards, updater = make_parts(config)
        config.max_tokens_per_micro_batch = 300 if rank else 150  # the processes need not have equal micro-batches
        episodes = torch.load(folder / f"{algorithm}.pt", weights_only=False)
        result = gradients(config, policy, rewards, updater, episodes)
        if rank == 0:
            torch.save(result, folder / f"{algorithm}_gradients.pt")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_one_process(tmp_path, world_size):
    expected = {}
    for algorithm in ALGORITHMS:
        config = small_config(algorithm)
        policy, questions, rewards, updater = make_parts(config)
        episodes = collect(policy, questions, rewards, torch.Generator().manual_seed(0), config, 1)
        for episode in episodes:
            episode.completion.environment = None
        assert len({e.reward for e in episodes}) > 1
        torch.save(episodes, tmp_path / f"{algorithm}.pt")
        expected[algorithm] = gradients(config, policy, rewards, updater, episodes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (world_size, port, tmp_path), world_size)
    for algorithm, (wanted, counts) in expected.items():
        found, found_counts = torch.load(tmp_path / f"{algorithm}_gradients.pt")
        assert any(gradient.abs().max() > 1e-4 for gradient in wanted)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        assert found_counts == pytest.approx(counts, abs=1e-4)


# --- whole runs


def torchrun(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "train.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def test_two_processes_write_one_run_and_one_continues_it(tmp_path):
    folder = tmp_path / "run"
    more = "--algorithm ppo --dynamic-sampling 1 --early-stopping 5".split()
    status, output = finish(torchrun(2, *SETTINGS.split(), *more, "--output-dir", folder))
    assert status == 0, output
    assert output.count("step 1/4") == 1 and output.count("Saved ") == 1
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    for file in (folder / "rollouts").iterdir():
        records = lines(file)
        assert len(records) >= 20 and len(records) % 4 == 0
        assert len({record["prompt_id"] for record in records}) >= 5
    assert len(lines(folder / "eval/after.jsonl")) == 9
    state = torch.load(folder / "checkpoints/step_000004/trainer_state.pt", weights_only=True)
    first, second = (process["generator"] for process in state["random"])
    assert not torch.equal(first, second)
    resume = ["--resume", folder, "--max-steps", "5", "--accept-changes"]
    status, output = finish(torchrun(1, *resume))
    assert status == 0 and "the checkpoint is of 2 processes" in output, output


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_gives_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(torchrun(2, *SETTINGS.split(), "--output-dir", whole))[0] == 0
    process = torchrun(2, *SETTINGS.split(), "--output-dir", parts)
    while not (parts / "checkpoints/last").exists():
        time.sleep(0.05)
    (parts / "STOP").touch()
    assert finish(process)[0] == 0
    assert len(lines(parts / "metrics.jsonl")) < 4
    assert finish(torchrun(2, "--resume", parts))[0] == 0
    name = "checkpoints/step_000004/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    for file in (whole / "rollouts").iterdir():
        assert lines(file) == lines(parts / "rollouts" / file.name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_others_and_the_run_resumes(tmp_path, victim):
    folder = tmp_path / "run"
    process = torchrun(2, *SETTINGS.split(), "--max-steps", "200", "--output-dir", folder)
    while not (folder / "checkpoints/step_000002").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(victim)]
    start = time.monotonic()
    workers[0].send_signal(signal.SIGKILL)
    status, output = finish(process)
    assert status != 0 and time.monotonic() - start < 30
    if victim:
        assert len(re.findall("another process of this run has stopped|SIGTERM: stopping", output)) == 1, output
    assert f'{ROOT}/train.py", line' not in output, output  # torchrun has a traceback of its own
    step = len(lines(folder / "metrics.jsonl"))
    resume = ["--resume", folder, "--max-steps", step + 2, "--accept-changes"]
    assert finish(torchrun(2, *resume))[0] == 0
    assert json.loads((folder / "summary.json").read_text())["finished"]


@pytest.mark.slow
def test_a_reward_error_in_any_process_is_reported_once_with_the_completions(tmp_path):
    """Only the second process gets the question on which the function fails."""
    (tmp_path / "rewards.py").write_text(
        "from grading import reward\n\n@reward\ndef fails(completion):\n"
        "    import os\n    return 1 / (os.environ['RANK'] == '0' or completion.step != 2)\n"
    )
    folder = tmp_path / "run"
    more = ["--rewards-file", tmp_path / "rewards.py", "--output-dir", folder]
    status, output = finish(torchrun(2, *SETTINGS.split(), *more))
    assert status != 0 and output.count("ZeroDivisionError") == 1, output
    assert (folder / "failed.jsonl").exists() and str(folder / "failed.jsonl") in output


@pytest.mark.slow
def test_evaluation_of_two_processes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--eval-only", "--eval-questions", 9, "--device", "cpu"]
    assert finish(torchrun(1, *arguments, "--output-dir", one))[0] == 0
    assert finish(torchrun(2, *arguments, "--output-dir", two))[0] == 0
    (first,) = (lines(file) for file in one.glob("eval/*.jsonl"))
    (second,) = (lines(file) for file in two.glob("eval/*.jsonl"))
    assert [line["completion"] for line in first] == [line["completion"] for line in second]


def test_one_process_exchanges_nothing(policy):
    items = [1, 2, 3]
    assert distributed.share(items) == items == distributed.gather_shares(items, 3)
    assert distributed.all_ranks("x") == ["x"]
    parameters = policy.trainable_parameters()
    distributed.sum_gradients(parameters)
    distributed.check_equal(parameters)
    assert all(p.grad is None for p in parameters)
    assert Path.cwd() == ROOT
