"""PPO: one base model for actor, critic and reference, and whose gradients go where."""

import math
from collections import Counter

import pytest
import torch
from conftest import Rewards, fill_lora, marked, vectors

from rl.advantages import Advantages
from rl.config import Config, ConfigError
from rl.critic import Critic
from rl.model.logprobs import completion_logprobs
from rl.model.policy import load_policy, save_adapter
from rl.update import Updater, prompt_and_completion_ids

# --- one set of weights


def test_actor_critic_and_reference_are_one_base_model(ppo):
    """Base once, two adapters, one head."""
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


def test_the_head_alone_adds_its_weights_only(ppo):
    ppo.critic = "head"
    policy = load_policy(ppo)
    before = sum(p.numel() for p in policy.model.parameters())
    critic = Critic(policy, ppo)
    assert sum(p.numel() for p in policy.model.parameters()) == before
    assert sum(p.numel() for p in critic.parameters) == 129


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_gradients_of_policy_and_critic_stay_apart(policy, episodes, ppo, kind):
    ppo.critic = kind
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    of_policy, of_critic = policy.trainable_parameters(), critic.parameters
    before = vectors(of_policy), vectors(of_critic)
    updater.critic_step(episodes, Counter())
    assert torch.equal(vectors(of_policy), before[0]) and all(p.grad is None for p in of_policy)
    assert not torch.equal(vectors(of_critic), before[1])
    before = vectors(of_policy), vectors(of_critic)
    updater.policy_step(episodes, Counter())
    assert not torch.equal(vectors(of_policy), before[0])
    assert torch.equal(vectors(of_critic), before[1]) and all(p.grad is None for p in of_critic)
    assert [p.requires_grad for p in of_policy] == [True] * len(of_policy)


def test_the_critic_learns_on_layers_that_the_policys_lora_leaves_out(policy, episodes, ppo, tmp_path):
    """A run that goes on from a LoRA on two of the matrices: the critic's is on all of them, and every one is trained."""
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
        decoder, policy.decoder = policy.decoder, None
        expected, _ = critic.values(*prompt_and_completion_ids(episodes))
        policy.decoder = decoder
    torch.testing.assert_close(values[:, :-1][mask], expected[:, :-1][mask], atol=1e-3, rtol=1e-3)


def test_the_critic_changes_neither_policy_nor_reference(policy, episodes, ppo):
    """With another critic the policy's and the reference's log-probabilities are the same to the bit, and KL at step 0 is 0."""
    fill_lora(policy, 0.0)  # as at step 0
    ids = prompt_and_completion_ids(episodes)
    with torch.no_grad():
        plain = completion_logprobs(policy, *ids)[0]
    critic = Critic(policy, ppo)
    with critic.active():
        fill_lora(policy, 0.5)
    for parameter in critic.head.parameters():
        parameter.data.fill_(0.3)
    ppo.beta = 0.1
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(policy, *ids)[0], plain)
    metrics = Advantages(policy, Rewards, ppo).compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    assert metrics["kl"] == 0.0
    assert all(torch.equal(e.old_logprobs, e.reference_logprobs) for e in episodes)
    assert all(e.values.abs().max() > 0.1 for e in episodes)


def test_values_are_read_before_each_token(policy, episodes, ppo):
    """V_t depends on the tokens before t alone; row by row, unpadded, from the model's own hidden states."""
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
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        other = [e.completion_ids[:3] + [9] * (len(e.completion_ids) - 3) for e in episodes]
        changed, _ = critic.values([e.prompt_ids for e in episodes], other)
    torch.testing.assert_close(changed[:, :4], values[:, :4], atol=1e-5, rtol=1e-5)
    assert mask.sum() == sum(len(e.completion_ids) for e in episodes)


def test_values_begin_at_zero_and_are_learnt(policy, episodes, ppo):
    ppo.critic_learning_rate = 1e-2
    critic = Critic(policy, ppo)
    updater, teacher = Updater(policy, critic, ppo), Advantages(policy, Rewards, ppo)
    marked(episodes, [1.0 if i < 8 else 0.0 for i in range(16)])
    losses, explained = [], []
    for _ in range(20):
        updater.fill_values(episodes)
        explained.append(teacher.compute(episodes)["explained_variance"])
        totals = Counter()
        updater.critic_step(episodes, totals)
        losses.append(totals["value_loss"])
    assert explained[0] == 0.0 and losses[0] == pytest.approx(0.5 * returns_squared(episodes))
    assert explained[-1] > 0.9 and losses[-1] < losses[0] / 10


