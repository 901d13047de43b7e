"""Roll-outs without our engine: with the model's own forward pass, for models without a `Decoder`, or on a server.

`generate` of transformers prepares the inputs and the cache of any architecture. The loop is ours: each prompt is
prefilled once, its rows of the cache are copied for its completions, and rows that have ended are dropped.
"""

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from rl.model.policy import Policy
from rl.model.sampling import Finished, Sampling, sample

CONNECTIONS = 64  # requests to a server at a time
STATE_IN_MODULES = ("recurrent_gemma",)  # the state of the recurrent layers is not in the cache


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
    play: object = None  # the environments (rl/model/play.py), if there are any

    def run(self) -> Iterator[Finished]:
        """Yield the completions of each batch, by index. Those of prompt i start at index i * num_generations."""
        for indices in self.batches():
            finished = self.complete(indices)
            yield self.play_on(finished) if self.play else finished

    def play_on(self, turns: Finished) -> Finished:
        """Play the episodes that begin with these turns to their ends. Each turn prefills the conversation again."""
        rows = {index: ([], []) for index in turns}  # token ids and log-probabilities
        finished = {}
        while turns:
            for index, (ids, logprobs, truncated) in turns.items():
                room = min(self.max_completion_length - len(rows[index][0]), self.play.max_turn_length)
                is_cut = truncated or len(ids) > room
                ids = ids[:room]
                rows[index][0].extend(ids)
                rows[index][1].extend(logprobs[:room])
                if is_cut:
                    self.play.end_last_turn(index, ids)
                    finished[index] = (*rows[index], True)
                else:
                    self.play.end_turn(index, ids)
            replies = {}
            while len(replies) < len(turns.keys() - finished.keys()):
                replies |= self.play.replies(block=True)
            continued = []
            for index, reply in replies.items():
                ids, logprobs = rows[index]
                if reply is None or len(ids) + len(reply) >= self.max_completion_length:
                    finished[index] = (ids, logprobs, reply is not None)
                else:
                    ids += reply
                    logprobs += [None] * len(reply)
                    continued.append(index)
            turns = self.next_turns({index: rows[index][0] for index in sorted(continued)})
        return finished

    def next_turns(self, rows: dict[int, list[int]]) -> Finished:
        """Generate the next turn after these tokens of each episode."""
        if not rows:
            return {}
        prompts = [self.prompts[index // self.num_generations] + ids for index, ids in rows.items()]
        limit = self.max_completion_length - min(map(len, rows.values()))
        once = type(self)(self.policy, prompts, 1, limit, self.sampling, self.generator, self.max_rows)
        indices = list(rows)
        return {indices[i]: turn for finished in once.run() for i, turn in finished.items()}

    @property
    def can_copy_rows(self) -> bool:
        """Whether rows of the cache can be copied and dropped. Unsloth's cache has no such operation."""
        return not self.policy.uses_unsloth and self.policy.model.config.model_type not in STATE_IN_MODULES

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

    def complete(self, indices: list[int]) -> Finished:
        """Generate the completions of one batch, by index: token ids, log-probabilities, and whether it is truncated."""
        policy = self.policy
        if policy.uses_unsloth:
            with policy.training():
                pass  # drops the copies of the LoRA that Unsloth caches for decoding, which may be out of date
        groups = [index // self.num_generations for index in indices]
        prefilled = sorted(set(groups)) if self.can_copy_rows else groups
        prompts = [self.prompts[group] for group in prefilled]
        width = max(map(len, prompts))
        padded = [[policy.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens, logprobs = policy.model.generate(
            input_ids=torch.tensor(padded, device=policy.device),
            attention_mask=torch.tensor(mask, device=policy.device),
            max_new_tokens=self.max_completion_length,
            do_sample=False,
            use_cache=True,
            pad_token_id=policy.pad_id,
            custom_generate=self.decode,
            groups=groups,
        )
        finished = {}
        for index, row, row_logprobs in zip(indices, tokens.tolist(), logprobs.tolist()):
            ends = [i + 1 for i, token in enumerate(row) if token in policy.eos_ids]
            length = min(ends, default=self.max_completion_length)
            finished[index] = (row[:length], row_logprobs[:length], not ends)
        return finished

    def decode(
        self, model, input_ids, groups: list[int], logits_processor, stopping_criteria, generation_config, **inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Complete the prompts in `input_ids`. `generate` calls this in place of its own loop.

        groups: the prompt of each completion. inputs: other inputs of the model, such as the attention mask. Returns
        tokens and log-probabilities, (B, C) each; what follows an end token is undefined.
        """
        device = input_ids.device
        size = (len(groups), self.max_completion_length)
        tokens = torch.zeros(size, dtype=torch.long, device=device)
        logprobs = torch.zeros(size, device=device)
        end_tokens = torch.tensor(sorted(self.policy.eos_ids), device=device)
        seen = self.tokens_seen(groups)
        running = torch.arange(len(groups), device=device)  # rows of `tokens` in the batch
        ended = torch.zeros(len(groups), dtype=torch.bool, device=device)  # (rows in the batch,)

        logits, inputs = next_logits(model, input_ids, inputs, is_first_iteration=True)
        if len(logits) < len(groups):
            copies = torch.tensor(groups, device=device).unique(return_inverse=True)[1]
            logits = logits[copies]
            inputs = select_rows(inputs, copies)
        for position in range(self.max_completion_length):
            token, logprob = sample(logits, self.sampling, self.generator, seen)
            tokens[running, position] = token
            logprobs[running, position] = logprob
            ended |= torch.isin(token, end_tokens)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if ended.all() or position + 1 == self.max_completion_length:
                break
            if ended.sum() * 4 >= len(ended) and self.can_copy_rows:
                kept = (~ended).nonzero().squeeze(1)
                inputs = select_rows(inputs, kept)
                seen = None if seen is None else seen[kept]
                token, running, ended = token[kept], running[kept], ended[kept]
            logits, inputs = next_logits(model, token[:, None], inputs)
        return tokens, logprobs

    def tokens_seen(self, groups: list[int]) -> torch.Tensor | None:
        """Return the tokens that the repetition penalty applies to, (B, V) bool: those of the prompt at first."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(groups), self.policy.vocabulary, dtype=torch.bool, device=self.policy.device)
        for row, group in zip(seen, groups):
            row[self.prompts[group]] = True
        return seen


def next_logits(model, ids: torch.Tensor, inputs: dict, is_first_iteration: bool = False) -> tuple[torch.Tensor, dict]:
    """Run the model on new tokens (B, T). Returns the logits of the next token (B, V), and the inputs with the cache."""
    prepared = model.prepare_inputs_for_generation(ids, is_first_iteration=is_first_iteration, **inputs)
    outputs = model(**prepared, return_dict=True)
    return outputs.logits[:, -1], model._update_model_kwargs_for_generation(outputs, inputs)


def select_rows(inputs: dict, indices: torch.Tensor) -> dict:
    """Return the inputs of these rows, which may repeat. The cache is changed in place."""
    selected = dict(inputs)
    for name, value in inputs.items():
        if hasattr(value, "reorder_cache"):
            value.reorder_cache(indices)
        elif isinstance(value, torch.Tensor):  # such as positions, (B, T) or (3, B, T)
            selected[name] = value.index_select(-2, indices)
    return selected


class ServerGenerate(HFGenerate):
    """Generates the completions on a vLLM server (rl/model/vllm_server.py). Has the same arguments and results."""

    def run(self) -> Iterator[Finished]:
        """Yield completions by index, each group as soon as it is finished."""
        if self.play:
            yield self.play_on({index: turn for finished in self.groups() for index, turn in finished.items()})
        else:
            yield from self.groups()

    def groups(self) -> Iterator[Finished]:
        server = self.policy.server
        name = server.publish(self.policy)
        n = self.num_generations
        device = self.generator.device
        seeds = torch.randint(2**31, (len(self.prompts),), generator=self.generator, device=device).tolist()
        context = self.policy.context_length or sys.maxsize
        limits = [min(self.max_completion_length, context - len(prompt)) for prompt in self.prompts]
        eos_ids = self.policy.eos_ids
        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            groups = {
                pool.submit(server.complete, name, prompt, n, limit, self.sampling, seed, eos_ids): i
                for i, (prompt, limit, seed) in enumerate(zip(self.prompts, limits, seeds))
            }
            for future in as_completed(groups):
                first = groups[future] * n
                yield {first + i: completion for i, completion in enumerate(future.result())}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
