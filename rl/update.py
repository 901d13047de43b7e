"""The update: from scored episodes to optimizer steps, in micro-batches under a token budget.

Micro-batches bound the memory and do not change the gradient: the weights of the loss are those of the whole optimizer
step. Completions that contribute nothing (all advantages 0, no KL term) are neither forwarded nor backwarded; the
divisor still counts them.
"""

import math
import warnings
from collections.abc import Iterator

import torch
import transformers

from rl import algorithms
from rl.config import Config
from rl.policy import Policy
from rl.rollout import Episode


class Updater:
    """Optimizer, schedule and loss scaling of a run, and the update made with them."""

    def __init__(self, policy: Policy, config: Config):
        self.policy, self.config = policy, config
        self.optimizer = make_optimizer(policy.trainable_parameters(), config)
        updates = config.max_steps * config.num_iterations * config.num_mini_batches
        self.schedule = transformers.get_scheduler(
            {"constant": "constant_with_warmup"}.get(config.lr_scheduler_type, config.lr_scheduler_type),
            self.optimizer,
            math.ceil(config.warmup_ratio * updates),
            updates,
        )
        # fp16 gradients underflow without scaling; bf16 and fp32 need none.
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order of mini-batches

    def update(self, episodes: list[Episode]) -> dict[str, float]:
        """All optimizer steps of one roll-out. Returns metrics by TRL's names.

        Every episode must have its advantages. Fills old_logprobs and reference_logprobs where they are needed. Means
        over tokens are over those of contributing completions, and nan where nothing contributed.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]  # of the first optimizer step
        config = self.config
        if not config.on_policy:
            self.fill_logprobs(episodes, "old_logprobs")
        if config.beta:
            with self.policy.reference():
                self.fill_logprobs(episodes, "reference_logprobs")
        totals = dict.fromkeys(
            ("loss", "entropy", "kl", "low", "high", "tokens", "grad_norm", "updates", "skipped"), 0.0
        )
        for _ in range(config.num_iterations):
            for mini_batch in self.mini_batches(episodes):
                self.optimizer_step(mini_batch, totals)
        tokens, updates = totals["tokens"] or math.nan, totals["updates"] or math.nan  # nan: nothing contributed
        metrics = {
            "loss": totals["loss"] / (config.num_iterations * config.num_mini_batches),
            "entropy": totals["entropy"] / tokens,
            "clip_ratio/low_mean": totals["low"] / tokens,
            "clip_ratio/high_mean": totals["high"] / tokens,
            "clip_ratio/region_mean": (totals["low"] + totals["high"]) / tokens,
            "grad_norm": totals["grad_norm"] / updates,
            "learning_rate": learning_rate,
            "skipped_updates": totals["skipped"],
        }
        if config.beta:
            metrics["kl"] = totals["kl"] / tokens
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

    def optimizer_step(self, episodes: list[Episode], totals: dict[str, float]) -> None:
        """One gradient step on these episodes; a gradient that is not finite is skipped and counted."""
        self.policy.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(episodes, totals)
        self.policy.model.eval()
        parameters = [p for p in self.policy.trainable_parameters() if p.grad is not None]
        if parameters:
            self.scaler.unscale_(self.optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm).item()
            if math.isfinite(grad_norm):
                totals["grad_norm"] += grad_norm
                totals["updates"] += 1
                self.scaler.step(self.optimizer)
            else:
                totals["skipped"] += 1
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():  # torch takes a skipped update for a mistake
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    def backward(self, episodes: list[Episode], totals: dict[str, float]) -> None:
        """Add the gradient of the loss over these episodes, the batch of one optimizer step, micro-batch by micro-batch."""
        config = self.config
        num_tokens = sum(len(e.completion_ids) for e in episodes if e.in_loss)
        contributing = [e for e in episodes if e.in_loss and (config.beta or e.advantages.any())]
        for batch in micro_batches(contributing, config.max_tokens_per_micro_batch):
            logprobs, mask, entropy = self.policy.logprobs(
                [e.prompt_ids for e in batch], [e.completion_ids for e in batch], with_entropy=True
            )  # (B, C)
            advantages = self.pad([e.advantages for e in batch])
            old = logprobs.detach() if config.on_policy else self.pad([e.old_logprobs for e in batch])
            ratio = algorithms.token_ratio(logprobs, old, mask)
            loss = algorithms.clipped_policy_loss(
                ratio, advantages, config.epsilon, config.epsilon_high, config.delta
            )  # (B, C)
            if config.beta:
                reference = self.pad([e.reference_logprobs for e in batch])
                kl = algorithms.kl_divergence(logprobs, reference, mask, config.kl_estimator)
                loss = loss + config.beta * (kl * ratio if config.use_bias_correction_kl else kl)
                totals["kl"] += kl.detach().sum().item()
            weights = algorithms.token_weights(
                mask, config.loss_type, num_tokens, len(episodes), config.max_completion_length
            )
            loss = (torch.where(mask, loss, 0.0) * weights).sum()
            self.scaler.scale(loss).backward()

            low, high = algorithms.clip_shares(ratio, advantages, mask, config.epsilon, config.epsilon_high)
            totals["loss"] += loss.item()
            totals["entropy"] += entropy.sum().item()
            totals["low"] += low.item()
            totals["high"] += high.item()
            totals["tokens"] += mask.sum().item()

    @torch.no_grad()
    def fill_logprobs(self, episodes: list[Episode], name: str) -> None:
        """Store each episode's log-probabilities under the model as it is now, by the path that scores in the update."""
        for batch in micro_batches(episodes, self.config.max_tokens_per_micro_batch):
            logprobs, _, _ = self.policy.logprobs([e.prompt_ids for e in batch], [e.completion_ids for e in batch])
            for episode, row in zip(batch, logprobs):
                setattr(episode, name, row[: len(episode.completion_ids)].clone())

    def pad(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.policy.device)

    @torch.no_grad()
    def inspect(self, episodes: list[Episode]) -> list[dict]:
        """What happens at each token of a few episodes, for tokens.jsonl: one dict a completion, one value a token."""
        rows = {}
        for batch in micro_batches(episodes, self.config.max_tokens_per_micro_batch):
            ids = [e.prompt_ids for e in batch], [e.completion_ids for e in batch]
            logprobs, mask, entropy = self.policy.logprobs(*ids, with_entropy=True)
            with self.policy.reference():
                reference, _, _ = self.policy.logprobs(*ids)
            kl = algorithms.kl_divergence(logprobs, reference, mask, "k3")
            for i, episode in enumerate(batch):
                rows[id(episode)] = self.inspected(episode, logprobs[i], entropy[i], kl[i])
        return [rows[id(episode)] for episode in episodes]

    def inspected(self, episode: Episode, logprobs, entropy, kl) -> dict:
        """One completion token by token; logprobs, entropy and kl are (C,) of the padded batch."""
        n = len(episode.completion_ids)
        return {
            "tokens": [self.policy.tokenizer.decode([token]) for token in episode.completion_ids],
            "logprobs": _rounded(logprobs[:n]),
            "sampler_logprobs": _rounded(torch.tensor(episode.sampler_logprobs)),
            "advantages": _rounded(episode.advantages),
            "entropy": _rounded(entropy[:n]),
            "kl": _rounded(kl[:n]),
        }


def micro_batches(episodes: list[Episode], max_tokens: int) -> Iterator[list[Episode]]:
    """Batches of similar length whose padded size (rows x longest row) stays within max_tokens; one row at the least."""
    batch: list[Episode] = []
    for episode in sorted(episodes, key=lambda e: len(e.prompt_ids) + len(e.completion_ids)):
        width = len(episode.prompt_ids) + len(episode.completion_ids)  # the longest so far: they are sorted
        if batch and (len(batch) + 1) * width > max_tokens:
            yield batch
            batch = []
        batch.append(episode)
    if batch:
        yield batch


def make_optimizer(parameters: list[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if config.optim == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(parameters, **settings)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