def returns_squared(episodes):
    return torch.cat([e.returns for e in episodes]).square().mean().item()


def test_warm_up_leaves_the_policy_alone(policy, episodes, ppo):
    ppo.critic_warmup_steps = 2
    critic = Critic(policy, ppo)
    updater, teacher = Updater(policy, critic, ppo), Advantages(policy, Rewards, ppo)
    moved = []
    for _ in range(3):
        updater.fill_values(episodes)
        teacher.compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
        before = vectors(policy.trainable_parameters()), vectors(critic.parameters)
        metrics = updater.update(episodes)
        moved.append(not torch.equal(vectors(policy.trainable_parameters()), before[0]))
        assert not torch.equal(vectors(critic.parameters), before[1])
    assert moved == [False, False, True] and metrics["updates"] == 1


def test_warm_up_is_the_critics_alone(policy, episodes, config):
    """Without a critic the setting is of no effect; with one it may not take the whole run."""
    config.critic_warmup_steps = 2
    assert Updater(policy, None, config).update(episodes)["updates"] == 1
    with pytest.raises(ConfigError, match="critic_warmup_steps .2. must be less than max_steps .2."):
        Config(algorithm="ppo", critic_warmup_steps=2, max_steps=2).check()


@pytest.mark.parametrize("budget", [1, 100])
def test_the_critics_gradient_does_not_depend_on_the_split(policy, episodes, ppo, budget):
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
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
    few = episodes[:8]
    updater.fill_values(few)
    Advantages(policy, Rewards, ppo).compute(marked(few, [1.0, 0.0, 0.0, 1.0] * 2))
    metrics = updater.update(few)
    assert metrics["updates"] == 2 and metrics["skipped_updates"] == 0 and metrics["critic_grad_norm"] > 0


def test_target_kl_ends_the_epochs(policy, episodes, ppo):
    ppo.num_iterations, ppo.learning_rate, ppo.target_kl = 6, 0.02, 0.01
    critic = Critic(policy, ppo)
    updater = Updater(policy, critic, ppo)
    updater.fill_values(episodes)
    Advantages(policy, Rewards, ppo).compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    metrics = updater.update(episodes)
    assert 1 <= metrics["updates"] < 6 and metrics["policy/approxkl_avg"] > 0
    assert updater.critic_optimizer.schedule.last_epoch == updater.optimizer.schedule.last_epoch == 6
    ppo.target_kl = 1e6
    assert updater.update(episodes)["updates"] == 6


def test_the_distance_from_the_old_policy_is_that_of_its_own_tokens(policy, episodes, ppo):
    """KL(old || new) estimated on tokens of the old policy: r - 1 - log r, which a token that became unlikely hardly moves."""
    ppo.num_iterations = 2
    updater = Updater(policy, Critic(policy, ppo), ppo)
    for e in episodes:
        e.advantages = torch.ones(len(e.completion_ids))
    updater.fill_logprobs(episodes, "old_logprobs")
    episodes[0].old_logprobs[0] += 10.0
    totals = Counter()
    updater.policy_step(episodes, totals)
    assert totals["approx_kl"] == pytest.approx(math.exp(-10) - 1 + 10, abs=1e-3)


def test_going_on_from_an_adapter_with_ppo(policy, episodes, ppo, tmp_path):
    """The adapter that a run starts from, frozen, is its reference: the KL is exactly 0 at its first step."""
    save_adapter(policy, tmp_path / "saved")
    ppo.adapter, ppo.beta = str(tmp_path / "saved"), 0.1
    again = load_policy(ppo)
    critic = Critic(again, ppo)
    updater, teacher = Updater(again, critic, ppo), Advantages(again, Rewards, ppo)
    frozen = {n: p.clone() for n, p in again.model.named_parameters() if ".reference." in n}
    kls = []
    for _ in range(2):
        updater.fill_values(episodes)
        kls.append(teacher.compute(marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))["kl"])
        updater.update(episodes)
        for e in episodes:
            e.old_logprobs = e.reference_logprobs = None
    assert kls[0] == 0.0 != kls[1]
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in again.model.named_parameters() if n in frozen)
