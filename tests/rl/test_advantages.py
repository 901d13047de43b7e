"""Advantages of episodes for each algorithm, and the updates made from them."""

import math
from collections import Counter

import pytest
import torch
from conftest import Rewards, completion, fill_lora, make_episodes, with_rewards

from rl import algorithms
from rl.advantages import Advantages
from rl.model.logprobs import completion_logprobs
from rl.model.policy import load_policy
from rl.rollout import Episode, groups_with_signal, set_rewards
from rl.update import Updater

NAN = math.nan


# --- advantages


def test_actor_critic_advantages_by_hand(policy, ppo):
    """gamma 0.5, lam 1, a KL in the reward, and a truncated completion with and without bootstrapping."""
    ppo.gamma, ppo.beta = 0.5, 2.0
    for bootstrap, last_value in ((False, 0.0), (True, 0.5 * 8.0)):
        ppo.bootstrap_truncated = bootstrap
        episodes = make_episodes(2, 1, truncated=(1,))
        for e, values in zip(episodes, ([0.5, 1.0, 9.0], [0.25, 8.0])):
            e.values = torch.tensor(values)
            e.old_logprobs = torch.full((len(e.completion_ids),), -1.0)
            e.reference_logprobs = torch.full((len(e.completion_ids),), -1.1)  # k1 = 0.1 per token
        metrics = Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0]))
        expected = [[-0.2 + 0.5 * 0.8, 0.8], [-0.2 + last_value]]
        for e, returns in zip(episodes, expected):
            assert e.returns.tolist() == pytest.approx(returns, abs=1e-6)
        raw = torch.tensor([0.2 - 0.5, 0.8 - 1.0, -0.2 + last_value - 0.25])
        whitened = (raw - raw.mean()) / (raw.std() + 1e-8)
        torch.testing.assert_close(torch.cat([e.advantages for e in episodes]), whitened, atol=1e-5, rtol=0)
        assert metrics["kl"] == pytest.approx(0.1) and metrics["beta"] == 2.0


def test_ungraded_completions_are_left_out_of_the_loss(policy, ppo):
    episodes = make_episodes(2, 2, 3, 1)
    for e in episodes:
        e.values = torch.zeros(len(e.completion_ids) + 1)
    Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, NAN, 0.0, 1.0]))
    assert [e.in_loss for e in episodes] == [True, False, True, True]
    advantages = torch.cat([e.advantages for e in episodes if e.in_loss])
    assert advantages.mean() == pytest.approx(0, abs=1e-6) and advantages.std() == pytest.approx(1, abs=1e-5)
    assert not episodes[1].advantages.any()


