"""The roll-out through the model's own forward and cache, for architectures that rl/model/decoder.py does not know.

A prompt is prefilled once for its whole group, its keys and values are copied to the group's rows, and finished rows
are dropped as the batch decodes. There is no refill: a batch ends with its longest row. A model that Unsloth has patched
keeps a cache of its own kind, and so generates through its `generate`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from rl.config import ConfigError
from rl.model.policy import Policy
from rl.model.sampling import Ended, Sampling, sample

DROP_FINISHED_SHARE = 0.2  # rows are dropped from the batch once this share of them has ended


@dataclass
class Batches:
    """One roll-out, batch by batch."""

    policy: Policy
    prompts: list[list[int]]
    num_generations: int
    max_completion_length: int
    sampling: Sampling
    generator: torch.Generator
    rows_at_a_time: int

    def run(self) -> Iterator[Ended]:
        """Yield the completions that have just ended, by their place: prompt i's are i * num_generations and on."""
        prompts_at_a_time = max(1, self.rows_at_a_time // self.num_generations)
        for first in range(0, len(self.prompts), prompts_at_a_time):
            batch = dataclasses.replace(self, prompts=self.prompts[first : first + prompts_at_a_time])
            for ended in batch._decode():
                yield {first * self.num_generations + row: outcome for row, outcome in ended.items()}

    def _decode(self) -> Iterator[Ended]:
        """All prompts in one batch: yield the rows that have just ended, by their number."""
        device, group = self.policy.device, self.num_generations
        self._begin()
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
            seen = self._seen(rows, step) if self.sampling.repetition_penalty != 1 else None
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

    def _begin(self) -> None:
        """Room for what will be drawn."""
        shape = len(self.prompts) * self.num_generations, self.max_completion_length  # (B, C), B the rows at the start
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.policy.device)
        self.logprobs = torch.zeros(shape, device=self.policy.device)

    def _rows(self, rows, length: int, truncated: bool) -> Ended:
        ids, logprobs = self.tokens[rows, :length].tolist(), self.logprobs[rows, :length].tolist()
        return {row: (i, p, truncated) for row, i, p in zip(rows.tolist(), ids, logprobs)}

    def _left_padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts' token ids and their mask, each (P, T)."""
        device, width = self.policy.device, max(map(len, self.prompts))
        padding = [width - len(prompt) for prompt in self.prompts]
        ids = torch.tensor([[self.policy.pad_id] * n + p for n, p in zip(padding, self.prompts)], device=device)
        return ids, (torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]).long()

    def _prefill(self):
        """Run the left-padded prompts once: next-token logits (P, V), their cache, and the mask (P, T)."""
        ids, attention_mask = self._left_padded()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.policy.model.config)
        return self._forward(ids, attention_mask, position_ids, cache), cache, attention_mask

    def _forward(self, ids, attention_mask, position_ids, cache) -> torch.Tensor:
        output = self.policy.model(
            input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].float()

    def _seen(self, rows, step: int) -> torch.Tensor:
        """The tokens of each row so far, (rows, V) bool."""
        vocabulary = self.policy.model.get_input_embeddings().num_embeddings
        seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=rows.device)
        seen.scatter_(1, self.tokens[rows, :step], True)
        for i, row in enumerate(rows.tolist()):
            seen[i, self.prompts[row // self.num_generations]] = True
        return seen


class Generated(Batches):
    """The same by the model's `generate`, which is given one choice for each token: the one that was drawn here.

    So nothing of its generation_config comes in between. A prompt is prefilled once a row, and a batch ends with its longest.
    """

    def _decode(self) -> Iterator[Ended]:
        policy = self.policy
        with policy.training():
            pass  # Unsloth's decoding keeps copies of the LoRA until the next training: they may be of an older one
        self._begin()
        ids, attention_mask = (x.repeat_interleave(self.num_generations, 0) for x in self._left_padded())
        settings = GenerationConfig(
            max_new_tokens=self.max_completion_length, do_sample=False, use_cache=True,
            eos_token_id=sorted(policy.eos_ids), pad_token_id=policy.pad_id,
        )  # fmt: skip
        with generation_config(policy.model, settings):
            policy.model.generate(
                input_ids=ids,
                attention_mask=attention_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([Draw(self)]),
            )
        ended = {}
        for row, tokens in enumerate(self.tokens.tolist()):
            length = next((i + 1 for i, token in enumerate(tokens) if token in policy.eos_ids), None)
            n = length or self.max_completion_length
            ended[row] = tokens[:n], self.logprobs[row, :n].tolist(), length is None
        yield ended


class Draw(LogitsProcessor):
    """Draws each next token of a batch, and lets nothing else be chosen."""

    def __init__(self, batch: Generated):
        self.batch, self.step = batch, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        batch, rows = self.batch, torch.arange(len(scores), device=scores.device)
        seen = batch._seen(rows, self.step) if batch.sampling.repetition_penalty != 1 else None
        token, logprob = sample(scores, batch.sampling, batch.generator, seen)
        batch.tokens[:, self.step], batch.logprobs[:, self.step] = token, logprob
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@contextlib.contextmanager
def generation_config(model, settings: GenerationConfig):
    """Within this context these are the model's own: `generate` fills up what it is given from them."""
    holders = [model, model.get_base_model()]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = settings
    try:
        yield
    finally:
        for holder, own in zip(holders, before):
            holder.generation_config = own
