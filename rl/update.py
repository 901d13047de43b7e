"""The update: from scored episodes to optimizer steps of policy and critic, in micro-batches under a token budget.

Micro-batches bound the memory and do not change the gradient: the weights of the loss are those of the whole optimizer
step. Completions that contribute nothing (all advantages 0, no further term) are neither forwarded nor backwarded; the
divisor still counts them. Policy and critic are updated one after the other, each with an optimizer of its own, so that
no gradient of the one reaches the other.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from rl import algorithms
from rl.config import Config
from rl.critic import Critic
from rl.model.logprobs import completion_logprobs
from rl.model.oom import within_memory
from rl.model.policy import Policy
from rl.optimizer import Optimizer
from rl.rollout import Episode


class Updater:
    """What happens to the policy (and the critic, where there is one) after a roll-out."""

    def __init__(self, policy: Policy, config: Config, critic: Critic | None = None):
        self.policy, self.critic, self.config = policy, critic, config
        self.optimizer = Optimizer(policy.trainable_parameters(), config.learning_rate, policy, config)
        if critic:
            learning_rate = config.critic_learning_rate or config.learning_rate
            self.critic_optimizer = Optimizer(critic.parameters, learning_rate, policy, config)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order of mini-batches
        self.rollouts = 0

    def state_dict(self) -> dict:
        """Optimizers, the critic's parameters, and what is counted over the run."""
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
        """In bf16 and fp16 the sampler is another policy than the trainer; fp32 kernels differ by rounding alone."""
        return self.config.importance_sampling_cap > 0 and self.policy.dtype != torch.float32

    def look(self, episodes: list[Episode]) -> None:
        """Before the advantages: what a critic's algorithm must know of each token, under the models as they are.

        Fills `values`, and with a KL in the reward `old_logprobs` and `reference_logprobs`. Nothing without a critic.
        """
        if not self.critic:
            return

        def value():
            for batch in self.micro_batches(episodes):
                values, _ = self.critic.values(*ids_of(batch))
                for episode, row in zip(batch, values):
                    episode.values = row[: len(episode.completion_ids) + 1].clone()

        with torch.no_grad(), self.critic.active():
            self.within_memory(value, episodes)
        if self.config.beta:
            self.fill_logprobs(episodes, "old_logprobs")
            with self.policy.reference():
                self.fill_logprobs(episodes, "reference_logprobs")

    def update(self, episodes: list[Episode]) -> dict[str, float]:
        """All optimizer steps of one roll-out. Returns metrics by TRL's names.

        Every episode must have its advantages (and with a critic its values and returns). Fills old_logprobs, and
        reference_logprobs where they are needed. Means over tokens are over those of contributing completions, and nan
        where nothing contributed.
        """
        config = self.config
        learning_rate = self.optimizer.learning_rate  # of the first optimizer step
        self.rollouts += 1
        frozen = self.critic is not None and self.rollouts <= config.critic_warmup_steps
        contributing = [] if frozen else [e for e in episodes if self.contributes(e)]
        parts = [list(self.mini_batches(episodes)) for _ in range(config.num_iterations)]
        if config.algorithm != "dpo":  # the first mini-batch is exactly on-policy: its own pass gives them
            later = set() if frozen else {id(e) for mini_batch in parts[0][1:] for e in mini_batch}
            self.fill_logprobs([e for e in contributing if e.old_logprobs is None and id(e) in later], "old_logprobs")
        if config.kl_in_loss or config.algorithm == "dpo":
            with self.policy.reference():
                self.fill_logprobs(contributing, "reference_logprobs")
        totals = Counter()
        for epoch in parts:
            for mini_batch in epoch:
                if frozen:
                    self.optimizer.discard()
                else:
                    frozen = self.policy_step(mini_batch, totals)
                    totals["mini_batches"] += 1
                if self.critic:
                    self.critic_step(mini_batch, totals)
        return self.describe(totals, learning_rate)

    def describe(self, totals: dict[str, float], learning_rate: float) -> dict[str, float]:
        """The sums of one roll-out's optimizer steps as metrics."""
        config = self.config
        tokens, updates = totals["tokens"] or math.nan, totals["updates"] or math.nan  # nan: nothing contributed
        metrics = {
            "loss": totals["loss"] / (totals["mini_batches"] or math.nan),
            "entropy": totals["entropy"] / tokens,
            "clip_ratio/low_mean": totals["low"] / tokens,
            "clip_ratio/high_mean": totals["high"] / tokens,
            "clip_ratio/region_mean": (totals["low"] + totals["high"]) / tokens,
            "policy/approxkl_avg": totals["moved"] / tokens,
            "grad_norm": totals["grad_norm"] / updates,
            "learning_rate": learning_rate,
            "updates": totals["updates"],
            "lora_norm": math.sqrt(sum(p.double().square().sum().item() for p in self.optimizer.parameters)),
            "skipped_updates": totals["skipped"],
        }
        if config.kl_in_loss:
            metrics["kl"] = totals["kl"] / tokens
        if self.corrects_sampler and config.algorithm != "dpo" and totals["tokens"]:
            metrics["sampling/importance_sampling_ratio/mean"] = totals["trust"] / tokens
            metrics["sampling/sampling_logp_difference/mean"] = totals["mismatch"] / tokens
            metrics["sampling/sampling_logp_difference/max"] = totals["most_mismatch"]
        if config.algorithm == "dpo":
            metrics["rewards/margins"] = totals["margin"] / (totals["pairs"] or math.nan)
        if self.critic:
            updates = totals["critic_updates"] or math.nan
            metrics["loss/value_avg"] = totals["value_loss"] / updates
            metrics["critic_grad_norm"] = totals["critic_grad_norm"] / updates
        return metrics

    def mini_batches(self, episodes: list[Episode]) -> Iterator[list[Episode]]:
        """Whole groups, shuffled, in num_mini_batches parts."""
        config = self.config
        if config.num_mini_batches == 1:
            yield episodes
            return
        groups = [episodes[i : i + config.num_generations] for i in range(0, len(episodes), config.num_generations)]
        order = torch.randperm(len(groups), generator=self.generator).tolist()
        for part in range(config.num_mini_batches):
            yield [episode for i in order[part :: config.num_mini_batches] for episode in groups[i]]

    def contributes(self, episode: Episode) -> bool:
        """Whether it moves the policy: some advantage is not 0, or a term of the loss goes beyond the advantages."""
        further_terms = self.config.kl_in_loss or self.config.entropy_coef
        return episode.in_loss and bool(further_terms or episode.advantages.any())

    def policy_step(self, episodes: list[Episode], totals: Counter) -> bool:
        """One gradient step on these episodes; a gradient that is not finite is left out and counted.

        Returns whether the policy has moved so far since the roll-out that it has to stay as it is: `target_kl`.
        """
        backward = self.backward_pairs if self.config.algorithm == "dpo" else self.backward
        own = self.accumulate(self.optimizer, backward, episodes)
        most = max(totals["most_mismatch"], own["most_mismatch"])
        totals.update(own)
        totals["most_mismatch"] = most
        if self.config.target_kl and own["moved"] > self.config.target_kl * own["tokens"]:
            self.optimizer.discard()
            return True
        norm = self.optimizer.step()
        if norm is not None:
            finite = math.isfinite(norm)
            totals.update({"grad_norm": norm, "updates": 1} if finite else {"skipped": 1})
        return False

    def accumulate(self, optimizer: Optimizer, backward: Callable, episodes: list[Episode]) -> Counter:
        """The gradient of these episodes, from the beginning each time that memory runs out; the sums of that pass."""

        def work():
            optimizer.clear()
            totals = Counter()
            with self.policy.training():
                backward(episodes, totals)
            return totals

        return self.within_memory(work, episodes)

    def backward(self, episodes: list[Episode], totals: Counter) -> None:
        """Add the gradient of the loss over these episodes, the batch of one optimizer step, micro-batch by micro-batch."""
        config = self.config
        num_tokens = sum(len(e.completion_ids) for e in episodes if e.in_loss)
        contributing = [e for e in episodes if self.contributes(e)]
        for batch in self.micro_batches(contributing):
            logprobs, mask, entropy = completion_logprobs(self.policy, *ids_of(batch), with_entropy=True)  # (B, C)
            advantages = self.pad([e.advantages for e in batch])
            for episode, row in zip(batch, logprobs.detach()):
                if episode.old_logprobs is None:  # nothing has been updated since the roll-out
                    episode.old_logprobs = row[: len(episode.completion_ids)].clone()
            old = self.pad([e.old_logprobs for e in batch])
            loss, ratio = algorithms.policy_loss(logprobs, old, advantages, mask, config)  # (B, C)
            if self.corrects_sampler:
                sampled = self.pad([torch.tensor(e.sampler_logprobs) for e in batch])
                trust = algorithms.truncated_importance_weights(old, sampled, config.importance_sampling_cap)
                loss = loss * trust
                totals["trust"] += (trust * mask).sum().item()
                mismatch = torch.where(mask, (old - sampled).abs(), 0.0)
                totals["mismatch"] += mismatch.sum().item()
                totals["most_mismatch"] = max(totals["most_mismatch"], mismatch.max().item())
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

            low, high = algorithms.clipped_tokens(ratio, advantages, mask, config)
            moved = algorithms.kl_divergence(old, logprobs.detach(), mask, "k3")  # the tokens are the old policy's
            for name, value in (("loss", loss), ("entropy", entropy), ("low", low), ("high", high), ("moved", moved)):
                totals[name] += value.detach().sum().item()
            totals["tokens"] += mask.sum().item()

    def backward_pairs(self, episodes: list[Episode], totals: Counter) -> None:
        """The same for DPO: each group's best completion (its advantage is 1) against its worst (-1)."""
        config = self.config
        groups = [episodes[i : i + config.num_generations] for i in range(0, len(episodes), config.num_generations)]
        pairs = [[e for sign in (1, -1) for e in group if e.in_loss and e.advantages[0] == sign] for group in groups]
        pairs = [pair for pair in pairs if len(pair) == 2]
        for batch in self.micro_batches(pairs):
            both = [pair[0] for pair in batch] + [pair[1] for pair in batch]
            logprobs, mask, entropy = completion_logprobs(self.policy, *ids_of(both), with_entropy=True)
            reference = self.pad([e.reference_logprobs for e in both])
            margin = config.beta * (logprobs - reference).sum(1)  # (2 pairs,)
            margin = margin[: len(batch)] - margin[len(batch) :]
            chosen, rejected = logprobs.sum(1).split(len(batch))
            loss = algorithms.dpo_loss(chosen, rejected, *reference.sum(1).split(len(batch)), config.beta)
            loss = loss.sum() / len(pairs)
            self.optimizer.backward(loss)
            for name, value in (("loss", loss), ("entropy", entropy), ("margin", margin)):
                totals[name] += value.detach().sum().item()
            totals.update({"tokens": mask.sum().item(), "pairs": len(batch)})

    def critic_step(self, episodes: list[Episode], totals: Counter) -> None:
        """One gradient step of the critic on these episodes: the mean value loss over their tokens."""
        with self.critic.active():
            totals.update(self.accumulate(self.critic_optimizer, self.backward_values, episodes))
        norm = self.critic_optimizer.step()
        if norm is not None:
            finite = math.isfinite(norm)
            totals.update({"critic_grad_norm": norm, "critic_updates": 1} if finite else {"skipped": 1})

    def backward_values(self, episodes: list[Episode], totals: Counter) -> None:
        """The same for the critic."""
        learning = [e for e in episodes if e.in_loss]
        num_tokens = sum(len(e.completion_ids) for e in learning)
        for batch in self.micro_batches(learning):
            values, mask = self.critic.values(*ids_of(batch))
            old = self.pad([e.values[:-1] for e in batch])
            returns = self.pad([e.returns for e in batch])
            loss = algorithms.clipped_value_loss(values[:, :-1], old, returns, self.config.cliprange_value)
            loss = torch.where(mask, loss, 0.0).sum() / num_tokens
            self.critic_optimizer.backward(loss)
            totals["value_loss"] += loss.item()

    @torch.no_grad()
    def fill_logprobs(self, episodes: list[Episode], name: str) -> None:
        """Store each episode's log-probabilities under the model as it is now, by the path that scores in the update."""

        def score():
            for batch in self.micro_batches(episodes):
                logprobs, _, _ = completion_logprobs(self.policy, *ids_of(batch))
                for episode, row in zip(batch, logprobs):
                    setattr(episode, name, row[: len(episode.completion_ids)].clone())

        self.within_memory(score, episodes)

    def micro_batches(self, items: list) -> Iterator[list]:
        return micro_batches(items, self.config.max_tokens_per_micro_batch, self.policy.shares_prompts)

    def within_memory(self, work: Callable, episodes: list[Episode]):
        """What work() on these episodes returns, with fewer tokens in a micro-batch where memory runs out."""
        longest = max((len(e.prompt_ids) + len(e.completion_ids) for e in episodes), default=0)
        return within_memory(work, self.config, "max_tokens_per_micro_batch", longest * len(episodes), longest)

    def pad(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.policy.device)

    @torch.no_grad()
    def inspect(self, episodes: list[Episode]) -> tuple[int, list[dict]]:
        """What happens at each token of the group with the largest advantages, for tokens.jsonl.

        Returns the number of the group, and one dict for each of its completions with one value a token.
        """
        size = self.config.num_generations

        def learned(group):
            return sum(
                e.advantages.abs().mean().item()
                for e in episodes[group * size : (group + 1) * size]
                if e.advantages is not None
            )

        group = max(range(len(episodes) // size), key=learned)
        rows, chosen = {}, episodes[group * size : (group + 1) * size]

        def look():
            for batch in self.micro_batches(chosen):
                logprobs, mask, entropy = completion_logprobs(self.policy, *ids_of(batch), with_entropy=True)
                with self.policy.reference():
                    reference, _, _ = completion_logprobs(self.policy, *ids_of(batch))
                kl = algorithms.kl_divergence(logprobs, reference, mask, "k3")
                for i, episode in enumerate(batch):
                    rows[id(episode)] = self.inspected(episode, logprobs[i], entropy[i], kl[i])

        self.within_memory(look, chosen)
        return group, [rows[id(episode)] for episode in chosen]

    def inspected(self, episode: Episode, logprobs, entropy, kl) -> dict:
        """One completion token by token; logprobs, entropy and kl are (C,) of the padded batch."""
        n = len(episode.completion_ids)
        return {
            "tokens": [self.policy.tokenizer.decode([token]) for token in episode.completion_ids],
            "logprobs": _rounded(logprobs[:n]),
            "sampler_logprobs": _rounded(torch.tensor(episode.sampler_logprobs)),
            "advantages": _rounded(torch.zeros(n) if episode.advantages is None else episode.advantages),
            "entropy": _rounded(entropy[:n]),
            "kl": _rounded(kl[:n]),
        } | ({} if episode.values is None else {"values": _rounded(episode.values[:n])})


def ids_of(episodes: list[Episode]) -> tuple[list[list[int]], list[list[int]]]:
    """Their prompts and their completions as token ids."""
    return [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]


def micro_batches(items: list, max_tokens: int, shares_prompts: bool) -> Iterator[list]:
    """Batches of similar length whose padded size stays within max_tokens; one item at the least.

    items: episodes, or lists of episodes that have to stay together. shares_prompts: a prompt counts once in a batch, and
    the completions of one prompt stay side by side as far as the budget goes; else each stands behind a prompt of its own.
    """

    def rows(item):
        return item if isinstance(item, list) else [item]

    longest = {}  # completion of each prompt
    for item in items:
        for e in rows(item):
            prompt = tuple(e.prompt_ids)
            longest[prompt] = max(longest.get(prompt, 0), len(e.completion_ids))

    def length(item):
        prompt = tuple(rows(item)[0].prompt_ids)
        own = max(len(e.completion_ids) for e in rows(item))
        return (longest[prompt], prompt, own) if shares_prompts else (len(prompt) + own,)

    batch, size, prompts, prompt_width, width = [], 0, set(), 0, 0
    for item in sorted(items, key=length):
        more, prompt = len(rows(item)), tuple(rows(item)[0].prompt_ids)
        new_prompts, new_prompt_width = prompts | {prompt}, max(prompt_width, len(prompt))
        new_width = max(width, *(len(e.completion_ids) for e in rows(item)))
        copies = len(new_prompts) if shares_prompts else size + more
        padded = (size + more) * new_width + copies * new_prompt_width
        attended = (size + more) * (new_width + new_prompt_width)  # each completion has its prompt's keys and values
        if batch and (padded > max_tokens or attended > 2 * max_tokens):
            yield batch
            batch, size, new_prompts, new_prompt_width = [], 0, {prompt}, len(prompt)
            new_width = max(len(e.completion_ids) for e in rows(item))
        batch.append(item)
        size, prompts, prompt_width, width = size + more, new_prompts, new_prompt_width, new_width
    if batch:
        yield batch


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
