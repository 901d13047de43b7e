"""PPO: one base model for actor, critic and reference; whose gradients go where; GAE on episodes; dynamic sampling."""

import json
import math
from collections import Counter

import pytest
import torch
from conftest import completion, fill_lora

import train
from grading import Score
from grading.registry import RewardFunction
from rl import algorithms
from rl.advantages import Advantages, learned_rewards, teaching_groups
from rl.config import Config, ConfigError
from rl.critic import Critic
from rl.policy import load_policy, save_adapter
from rl.rollout import Episode
from rl.update import Updater, ids_of

NAN = math.nan


@pytest.fixture
def ppo(config):
    config.algorithm, config.cliprange_value = "ppo", None
    return config


class Rewards:
    """As much of a reward file as Advantages looks at."""

    functions = [RewardFunction("correct", None, 1.0), RewardFunction("right_steps", None, 0.5)]


def marked(episodes, rewards, process=None):
    """Completions and scores of episodes with these rewards."""
    texts = [completion("x" * len(e.completion_ids)) for e in episodes]
    verdicts = ["ungraded" if math.isnan(r) else "right" if r >= 1 else "wrong" for r in rewards]
    parts = [{"correct": None if math.isnan(r) else r} for r in rewards]
    scores = [Score(r, p, {}, {}, v, judge="correct") for r, p, v in zip(rewards, parts, verdicts)]
    for score, steps in zip(scores, process or []):
        score.process = {"right_steps": steps}
        score.total += 0.5 * sum(value for _, value in steps)
    return torch.tensor([s.total for s in scores]), texts, scores


def vectors(parameters):
    return torch.cat([p.detach().flatten().clone() for p in parameters])


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
    updater = Updater(policy, ppo, critic)
    updater.look(episodes)
    Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
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


def test_the_critic_changes_neither_policy_nor_reference(policy, episodes, ppo):
    """With another critic the policy's and the reference's log-probabilities are the same to the bit, and KL at step 0 is 0."""
    fill_lora(policy, 0.0)  # as at step 0
    ids = ids_of(episodes)
    with torch.no_grad():
        plain = policy.logprobs(*ids)[0]
    critic = Critic(policy, ppo)
    with critic.active():
        fill_lora(policy, 0.5)
    for parameter in critic.head.parameters():
        parameter.data.fill_(0.3)
    ppo.beta = 0.1
    updater = Updater(policy, ppo, critic)
    updater.look(episodes)
    with torch.no_grad():
        assert torch.equal(policy.logprobs(*ids)[0], plain)
    metrics = Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    assert metrics["kl"] == 0.0
    assert all(torch.equal(e.old_logprobs, e.reference_logprobs) for e in episodes)
    assert all(e.values.abs().max() > 0.1 for e in episodes)


def test_values_are_read_before_each_token(policy, episodes, ppo):
    """V_t depends on the tokens before t alone; row by row, unpadded, from the model's own hidden states."""
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    with critic.active(), torch.no_grad():
        fill_lora(policy, 0.1)
        values, mask = critic.values(*ids_of(episodes))
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
    updater, teacher = Updater(policy, ppo, critic), Advantages(policy, ppo, Rewards)
    rewards = marked(episodes, [1.0 if i < 8 else 0.0 for i in range(16)])
    losses, explained = [], []
    for _ in range(20):
        updater.look(episodes)
        explained.append(teacher.fill(episodes, *rewards)["explained_variance"])
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
    updater, teacher = Updater(policy, ppo, critic), Advantages(policy, ppo, Rewards)
    moved = []
    for _ in range(3):
        updater.look(episodes)
        teacher.fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
        before = vectors(policy.trainable_parameters()), vectors(critic.parameters)
        metrics = updater.update(episodes)
        moved.append(not torch.equal(vectors(policy.trainable_parameters()), before[0]))
        assert not torch.equal(vectors(critic.parameters), before[1])
    assert moved == [False, False, True] and metrics["updates"] == 1


