"""Before a run: does the roll-out sample from the policy that is trained?

A LoRA that is left out of the roll-out shows nowhere at the start, where it is zero, and one update moves less than the
rounding of bf16. So its second matrices are filled with noise for a moment, until it moves the log-probabilities by a nat,
and then three paths have to agree: the sampler, the trainer, and the model's own forward.
"""

import contextlib
from dataclasses import dataclass

import torch

from rl.config import Config, ConfigError
from rl.model.engine import Engine
from rl.model.logprobs import completion_logprobs
from rl.model.oom import within_memory
from rl.model.policy import Policy
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout
from rl.update import Updater, ids_of

PROMPTS, COMPLETIONS, TOKENS = 4, 2, 16  # of the trial roll-out: so many of each, of at most so many tokens
SHIFT = 3.0  # nats a token by which the noise is to move the policy; at 1 the rounding of bf16 is up to 7 % of it
ALLOWED = 0.05  # of that shift may lie between two paths


@dataclass
class Agreement:
    """Mean absolute differences of log-probabilities, nats a token, with noise in the LoRA."""

    shift: float  # between LoRA on and off
    sampler: float  # between sampler and trainer
    own_forward: float  # between trainer and the model's own forward

    def sampler_agrees(self) -> bool:
        return self.sampler <= ALLOWED * max(self.shift, 1)  # False for nan

    def trainer_agrees(self) -> bool:
        return self.own_forward <= ALLOWED * max(self.shift, 1)


def check_sampler(policy: Policy, prompts: list[list[int]], max_completion_length: int) -> Agreement:
    """Compare the three paths, and leave the policy as it was. Where the written-out forward pass is not the model's, it
    is given up (`policy.decoder` becomes None). Raises ConfigError where the roll-out samples from another policy."""
    tokens = min(TOKENS, max_completion_length)
    found = compare(policy, prompts[:PROMPTS], tokens)
    if policy.decoder and not (found.sampler_agrees() and found.trainer_agrees()):
        policy.decoder, policy.own_forward_because = (
            None,
            (
                f"with noise in the LoRA, which moves log-probabilities by {found.shift:.2g} nats a token, the written-out one "
                f"differs from it by {found.own_forward:.2g} in the update and by {found.sampler:.2g} more in the roll-out"
            ),
        )
        found = compare(policy, prompts[:PROMPTS], tokens)
    if not found.sampler_agrees():
        raise ConfigError(
            f"model: the roll-out does not sample from the policy that is trained: log-probabilities differ by "
            f"{found.sampler:.2g} nats a token where the LoRA moves them by {found.shift:.2g}; try dtype: float32"
        )
    return found


@torch.no_grad()
def compare(policy: Policy, prompts: list[list[int]], tokens: int) -> Agreement:
    """The differences on completions of at most so many tokens, written by the policy with noise in its LoRA."""
    generator = torch.Generator(policy.device).manual_seed(0)

    def ask():
        sampling = Sampling(policy.temperature)
        return rollout(policy, prompts, COMPLETIONS, tokens, sampling, generator, PROMPTS * COMPLETIONS)

    def score(episodes):  # packed log-probabilities
        ids = [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]
        logprobs, mask, _ = completion_logprobs(policy, *ids)
        return logprobs[mask]

    def shift(episodes):
        on = score(episodes)
        with policy.model.disable_adapter():
            return (on - score(episodes)).abs().mean().item()

    with noise_in_lora(policy) as refill:
        episodes, best = ask(), (0.0, 0.0)  # best: shift, scale
        for scale in (0.01 * 2 ** (n / 2) for n in range(24)):
            refill(scale)
            best = max(best, (shift(episodes), scale))
            if best[0] >= SHIFT:
                break
        refill(best[1])
        episodes = ask()
        trainer = score(episodes)
        sampler = torch.tensor([p for e in episodes for p in e.sampler_logprobs], device=policy.device)
        decoder, policy.decoder = policy.decoder, None
        try:
            own = score(episodes)
        finally:
            policy.decoder = decoder
        return Agreement(
            shift=shift(episodes),
            sampler=(sampler - trainer).abs().mean().item(),
            own_forward=(own - trainer).abs().mean().item(),
        )


@contextlib.contextmanager
def noise_in_lora(policy: Policy):
    """Gives a function that fills the LoRA's second matrices with seeded noise of a scale; at the end they are as before."""
    second = [p for name, p in policy.model.named_parameters() if "lora_B.default" in name]
    before = [p.detach().clone() for p in second]

    def refill(scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        for p in second:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)

    try:
        yield refill
    finally:
        for p, values in zip(second, before):
            p.copy_(values)


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
