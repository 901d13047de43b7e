"""The roll-out: sample completions from the policy's own distribution.

A prompt is prefilled once for its whole group, its keys and values are copied to the group's rows, and finished rows
are dropped as the batch decodes. Sampling is done here, not by the model's `generate`, so nothing of a model's
generation_config (a temperature, a top_k) comes in between: what is sampled is what is trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from rl.config import ConfigError
from rl.policy import Policy

DROP_FINISHED_SHARE = 0.2  # rows are dropped from the batch once this share of them has ended


@dataclass
class Episode:
    """One completion: the token ids that were sampled, and what learning adds to them."""

    question: int  # index of its prompt among those asked
    prompt_ids: list[int]
    completion_ids: list[int]  # the end-of-sequence token included
    sampler_logprobs: list[float]  # at the sampling temperature, before top-k and the like
    truncated: bool  # reached the length limit without an end-of-sequence token
    advantages: torch.Tensor | None = None  # (C,) one for each completion token
    in_loss: bool = True  # False: masked out of the loss (truncated, by setting)
    old_logprobs: torch.Tensor | None = None  # (C,) under the policy before the first update
    reference_logprobs: torch.Tensor | None = None  # (C,)
    values: torch.Tensor | None = None  # (C + 1,) by the critic: before each token and after the last one
    returns: torch.Tensor | None = None  # (C,) what the critic learns

    @property
    def finish_reason(self) -> str:
        return "length" if self.truncated else "stop"


@dataclass
class Sampling:
    """How the next token is drawn. temperature 0 is greedy (for evaluation only)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: list[list[int]],
    num_generations: int,
    max_completion_length: int,
    sampling: Sampling,
    generator: torch.Generator,
    rows_at_a_time: int,
    on_finished: Callable[[dict[int, Episode]], None] = lambda finished: None,
) -> list[Episode]:
    """`num_generations` completions of each prompt, in the prompts' order.

    prompts: token ids. rows_at_a_time: completions generated together. on_finished is given the completions that have
    just ended, by their place in the result, so that they can be scored while the others go on.
    """
    policy.model.eval()  # the KV cache stays on where training would recompute activations
    episodes = {}
    prompts_at_a_time = max(1, rows_at_a_time // num_generations)
    for first in range(0, len(prompts), prompts_at_a_time):
        chunk = prompts[first : first + prompts_at_a_time]
        decoding = _Decoding(policy, chunk, num_generations, max_completion_length, sampling, generator)
        for ended in decoding.run():
            finished = {}
            for row, (ids, logprobs, truncated) in ended.items():
                question = first + row // num_generations
                episode = Episode(question, prompts[question], ids, logprobs, truncated)
                finished[first * num_generations + row] = episode
            episodes |= finished
            on_finished(finished)
    return [episodes[i] for i in range(len(episodes))]


@dataclass
class _Decoding:
    """One batch of rows decoded to their ends."""

    policy: Policy
    prompts: list[list[int]]
    num_generations: int
    max_completion_length: int
    sampling: Sampling
    generator: torch.Generator

    def __post_init__(self):
        shape = len(self.prompts) * self.num_generations, self.max_completion_length  # (B, C), B the rows at the start
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.policy.device)
        self.logprobs = torch.zeros(shape, device=self.policy.device)

    def run(self) -> Iterator[dict[int, tuple[list[int], list[float], bool]]]:
        """Yield the rows that have just ended: token ids, their log-probabilities, and whether the row was cut."""
        device, group = self.policy.device, self.num_generations
        logits, cache, attention_mask = self._prefill()
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
            kind = self.policy.model.config.model_type
            raise ConfigError(
                f"model: the roll-out cannot share a prompt's cache in models of the type {kind} (recurrent layers)"
            )
        logits = logits.repeat_interleave(group, 0)  # (B, V)
        cache.batch_repeat_interleave(group)
        attention_mask = attention_mask.repeat_interleave(group, 0)  # (B, P)
        position = attention_mask.sum(1)  # (B,) of the token about to be drawn
        eos_ids = torch.tensor(sorted(self.policy.eos_ids), device=device)
        total = len(self.prompts) * group
        rows = torch.arange(total, device=device)  # which rows are still in the batch
        alive = torch.ones(total, dtype=torch.bool, device=device)  # of those in the batch
        living = total
        for step in range(self.max_completion_length):
            seen = self._seen_tokens(rows, step) if self.sampling.repetition_penalty != 1 else None
            token, logprob = sample(logits, self.sampling, self.generator, seen)
            self.tokens[rows, step], self.logprobs[rows, step] = token, logprob
            ending = alive & torch.isin(token, eos_ids)
            alive = alive & ~ending
            living, before = int(alive.sum()), living
            if living < before:
                yield self._rows(rows[ending], step + 1, truncated=False)
            if living == 0 or step + 1 == self.max_completion_length:
                break
            if living <= (1 - DROP_FINISHED_SHARE) * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, position, attention_mask = rows[keep], token[keep], position[keep], attention_mask[keep]
                alive = alive[keep]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(token[:, None], attention_mask, position[:, None], cache)
            position = position + 1
        if living:
            yield self._rows(rows[alive], self.max_completion_length, truncated=True)

    def _rows(self, rows, length: int, truncated: bool) -> dict[int, tuple[list[int], list[float], bool]]:
        ids, logprobs = self.tokens[rows, :length].tolist(), self.logprobs[rows, :length].tolist()
        return {row: (i, p, truncated) for row, i, p in zip(rows.tolist(), ids, logprobs)}

    def _prefill(self):
        """Run the left-padded prompts once: next-token logits (P, V), their cache, and the mask (P, T)."""
        device = self.policy.device
        width = max(map(len, self.prompts))
        padding = [width - len(prompt) for prompt in self.prompts]
        ids = torch.tensor([[self.policy.pad_id] * n + p for n, p in zip(padding, self.prompts)], device=device)
        attention_mask = (torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]).long()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.policy.model.config)
        return self._forward(ids, attention_mask, position_ids, cache), cache, attention_mask

    def _forward(self, ids, attention_mask, position_ids, cache) -> torch.Tensor:
        output = self.policy.model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].float()

    def _seen_tokens(self, rows, step: int) -> list[list[int]]:
        so_far = self.tokens[rows, :step].tolist()
        return [self.prompts[r // self.num_generations] + ids for r, ids in zip(rows.tolist(), so_far)]


def sample(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, seen: list[list[int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from logits (B, V): the tokens (B,) and their log-probabilities (B,).

    The log-probability is that of the temperature-scaled distribution, before repetition penalty, top-k, top-p and
    min-p, which are applied in this order. seen: the tokens that the repetition penalty looks at, one list a row.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    logprobs = (logits / sampling.temperature).log_softmax(-1)  # (B, V)
    if sampling.repetition_penalty != 1:
        logits = logits.clone()
        for row, ids in enumerate(seen or []):
            ids = torch.tensor(sorted(set(ids)), device=logits.device)
            scores = logits[row, ids]
            penalty = sampling.repetition_penalty
            logits[row, ids] = torch.where(scores > 0, scores / penalty, scores * penalty)
    probabilities = (logits / sampling.temperature).softmax(-1)  # (B, V)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = probabilities.topk(sampling.top_k).values[:, -1:]
        probabilities = torch.where(probabilities < smallest, 0.0, probabilities)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    if sampling.min_p > 0:
        floor = sampling.min_p * probabilities.max(-1, keepdim=True).values
        probabilities = torch.where(probabilities < floor, 0.0, probabilities)
    token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B,)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)
