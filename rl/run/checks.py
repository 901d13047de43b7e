"""Checks before training: the roll-out samples from the trained policy, and the largest batches fit into memory.

Sampler: a roll-out that ignores the LoRA goes unnoticed at first, because a new LoRA is zero and one update moves it
by less than bf16 rounding. The check fills the LoRA's B matrices with noise until log-probabilities shift by several
nats, and compares three paths: the sampler, the trainer and the model's own forward pass on each row alone, without
padding. It does so with the LoRA as it is, too.

Memory: the largest batches of roll-out, evaluation and update run once, and batch settings are halved on OOM, so that a
run fails at its start and not at step 120. The peak memory of this check is the peak of the whole run.
"""

import contextlib
from dataclasses import dataclass

import torch

from grading.base import first_line
from rl.config import Config, ConfigError, RunError
from rl.model.engine import Engine
from rl.model.logprobs import completion_logprobs
from rl.model.oom import is_out_of_memory, retry_on_oom, return_freed_memory
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout
from rl.update import Updater, prompt_and_completion_ids

NUM_PROMPTS, NUM_GENERATIONS, MAX_TOKENS = 4, 2, 16  # size of the trial roll-out
TARGET_SHIFT = 3.0  # nats per token by which the noise moves the policy; bf16 rounding is up to 7 % of a shift of 1
MAX_DIFFERENCE = 0.05  # maximum difference between two paths, as a fraction of the shift


@dataclass
class Agreement:
    """Mean absolute differences of log-probabilities in nats per token, the larger one of two: with noise and without."""

    shift: float  # noise in the LoRA vs. LoRA off
    sampler: float  # sampler vs. trainer
    model_forward: float  # the model's own forward pass vs. trainer

    def sampler_agrees(self) -> bool:
        return self.sampler <= MAX_DIFFERENCE * max(self.shift, 1)  # False for nan

    def trainer_agrees(self) -> bool:
        return self.model_forward <= MAX_DIFFERENCE * max(self.shift, 1)


def check_sampler(policy: Policy, questions: list[Question]) -> Agreement:
    """Check that sampler, trainer and the model's own forward pass agree. The policy's weights are restored.

    If `policy.decoder` disagrees with the model's own forward pass, it is set to None and the model's own is used.

    Raises:
        ConfigError: if the roll-out does not sample from the trained policy.
    """
    prompts = [question.prompt_ids for question in questions[:NUM_PROMPTS]]
    agreement = compare_paths(policy, prompts)
    agrees = agreement.trainer_agrees() and (policy.server or agreement.sampler_agrees())
    if policy.decoder and not agrees:
        policy.decoder = None
        policy.fallback_reason = (
            f"with noise in the LoRA (shift {agreement.shift:.2g} nats/token), Ponder's decoder differs from it by "
            f"{agreement.model_forward:.2g} nats/token, and the sampler from the decoder by {agreement.sampler:.2g}"
        )
        agreement = compare_paths(policy, prompts)
    if not agreement.trainer_agrees():
        raise ConfigError(
            f"model: {policy.model.config.model_type} cannot be trained, because its log-probabilities depend on the "
            f"padding of the batch: they differ by {agreement.model_forward:.2g} nats/token from those of each row alone"
        )
    if policy.server and not agreement.sampler_agrees():
        raise ConfigError(
            f"rollout_url: the server does not sample from the trained policy: log-probabilities differ by "
            f"{agreement.sampler:.2g} nats/token, where the LoRA shifts them by {agreement.shift:.2g}: it ignores the LoRA, keeps an "
            "older one in its cache, has another base model, or has replicas with different LoRAs"
        )
    if not agreement.sampler_agrees():
        raise ConfigError(
            f"model: the roll-out does not sample from the trained policy: log-probabilities differ by "
            f"{agreement.sampler:.2g} nats/token (the LoRA's shift is {agreement.shift:.2g}); try dtype: float32"
        )
    return agreement


@torch.no_grad()
def compare_paths(policy: Policy, prompts: list[list[int]]) -> Agreement:
    """Measure the differences on sampled completions, with noise in the LoRA and without.

    Raises ConfigError if the model's forward pass or its generation fails.
    """
    try:
        return _compare_paths(policy, prompts)
    except Exception as error:  # the code of any architecture may raise anything
        if is_out_of_memory(error) or policy.server and isinstance(error, (ConfigError, RunError)):
            raise
        raise ConfigError(
            f"model: {policy.model.config.name_or_path} ({policy.model.config.model_type}) cannot be trained: its forward "
            f"pass or its generation fails: {type(error).__name__}: {first_line(error)}"
        ) from error


