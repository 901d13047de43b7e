"""PPO: actor, critic and reference on one base model, and the separation of their gradients."""

import math
from collections import Counter

import pytest
import torch
from conftest import Rewards, fill_lora, vectors, with_rewards

from rl.advantages import Advantages
from rl.config import Config, ConfigError
from rl.critic import Critic
from rl.model.logprobs import completion_logprobs
from rl.model.lora import save_adapter
from rl.model.policy import load_policy
from rl.update import Updater, prompt_and_completion_ids

# --- shared base weights


def test_actor_critic_and_reference_share_one_base_model(ppo):
    """The parameters are one base model, two adapters and one head."""
    policy = load_policy(ppo)
    lora = sum(p.numel() for p in policy.trainable_parameters())
    base = sum(p.numel() for p in policy.model.parameters()) - lora
    critic = Critic(policy, ppo)
    parameters = {id(p): p.numel() for p in [*policy.model.parameters(), *critic.parameters]}
    assert base == 804_224 and sum(parameters.values()) == base + 2 * lora + (128 + 1)
    assert sum(p.numel() for p in critic.parameters) == lora + 129
    assert sum(p.numel() for p in policy.trainable_parameters()) == lora
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all(".default." in name for name in names)


def test_critic_head_adds_only_its_own_weights(ppo):
    ppo.critic = "head"
    policy = load_policy(ppo)
    before = sum(p.numel() for p in policy.model.parameters())
    critic = Critic(policy, ppo)
    assert sum(p.numel() for p in policy.model.parameters()) == before
    assert sum(p.numel() for p in critic.parameters) == 129


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_gradients_of_policy_and_critic_are_separate(policy, episodes, ppo, kind):
    ppo.critic = kind
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    policy_parameters, critic_parameters = policy.trainable_parameters(), critic.parameters
    before = vectors(policy_parameters), vectors(critic_parameters)
    updater.critic_step(episodes, Counter())
    assert torch.equal(vectors(policy_parameters), before[0]) and all(p.grad is None for p in policy_parameters)
    assert not torch.equal(vectors(critic_parameters), before[1])
    before = vectors(policy_parameters), vectors(critic_parameters)
    updater.policy_step(episodes, Counter())
    assert not torch.equal(vectors(policy_parameters), before[0])
    assert torch.equal(vectors(critic_parameters), before[1]) and all(p.grad is None for p in critic_parameters)
    assert [p.requires_grad for p in policy_parameters] == [True] * len(policy_parameters)


def test_critic_learns_on_layers_without_a_policy_lora(policy, episodes, ppo, tmp_path):
    """If the starting adapter covers two of the matrices, the critic's LoRA still covers and trains all of them."""
    import peft

    base = policy.model.unload()
    small = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    small.save_pretrained(tmp_path / "small")
    ppo.adapter = str(tmp_path / "small")
    policy = load_policy(ppo)
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight)
    with critic.active():
        fill_lora(policy, 0.1)
        values, mask = critic.values(*prompt_and_completion_ids(episodes))
        values.sum().backward()
        assert all(
            p.grad is not None and p.grad.any() for name, p in policy.model.named_parameters() if ".critic." in name
        )
        decoder = policy.decoder
        policy.decoder = None
        expected, _ = critic.values(*prompt_and_completion_ids(episodes))
        policy.decoder = decoder
    torch.testing.assert_close(values[:, :-1][mask], expected[:, :-1][mask], atol=1e-3, rtol=1e-3)


def test_critic_changes_neither_policy_nor_reference(policy, episodes, ppo):
    """The critic's weights do not change a bit of the log-probabilities of policy and reference. KL at step 0 is 0."""
    fill_lora(policy, 0.0)  # the state at step 0
    ids = prompt_and_completion_ids(episodes)
    with torch.no_grad():
        before = completion_logprobs(policy, *ids)[0]
    critic = Critic(policy, ppo)
    with critic.active():
        fill_lora(policy, 0.5)
    for parameter in critic.head.parameters():
        parameter.data.fill_(0.3)
    ppo.beta = 0.1
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(policy, *ids)[0], before)
    metrics = Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    assert metrics["kl"] == 0.0
    assert all(torch.equal(e.old_logprobs, e.reference_logprobs) for e in episodes)
    assert all(e.values.abs().max() > 0.1 for e in episodes)


def test_values_depend_only_on_earlier_tokens(policy, episodes, ppo):
    """Compare V_t with the head on the model's own hidden states of each unpadded row, and change later tokens."""
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    with critic.active(), torch.no_grad():
        fill_lora(policy, 0.1)
        values, mask = critic.values(*prompt_and_completion_ids(episodes))
        assert values[:, 0].abs().max() > 0.01
        for row, e in zip(values, episodes):
            ids = torch.tensor([e.prompt_ids + e.completion_ids])
            hidden = policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            expected = critic.head(hidden.float()).squeeze(-1)[len(e.prompt_ids) - 1 :]
            assert len(expected) == len(e.completion_ids) + 1
            torch.testing.assert_close(row[: len(expected)], expected, atol=3e-5, rtol=3e-5)
        other = [e.completion_ids[:3] + [9] * (len(e.completion_ids) - 3) for e in episodes]
        changed, _ = critic.values([e.prompt_ids for e in episodes], other)
    torch.testing.assert_close(changed[:, :4], values[:, :4], atol=1e-5, rtol=1e-5)
    assert mask.sum() == sum(len(e.completion_ids) for e in episodes)