def test_warm_up_is_the_critics_alone(policy, episodes, config):
    """Without a critic the setting is of no effect; with one it may not take the whole run."""
    config.critic_warmup_steps = 2
    assert Updater(policy, config).update(episodes)["updates"] == 1
    with pytest.raises(ConfigError, match="critic_warmup_steps .2. must be less than max_steps .2."):
        Config(algorithm="ppo", critic_warmup_steps=2, max_steps=2).check()


@pytest.mark.parametrize("budget", [1, 100])
def test_the_critics_gradient_does_not_depend_on_the_split(policy, episodes, ppo, budget):
    critic = Critic(policy, ppo)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    updater = Updater(policy, ppo, critic)
    updater.look(episodes)
    Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
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
    updater = Updater(policy, ppo, critic)
    few = episodes[:8]
    updater.look(few)
    Advantages(policy, ppo, Rewards).fill(few, *marked(few, [1.0, 0.0, 0.0, 1.0] * 2))
    metrics = updater.update(few)
    assert metrics["updates"] == 2 and metrics["skipped_updates"] == 0 and metrics["critic_grad_norm"] > 0


def test_target_kl_ends_the_epochs(policy, episodes, ppo):
    ppo.num_iterations, ppo.learning_rate, ppo.target_kl = 6, 0.02, 0.01
    critic = Critic(policy, ppo)
    updater = Updater(policy, ppo, critic)
    updater.look(episodes)
    Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    metrics = updater.update(episodes)
    assert 1 <= metrics["updates"] < 6 and metrics["policy/approxkl_avg"] > 0
    assert updater.critic_optimizer.schedule.last_epoch == updater.optimizer.schedule.last_epoch == 6
    ppo.target_kl = 1e6
    assert updater.update(episodes)["updates"] == 6


def test_the_distance_from_the_old_policy_is_that_of_its_own_tokens(policy, episodes, ppo):
    """KL(old || new) estimated on tokens of the old policy: r - 1 - log r, which a token that became unlikely hardly moves."""
    ppo.num_iterations = 2
    updater = Updater(policy, ppo, Critic(policy, ppo))
    for e in episodes:
        e.advantages = torch.ones(len(e.completion_ids))
    updater.fill_logprobs(episodes, "old_logprobs")
    episodes[0].old_logprobs[0] += 10.0
    totals = Counter()
    updater.policy_step(episodes, totals)
    assert totals["moved"] == pytest.approx(math.exp(-10) - 1 + 10, abs=1e-3)


# --- advantages of episodes


def episodes_of(*lengths, truncated=()):
    return [Episode(0, [1], [2] * n, [0.0] * n, i in truncated) for i, n in enumerate(lengths)]


def test_advantages_of_actor_and_critic_by_hand(policy, ppo):
    """Two completions with gamma 0.5, lam 1, KL in the reward, a truncated one without and with its last value."""
    ppo.gamma, ppo.beta = 0.5, 2.0
    for bootstrap, last in ((False, 0.0), (True, 0.5 * 8.0)):
        ppo.bootstrap_truncated = bootstrap
        episodes = episodes_of(2, 1, truncated=(1,))
        for e, values in zip(episodes, ([0.5, 1.0, 9.0], [0.25, 8.0])):
            e.values = torch.tensor(values)
            e.old_logprobs = torch.full((len(e.completion_ids),), -1.0)
            e.reference_logprobs = torch.full((len(e.completion_ids),), -1.1)  # k1 = 0.1 a token
        metrics = Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0]))
        expected = [[-0.2 + 0.5 * 0.8, 0.8], [-0.2 + last]]
        for e, returns in zip(episodes, expected):
            assert e.returns.tolist() == pytest.approx(returns, abs=1e-6)
        raw = torch.tensor([0.2 - 0.5, 0.8 - 1.0, -0.2 + last - 0.25])
        whitened = (raw - raw.mean()) / (raw.std() + 1e-8)
        torch.testing.assert_close(torch.cat([e.advantages for e in episodes]), whitened, atol=1e-5, rtol=0)
        assert metrics["kl"] == pytest.approx(0.1) and metrics["beta"] == 2.0


