"""Before a run: the longest batches that it can meet are tried, so that what does not fit shows at once and not at step 120.

What is too much is halved (rl/budget.py). Measured now, the peak of memory is that of the whole run.
"""

import torch

from rl.budget import within_memory
from rl.config import Config
from rl.engine import Engine
from rl.logprobs import completion_logprobs
from rl.policy import Policy
from rl.rollout import Episode
from rl.sampling import Sampling
from rl.update import Updater, ids_of


def rehearse(updater: Updater, train_prompts: list[list[int]], eval_prompts: list[list[int]], config: Config) -> None:
    """Try roll-out, evaluation and update at full length. Policy and critic stay as they are.

    train_prompts, eval_prompts: token ids. Raises ConfigError where even the least does not fit.
    """
    if updater.policy.decoder:  # the model's own forward takes long for a full length, and shows at its first roll-out
        rehearse_rollout(updater.policy, train_prompts, config.prompts_per_step, config.num_generations, config)
        rehearse_rollout(updater.policy, eval_prompts, len(eval_prompts), 1, config)
    rehearse_update(updater, train_prompts, config)


@torch.no_grad()
def rehearse_rollout(
    policy: Policy, prompts: list[list[int]], asked: int, num_generations: int, config: Config
) -> None:
    """Prefill the longest of the prompts for as many rows as there will be, and decode one token at the full length."""
    longest = sorted(prompts, key=len, reverse=True)
    longest = (longest * -(-asked // len(longest)))[:asked]

    def work():
        Engine(
            policy, longest, num_generations, config.max_completion_length, Sampling(config.temperature),
            torch.Generator(policy.device), config.rollout_batch_size,
        ).rehearse()  # fmt: skip

    within_memory(work, config, "rollout_batch_size", needed=asked * num_generations, least=num_generations)


def rehearse_update(updater: Updater, prompts: list[list[int]], config: Config) -> None:
    """One forward and backward pass of the fullest micro-batch, of policy and critic, beside what the optimizers hold."""
    policy, critic = updater.policy, updater.critic
    filler = next(token for token in range(policy.vocabulary) if token not in policy.eos_ids)
    longest = sorted(prompts, key=len, reverse=True)[: config.prompts_per_step]
    completion = [filler] * config.max_completion_length
    episodes = [Episode(0, prompt, completion, [], True) for prompt in longest for _ in range(config.num_generations)]
    trained = [*policy.trainable_parameters(), *(critic.parameters if critic else ())]

    def work():
        batch = max(
            updater.micro_batches(episodes), key=lambda b: sum(len(e.prompt_ids) + len(e.completion_ids) for e in b)
        )
        # What a later micro-batch finds taken: the gradients so far, and AdamW's two moments.
        taken = [torch.zeros_like(p) for p in trained for _ in range(3)]
        try:
            with policy.training():
                completion_logprobs(policy, *ids_of(batch), with_entropy=True)[0].sum().backward()
                if critic:
                    with critic.active():
                        critic.values(*ids_of(batch))[0].sum().backward()
        finally:
            for p in trained:
                p.grad = None
        del taken

    least = len(longest[0]) + len(completion)
    within_memory(work, config, "max_tokens_per_micro_batch", needed=len(episodes) * least, least=least)
