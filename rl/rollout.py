"""The roll-out: sample completions from the policy's own distribution.

Every token is drawn by rl/model/sampling.py, so nothing of a model's generation_config (a temperature, a top_k) takes part:
what is sampled is what is trained. Llama, Qwen2 and Qwen3 run on the engine of rl/model/engine.py, other architectures
through their own `generate` (rl/model/hf_generate.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rl.model.backends import set_mode
from rl.model.engine import Engine
from rl.model.hf_generate import HFGenerate
from rl.model.policy import Policy
from rl.model.sampling import Sampling


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
    set_mode(policy.model, False, policy.by_unsloth)  # the KV cache stays on where training would recompute activations
    generating = Engine if policy.decoder else HFGenerate
    asked = prompts, num_generations, max_completion_length, sampling, generator, rows_at_a_time
    episodes = {}
    for ended in generating(policy, *asked).run():
        finished = {}
        for place, (ids, logprobs, truncated) in ended.items():
            question = place // num_generations
            finished[place] = Episode(question, prompts[question], ids, logprobs, truncated)
        episodes |= finished
        on_finished(finished)
    return [episodes[place] for place in range(len(episodes))]