def _compare_paths(policy: Policy, prompts: list[list[int]]) -> Agreement:
    generator = torch.Generator(policy.device).manual_seed(0)
    length = min(MAX_TOKENS, policy.max_completion_length)

    def sample() -> list[Episode]:
        sampling = Sampling(policy.temperature)
        return rollout(policy, prompts, NUM_GENERATIONS, length, sampling, generator, NUM_PROMPTS * NUM_GENERATIONS)

    def score(episodes: list[Episode]) -> torch.Tensor:
        logprobs, mask, _ = completion_logprobs(policy, *prompt_and_completion_ids(episodes))
        return logprobs[mask]  # packed, (tokens,)

    def shift(episodes: list[Episode]) -> float:
        with policy.model.disable_adapter():
            base = score(episodes)
        return (score(episodes) - base).abs().mean().item()

    def differences(episodes: list[Episode]) -> tuple[float, float]:
        """Return the mean differences of the sampler and of the model's own forward pass from the trainer."""
        trainer = score(episodes)
        sampled = torch.tensor([p for e in episodes for p in e.sampler_logprobs], device=policy.device)
        rows = torch.cat([model_logprobs(policy, episode) for episode in episodes])
        return tuple((x - trainer).abs().mean().item() for x in (sampled, rows))

    with noise_in_lora(policy) as set_noise:
        episodes = sample()
        best = (0.0, 0.0)  # shift, scale
        for scale in (0.01 * 2 ** (n / 2) for n in range(24)):
            set_noise(scale)
            best = max(best, (shift(episodes), scale))
            if best[0] >= TARGET_SHIFT:
                break
        set_noise(best[1])
        episodes = sample()
        with_noise = differences(episodes)
        noise_shift = shift(episodes)
    as_it_is = differences(sample())
    worst = (torch.tensor(pair).max().item() for pair in zip(with_noise, as_it_is))  # nan if one of them is
    return Agreement(noise_shift, *worst)


def model_logprobs(policy: Policy, episode: Episode) -> torch.Tensor:
    """Return the log-probabilities of a completion's tokens, (C,), by the model's own forward pass without padding."""
    if policy.uses_unsloth:  # its forward needs the settings of `unsloth_states`
        return completion_logprobs(policy, [episode.prompt_ids], [episode.completion_ids])[0][0]
    ids = torch.tensor([episode.prompt_ids + episode.completion_ids], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(episode.prompt_ids) - 1 : -1].float()
    targets = ids[0, len(episode.prompt_ids) :, None]
    return (logits / policy.temperature).log_softmax(-1).gather(1, targets).squeeze(1)


@contextlib.contextmanager
def noise_in_lora(policy: Policy):
    """Yield a function that fills the LoRA's B matrices with seeded noise of a given scale. Restore them on exit."""
    lora_b = [p for name, p in policy.model.named_parameters() if "lora_B.default" in name]
    saved = [p.detach().clone() for p in lora_b]

    def set_noise(scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        for p in lora_b:
            p.copy_(torch.randn(p.shape, generator=generator) * scale)

    try:
        yield set_noise
    finally:
        for p, values in zip(lora_b, saved):
            p.copy_(values)


def check_memory(updater: Updater, questions: list[Question], held_out: list[Question]) -> None:
    """Run roll-out, evaluation and update once at full length, without changing policy or critic.

    Raises:
        ConfigError: if even the smallest batch does not fit.
    """
    policy = updater.policy
    config = updater.config
    if policy.decoder and not policy.server:  # the fallback is too slow at full length; its first roll-out is the check
        try_rollout(policy, questions, config.prompts_per_step, config.num_generations, config)
        try_rollout(policy, held_out, len(held_out), 1, config)
    try_update(updater, questions)


@torch.no_grad()
def try_rollout(policy: Policy, questions: list[Question], count: int, num_generations: int, config: Config) -> None:
    """Prefill the largest batch for `count` prompts, the longest ones, and decode one token at full length."""
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
    return_freed_memory(policy)


def try_update(updater: Updater, questions: list[Question]) -> None:
    """Run forward and backward of policy and critic on the largest micro-batch, with the optimizer states allocated."""
    policy = updater.policy
    critic = updater.critic
    config = updater.config
    prompts = sorted((question.prompt_ids for question in questions), key=len, reverse=True)
    filler_id = next(token for token in range(policy.vocabulary) if token not in policy.eos_ids)
    completion = [filler_id] * config.max_completion_length
    episodes = [
        Episode(prompt, completion, [], True)
        for prompt in prompts[: config.prompts_per_step]
        for _ in range(config.num_generations)
    ]
    trained = [*policy.trainable_parameters(), *(critic.parameters if critic else ())]

    def num_tokens(batch: list[Episode]) -> int:
        return sum(len(episode.prompt_ids) + len(completion) for episode in batch)

    def attempt() -> None:
        batch = max(updater.micro_batches(episodes), key=num_tokens)
        # Later micro-batches run while the accumulated gradients and AdamW's two moments are in memory.
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
    return_freed_memory(policy)