def test_ungraded_completions_teach_neither(policy, ppo):
    episodes = episodes_of(2, 2, 3, 1)
    for e in episodes:
        e.values = torch.zeros(len(e.completion_ids) + 1)
    Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, NAN, 0.0, 1.0]))
    assert [e.in_loss for e in episodes] == [True, False, True, True]
    counted = torch.cat([e.advantages for e in episodes if e.in_loss])
    assert counted.mean() == pytest.approx(0, abs=1e-6) and counted.std() == pytest.approx(1, abs=1e-5)
    assert not episodes[1].advantages.any()


def test_process_rewards_reach_their_tokens(policy, ppo, config):
    """In PPO they are paid where the step ends; in GRPO they count for the tokens up to it, the outcome without them."""
    process = [[(2, 1.0), (4, -1.0)], []]
    episodes = episodes_of(4, 3)
    for e in episodes:
        e.values = torch.zeros(len(e.completion_ids) + 1)
        e.completion_ids = policy.tokenizer.encode("x" * len(e.completion_ids), add_special_tokens=False)
    Advantages(policy, ppo, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0], process))
    assert episodes[0].returns.tolist() == [1.0, 1.0, 0.5, 0.5]  # 0.5 at token 1, 1 - 0.5 at token 3
    config.algorithm, config.num_generations = "grpo", 2
    Advantages(policy, config, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0], process))
    outcome = algorithms.group_advantages(torch.tensor([1.0, 0.0]), 2)
    step = 0.5 * 1 / (math.sqrt(2) + 1e-4)  # weight 0.5; values 1 and -1: deviation sqrt(2)
    expected = outcome[0] + torch.tensor([0.0, 0.0, -step, -step])
    torch.testing.assert_close(episodes[0].advantages, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(episodes[1].advantages, outcome[1].expand(3), atol=1e-6, rtol=0)


def test_steps_are_found_in_the_text_whatever_the_tokens(policy, config):
    text = "<think>1+1=2\n2+2=5</think>4"
    ids = policy.tokenizer.encode(text, add_special_tokens=False) + [min(policy.eos_ids)]
    episode = Episode(0, [1], ids, [0.0] * len(ids), False)
    teacher = Advantages(policy, config, Rewards)
    places = teacher.place(episode, completion(text), [(text.index("\n"), 1.0), (text.index("</think>"), -1.0)])
    decoded = [policy.decode(ids[: token + 1]) for token, _ in places]
    assert decoded == ["<think>1+1=2", "<think>1+1=2\n2+2=5"] and [v for _, v in places] == [1.0, -1.0]
    opened = Episode(0, [1], ids[1:], [0.0] * (len(ids) - 1), False)  # the template had written <think>
    assert [t for t, _ in teacher.place(opened, completion(text), [(text.index("\n"), 1.0)])] == [places[0][0] - 1]
    assert teacher.place(episode, completion(text), [(0, 1.0), (len(text), 1.0)]) == [(0, 1.0), (len(ids) - 2, 1.0)]


def test_reinforce_baselines(policy, config):
    config.algorithm, config.num_generations = "reinforce", 2
    rewards = [1.0, 0.0, NAN, 1.0]

    def advantages(teacher):
        episodes = episodes_of(2, 1, 3, 2)
        teacher.fill(episodes, *marked(episodes, rewards))
        return [e.advantages.tolist() for e in episodes]

    config.baseline = "none"
    assert advantages(Advantages(policy, config, Rewards)) == [[1.0, 1.0], [0.0], [0.0] * 3, [1.0, 1.0]]
    config.baseline = "group"
    assert advantages(Advantages(policy, config, Rewards)) == [[0.5, 0.5], [-0.5], [0.0] * 3, [0.0, 0.0]]
    config.baseline = "running"
    teacher = Advantages(policy, config, Rewards)
    assert advantages(teacher)[0] == [1.0, 1.0]  # nothing is known before the first step
    torch.testing.assert_close(torch.tensor(advantages(teacher)[1]), torch.tensor([-2 / 3]))
    config.baseline, config.gamma = "none", 0.5
    assert advantages(Advantages(policy, config, Rewards))[0] == [0.5, 1.0]


def test_length_penalties(config):
    config.max_completion_length, config.missing_eos_penalty = 100, 0.3
    episodes = episodes_of(10, 100, truncated=(1,))
    rewards = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(learned_rewards(rewards, episodes, config), torch.tensor([1.0, 0.7]))
    config.soft_punish_cache = 20
    torch.testing.assert_close(learned_rewards(rewards, episodes, config), torch.tensor([1.0, -0.3]))


def test_adaptive_beta_follows_its_target(policy, ppo):
    ppo.beta, ppo.beta_target_kl = 0.1, 0.05
    teacher = Advantages(policy, ppo, Rewards)
    for expected in (0.1, 0.1 * 1.02):  # a KL of 0.2 a completion is far above 0.05: the error is clipped at 0.2
        episodes = episodes_of(2, 2)
        for e in episodes:
            e.values = torch.zeros(3)
            e.old_logprobs, e.reference_logprobs = torch.zeros(2), torch.full((2,), -0.1)
        assert teacher.fill(episodes, *marked(episodes, [1.0, 0.0]))["beta"] == pytest.approx(expected)


# --- the rest of the family, through the updater


def test_dpo_moves_best_and_worst_apart(policy, episodes, config):
    config.algorithm, config.beta, config.learning_rate = "dpo", 0.1, 5e-4
    teacher, updater = Advantages(policy, config, Rewards), Updater(policy, config)
    rewards = marked(episodes, [0.0, 1.0, 0.5, 0.5, *[0.3] * 4, 1.0, 0.0, 1.0, 0.0, NAN, NAN, 1.0, 0.0])
    margins = []
    for _ in range(4):
        teacher.fill(episodes, *rewards)
        metrics = updater.update(episodes)
        margins.append(metrics["rewards/margins"])
    assert margins[-1] > margins[0] + 0.05
    for e in episodes:
        e.reference_logprobs = None
    fill_lora(policy, 0.0)
    teacher.fill(episodes, *rewards)
    assert updater.update(episodes)["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference agree
    assert sum(e.reference_logprobs is not None for e in episodes) == 6


def test_dpo_pairs_only_what_is_in_the_loss(policy, config):
    config.algorithm, config.num_generations, config.mask_truncated_completions = "dpo", 4, True
    episodes = episodes_of(2, 2, 2, 2, truncated=(1,))
    Advantages(policy, config, Rewards).fill(episodes, *marked(episodes, [1.0, 0.0, 0.1, 0.1]))
    assert [e.advantages[0].item() for e in episodes] == [1.0, 0.0, -1.0, 0.0]


def test_dpo_prefers_by_the_whole_reward(policy, config):
    """Process rewards are part of what is compared, and do not change the signs that mark a pair."""
    config.algorithm, config.num_generations = "dpo", 3
    episodes = episodes_of(2, 2, 2)
    Advantages(policy, config, Rewards).fill(
        episodes, *marked(episodes, [1.0, 1.0, 1.0], [[(1, -1.0)], [(2, 1.0)], []])
    )
    assert [e.advantages.tolist() for e in episodes] == [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_dpo_gradient_does_not_depend_on_the_split(policy, episodes, config, budget):
    config.algorithm, config.beta, config.max_tokens_per_micro_batch = "dpo", 0.1, budget
    Advantages(policy, config, Rewards).fill(episodes, *marked(episodes, [0.0, 1.0, 0.5, 0.5] * 4))
    updater = Updater(policy, config)
    with policy.reference():
        updater.fill_logprobs(episodes, "reference_logprobs")
    updater.backward_pairs(episodes, Counter())
    got = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    policy.model.zero_grad()
    loss = 0.0
    for i in range(0, 16, 4):  # the definition, pair by pair
        best, worst = (
            policy.logprobs([e.prompt_ids], [e.completion_ids])[0].sum() for e in (episodes[i + 1], episodes[i])
        )
        margin = best - worst - episodes[i + 1].reference_logprobs.sum() + episodes[i].reference_logprobs.sum()
        loss = loss + torch.log1p(torch.exp(-0.1 * margin)) / 4
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_the_entropy_bonus_raises_entropy(config, episodes):
    config.entropy_coef = 1.0
    policy = load_policy(config)
    for e in episodes:
        e.advantages = torch.zeros(len(e.completion_ids))
    updater = Updater(policy, config)
    entropies = [updater.update(episodes)["entropy"] for _ in range(6)]
    assert entropies[-1] > entropies[0] * 1.1


# --- dynamic sampling and the curriculum


def test_groups_that_teach():
    _, _, scores = marked(episodes_of(*[1] * 10), [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, NAN, 1.0, NAN, NAN])
    assert teaching_groups(scores, 2) == [True, False, False, False, False]
    scores[4].total = 0.1  # shaping differs, right or wrong does not
    assert teaching_groups(scores, 2)[2] is False
    for score in scores:
        score.judge = None  # nothing says what is right: a difference is enough
    assert teaching_groups(scores, 2)[2] is True


SMALL = "--max-steps 3 --prompts-per-step 6 --num-generations 4 --eval-questions 6 --eval-steps 0 --train-questions 60 --device cpu"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_dynamic_sampling_is_capped_and_counted(tmp_path):
    """No group without variance enters an update; refills are at most what is allowed; what was left out is logged."""
    train.main(
        [*SMALL.split(), "--dynamic-sampling", "2", "--train-data", "sums", "--output-dir", str(tmp_path / "run")]
    )
    rollouts = lines(tmp_path / "run/rollouts.jsonl")
    for metrics in lines(tmp_path / "run/metrics.jsonl"):
        of_step = [r for r in rollouts if r["step"] == metrics["step"]]
        groups = [of_step[i : i + 4] for i in range(0, len(of_step), 4)]
        took_part = [g for g in groups if g[0]["advantage"] is not None]
        assert all(len({r["verdict"] for r in g}) == 2 for g in took_part) and len(took_part) <= 6
        assert len(groups) - len(took_part) == metrics["dynamic_sampling/groups_left_out"]
        assert len(took_part) == 6 or metrics["dynamic_sampling/refills"] == 2
        assert 0 <= metrics["dynamic_sampling/refills"] <= 2 and len(groups) >= 6
    assert any(m["dynamic_sampling/refills"] for m in lines(tmp_path / "run/metrics.jsonl"))


def test_a_step_without_anything_to_learn_goes_by(tmp_path):
    """Every group is all wrong: with dynamic sampling nothing is left, the policy stays, and the run goes on."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("from grading import reward\n\n@reward\ndef never(completion):\n    return 0.0\n")
    arguments = [*SMALL.split(), "--rewards-file", str(rewards), "--dynamic-sampling", "1"]
    train.main([*arguments, "--output-dir", str(tmp_path / "run")])
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 3 and all(m["updates"] == 0 and m["loss"] == 0 for m in metrics)
    assert all(m["dynamic_sampling/groups_left_out"] == 12 for m in metrics)


def test_the_curriculum_begins_with_what_is_easy(tmp_path):
    arguments = "--train-data big_sums long_sums --curriculum-steps 3"
    train.main([*SMALL.split(), *arguments.split(), "--output-dir", str(tmp_path / "run")])
    terms = {}
    for line in lines(tmp_path / "run/rollouts.jsonl"):
        terms.setdefault(line["step"], set()).add(line["prompt"].count(" + ") + line["prompt"].count(" - ") + 1)
    assert terms[1] <= {2, 3} and terms[2] <= {2, 3, 4} and max(terms[3]) == 5
    assert [train.highest_level([1, 1, 2, 5], step, 6) for step in (1, 2, 3, 4, 5, 6, 60)] == [1, 1, 2, 2, 5, 5, 5]
    assert train.highest_level([1, 1, 2, 5], 1, 0) == 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"algorithm": "reinforce", "num_iterations": 2}, "algorithm reinforce learns once from each roll-out"),
        ({"algorithm": "a2c", "num_mini_batches": 2}, "algorithm a2c learns once"),
        ({"algorithm": "dpo"}, "beta is 0, but dpo needs it"),
        ({"algorithm": "rloo", "num_generations": 1}, "rloo compares the completions of a group"),
        ({"algorithm": "ppo", "num_generations": 1, "dynamic_sampling": 1}, "dynamic_sampling compares"),
        ({"loss_type": "cispo"}, "it is the ceiling of the ratio itself"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "does not go with loss_type sapo"),
        ({"target_kl": 0.1}, "target_kl ends the epochs early"),
        ({"algorithm": "dpo", "beta": 0.1, "entropy_coef": 0.1}, "entropy_coef has no part in dpo"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"beta_target_kl": 1.0, "beta": 0.1}, "beta_target_kl adapts the beta of ppo"),
        ({"soft_punish_cache": 256}, "soft_punish_cache (256) must be less than max_completion_length"),
        ({"dynamic_sampling": 1, "control": "random-reward"}, "the control must not know"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Config(**settings).check()
    Config(algorithm="ppo", num_generations=1).check()
    Config(algorithm="reinforce", num_generations=1, baseline="running").check()


@pytest.mark.parametrize(
    "arguments",
    [
        "--algorithm ppo --num-iterations 2 --num-mini-batches 2 --beta 0.05 --beta-target-kl 0.5 --lam 0.95 --target-kl 0.1",
        "--algorithm ppo --critic head --num-generations 1 --whiten-rewards --bootstrap-truncated --max-completion-length 20",
        "--algorithm ppo --load-in-4bit --gradient-checkpointing --critic-warmup-steps 1 --loss-type cispo --epsilon-high 5",
        "--algorithm a2c --num-mini-batches 1 --missing-eos-penalty 0.5 --entropy-coef 0.01",
        "--algorithm reinforce --num-mini-batches 1 --baseline running --num-generations 1 --gamma 0.99",
        "--algorithm rloo --soft-punish-cache 50 --loss-type sapo",
        "--algorithm reinforce_plus_plus --num-mini-batches 2 --beta 0.01 --kl-estimator k2",
        "--algorithm dpo --beta 0.1 --num-iterations 2",
        "--importance-sampling-level sequence --loss-type grpo --epsilon 3e-4 --epsilon-high 4e-4 --num-mini-batches 2",
        "--reward-funcs correct right_steps --train-data long_sums --algorithm grpo",
        "--reward-funcs correct right_steps --train-data long_sums --algorithm ppo",
    ],
)
def test_every_algorithm_runs(tmp_path, arguments):
    train.main([*SMALL.split(), "--max-steps", "2", *arguments.split(), "--output-dir", str(tmp_path / "run")])
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 2 and all(m["skipped_updates"] == 0 for m in metrics) and metrics[1]["grad_norm"] > 0
    rollouts = lines(tmp_path / "run/rollouts.jsonl")
    assert ("learned_reward" in rollouts[0]) == ("penalty" in arguments or "punish" in arguments)
    tokens = lines(tmp_path / "run/tokens.jsonl")[1]["completions"][0]
    assert ("values" in tokens) == ("ppo" in arguments or "a2c" in arguments)
    assert len(tokens.get("values", tokens["advantages"])) == len(tokens["tokens"])


def test_going_on_from_an_adapter_with_ppo(policy, episodes, ppo, tmp_path):
    """The adapter that a run starts from, frozen, is its reference: the KL is exactly 0 at its first step."""
    save_adapter(policy, tmp_path / "saved", "card", {})
    ppo.adapter, ppo.beta = str(tmp_path / "saved"), 0.1
    again = load_policy(ppo)
    critic = Critic(again, ppo)
    updater, teacher = Updater(again, ppo, critic), Advantages(again, ppo, Rewards)
    frozen = {n: p.clone() for n, p in again.model.named_parameters() if ".reference." in n}
    kls = []
    for _ in range(2):
        updater.look(episodes)
        kls.append(teacher.fill(episodes, *marked(episodes, [1.0, 0.0, 0.0, 1.0] * 4))["kl"])
        updater.update(episodes)
        for e in episodes:
            e.old_logprobs = e.reference_logprobs = None
    assert kls[0] == 0.0 != kls[1]
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in again.model.named_parameters() if n in frozen)
