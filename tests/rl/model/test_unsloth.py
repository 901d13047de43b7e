"""Tests of the Unsloth backend against the real package, through its CPU fallback on a machine without a GPU.

Unsloth must be imported before transformers and patches it permanently, so these tests run in a separate process and
environment (`make test-unsloth`), with the first version that runs on a CPU. The version in requirements.txt does not,
until its dependencies are available. Both backends load the same model with the same seed and must agree.
"""

import os

import pytest

if not os.environ.get("TEST_UNSLOTH"):
    pytest.skip("needs an environment with Unsloth: run make test-unsloth", allow_module_level=True)

import copy  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from rl.config import Config, ConfigError  # noqa: E402
from rl.model.backends import import_backend, set_mode  # noqa: E402

import_backend(Config(backend="unsloth"))

import torch  # noqa: E402
from conftest import copy_tiny, fill_lora  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from rl.critic import Critic  # noqa: E402
from rl.model.logprobs import completion_logprobs  # noqa: E402
from rl.model.lora import reloaded_adapter, save_adapter  # noqa: E402
from rl.model.policy import Question, load_policy  # noqa: E402
from rl.model.sampling import Sampling  # noqa: E402
from rl.rollout import rollout  # noqa: E402
from rl.run.checks import check_sampler  # noqa: E402
from rl.update import Updater  # noqa: E402

QUESTIONS = ["What is 3 + 4 + 5?", "Compute 9 - 2 + 1.", "1 + 1 = ?"]
BATCH = [[4, 30, 31, 32], [5, 40], [4, 30, 31, 32]], [[33, 34, 35, 36], [41], [37, 38]]


def load_with_backend(config, backend, noise=0.02):
    """Load a policy with a backend, and fill its LoRA with noise."""
    policy = load_policy(dataclasses.replace(config, backend=backend))
    assert policy.uses_unsloth == (backend == "unsloth")
    if noise:
        fill_lora(policy, noise)
    return policy


@pytest.fixture(params=[False, True], ids=["16 or 32 bits", "4 bits"])
def both(config, request, tmp_path):
    """The same policy loaded by Unsloth and by transformers. The model's generation_config must have no effect."""
    config.load_in_4bit = request.param
    config.model = copy_tiny(tmp_path / "model", generation_config={"repetition_penalty": 5.0})
    return [load_with_backend(config, backend) for backend in ("unsloth", "transformers")]


def gradients(policy, loss, module):
    policy.model.zero_grad()
    with policy.training():
        loss(module).backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def assert_close(a: dict, b: dict):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4, msg=name)


def test_backends_agree_on_log_probabilities_and_gradients(both):
    """Unsloth runs its own forward on right-padded rows without a mask, transformers our decoder on packed tokens."""
    a, b = both
    assert not a.shares_prompts and b.shares_prompts
    assert_close(*({n: p for n, p in policy.model.named_parameters() if "lora_" in n} for policy in both))
    with torch.no_grad():
        for x, y in zip(*(completion_logprobs(policy, *BATCH, with_entropy=True) for policy in both)):
            torch.testing.assert_close(x, y, atol=2e-5, rtol=0)
    assert_close(*(gradients(policy, lambda p: completion_logprobs(p, *BATCH)[0].sum(), policy) for policy in both))