def test_process_rewards_by_hand(policy, ppo, config):
    """PPO adds them to the reward of the step's last token, GRPO to the advantages of all tokens up to that one."""
    process = [[(2, 1.0), (4, -1.0)], []]
    episodes = make_episodes(4, 3)
    for e in episodes:
        e.values = torch.zeros(len(e.completion_ids) + 1)
        e.completion_ids = policy.tokenizer.encode("x" * len(e.completion_ids), add_special_tokens=False)
    Advantages(policy, Rewards, ppo).compute(with_rewards(episodes, [1.0, 0.0], process))
    assert episodes[0].returns.tolist() == [1.0, 1.0, 0.5, 0.5]  # 0.5 at token 1, 1 - 0.5 at token 3
    config.algorithm, config.num_generations = "grpo", 2
    Advantages(policy, Rewards, config).compute(with_rewards(episodes, [1.0, 0.0], process))
    outcome = algorithms.group_advantages(torch.tensor([1.0, 0.0]), 2)
    step = 0.5 * 1 / (math.sqrt(2) + 1e-4)  # weight 0.5; values 1 and -1: deviation sqrt(2)
    expected = outcome[0] + torch.tensor([0.0, 0.0, -step, -step])
    torch.testing.assert_close(episodes[0].advantages, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(episodes[1].advantages, outcome[1].expand(3), atol=1e-6, rtol=0)


def test_process_rewards_are_aligned_to_tokens(policy, config):
    text = "<think>1+1=2\n2+2=5</think>4"
    ids = policy.tokenizer.encode(text, add_special_tokens=False) + [min(policy.eos_ids)]
    episode = Episode([1], ids, [0.0] * len(ids), False)
    episode.completion = completion(text)
    estimator = Advantages(policy, Rewards, config)
    steps = estimator.align_to_tokens(episode, [(text.index("\n"), 1.0), (text.index("</think>"), -1.0)])
    decoded = [policy.decode(ids[: token + 1]) for token, _ in steps]
    assert decoded == ["<think>1+1=2", "<think>1+1=2\n2+2=5"] and [v for _, v in steps] == [1.0, -1.0]
    prefixed = Episode([1], ids[1:], [0.0] * (len(ids) - 1), False)  # <think> belongs to the prompt
    prefixed.completion = completion(text)
    assert [t for t, _ in estimator.align_to_tokens(prefixed, [(text.index("\n"), 1.0)])] == [steps[0][0] - 1]
    assert estimator.align_to_tokens(episode, [(0, 1.0), (len(text), 1.0)]) == [(0, 1.0), (len(ids) - 2, 1.0)]


def test_reinforce_baselines(policy, config):
    config.algorithm, config.num_generations = "reinforce", 2
    rewards = [1.0, 0.0, NAN, 1.0]

    def compute(estimator):
        episodes = make_episodes(2, 1, 3, 2)
        estimator.compute(with_rewards(episodes, rewards))
        return [e.advantages.tolist() for e in episodes]

    config.baseline = "none"
    assert compute(Advantages(policy, Rewards, config)) == [[1.0, 1.0], [0.0], [0.0] * 3, [1.0, 1.0]]
    config.baseline = "group"
    assert compute(Advantages(policy, Rewards, config)) == [[0.5, 0.5], [-0.5], [0.0] * 3, [0.0, 0.0]]
    config.baseline = "running"
    estimator = Advantages(policy, Rewards, config)
    assert compute(estimator)[0] == [1.0, 1.0]  # the running mean starts at 0
    torch.testing.assert_close(torch.tensor(compute(estimator)[1]), torch.tensor([-2 / 3]))
    config.baseline, config.gamma = "none", 0.5
    assert compute(Advantages(policy, Rewards, config))[0] == [0.5, 1.0]


def test_length_penalties(config):
    config.max_completion_length, config.missing_eos_penalty = 100, 0.3
    episodes = make_episodes(10, 100, truncated=(1,))
    with_rewards(episodes, [1.0, 1.0])
    set_rewards(episodes, config, step=1)
    assert [e.reward for e in episodes] == pytest.approx([1.0, 0.7])
    config.soft_punish_cache = 20
    set_rewards(episodes, config, step=1)
    assert [e.reward for e in episodes] == pytest.approx([1.0, -0.3])


def test_adaptive_beta_follows_its_target(policy, ppo):
    ppo.beta, ppo.beta_target_kl = 0.1, 0.05
    estimator = Advantages(policy, Rewards, ppo)
    for expected in (0.1, 0.1 * 1.02):  # the KL, 0.2 per completion, is far above 0.05: the error is clipped to 0.2
        episodes = make_episodes(2, 2)
        for e in episodes:
            e.values = torch.zeros(3)
            e.old_logprobs, e.reference_logprobs = torch.zeros(2), torch.full((2,), -0.1)
        assert estimator.compute(with_rewards(episodes, [1.0, 0.0]))["beta"] == pytest.approx(expected)


# --- updates


def test_dpo_increases_the_margin(policy, episodes, config):
    config.algorithm, config.beta, config.learning_rate = "dpo", 0.1, 5e-4
    estimator = Advantages(policy, Rewards, config)
    updater = Updater(policy, None, config)
    with_rewards(episodes, [0.0, 1.0, 0.5, 0.5, *[0.3] * 4, 1.0, 0.0, 1.0, 0.0, NAN, NAN, 1.0, 0.0])
    margins = []
    for _ in range(4):
        estimator.compute(episodes)
        metrics = updater.update(episodes)
        margins.append(metrics["rewards/margins"])
    assert margins[-1] > margins[0] + 0.05
    for e in episodes:
        e.reference_logprobs = None
    fill_lora(policy, 0.0)
    estimator.compute(episodes)
    assert updater.update(episodes)["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy = reference
    assert sum(e.reference_logprobs is not None for e in episodes) == 6


def test_dpo_pairs_exclude_masked_completions(policy, config):
    config.algorithm, config.num_generations, config.mask_truncated_completions = "dpo", 4, True
    episodes = make_episodes(2, 2, 2, 2, truncated=(1,))
    Advantages(policy, Rewards, config).compute(with_rewards(episodes, [1.0, 0.0, 0.1, 0.1]))
    assert [e.advantages[0].item() for e in episodes] == [1.0, 0.0, -1.0, 0.0]


def test_dpo_compares_rewards_with_process_rewards(policy, config):
    """The compared rewards include process rewards, which do not change the signs of a pair."""
    config.algorithm, config.num_generations = "dpo", 3
    episodes = make_episodes(2, 2, 2)
    Advantages(policy, Rewards, config).compute(with_rewards(episodes, [1.0, 1.0, 1.0], [[(1, -1.0)], [(2, 1.0)], []]))
    assert [e.advantages.tolist() for e in episodes] == [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_dpo_gradient_does_not_depend_on_micro_batches(policy, episodes, config, budget):
    config.algorithm, config.beta, config.max_tokens_per_micro_batch = "dpo", 0.1, budget
    Advantages(policy, Rewards, config).compute(with_rewards(episodes, [0.0, 1.0, 0.5, 0.5] * 4))
    updater = Updater(policy, None, config)
    with policy.reference():
        updater.fill_logprobs(episodes, "reference_logprobs")
    updater.backward_pairs(episodes, Counter())
    result = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    policy.model.zero_grad()
    loss = 0.0
    for i in range(0, 16, 4):  # the definition, one pair at a time
        best, worst = (
            completion_logprobs(policy, [e.prompt_ids], [e.completion_ids])[0].sum()
            for e in (episodes[i + 1], episodes[i])
        )
        margin = best - worst - episodes[i + 1].reference_logprobs.sum() + episodes[i].reference_logprobs.sum()
        loss = loss + torch.log1p(torch.exp(-0.1 * margin)) / 4
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)


def test_the_entropy_bonus_raises_entropy(config, episodes):
    config.entropy_coef = 1.0
    policy = load_policy(config)
    for e in episodes:
        e.advantages = torch.zeros(len(e.completion_ids))
    updater = Updater(policy, None, config)
    entropies = [updater.update(episodes)["entropy"] for _ in range(6)]
    assert entropies[-1] > entropies[0] * 1.1


def test_groups_with_signal():
    episodes = with_rewards(make_episodes(*[1] * 10), [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, NAN, 1.0, NAN, NAN])
    scores = [episode.score for episode in episodes]
    assert groups_with_signal(scores, 2) == [True, False, False, False, False]
    scores[4].total = 0.1  # rewards differ, but both completions are wrong
    assert groups_with_signal(scores, 2)[2] is False
    for score in scores:
        score.judge = None  # without a judge, different rewards suffice
    assert groups_with_signal(scores, 2)[2] is True
