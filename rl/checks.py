"""Two checks before training: the roll-out samples from the policy that is trained, and the largest batches fit into memory.

Sampler: a LoRA that the roll-out ignores goes unnoticed at the start, where it is zero, and one update moves less than the
rounding of bf16. So the LoRA's second matrices are filled with noise for a moment, until log-probabilities move by some nats,
and then three paths have to agree: the sampler, the trainer, and the model's own forward pass.

Memory: the largest batches of roll-out, evaluation and update are run once, and batch settings are halved if memory runs
out, so that what does not fit shows at once and not at step 120. Measured now, the peak is that of the whole run.
"""

import contextlib
from dataclasses import dataclass

import torch

from rl.config import Config, ConfigError
from rl.model.engine import Engine
from rl.model.logprobs import completion_logprobs
from rl.model.oom import retry_on_oom
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout
from rl.update import Updater, prompt_and_completion_ids

PROMPTS, COMPLETIONS, TOKENS = 4, 2, 16  # of the trial roll-out; TOKENS is the greatest length
SHIFT = 3.0  # nats a token by which the noise is to move the policy; at 1 the rounding of bf16 is up to 7 % of it
ALLOWED = 0.05  # share of that shift by which two paths may differ


@dataclass
class Agreement:
    """Mean absolute differences of log-probabilities, nats a token, with noise in the LoRA."""

    shift: float  # between LoRA on and off
    sampler: float  # between sampler and trainer
    model_forward: float  # between trainer and the model's own forward pass

    def sampler_agrees(self) -> bool:
        return self.sampler <= ALLOWED * max(self.shift, 1)  # False for nan

    def trainer_agrees(self) -> bool:
        return self.model_forward <= ALLOWED * max(self.shift, 1)


def check_sampler(policy: Policy, questions: list[Question]) -> Agreement:
    """Compare the three paths, and leave the policy as it was.

    If the written-out forward pass disagrees with the model's own, fall back to the model's (`policy.decoder` becomes None).

    Raises:
        ConfigError: the roll-out samples from another policy than the one that is trained.
    """
    prompts = [question.prompt_ids for question in questions[:PROMPTS]]
    agreement = compare_paths(policy, prompts)
    if policy.decoder and not (agreement.sampler_agrees() and agreement.trainer_agrees()):
        policy.decoder = None
        policy.fallback_reason = (
            f"with noise in the LoRA, which moves log-probabilities by {agreement.shift:.2g} nats a token, the written-out one "
            f"differs from it by {agreement.model_forward:.2g} in the update and by {agreement.sampler:.2g} more in the roll-out"
        )
        agreement = compare_paths(policy, prompts)
    if not agreement.sampler_agrees():
        raise ConfigError(
            f"model: the roll-out does not sample from the policy that is trained: log-probabilities differ by "
            f"{agreement.sampler:.2g} nats a token where the LoRA moves them by {agreement.shift:.2g}; try dtype: float32"
        )
    return agreement


@torch.no_grad()
def compare_paths(policy: Policy, prompts: list[list[int]]) -> Agreement:
    """The differences on completions that the policy writes with noise in its LoRA."""
    generator = torch.Generator(policy.device).manual_seed(0)
    length = min(TOKENS, policy.max_completion_length)

    def sample() -> list[Episode]:
        sampling = Sampling(policy.temperature)
        return rollout(policy, prompts, COMPLETIONS, length, sampling, generator, PROMPTS * COMPLETIONS)

    def score(episodes: list[Episode]) -> torch.Tensor:
        logprobs, mask, _ = completion_logprobs(policy, *prompt_and_completion_ids(episodes))
        return logprobs[mask]  # packed, (tokens,)

    def shift(episodes: list[Episode]) -> float:
        with policy.model.disable_adapter():
            without = score(episodes)
        return (score(episodes) - without).abs().mean().item()

    with noise_in_lora(policy) as refill:
        episodes = sample()
        best = (0.0, 0.0)  # shift, scale
        for scale in (0.01 * 2 ** (n / 2) for n in range(24)):
            refill(scale)
            best = max(best, (shift(episodes), scale))
            if best[0] >= SHIFT:
                break
        refill(best[1])
        episodes = sample()
        trainer = score(episodes)
        sampler = torch.tensor([p for e in episodes for p in e.sampler_logprobs], device=policy.device)
        decoder = policy.decoder
        policy.decoder = None
        try:
            model_forward = score(episodes)
        finally:
            policy.decoder = decoder
        return Agreement(
            shift=shift(episodes),
            sampler=(sampler - trainer).abs().mean().item(),
            model_forward=(model_forward - trainer).abs().mean().item(),
        )


@contextlib.contextmanager
def noise_in_lora(policy: Policy):
    """Yield a function that fills the LoRA's second matrices with seeded noise of a scale; restore them at the end."""
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


def check_memory(updater: Updater, questions: list[Question], held_out: list[Question]) -> None:
    """Run roll-out, evaluation and update once at full length. Policy and critic stay as they are.

    Raises:
        ConfigError: not even the smallest batch fits.
    """
    policy = updater.policy
    config = updater.config
    if policy.decoder:  # the fallback takes long for a full length, and shows at its first roll-out
        try_rollout(policy, questions, config.prompts_per_step, config.num_generations, config)
        try_rollout(policy, held_out, len(held_out), 1, config)
    try_update(updater, questions)


@torch.no_grad()
def try_rollout(policy: Policy, questions: list[Question], count: int, num_generations: int, config: Config) -> None:
    """Prefill the longest prompts for as many rows as there will be, and decode one token at the full length."""
    prompts = sorted((question.prompt_ids for question in questions), key=len, reverse=True)
    prompts = (prompts * -(-count // len(prompts)))[:count]

    def attempt() -> None:
        Engine(
            policy,
            prompts,
            num_generations,
            config.max_completion_length,
            Sampling(config.temperature),
            torch.Generator(policy.device),
            config.rollout_batch_size,
        ).allocate_peak()

    retry_on_oom(attempt, config, "rollout_batch_size", requested=count * num_generations, minimum=num_generations)


def try_update(updater: Updater, questions: list[Question]) -> None:
    """One forward and backward pass of the fullest micro-batch, of policy and critic, beside what the optimizers will hold."""
    policy = updater.policy
    critic = updater.critic
    config = updater.config
    prompts = sorted((question.prompt_ids for question in questions), key=len, reverse=True)
    filler = next(token for token in range(policy.vocabulary) if token not in policy.eos_ids)
    completion = [filler] * config.max_completion_length
    episodes = [
        Episode(prompt, completion, [], True)
        for prompt in prompts[: config.prompts_per_step]
        for _ in range(config.num_generations)
    ]
    trained = [*policy.trainable_parameters(), *(critic.parameters if critic else ())]

    def size(batch: list[Episode]) -> int:
        return sum(len(episode.prompt_ids) + len(completion) for episode in batch)

    def attempt() -> None:
        batch = max(updater.micro_batches(episodes), key=size)
        # What a later micro-batch finds allocated: the gradients so far, and AdamW's two moments.
        allocated = [torch.zeros_like(p) for p in trained for _ in range(3)]
        try:
            with policy.training():
                completion_logprobs(policy, *prompt_and_completion_ids(batch), with_entropy=True)[0].sum().backward()
                if critic:
                    with critic.active():
                        critic.values(*prompt_and_completion_ids(batch))[0].sum().backward()
        finally:
            for p in trained:
                p.grad = None
        del allocated

    minimum = len(prompts[0]) + len(completion)
    retry_on_oom(attempt, config, "max_tokens_per_micro_batch", len(episodes) * minimum, minimum)
