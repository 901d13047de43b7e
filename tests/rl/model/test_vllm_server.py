"""Roll-outs from a server that speaks vLLM's protocol with the bundled tiny model: learning, restarts, and broken servers."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from conftest import ROOT, fill_lora, lines

import train
from rl.config import Config, ConfigError, RunError
from rl.model.policy import load_policy
from rl.model.sampling import Sampling
from rl.model.vllm_server import RANKS, launch_command
from rl.rollout import rollout
from rl.run.checks import check_sampler

SETTINGS = "--max-steps 3 --prompts-per-step 4 --num-generations 4 --eval-questions 6 --eval-steps 2 --save-steps 1 --train-questions 30 --max-completion-length 40 --device cpu --rollout vllm"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(port, fault=""):
    command = [sys.executable, "tests/vllm_protocol.py", str(port), fault]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def url():
    port = free_port()
    process = start(port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def connected(url, **settings):
    config = Config(rollout="vllm", rollout_url=url, device="cpu", max_completion_length=24, **settings)
    policy = load_policy(config)
    return (
        config,
        policy,
        policy.encode([{"id": str(i), "prompt": f"What is {i} + 3?", "task": "sums"} for i in range(5)]),
    )


def test_completions_come_from_the_current_lora_with_its_logprobs(url):
    config, policy, questions = connected(url)
    fill_lora(policy, 0.05)
    agreement = check_sampler(policy, questions)
    assert agreement.shift > 1 and agreement.sampler < 1e-3
    prompts = [question.prompt_ids for question in questions]

    def sample():
        return rollout(policy, prompts, 3, 24, Sampling(1.0), torch.Generator().manual_seed(1), 512)

    episodes = sample()
    assert [e.prompt_ids for e in episodes] == [prompt for prompt in prompts for _ in range(3)]
    assert all(len(e.completion_ids) == len(e.sampler_logprobs) <= 24 for e in episodes)
    assert all(e.truncated == (e.completion_ids[-1] not in policy.eos_ids) for e in episodes)
    server = policy.server
    first = server.publish(policy)
    assert server.publish(policy) == first  # unchanged weights are not loaded again
    names = [first]
    for scale in (0.01, 0.02, 0.03):
        fill_lora(policy, scale)
        names.append(server.publish(policy))
    assert len(set(names)) == 4 and server.loaded == names[-2:]
    with policy.reference():
        assert server.publish(policy) == "data/tiny"


@pytest.mark.parametrize(
    "fault, message",
    [
        ("ignores", "the server does not sample from the trained policy"),
        pytest.param("stale", "the server does not sample from the trained policy", marks=pytest.mark.slow),
        ("prompt", "the server answers another prompt than was sent"),
        pytest.param("name", "the server answers with data/tiny in place of ponder-", marks=pytest.mark.slow),
        pytest.param("replicas", "or has replicas with different LoRAs", marks=pytest.mark.slow),
    ],
)
def test_refuses_a_server(fault, message):
    port = free_port()
    process = start(port, fault)
    try:
        _, policy, questions = connected(f"http://127.0.0.1:{port}")
        fill_lora(policy, 0.05)
        with pytest.raises((ConfigError, RunError), match=message):
            check_sampler(policy, questions)
    finally:
        process.kill()
        process.wait()


def test_no_server_is_one_line():
    with pytest.raises(ConfigError, match="rollout_url: no vLLM server answers at http://127.0.0.1:9"):
        connected("http://127.0.0.1:9")


@pytest.mark.parametrize("status, text", [(404, "Not Found"), (500, "LoRA rank 16 is greater than max_lora_rank 8")])
def test_a_server_that_cannot_load_a_lora(url, status, text, monkeypatch):
    _, policy, questions = connected(url)
    monkeypatch.setattr(policy.server.client, "post", lambda path, json: httpx.Response(status, text=text))
    with pytest.raises(ConfigError, match=f"{status} {text}"):
        check_sampler(policy, questions)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda body: body["choices"].pop(), "returns 1 of 2 completions"),
        (lambda body: body["choices"][0]["token_ids"].append(1), "without a log-probability for each token"),
        (lambda body: body["choices"][0].pop("token_ids"), "has no 'token_ids': vLLM 0.11 or newer"),
        (lambda body: body["choices"][1]["token_ids"].__setitem__(1, 6), "ends completions at other tokens"),
    ],
)
def test_refuses_an_incomplete_answer(url, change, message, monkeypatch):
    _, policy, questions = connected(url)
    server = policy.server
    choice = {"token_ids": [5, min(policy.eos_ids)], "prompt_token_ids": [3], "finish_reason": "stop"}
    choices = [choice | {"index": i, "logprobs": {"token_logprobs": [-1.0, -0.5]}} for i in range(2)]
    body = json.loads(json.dumps({"model": "lora", "choices": choices}))
    answer = ([5, min(policy.eos_ids)], [-1.0, -0.5], False)
    monkeypatch.setattr(server, "_post", lambda path, request: httpx.Response(200, json=body))
    assert server.complete("lora", [3], 2, 8, Sampling(), 0, policy.eos_ids) == [answer, answer]
    change(body)
    with pytest.raises(RunError, match=message):
        server.complete("lora", [3], 2, 8, Sampling(), 0, policy.eos_ids)


def test_prompts_that_exceed_the_servers_context_are_refused(url, monkeypatch):
    _, policy, questions = connected(url)
    policy.server.max_model_len = 30
    with pytest.raises(ConfigError, match="the model's context is 30"):
        policy.encode([question.row for question in questions])


def test_page_and_export_of_a_run_need_no_server(url, tmp_path):
    from export.pipeline import Export
    from ui.models import Models

    folder = tmp_path / "run"
    train.main([*SETTINGS.split(), "--max-steps", "1", "--rollout-url", url, "--output-dir", str(folder)])
    config = Config(rollout="vllm", rollout_url="http://127.0.0.1:9")
    assert Export(folder / "checkpoints/step_000001", config, None, "cpu").load().server is None
    runs = SimpleNamespace(get=lambda name: SimpleNamespace(config=config))
    settings, _ = Models.settings(SimpleNamespace(runs=runs, choose_device=lambda config: "cpu"), "run")
    assert settings.rollout == "local"


def test_the_dry_run_prints_the_command_that_starts_the_server(capsys):
    train.main(["--dry-run", "--rollout", "vllm", "--lora-r", "20", "--rollout-url", "http://gpu:8123"])
    output = capsys.readouterr().out
    assert "vllm serve data/tiny --enable-lora --max-lora-rank 32 --max-loras 2 " in output and "--port 8123" in output
    assert launch_command(Config(lora_r=RANKS[-1]), 10).count("--max-lora-rank 512")


@pytest.mark.slow
def test_a_run_survives_a_restart_of_the_server(tmp_path):
    """The new server knows no LoRA, so the run loads it again."""
    port = free_port()
    first = start(port)
    arguments = [*SETTINGS.split(), "--rollout-url", f"http://127.0.0.1:{port}", "--output-dir", str(tmp_path / "run")]
    run = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.05)
        assert run.poll() is None, run.communicate()[0]
    first.kill()
    first.wait()
    second = start(port)
    try:
        output, _ = run.communicate(timeout=150)
    finally:
        second.kill()
        second.wait()
    assert run.returncode == 0, output
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3 and "Saved " in output


def test_episodes_are_played_through_the_server(url, tmp_path):
    folder = tmp_path / "run"
    game = "--train-data environments.py:GuessNumber --reward-funcs wins --max-turns 3 --max-completion-length 90 --max-steps 1"
    train.main([*SETTINGS.split(), *game.split(), "--rollout-url", url, "--output-dir", str(folder)])
    records = lines(folder / "rollouts/000001.jsonl")
    assert len(records) == 16 and all(record["turns"] for record in records)
    assert any(len(record["turns"]) > 1 for record in records)


@pytest.mark.slow
def test_the_main_job_is_learned(url, tmp_path):
    folder = tmp_path / "run"
    train.main(["--rollout", "vllm", "--rollout-url", url, "--output-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval"]["after"]["accuracy"] >= 0.95
    assert "sampling/importance_sampling_ratio/mean" in lines(folder / "metrics.jsonl")[0]