def test_values_start_at_zero_and_are_learnt(policy, episodes, ppo):
    ppo.critic_learning_rate = 1e-2
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    estimator = Advantages(policy, Rewards, ppo)
    with_rewards(episodes, [1.0 if i < 8 else 0.0 for i in range(16)])
    losses, explained = [], []
    for _ in range(20):
        updater.fill_values(episodes)
        explained.append(estimator.compute(episodes)["explained_variance"])
        totals = Counter()
        updater.critic_step(episodes, totals)
        losses.append(totals["value_loss"])
    assert explained[0] == 0.0 and losses[0] == pytest.approx(0.5 * mean_squared_return(episodes))
    assert explained[-1] > 0.9 and losses[-1] < losses[0] / 10


def mean_squared_return(episodes):
    return torch.cat([e.returns for e in episodes]).square().mean().item()


def test_critic_warmup_does_not_update_the_policy(policy, episodes, ppo):
    ppo.critic_warmup_steps = 2
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    estimator = Advantages(policy, Rewards, ppo)
    is_updated = []
    for _ in range(3):
        updater.fill_values(episodes)
        estimator.compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
        before = vectors(policy.trainable_parameters()), vectors(critic.parameters)
        metrics = updater.update(episodes)
        is_updated.append(not torch.equal(vectors(policy.trainable_parameters()), before[0]))
        assert not torch.equal(vectors(critic.parameters), before[1])
    assert is_updated == [False, False, True] and metrics["updates"] == 1


def test_critic_warmup_needs_a_critic(policy, episodes, config):
    """Without a critic the setting has no effect. With one it must leave steps for the policy."""
    config.critic_warmup_steps = 2
    assert Updater(policy, None, config).update(episodes)["updates"] == 1
    with pytest.raises(ConfigError, match="critic_warmup_steps .2. must be less than max_steps .2."):
        Config(algorithm="ppo", critic_warmup_steps=2, max_steps=2).check()


@pytest.mark.parametrize("budget", [1, 100])
def test_critic_gradient_does_not_depend_on_micro_batches(policy, episodes, ppo, budget):
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    gradients = []
    updater.critic_optimizer.step = lambda: gradients.append(
        torch.cat([p.grad.flatten() for p in critic.parameters if p.grad is not None])
    )
    for ppo.max_tokens_per_micro_batch in (10**6, budget):
        updater.critic_step(episodes, Counter())
        for parameter in critic.parameters:
            parameter.grad = None
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-6, rtol=1e-5)


def test_fp16_with_a_critic_and_fewer_groups_than_mini_batches(ppo, episodes):
    ppo.dtype, ppo.num_mini_batches = "float16", 3
    policy = load_policy(ppo)
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    subset = episodes[:8]
    updater.fill_values(subset)
    Advantages(policy, Rewards, ppo).compute(with_rewards(subset, [1.0, 0.0, 0.0, 1.0] * 2))
    metrics = updater.update(subset)
    assert metrics["updates"] == 2 and metrics["skipped_updates"] == 0 and metrics["critic_grad_norm"] > 0


def test_target_kl_ends_the_epochs(policy, episodes, ppo):
    ppo.num_iterations, ppo.learning_rate, ppo.target_kl = 6, 0.02, 0.01
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    metrics = updater.update(episodes)
    assert 1 <= metrics["updates"] < 6 and metrics["policy/approxkl_avg"] > 0
    assert updater.critic_optimizer.schedule.last_epoch == updater.optimizer.schedule.last_epoch == 6
    ppo.target_kl = 1e6
    assert updater.update(episodes)["updates"] == 6


def test_approx_kl_uses_tokens_of_the_old_policy(policy, episodes, ppo):
    """KL(old || new) is estimated by r - 1 - log r, which is linear in log r for tokens that become unlikely."""
    ppo.num_iterations = 2
    updater = Updater(policy, Critic(policy, ppo), ppo)
    for e in episodes:
        e.advantages = torch.ones(len(e.completion_ids))
    updater.fill_logprobs(episodes, "old_logprobs")
    episodes[0].old_logprobs[0] += 10.0
    totals = Counter()
    updater.policy_step(episodes, totals)
    assert totals["approx_kl"] == pytest.approx(math.exp(-10) - 1 + 10, abs=1e-3)


def test_ppo_from_a_saved_adapter(policy, episodes, ppo, tmp_path):
    """The reference is a frozen copy of the starting adapter, so that the KL is exactly 0 at the first step."""
    save_adapter(policy, tmp_path / "saved")
    ppo.adapter, ppo.beta = str(tmp_path / "saved"), 0.1
    loaded = load_policy(ppo)
    critic = Critic(loaded, ppo)
    updater = Updater(loaded, critic, ppo)
    estimator = Advantages(loaded, Rewards, ppo)
    frozen = {n: p.clone() for n, p in loaded.model.named_parameters() if ".reference." in n}
    kls = []
    for _ in range(2):
        updater.fill_values(episodes)
        kls.append(estimator.compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))["kl"])
        updater.update(episodes)
        for e in episodes:
            e.old_logprobs = e.reference_logprobs = None
    assert kls[0] == 0.0 != kls[1]
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in loaded.model.named_parameters() if n in frozen)
