"""Roll-outs with the model's own `generate`: the fallback for models without a `Decoder` (rl/model/decoder.py).

A logits processor samples each token and forces `generate` to choose it; `load_policy` has reset the model's
generation_config. Every row is prefilled separately, and a batch ends with its longest completion.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from rl.model.policy import Policy
from rl.model.sampling import Finished, Sampling, sample


@dataclass
class HFGenerate:
    """Generates the completions of one roll-out, batch by batch. Has the same arguments and results as `Engine`."""

    policy: Policy
    prompts: list[list[int]]
    num_generations: int
    max_completion_length: int
    sampling: Sampling
    generator: torch.Generator
    max_rows: int

    def run(self) -> Iterator[Finished]:
        """Yield the completions of each batch, by index. Those of prompt i start at index i * num_generations."""
        for indices in self.batches():
            prompts = [self.prompts[index // self.num_generations] for index in indices]
            yield dict(zip(indices, self.complete(prompts)))

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of each batch. Recurrent layers may read padding, so they get prompts of equal length."""
        lengths = [len(prompt) for prompt in self.prompts for _ in range(self.num_generations)]
        if not self.policy.model.get_base_model()._is_stateful:
            lengths = [0] * len(lengths)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for _, group in itertools.groupby(order, key=lengths.__getitem__):
            group = list(group)
            for first in range(0, len(group), self.max_rows):
                yield group[first : first + self.max_rows]

    def complete(self, prompts: list[list[int]]) -> list[tuple[list[int], list[float], bool]]:
        """Complete each prompt once. Returns token ids, log-probabilities, and whether the completion is truncated."""
        policy = self.policy
        if policy.uses_unsloth:
            with policy.training():
                pass  # drops the copies of the LoRA that Unsloth caches for decoding, which may be out of date
        width = max(map(len, prompts))
        padded = [[policy.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        sampler = ForcedSampler(self, prompts)
        policy.model.generate(
            input_ids=torch.tensor(padded, device=policy.device),
            attention_mask=torch.tensor(mask, device=policy.device),
            max_new_tokens=self.max_completion_length,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(policy.eos_ids),
            pad_token_id=policy.pad_id,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = torch.stack(sampler.tokens, 1).tolist()  # (B, C)
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        completions = []
        for row, row_logprobs in zip(tokens, logprobs):
            ends = [i + 1 for i, token in enumerate(row) if token in policy.eos_ids]
            length = min(ends, default=self.max_completion_length)
            completions.append((row[:length], row_logprobs[:length], not ends))
        return completions


class ForcedSampler(LogitsProcessor):
    """Samples the next token of each row, and forces `generate` to choose it."""

    def __init__(self, rollout: HFGenerate, prompts: list[list[int]]):
        self.sampling = rollout.sampling
        self.generator = rollout.generator
        self.tokens: list[torch.Tensor] = []  # tokens of each step, (B,)
        self.logprobs: list[torch.Tensor] = []  # log-probabilities of each step, (B,)
        self.seen = None  # the tokens that the repetition penalty applies to, (B, V) bool
        if self.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(
                len(prompts), rollout.policy.vocabulary, dtype=torch.bool, device=rollout.policy.device
            )
            for row, prompt in zip(self.seen, prompts):
                row[prompt] = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token, logprob = sample(scores, self.sampling, self.generator, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
