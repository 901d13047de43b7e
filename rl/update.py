"""The update: optimizer steps of policy and critic on the episodes of one roll-out.

Micro-batches with a token budget bound the memory without changing the gradient: the loss is normalised over the whole
optimizer step. Completions without a gradient (all advantages 0, no other term in the loss) are skipped, but counted
in the normalisation. Policy and critic are updated one after the other by separate optimizers and share no gradients.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from rl import algorithms
from rl.config import Config
from rl.critic import Critic
from rl.model import distributed
from rl.model.logprobs import completion_logprobs
from rl.model.oom import micro_batches, retry_on_oom, return_freed_memory
from rl.model.policy import Policy
from rl.optimizer import Optimizer
from rl.rollout import Episode, sampled_mask


class Updater:
    """Updates the policy and, if there is one, the critic. Owns their optimizers."""

    def __init__(self, policy: Policy, critic: Critic | None, config: Config):
        self.policy = policy
        self.critic = critic
        self.config = config
        self.uses_pairs = config.algorithm == "dpo"  # pairs of the best and the worst completion of a group
        self.optimizer = Optimizer(policy.trainable_parameters(), config.learning_rate, policy, config)
        if critic:
            learning_rate = config.critic_learning_rate or config.learning_rate
            self.critic_optimizer = Optimizer(critic.parameters, learning_rate, policy, config)
        self.generator = torch.Generator().manual_seed(config.seed)  # shuffles the groups into mini-batches
        self.rollouts = 0

    def state_dict(self) -> dict:
        """Return the state of the optimizers and the generator, the critic's parameters and the number of roll-outs."""
        state = {"rollouts": self.rollouts, "generator": self.generator.get_state()}
        state["optimizer"] = self.optimizer.state_dict()
        if self.critic:
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
            state["critic"] = [p.detach() for p in self.critic.parameters]
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.rollouts = state["rollouts"]
        self.generator.set_state(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
            for p, saved in zip(self.critic.parameters, state["critic"], strict=True):
                p.copy_(saved)

    @property
    def corrects_sampler(self) -> bool:
        """True if importance weights correct for the sampler: a server, or ours in bf16 or fp16."""
        differs = self.policy.dtype != torch.float32 or self.policy.server
        return self.config.importance_sampling_cap > 0 and bool(differs)

    def fill_values(self, episodes: list[Episode]) -> None:
        """Set each episode's `values` and, for a KL in the reward, its `old_logprobs` and `reference_logprobs`.

        Call before the advantages are computed. Does nothing without a critic.
        """
        if not self.critic:
            return

        def fill() -> None:
            for batch in self.micro_batches(distributed.own(episodes)):
                values, _ = self.critic.values(*prompt_and_completion_ids(batch))  # (B, C + 1)
                for episode, row in zip(batch, values):
                    episode.values = row[: len(episode.completion_ids) + 1].clone()

        with torch.no_grad(), self.critic.active():
            self.retry_on_oom(fill, episodes)
        distributed.exchange(episodes, "values")
        if self.config.beta:
            self.fill_logprobs(episodes, "old_logprobs")
            with self.policy.reference():
                self.fill_logprobs(episodes, "reference_logprobs")
            distributed.exchange(episodes, "old_logprobs")
            distributed.exchange(episodes, "reference_logprobs")

    def update(self, episodes: list[Episode]) -> dict[str, float]:
        """Run all optimizer steps on the episodes of one roll-out.

        Reads each episode's `advantages` and, with a critic, `values` and `returns`. Sets `old_logprobs`, and
        `reference_logprobs` if the loss needs them.

        Returns:
            Metrics under TRL's names. Token means are over the contributing completions, nan if there are none.
        """
        config = self.config
        learning_rate = self.optimizer.learning_rate  # of the first optimizer step
        self.rollouts += 1
        frozen = self.critic is not None and self.rollouts <= config.critic_warmup_steps
        contributing = [] if frozen else [e for e in episodes if self.contributes(e)]
        epochs = [list(self.mini_batches(episodes)) for _ in range(config.num_iterations)]
        if contributing and not self.uses_pairs:  # the first mini-batch gets its old_logprobs in its own forward pass
            later = {id(e) for mini_batch in epochs[0][1:] for e in mini_batch}
            self.fill_logprobs([e for e in contributing if e.old_logprobs is None and id(e) in later], "old_logprobs")
        if config.kl_in_loss or self.uses_pairs:
            with self.policy.reference():
                self.fill_logprobs(contributing, "reference_logprobs")
        totals = Counter()
        for epoch in epochs:
            for mini_batch in epoch:
                if frozen:
                    self.optimizer.skip_step()
                else:
                    frozen = self.policy_step(mini_batch, totals)
                    totals["mini_batches"] += 1
                if self.critic:
                    self.critic_step(mini_batch, totals)
        return self.metrics(totals, learning_rate)

    def metrics(self, totals: Counter, learning_rate: float) -> dict[str, float]:
        """Compute the metrics from the sums over all optimizer steps of one roll-out."""
        config = self.config
        tokens = totals["tokens"] or math.nan  # nan if no completion contributed
        updates = totals["updates"] or math.nan
        metrics = {
            "loss": totals["loss"] / (totals["mini_batches"] or math.nan),
            "entropy": totals["entropy"] / tokens,
            "clip_ratio/low_mean": totals["clipped_low"] / tokens,
            "clip_ratio/high_mean": totals["clipped_high"] / tokens,
            "clip_ratio/region_mean": (totals["clipped_low"] + totals["clipped_high"]) / tokens,
            "policy/approxkl_avg": totals["approx_kl"] / tokens,
            "grad_norm": totals["grad_norm"] / updates,
            "learning_rate": learning_rate,
            "updates": totals["updates"],
            "lora_norm": math.sqrt(sum(p.double().square().sum().item() for p in self.optimizer.parameters)),
            "skipped_updates": totals["skipped"],
        }
        if config.kl_in_loss:
            metrics["kl"] = totals["kl"] / tokens
        if totals["is_weight"]:
            metrics["sampling/importance_sampling_ratio/mean"] = totals["is_weight"] / tokens
            metrics["sampling/sampling_logp_difference/mean"] = totals["logp_diff"] / tokens
            metrics["sampling/sampling_logp_difference/max"] = totals["max_logp_diff"]
        if self.uses_pairs:
            metrics["rewards/margins"] = totals["margin"] / (totals["pairs"] or math.nan)
        if self.critic:
            updates = totals["critic_updates"] or math.nan
            metrics["loss/value_avg"] = totals["value_loss"] / updates
            metrics["critic_grad_norm"] = totals["critic_grad_norm"] / updates
        return metrics

    def mini_batches(self, episodes: list[Episode]) -> Iterator[list[Episode]]:
        """Yield the episodes in `num_mini_batches` parts: all at once, or whole groups in random order."""
        config = self.config
        if config.num_mini_batches == 1:
            yield episodes
            return
        groups = self.groups(episodes)
        order = torch.randperm(len(groups), generator=self.generator).tolist()
        for part in range(config.num_mini_batches):
            yield [episode for i in order[part :: config.num_mini_batches] for episode in groups[i]]

    def groups(self, episodes: list[Episode]) -> list[list[Episode]]:
        size = self.config.num_generations
        return [episodes[i : i + size] for i in range(0, len(episodes), size)]

    def contributes(self, episode: Episode) -> bool:
        """Return True if the episode has a gradient: a nonzero advantage, or a KL or entropy term in the loss."""
        has_other_terms = self.config.kl_in_loss or self.config.entropy_coef
        return episode.in_loss and bool(has_other_terms or episode.advantages.any())

    def policy_step(self, episodes: list[Episode], totals: Counter) -> bool:
        """Make one optimizer step of the policy. Steps with a non-finite gradient are skipped and counted.

        Returns:
            True if KL(old, new) exceeds `target_kl`: the step is skipped, and the policy is not updated any further.
        """
        backward = self.backward_pairs if self.uses_pairs else self.backward
        sums = self.accumulate(self.optimizer, backward, episodes)
        max_logp_diff = max(totals["max_logp_diff"], sums["max_logp_diff"])
        totals.update(sums)
        totals["max_logp_diff"] = max_logp_diff
        if self.config.target_kl and sums["approx_kl"] > self.config.target_kl * sums["tokens"]:
            self.optimizer.skip_step()
            return True
        norm = self.optimizer.step()
        if norm is not None:
            finite = math.isfinite(norm)
            totals.update({"grad_norm": norm, "updates": 1} if finite else {"skipped": 1})
        return False

    def accumulate(self, optimizer: Optimizer, backward: Callable, episodes: list[Episode]) -> Counter:
        """Accumulate the gradient over the episodes, with torchrun each process over its own, and return the sums for the
        metrics. Restarts on OOM.
        """

        def attempt() -> Counter:
            optimizer.zero_grad()
            totals = Counter()
            with self.policy.training():
                backward(episodes, totals)
            return totals

        totals = self.retry_on_oom(attempt, episodes)
        distributed.sum_gradients(optimizer.parameters)
        return distributed.sum_counts(totals)

    def backward(self, episodes: list[Episode], totals: Counter) -> None:
        """Accumulate the gradient of the policy loss over the episodes of one optimizer step."""
        config = self.config
        num_tokens = sum(e.num_sampled for e in episodes if e.in_loss)
        contributing = [e for e in distributed.own(episodes) if self.contributes(e)]
        for batch in self.micro_batches(contributing):
            logprobs, mask, entropy = completion_logprobs(
                self.policy, *prompt_and_completion_ids(batch), with_entropy=True
            )  # (B, C)
            mask = sampled_mask(batch).to(mask.device)
            advantages = self.pad([e.advantages for e in batch])
            for episode, row in zip(batch, logprobs.detach()):
                if episode.old_logprobs is None:  # first update after the roll-out: pi = pi_old
                    episode.old_logprobs = row[: len(episode.completion_ids)].clone()
            old = self.pad([e.old_logprobs for e in batch])
            loss, ratio = algorithms.policy_loss(logprobs, old, advantages, mask, config)  # (B, C)
            if self.corrects_sampler:
                sampled = self.pad([torch.tensor(e.sampler_logprobs) for e in batch])
                is_weight = algorithms.truncated_importance_weights(old, sampled, config.importance_sampling_cap)
                loss = loss * is_weight
                logp_diff = torch.where(mask, (old - sampled).abs(), 0.0)
                totals["is_weight"] += (is_weight * mask).sum().item()
                totals["logp_diff"] += logp_diff.sum().item()
                totals["max_logp_diff"] = max(totals["max_logp_diff"], logp_diff.max().item())
            entropy = torch.where(mask, entropy, 0.0)
            loss = loss - config.entropy_coef * entropy
            if config.kl_in_loss:
                reference = self.pad([e.reference_logprobs for e in batch])
                kl = algorithms.kl_divergence(logprobs, reference, mask, config.kl_estimator)
                loss = loss + config.beta * (kl * ratio if config.use_bias_correction_kl else kl)
                totals["kl"] += kl.detach().sum().item()
            weights = algorithms.token_weights(
                mask, config.loss_type, num_tokens, len(episodes), config.max_completion_length
            )
            loss = (torch.where(mask, loss, 0.0) * weights).sum()
            self.optimizer.backward(loss)

            clipped_low, clipped_high = algorithms.clipped_tokens(ratio, advantages, mask, config)
            approx_kl = algorithms.kl_divergence(old, logprobs.detach(), mask, "k3")  # KL(old, new)
            totals["loss"] += loss.item()
            totals["entropy"] += entropy.sum().item()
            totals["clipped_low"] += clipped_low.sum().item()
            totals["clipped_high"] += clipped_high.sum().item()
            totals["approx_kl"] += approx_kl.sum().item()
            totals["tokens"] += mask.sum().item()

    def backward_pairs(self, episodes: list[Episode], totals: Counter) -> None:
        """Accumulate the gradient of DPO's loss on the best (advantage 1) and worst (-1) completion of each group."""
        config = self.config
        pairs = []
        for group in self.groups(episodes):
            pair = [e for sign in (1, -1) for e in group if e.in_loss and e.advantages[0] == sign]
            if len(pair) == 2:
                pairs.append(pair)
        own_pairs = [pair for pair in pairs if distributed.own(pair)]
        for batch in self.micro_batches(own_pairs):
            rows = [pair[0] for pair in batch] + [pair[1] for pair in batch]
            logprobs, mask, entropy = completion_logprobs(
                self.policy, *prompt_and_completion_ids(rows), with_entropy=True
            )
            mask = sampled_mask(rows).to(mask.device)
            logprobs = torch.where(mask, logprobs, 0.0)
            entropy = torch.where(mask, entropy, 0.0)
            reference = torch.where(mask, self.pad([e.reference_logprobs for e in rows]), 0.0)
            margin = config.beta * (logprobs - reference).sum(1)  # (2 pairs,)
            margin = margin[: len(batch)] - margin[len(batch) :]
            chosen, rejected = logprobs.sum(1).split(len(batch))
            loss = algorithms.dpo_loss(chosen, rejected, *reference.sum(1).split(len(batch)), config.beta)
            loss = loss.sum() / len(pairs)
            self.optimizer.backward(loss)
            totals["loss"] += loss.item()
            totals["entropy"] += entropy.sum().item()
            totals["margin"] += margin.sum().item()
            totals["tokens"] += mask.sum().item()
            totals["pairs"] += len(batch)

    def critic_step(self, episodes: list[Episode], totals: Counter) -> None:
        """Make one optimizer step of the critic on the mean value loss over the tokens."""
        with self.critic.active():
            totals.update(self.accumulate(self.critic_optimizer, self.backward_values, episodes))
        norm = self.critic_optimizer.step()
        if norm is not None:
            finite = math.isfinite(norm)
            totals.update({"critic_grad_norm": norm, "critic_updates": 1} if finite else {"skipped": 1})

    def backward_values(self, episodes: list[Episode], totals: Counter) -> None:
        """Accumulate the gradient of the value loss."""
        in_loss = [e for e in episodes if e.in_loss]
        num_tokens = sum(e.num_sampled for e in in_loss)
        for batch in self.micro_batches(distributed.own(in_loss)):
            values, mask = self.critic.values(*prompt_and_completion_ids(batch))  # (B, C + 1), (B, C)
            mask = sampled_mask(batch).to(mask.device)
            old = self.pad([e.values[:-1] for e in batch])
            returns = self.pad([e.returns for e in batch])
            loss = algorithms.clipped_value_loss(values[:, :-1], old, returns, self.config.cliprange_value)
            loss = torch.where(mask, loss, 0.0).sum() / num_tokens
            self.critic_optimizer.backward(loss)
            totals["value_loss"] += loss.item()

    @torch.no_grad()
    def fill_logprobs(self, episodes: list[Episode], name: str) -> None:
        """Set the attribute `name` of this process's episodes to their log-probabilities under the current model."""

        def fill() -> None:
            for batch in self.micro_batches(distributed.own(episodes)):
                logprobs, _, _ = completion_logprobs(self.policy, *prompt_and_completion_ids(batch))
                for episode, row in zip(batch, logprobs):
                    setattr(episode, name, row[: len(episode.completion_ids)].clone())

        self.retry_on_oom(fill, episodes)

    def micro_batches(self, items: list) -> Iterator[list]:
        for batch in micro_batches(items, self.config.max_tokens_per_micro_batch, self.policy.shares_prompts):
            yield batch
            return_freed_memory(self.policy)

    def retry_on_oom(self, fn: Callable, episodes: list[Episode]):
        """Return fn(). On OOM, halve `max_tokens_per_micro_batch` and retry."""
        longest = max((len(e.prompt_ids) + len(e.completion_ids) for e in episodes), default=0)
        return retry_on_oom(fn, self.config, "max_tokens_per_micro_batch", longest * len(episodes), longest)

    def pad(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.policy.device)


def prompt_and_completion_ids(episodes: list[Episode]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of the prompts and of the completions."""
    return [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]
