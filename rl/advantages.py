"""From rewards to an advantage for each token, by the algorithm that the settings name.

Critic-free algorithms give all tokens of a completion one advantage, and where reward functions pay for steps (process
rewards) more to the tokens before a step's end. With a critic, and in REINFORCE, each token is an action with its reward.
"""

import bisect
import functools
import math

import torch

from grading import Completion, Rewards, Score
from rl import algorithms
from rl.config import Config
from rl.model.policy import Policy
from rl.rollout import Episode

Steps = list[tuple[int, float]]  # process rewards of one completion: (index of the token in which a step ends, value)


class Advantages:
    """Gives episodes their advantages, and keeps what an algorithm carries from one step of the run to the next."""

    def __init__(self, policy: Policy, config: Config, rewards: Rewards):
        self.policy, self.config = policy, config
        self.weights = {f.name: f.weight for f in rewards.functions}
        self.mean_return = None  # of the completions so far: REINFORCE's running baseline
        self.beta = config.beta  # of the KL in PPO's rewards; follows beta_target_kl

    def state_dict(self) -> dict:
        return {"mean_return": self.mean_return, "beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.mean_return = state["mean_return"]
        if self.config.beta_target_kl:  # else it is what the settings say
            self.beta = state["beta"]

    def fill(
        self, episodes: list[Episode], rewards: torch.Tensor, completions: list[Completion], scores: list[Score]
    ) -> dict[str, float]:
        """Set each episode's `advantages`, (C,), and `in_loss`; with a critic `returns` too. Returns metrics.

        rewards: (N,) what is learned from, nan where ungraded; it includes the process rewards of `scores`.
        """
        config, metrics = self.config, {}
        if not episodes:
            return metrics
        for episode in episodes:
            episode.in_loss = not (episode.truncated and config.mask_truncated_completions)
        in_loss = torch.tensor([episode.in_loss for episode in episodes])
        if config.algorithm == "dpo":
            eligible = torch.where(in_loss, rewards, torch.nan)
            for episode, sign in zip(episodes, algorithms.preference_signs(eligible, config.num_generations).tolist()):
                episode.advantages = torch.full((len(episode.completion_ids),), sign)
            return metrics
        steps = self.steps(episodes, completions, scores)  # by reward function
        paid = [
            sum(value for of_function in steps.values() for _, value in of_function[i]) for i in range(len(episodes))
        ]
        outcome = rewards - torch.tensor(paid)  # (N,) without the process rewards
        if config.has_critic or config.algorithm == "reinforce":
            merged = [[step for of_function in steps.values() for step in of_function[i]] for i in range(len(episodes))]
            of_tokens = self.actor_critic if config.has_critic else self.reinforce
            advantages = of_tokens(episodes, outcome, merged, metrics)
        else:
            lengths = [len(episode.completion_ids) for episode in episodes]
            by_completion = self.of_completions(outcome, lengths, in_loss).tolist()
            advantages = [torch.full((n,), a) for n, a in zip(lengths, by_completion)]
            for name, of_function in steps.items():
                unweighted = [[(position, value / self.weights[name]) for position, value in s] for s in of_function]
                more = algorithms.process_advantages(unweighted, lengths, config.num_generations)
                advantages = [a + self.weights[name] * extra for a, extra in zip(advantages, more)]
        for episode, of_episode in zip(episodes, advantages):
            episode.advantages = of_episode
        return metrics

    def of_completions(self, rewards: torch.Tensor, lengths: list[int], in_loss: torch.Tensor) -> torch.Tensor:
        """One advantage for each completion, (N,), from those of its group. rewards: (N,), nan where ungraded."""
        group = self.config.num_generations
        if self.config.algorithm == "rloo":
            return algorithms.leave_one_out_advantages(rewards, group)
        if self.config.algorithm == "reinforce_plus_plus":
            centred = algorithms.group_advantages(rewards, group, "none")
            counted = ~rewards.isnan() & in_loss
            return algorithms.whiten_by_token(centred, torch.tensor(lengths), counted)
        return algorithms.group_advantages(rewards, group, self.config.scale_rewards)

    def reinforce(
        self, episodes: list[Episode], outcome: torch.Tensor, steps: list[Steps], metrics: dict
    ) -> list[torch.Tensor]:
        """G_t - b: the baseline is the mean return of the group, the running mean over the steps so far, or none."""
        mask = mask_of(episodes)  # (N, C)
        returns = algorithms.discounted_returns(
            algorithms.token_rewards(outcome, steps, mask, None, 0.0), mask, self.config.gamma
        )
        graded = ~outcome.isnan()
        mean = torch.where(graded, returns.sum(1) / mask.sum(1), torch.nan)  # (N,) of each completion
        baseline = torch.zeros(1)
        if self.config.baseline == "group":
            groups = mean.view(-1, self.config.num_generations)
            baseline = groups.nanmean(1, keepdim=True).expand_as(groups).reshape(-1, 1)
        elif self.config.baseline == "running":
            baseline = torch.tensor([self.mean_return or 0.0])
            self.mean_return = algorithms.running_mean(self.mean_return, mean)
        advantages = algorithms.reinforce_advantages(returns, mask & graded[:, None], baseline)
        return unpad(advantages, episodes)

    def actor_critic(
        self, episodes: list[Episode], outcome: torch.Tensor, steps: list[Steps], metrics: dict
    ) -> list[torch.Tensor]:
        """GAE over token rewards with the KL in them, whitened. Ungraded completions take no part in the update."""
        config, mask = self.config, mask_of(episodes)
        kl = None
        if config.beta:
            old, reference = (pad([getattr(e, f"{name}_logprobs") for e in episodes]) for name in ("old", "reference"))
            kl = algorithms.kl_divergence(old, reference, mask, "k1")
            metrics |= {"kl": (kl.sum() / mask.sum()).item(), "beta": self.beta}
        rewards = algorithms.token_rewards(outcome, steps, mask, kl, self.beta)
        if config.beta_target_kl:
            of_completion = kl.sum(1).mean().item()
            self.beta = algorithms.adapted_beta(self.beta, of_completion, config.beta_target_kl)
        for episode, reward in zip(episodes, outcome.tolist()):
            episode.in_loss = episode.in_loss and not math.isnan(reward)
        counted = mask & torch.tensor([e.in_loss for e in episodes])[:, None]
        if config.whiten_rewards:
            rewards = algorithms.whiten(rewards, counted, shift_mean=False)
        values = pad([e.values[:-1] for e in episodes])
        after = torch.stack([e.values[-1].cpu() for e in episodes])
        cut = torch.tensor([e.truncated and config.bootstrap_truncated for e in episodes])
        advantages, returns = algorithms.generalised_advantages(
            rewards, values, mask, config.gamma, config.lam, torch.where(cut, after, 0.0)
        )
        for episode, of_episode in zip(episodes, unpad(returns, episodes)):
            episode.returns = of_episode
        metrics["explained_variance"] = algorithms.explained_variance(values, returns, counted)
        metrics["value"] = values[counted].mean().item() if counted.any() else 0.0
        return unpad(algorithms.whiten(advantages, counted), episodes)

    def steps(
        self, episodes: list[Episode], completions: list[Completion], scores: list[Score]
    ) -> dict[str, list[Steps]]:
        """Weighted process rewards by function, for each completion in the order of its text. None for the control."""
        found = {}
        if self.config.control != "none":
            return found
        for i, score in enumerate(scores):
            for name, steps in score.process.items():
                if self.weights[name] and score.verdict != "ungraded":
                    placed = self.place(episodes[i], completions[i], steps)
                    found.setdefault(name, [[] for _ in scores])[i] = [(t, self.weights[name] * v) for t, v in placed]
        return found

    def place(self, episode: Episode, completion: Completion, steps: list[tuple[int, float]]) -> Steps:
        """Process rewards at character positions of the text, as (index of the token in which the step ends, value)."""
        ids, decode = episode.completion_ids, self.policy.decode
        opened = len(completion.text) - len(decode(ids))  # what the template had written of the thinking

        @functools.cache
        def end(n):
            """The position in the text after n tokens."""
            return opened + len(decode(ids[:n]))

        counts = range(1, len(ids))  # of tokens; the last one takes what lies beyond
        return [(bisect.bisect_left(counts, position, key=end), value) for position, value in sorted(steps)]


def learned_rewards(rewards: torch.Tensor, episodes: list[Episode], config: Config) -> torch.Tensor:
    """The rewards less what the settings take off for length: of truncated completions, and DAPO's overlong punishment. (N,)"""
    if config.missing_eos_penalty:
        rewards = rewards - config.missing_eos_penalty * torch.tensor([float(e.truncated) for e in episodes])
    if config.soft_punish_cache:
        lengths = torch.tensor([len(e.completion_ids) for e in episodes])
        rewards = rewards + algorithms.overlong_penalty(lengths, config.max_completion_length, config.soft_punish_cache)
    return rewards


def teaching_groups(scores: list[Score], num_generations: int) -> list[bool]:
    """Which groups have something to learn from: some of their completions are right and some wrong, and rewards differ.

    Where nothing says what is right, it is enough that rewards differ. Ungraded completions do not count.
    """
    totals = torch.tensor([score.total for score in scores])
    varied = algorithms.varied_groups(totals, num_generations)
    if any(score.judge for score in scores):
        right = torch.tensor([float(score.is_right) for score in scores])
        varied &= algorithms.varied_groups(torch.where(totals.isnan(), torch.nan, right), num_generations)
    return varied.tolist()


def mask_of(episodes: list[Episode]) -> torch.Tensor:
    """True on the tokens of each completion, (N, C)."""
    lengths = torch.tensor([len(e.completion_ids) for e in episodes])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """(N, C) on the CPU, zeros behind each row."""
    return torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True)


def unpad(values: torch.Tensor, episodes: list[Episode]) -> list[torch.Tensor]:
    """The rows of (N, C), each as long as its completion."""
    return [row[: len(e.completion_ids)].clone() for row, e in zip(values, episodes)]
