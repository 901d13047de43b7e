"""From rewards to an advantage for each token, by the algorithm that the settings name.

Critic-free algorithms give all tokens of a completion one advantage, and where reward functions pay for steps (process
rewards) more to the tokens before a step's end. With a critic, and in REINFORCE, each token is an action with its reward.
"""

import bisect
import functools
import math

import torch

from grading import Rewards
from rl import algorithms
from rl.config import Config
from rl.model.policy import Policy
from rl.rollout import Episode

Steps = list[tuple[int, float]]  # process rewards of one completion: (index of the token in which a step ends, value)


class Advantages:
    """Computes the advantages of episodes, and keeps what an algorithm carries from one training step to the next."""

    def __init__(self, policy: Policy, rewards: Rewards, config: Config):
        self.policy = policy
        self.config = config
        self.weights = {f.name: f.weight for f in rewards.functions}
        self.mean_return = None  # running mean over the completions so far: REINFORCE's running baseline
        self.beta = config.beta  # weight of the KL in PPO's rewards; follows beta_target_kl

    def state_dict(self) -> dict:
        return {"mean_return": self.mean_return, "beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.mean_return = state["mean_return"]
        if self.config.beta_target_kl:  # otherwise the setting decides
            self.beta = state["beta"]

    def compute(self, episodes: list[Episode]) -> dict[str, float]:
        """Set each episode's `advantages` (C,) and `in_loss`, and with a critic its `returns`. Returns metrics.

        Reads each episode's `reward`, which includes the process rewards of its score, and with a critic its `values`.
        """
        config = self.config
        metrics = {}
        if not episodes:
            return metrics
        for episode in episodes:
            episode.in_loss = not (episode.truncated and config.mask_truncated_completions)
        in_loss = torch.tensor([episode.in_loss for episode in episodes])
        rewards = torch.tensor([episode.reward for episode in episodes])  # (N,)
        lengths = [len(episode.completion_ids) for episode in episodes]
        if config.algorithm == "dpo":
            eligible = torch.where(in_loss, rewards, torch.nan)
            signs = algorithms.preference_signs(eligible, config.num_generations).tolist()
            for episode, length, sign in zip(episodes, lengths, signs):
                episode.advantages = torch.full((length,), sign)
            return metrics
        steps = self.process_rewards(episodes)
        paid = [sum(value for by_episode in steps.values() for _, value in by_episode[i]) for i in range(len(episodes))]
        outcome = rewards - torch.tensor(paid)  # (N,) without the process rewards
        if config.has_critic or config.algorithm == "reinforce":
            merged = [[step for by_episode in steps.values() for step in by_episode[i]] for i in range(len(episodes))]
            by_token = self.actor_critic if config.has_critic else self.reinforce
            advantages = by_token(episodes, outcome, merged, metrics)
        else:
            by_completion = self.group_relative(outcome, lengths, in_loss).tolist()
            advantages = [torch.full((length,), a) for length, a in zip(lengths, by_completion)]
            for name, by_episode in steps.items():
                weight = self.weights[name]
                unweighted = [[(token, value / weight) for token, value in pairs] for pairs in by_episode]
                extra = algorithms.process_advantages(unweighted, lengths, config.num_generations)
                advantages = [a + weight * more for a, more in zip(advantages, extra)]
        for episode, tensor in zip(episodes, advantages):
            episode.advantages = tensor
        return metrics

    def group_relative(self, rewards: torch.Tensor, lengths: list[int], in_loss: torch.Tensor) -> torch.Tensor:
        """One advantage for each completion, (N,), relative to its group. rewards: (N,), nan if ungraded."""
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
        mask = completion_mask(episodes)  # (N, C)
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
        config = self.config
        mask = completion_mask(episodes)  # (N, C)
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

    def process_rewards(self, episodes: list[Episode]) -> dict[str, list[Steps]]:
        """Weighted process rewards by function, for each episode in the order of its text. Empty for a control run."""
        by_function = {}
        if self.config.control != "none":
            return by_function
        for i, episode in enumerate(episodes):
            for name, steps in episode.score.process.items():
                weight = self.weights[name]
                if weight and episode.score.verdict != "ungraded":
                    by_episode = by_function.setdefault(name, [[] for _ in episodes])
                    by_episode[i] = [(token, weight * value) for token, value in self.place(episode, steps)]
        return by_function

    def place(self, episode: Episode, steps: list[tuple[int, float]]) -> Steps:
        """Convert process rewards at character positions to (index of the token in which the step ends, value)."""
        ids = episode.completion_ids
        decode = self.policy.decode
        opening = len(episode.completion.text) - len(decode(ids))  # characters that the chat template had written

        @functools.cache
        def end(n: int) -> int:
            """The position in the text after n tokens."""
            return opening + len(decode(ids[:n]))

        counts = range(1, len(ids))  # numbers of tokens; the last token takes what lies beyond
        return [(bisect.bisect_left(counts, position, key=end), value) for position, value in sorted(steps)]


def completion_mask(episodes: list[Episode]) -> torch.Tensor:
    """True on the tokens of each completion, (N, C)."""
    lengths = torch.tensor([len(e.completion_ids) for e in episodes])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """(N, C) on the CPU, zeros behind each row."""
    return torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True)


def unpad(values: torch.Tensor, episodes: list[Episode]) -> list[torch.Tensor]:
    """The rows of (N, C), each as long as its completion."""
    return [row[: len(e.completion_ids)].clone() for row, e in zip(values, episodes)]
