"""Per-token advantages, computed from the rewards with the configured `algorithm`.

GRPO, RLOO and REINFORCE++ give all tokens of a completion the same advantage; process rewards add to it for the tokens
up to the end of their step. In REINFORCE, PPO and A2C each token is an action with its own reward and advantage.
"""

import bisect
import functools
import math

import torch

from grading import Rewards
from rl import algorithms
from rl.algorithms import StepRewards
from rl.config import Config
from rl.model.policy import Policy
from rl.rollout import Episode, sampled_mask


class Advantages:
    """Computes the advantages of episodes. Holds the state that an algorithm carries over between training steps."""

    def __init__(self, policy: Policy, rewards: Rewards, config: Config):
        self.policy = policy
        self.config = config
        self.weights = {f.name: f.weight for f in rewards.functions}
        self.mean_return = None  # running mean of the completions' mean returns, for `baseline: running`
        self.beta = config.beta  # weight of the KL in the rewards of PPO and A2C, adapted if beta_target_kl is set

    def state_dict(self) -> dict:
        return {"mean_return": self.mean_return, "beta": self.beta}

    def load_state_dict(self, state: dict) -> None:
        self.mean_return = state["mean_return"]
        if self.config.beta_target_kl:  # otherwise a changed `beta` setting takes effect
            self.beta = state["beta"]

    def compute(self, episodes: list[Episode]) -> dict[str, float]:
        """Set `advantages` (C,) and `in_loss` of each episode and, with a critic, `returns` (C,). Return metrics.

        Reads `reward`, which includes the process rewards, and, with a critic, the results of `Updater.fill_values`.
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
        num_sampled = [episode.num_sampled for episode in episodes]
        if config.algorithm == "dpo":
            eligible = torch.where(in_loss, rewards, torch.nan)
            signs = algorithms.preference_signs(eligible, config.num_generations).tolist()
            for episode, length, sign in zip(episodes, lengths, signs):
                episode.advantages = torch.full((length,), sign)
            return metrics
        steps = self.process_rewards(episodes)
        sums = [sum(value for by_episode in steps.values() for _, value in by_episode[i]) for i in range(len(episodes))]
        outcome = rewards - torch.tensor(sums)  # (N,), without the process rewards
        if config.has_critic or config.algorithm == "reinforce":
            merged = [[step for by_episode in steps.values() for step in by_episode[i]] for i in range(len(episodes))]
            estimate = self.actor_critic if config.has_critic else self.reinforce
            advantages = estimate(episodes, outcome, merged, metrics)
        else:
            by_completion = self.group_relative(outcome, num_sampled, in_loss).tolist()
            advantages = [torch.full((length,), a) for length, a in zip(lengths, by_completion)]
            for name, by_episode in steps.items():
                weight = self.weights[name]
                unweighted = [[(token, value / weight) for token, value in pairs] for pairs in by_episode]
                process = algorithms.process_advantages(unweighted, lengths, config.num_generations)
                advantages = [a + weight * p for a, p in zip(advantages, process)]
        for episode, tensor in zip(episodes, advantages):
            episode.advantages = tensor
        return metrics

    def group_relative(self, rewards: torch.Tensor, lengths: list[int], in_loss: torch.Tensor) -> torch.Tensor:
        """Return the group-relative advantage of each completion, (N,). rewards: (N,), nan if ungraded."""
        group = self.config.num_generations
        if self.config.algorithm == "rloo":
            return algorithms.leave_one_out_advantages(rewards, group)
        if self.config.algorithm == "reinforce_plus_plus":
            centred = algorithms.group_advantages(rewards, group, "none")
            loss_mask = ~rewards.isnan() & in_loss
            return algorithms.whiten_by_token(centred, torch.tensor(lengths), loss_mask)
        return algorithms.group_advantages(rewards, group, self.config.scale_rewards)

    def reinforce(
        self, episodes: list[Episode], outcome: torch.Tensor, steps: list[StepRewards], metrics: dict
    ) -> list[torch.Tensor]:
        """Return G_t - b of each episode, (C,). The baseline b is the group's mean return, a running mean, or 0."""
        mask = sampled_mask(episodes)  # (N, C)
        returns = algorithms.discounted_returns(
            algorithms.token_rewards(outcome, steps, mask, None, 0.0), mask, self.config.gamma
        )
        graded = ~outcome.isnan()
        mean = torch.where(graded, returns.sum(1) / mask.sum(1), torch.nan)  # (N,), mean return of each completion
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
        self, episodes: list[Episode], outcome: torch.Tensor, steps: list[StepRewards], metrics: dict
    ) -> list[torch.Tensor]:
        """Return the whitened GAE advantages of each episode, (C,), with the KL in the rewards.

        Sets `in_loss` of ungraded episodes to False, and `returns` of all episodes.
        """
        config = self.config
        mask = sampled_mask(episodes)  # (N, C)
        kl = None
        if config.beta:
            old, reference = (pad([getattr(e, f"{name}_logprobs") for e in episodes]) for name in ("old", "reference"))
            kl = algorithms.kl_divergence(old, reference, mask, "k1")
            metrics |= {"kl": (kl.sum() / mask.sum()).item(), "beta": self.beta}
        rewards = algorithms.token_rewards(outcome, steps, mask, kl, self.beta)
        if config.beta_target_kl:
            mean_kl = kl.sum(1).mean().item()  # nats per completion
            self.beta = algorithms.adapted_beta(self.beta, mean_kl, config.beta_target_kl)
        for episode, reward in zip(episodes, outcome.tolist()):
            episode.in_loss = episode.in_loss and not math.isnan(reward)
        loss_mask = mask & torch.tensor([e.in_loss for e in episodes])[:, None]
        if config.whiten_rewards:
            rewards = algorithms.whiten(rewards, loss_mask, shift_mean=False)
        values = pad([e.values[:-1] for e in episodes])
        last_values = torch.stack([e.values[-1].cpu() for e in episodes])
        bootstrap = torch.tensor([e.truncated and config.bootstrap_truncated for e in episodes])
        advantages, returns = algorithms.generalised_advantages(
            rewards, values, mask, config.gamma, config.lam, torch.where(bootstrap, last_values, 0.0)
        )
        for episode, tensor in zip(episodes, unpad(returns, episodes)):
            episode.returns = tensor
        metrics["explained_variance"] = algorithms.explained_variance(values, returns, loss_mask)
        metrics["value"] = values[loss_mask].mean().item() if loss_mask.any() else 0.0
        return unpad(algorithms.whiten(advantages, loss_mask), episodes)

    def process_rewards(self, episodes: list[Episode]) -> dict[str, list[StepRewards]]:
        """Return weighted process rewards by function and episode, in text order. A control run has none."""
        by_function = {}
        if self.config.control != "none":
            return by_function
        for i, episode in enumerate(episodes):
            for name, steps in episode.score.process.items():
                weight = self.weights[name]
                if weight and episode.score.verdict != "ungraded":
                    by_episode = by_function.setdefault(name, [[] for _ in episodes])
                    by_episode[i] = [(token, weight * value) for token, value in self.align_to_tokens(episode, steps)]
            for name, steps in episode.score.turns.items():
                weight = self.weights[name]
                if weight and episode.score.verdict != "ungraded":
                    by_episode = by_function.setdefault(name, [[] for _ in episodes])
                    ends = episode.turn_ends()
                    by_episode[i] = [(ends[turn], weight * value) for turn, value in steps]
        return by_function

    def align_to_tokens(self, episode: Episode, steps: list[tuple[int, float]]) -> StepRewards:
        """Convert (character position, value) pairs to (index of the token in which the step ends, value) pairs."""
        *earlier, _ = episode.turn_ends()
        start = (
            episode.sampled_flags.index(True, earlier[-1] + 1) if earlier else 0
        )  # the text is that of the last turn
        ids = episode.completion_ids[start:]
        decode = self.policy.decode
        prefix_length = len(episode.completion.text) - len(decode(ids))  # characters that the chat template writes

        @functools.cache
        def end_position(num_tokens: int) -> int:
            return prefix_length + len(decode(ids[:num_tokens]))

        counts = range(1, len(ids))  # a position after the second-to-last token belongs to the last token
        return [
            (start + bisect.bisect_left(counts, position, key=end_position), value) for position, value in sorted(steps)
        ]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    """Pad with zeros on the right to (N, C), on the CPU."""
    return torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True)


def unpad(values: torch.Tensor, episodes: list[Episode]) -> list[torch.Tensor]:
    """Split (N, C) into rows without padding, (C,) each."""
    return [row[: len(e.completion_ids)].clone() for row, e in zip(values, episodes)]