def test_new_lora_equals_the_one_of_peft(config):
    a, b = (load_with_backend(config, backend, noise=0) for backend in ("unsloth", "transformers"))
    assert_close(*({n: p for n, p in policy.model.named_parameters() if "lora_A" in n} for policy in (a, b)))
    trained = [name for name, p in a.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2 and all("lora_" in name for name in trained)


def test_policy_without_adapter_is_the_reference(both):
    def scores(policy):
        with torch.no_grad(), policy.reference():
            return completion_logprobs(policy, *BATCH)[0]

    a, b = map(scores, both)
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert not torch.allclose(a, completion_logprobs(both[0], *BATCH)[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_critic_shares_the_base_and_has_separate_gradients(both, ppo, kind):
    ppo.critic = kind
    critics = []
    for policy in both:
        torch.manual_seed(0)
        critic = Critic(policy, ppo)
        torch.nn.init.normal_(critic.head.weight)
        for name, p in policy.model.named_parameters():
            if "lora_B.critic" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.02
        critics.append(critic)

    def values(critic):
        with critic.policy.training(), critic.active():
            return critic.values(*BATCH)[0]

    torch.testing.assert_close(*map(values, critics), atol=1e-4, rtol=0)
    critic_gradients = []
    for policy, critic in zip(both, critics):
        with critic.active():
            critic_gradients.append(gradients(policy, lambda c: c.values(*BATCH)[0].square().mean(), critic))
    if kind == "adapter":
        assert_close(*critic_gradients)
        assert all(".critic." in name for name in critic_gradients[0]) and len(critic_gradients[0]) == 4 * 7 * 2
    else:
        assert critic_gradients == [{}, {}]
    assert both[0].model.active_adapters == ["default"]


def test_training_context_switches_all_modules(both):
    policy = both[0]
    assert not policy.model.training
    with policy.training():
        assert all(module.training for module in policy.model.modules())
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("path", ["engine", "generate"])
def test_sampled_policy_is_the_trained_policy(both, path):
    """Both backends give the same greedy completions, and sampler and trainer the same log-probabilities."""
    greedy_completions = []
    for policy in both:
        policy = copy.copy(policy)
        if path == "generate" and policy.uses_unsloth:
            policy.decoder = None
        prompts = [policy.encode_prompt(question) for question in QUESTIONS]
        arguments = policy, prompts, 2, 12
        greedy_completions.append([e.completion_ids for e in rollout(*arguments, Sampling(0), torch.Generator(), 4)])
        episodes = rollout(*arguments, Sampling(), torch.Generator().manual_seed(1), 4)
        ids = [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]
        with torch.no_grad():
            logprobs, mask, _ = completion_logprobs(policy, *ids)
        sampled = torch.tensor([p for e in episodes for p in e.sampler_logprobs])
        torch.testing.assert_close(logprobs[mask], sampled, atol=1e-4, rtol=0)
        assert {e.finish_reason for e in episodes} <= {"stop", "length"}
        assert all(e.truncated == (e.completion_ids[-1] not in policy.eos_ids) for e in episodes)
        assert not any(token in policy.eos_ids for e in episodes for token in e.completion_ids[:-1])
    assert greedy_completions[0] == greedy_completions[1]


def test_sampler_check_falls_back_to_generate(both, monkeypatch):
    policy = both[0]
    questions = [Question({}, policy.encode_prompt(question)) for question in QUESTIONS]
    agreement = check_sampler(policy, questions)
    assert agreement.shift >= 3 and agreement.sampler < 1e-3 and policy.decoder
    monkeypatch.setattr("rl.model.decoder.active_loras", lambda module: iter(()))  # the engine ignores the LoRA
    agreement = check_sampler(policy, questions)
    assert policy.decoder is None and agreement.sampler < 1e-3  # `generate` does not ignore it


def test_saved_adapter_loads_in_both_backends(both, config, tmp_path):
    unsloth_policy, transformers_policy = both
    fill_lora(unsloth_policy, 0.04, seed=9)
    with torch.no_grad():
        expected = completion_logprobs(unsloth_policy, *BATCH)[0]
        save_adapter(unsloth_policy, tmp_path / "a")
        with reloaded_adapter(transformers_policy, tmp_path / "a"):
            torch.testing.assert_close(completion_logprobs(transformers_policy, *BATCH)[0], expected, atol=2e-5, rtol=0)
        config.adapter = str(tmp_path / "a")
        reloaded = load_with_backend(config, "unsloth", noise=0)
        torch.testing.assert_close(completion_logprobs(reloaded, *BATCH)[0], expected, atol=2e-5, rtol=0)
        fill_lora(reloaded, 0.0)
        with reloaded.reference():  # the frozen copy of the saved LoRA
            torch.testing.assert_close(completion_logprobs(reloaded, *BATCH)[0], expected, atol=2e-5, rtol=0)
    trained = [name for name, p in reloaded.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2 and all(".default." in name for name in trained)


def test_backends_agree_on_an_update(both, config):
    """Update on the same episodes, with a KL term in the loss."""
    config.beta = 0.05
    config.num_iterations = 2
    prompts = [both[0].encode_prompt(question) for question in QUESTIONS]
    episodes = rollout(both[0], prompts, 4, 16, Sampling(), torch.Generator().manual_seed(2), 12)
    for i, episode in enumerate(episodes):
        episode.advantages = torch.full((len(episode.completion_ids),), [1.0, -0.5, 0.0, -0.5][i % 4])
    metrics = [Updater(policy, None, config).update(copy.deepcopy(episodes)) for policy in both]
    for name in ("loss", "kl", "grad_norm", "entropy", "lora_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-6), name


def test_refuses_a_prompt_above_max_seq_length_instead_of_truncating_it(both):
    policy = both[0]
    policy.model.max_seq_length = 40
    policy.max_completion_length = 36
    with pytest.raises(ConfigError, match="row r1 .*context is 40"):
        policy.encode([{"id": "r1", "prompt": QUESTIONS[0]}])


def test_other_families_use_transformers(config, tmp_path):
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=128)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("data/tiny").save_pretrained(tmp_path)
    policy = load_policy(dataclasses.replace(config, backend="unsloth", model=str(tmp_path)))
    assert not policy.uses_unsloth and "GPTNeoX" in policy.fallback_reason


def test_roll_out_works_after_training_mode(both):
    """Unsloth switches the KV cache on and off with its modes."""
    policy = both[0]
    set_mode(policy.model, True, uses_unsloth=True)
    rollout(policy, [policy.encode_prompt(QUESTIONS[0])], 2, 4, Sampling(), torch.Generator(), 2)
    assert not policy.model.training and policy.model.config.use_cache


def test_refuses_missing_weights(config, tmp_path):
    folder = shutil.copytree("data/tiny", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="^model: .* model.layers.1.mlp.down_proj.weight"):
        load_policy(dataclasses.replace(config, backend="unsloth", model=str(folder)))


def test_loads_an_adapter_with_patterns_and_refuses_dora(both, config, tmp_path):
    """Policy and frozen reference are equal at the start. Unsloth does not support DoRA."""
    save_adapter(both[0], tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"alpha_pattern": {"down_proj": 64}}))
    policy = load_with_backend(dataclasses.replace(config, adapter=str(tmp_path / "a")), "unsloth", noise=0)
    with torch.no_grad():
        trained = completion_logprobs(policy, *BATCH)[0]
        with policy.reference():
            torch.testing.assert_close(completion_logprobs(policy, *BATCH)[0], trained)
    file.write_text(json.dumps(saved | {"use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora.*set backend to transformers"):
        load_with_backend(dataclasses.replace(config, adapter=str(tmp_path / "a")), "unsloth")


@pytest.mark.parametrize("settings", [[], ["--algorithm", "ppo"]], ids=["grpo", "ppo"])
def test_runs_and_resumes(tmp_path, settings):
    common = (
        "--backend unsloth --load-in-4bit --gradient-checkpointing --prompts-per-step 4 --num-generations 4".split()
    )
    common += "--max-completion-length 32 --eval-questions 12 --learning-rate 1e-3 --save-steps 1".split()
    run = tmp_path / "run"
    arguments = [*common, *settings, "--max-steps", "3", "--output-dir", str(run)]
    result = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "data/tiny (Unsloth)" in result.stdout and "Double" not in result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["versions"]["unsloth"]
    assert "greedy" in result.stdout  # the saved adapter was compared with the policy in memory
    resumed = subprocess.run(
        [sys.executable, "train.py", "--resume", str(run), "--max-steps", "4", "--accept-changes"],
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def test_requirements_txt_can_be_installed_together(tmp_path):
    """pip resolves all packages for a GPU. Nothing is installed; for most packages only metadata is fetched."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    report = tmp_path / "report.json"
    result = subprocess.run(
        [*command, "--report", str(report), "-r", "requirements.txt"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    resolved = {package["name"].lower(): package["version"] for package in packages}
    pinned = dict(
        line.split("==")
        for name in ("requirements.txt", "requirements-cpu.txt")
        for line in Path(name).read_text().splitlines()
        if "==" in line
    )
    assert {name: resolved[name.lower()].partition("+")[0] for name in pinned} == pinned
