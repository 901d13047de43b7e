"""The roll-out: sample completions of the policy, and score them while the others are still being generated.

Sampling is done here, not by the model's `generate`, so nothing of a model's generation_config (a temperature, a top_k)
interferes: what is sampled is what is trained. Llama, Qwen2 and Qwen3 run on the engine of rl/model/engine.py, other
architectures through their own `generate`, with our own draw (rl/model/hf_generate.py).
"""

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import QuestionSampler
from grading import Completion, Rewards, Score, Scoring, prompt_text
from rl import algorithms
from rl.config import Config
from rl.model.backends import set_mode
from rl.model.engine import Engine
from rl.model.hf_generate import HFGenerate
from rl.model.oom import retry_on_oom
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling


@dataclass
class Episode:
    """One completion, with everything that scoring and learning add to it. C is the number of its tokens."""

    prompt_ids: list[int]
    completion_ids: list[int]  # including the end-of-sequence token
    sampler_logprobs: list[float]  # (C,) at the sampling temperature, before top-k and the like
    truncated: bool  # reached max_completion_length without an end-of-sequence token
    group: int = 0  # completions of one question have the same number
    refill: int = 0  # dynamic_sampling: 0, or which refill of the step its question came with
    completion: Completion | None = None  # as reward functions see it
    score: Score | None = None
    reward: float = math.nan  # the reward to learn from: after penalties for length; nan if ungraded
    has_signal: bool = True  # False if dynamic_sampling leaves out its group: all right, or all wrong
    in_loss: bool = True  # False if it is masked out of the loss
    advantages: torch.Tensor | None = None  # (C,)
    old_logprobs: torch.Tensor | None = None  # (C,) under the policy before the first update
    reference_logprobs: torch.Tensor | None = None  # (C,)
    values: torch.Tensor | None = None  # (C + 1,) of the critic: before each token, and after the last one
    returns: torch.Tensor | None = None  # (C,) targets of the critic

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
    rollout_batch_size: int,
    on_finished: Callable[[dict[int, Episode]], None] = lambda finished: None,
) -> list[Episode]:
    """Sample `num_generations` completions of each prompt.

    Args:
        prompts: token ids of each prompt.
        rollout_batch_size: number of completions generated at a time.
        on_finished: called with the completions that have just ended, by their index in the result.

    Returns:
        The episodes, in the order of the prompts; the completions of one prompt stand side by side.
    """
    set_mode(policy.model, False, policy.uses_unsloth)  # keeps the KV cache on if training recomputes activations
    engine = Engine if policy.decoder else HFGenerate
    sampler = engine(policy, prompts, num_generations, max_completion_length, sampling, generator, rollout_batch_size)
    episodes = {}
    for ended in sampler.run():
        finished = {}
        for index, (ids, logprobs, truncated) in ended.items():
            group = index // num_generations
            finished[index] = Episode(prompts[group], ids, logprobs, truncated, group)
        episodes |= finished
        on_finished(finished)
    return [episodes[index] for index in range(len(episodes))]


class StreamingScorer:
    """Scores completions as they end, while the roll-out continues with the others."""

    def __init__(self, policy: Policy, questions: list[Question], rewards: Rewards, step: int, progress: tqdm):
        self.policy = policy
        self.questions = questions
        self.step = step
        self.progress = progress
        self.scoring = Scoring(rewards)

    def add(self, finished: dict[int, Episode]) -> None:
        """Start scoring the episodes that have just ended, given by their index in the roll-out."""
        for index, episode in finished.items():
            question = self.questions[episode.group]
            episode.completion = Completion(
                prompt=prompt_text(question.row["prompt"]),
                text=question.completion_prefix + self.policy.decode(episode.completion_ids),
                row=question.row,
                tokens=len(episode.completion_ids),
                token_ids=episode.completion_ids,
                truncated=episode.truncated,
                step=self.step,
            )
            self.scoring.add(episode.completion, index)
        self.progress.update(len(finished))

    def results(self) -> list[Score]:
        """Wait for all scores, in the order of the roll-out. Raises RewardError if a reward function fails."""
        return self.scoring.results()


def rollout_and_score(
    policy: Policy,
    questions: list[Question],
    num_generations: int,
    sampling: Sampling,
    generator: torch.Generator,
    rewards: Rewards,
    config: Config,
    step: int,
    label: str = "",
) -> list[Episode]:
    """Sample completions and score them. Out of memory, the whole roll-out is repeated with a smaller batch.

    Repeating only what had not ended would favour short completions.

    Args:
        label: text before the progress bar, which appears on a terminal only.

    Raises:
        RewardError: a reward function failed.
        ConfigError: not even one group fits into memory.
    """
    prompts = [question.prompt_ids for question in questions]
    total = len(questions) * num_generations
    state = generator.get_state()
    scorer = None

    def attempt() -> list[Episode]:
        nonlocal scorer
        generator.set_state(state)
        progress.reset()
        scorer = StreamingScorer(policy, questions, rewards, step, progress)
        return rollout(
            policy,
            prompts,
            num_generations,
            config.max_completion_length,
            sampling,
            generator,
            config.rollout_batch_size,
            scorer.add,
        )

    is_terminal = sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit=" completions", leave=False, disable=not is_terminal) as progress:
        episodes = retry_on_oom(attempt, config, "rollout_batch_size", requested=total, minimum=num_generations)
        for episode, score in zip(episodes, scorer.results()):
            episode.score = score
            episode.reward = score.total
    return episodes


def collect(
    policy: Policy,
    questions: QuestionSampler,
    rewards: Rewards,
    generator: torch.Generator,
    config: Config,
    step: int,
) -> list[Episode]:
    """The episodes of one training step: sampled, scored, and with the rewards to learn from.

    With `dynamic_sampling` (DAPO, arXiv 2503.14476), groups without signal are replaced by groups of new questions, at
    most that many times. They stay in the result, with `has_signal` False.
    """
    sampling = Sampling.from_config(config)
    episodes = []
    missing = config.prompts_per_step
    for refill in range(1 + config.dynamic_sampling):
        batch = questions.take(missing, step)
        first_group = len(episodes) // config.num_generations
        more = rollout_and_score(
            policy, batch, config.num_generations, sampling, generator, rewards, config, step, f"step {step}"
        )
        for episode in more:
            episode.group += first_group
            episode.refill = refill
        episodes += more
        signals = groups_with_signal([episode.score for episode in episodes], config.num_generations)
        missing = config.prompts_per_step - sum(signals)
        if missing <= 0:
            break
    if config.dynamic_sampling:
        for episode in episodes:
            episode.has_signal = signals[episode.group]
    set_rewards(episodes, config, step)
    return episodes


def groups_with_signal(scores: list[Score], num_generations: int) -> list[bool]:
    """Whether each group has something to learn from: right and wrong completions, with different rewards.

    If no function says what is right, different rewards are enough. Ungraded completions do not count.
    """
    totals = torch.tensor([score.total for score in scores])
    varied = algorithms.varied_groups(totals, num_generations)
    if any(score.judge for score in scores):
        right = torch.tensor([float(score.is_right) for score in scores])
        varied &= algorithms.varied_groups(torch.where(totals.isnan(), torch.nan, right), num_generations)
    return varied.tolist()


def set_rewards(episodes: list[Episode], config: Config, step: int) -> None:
    """Set the rewards to learn from: the scores less the penalties for length, or the control's coin flips.

    What training on coin flips gains is not skill but an artefact of the model or the algorithm (arXiv 2506.10947).
    """
    rewards = torch.tensor([episode.score.total for episode in episodes])  # (N,)
    if config.missing_eos_penalty:
        rewards = rewards - config.missing_eos_penalty * torch.tensor([float(e.truncated) for e in episodes])
    if config.soft_punish_cache:
        lengths = torch.tensor([len(episode.completion_ids) for episode in episodes])
        rewards = rewards + algorithms.overlong_penalty(lengths, config.max_completion_length, config.soft_punish_cache)
    if config.control == "random-reward":
        coin = random.Random(f"{config.seed} {step}")
        flips = torch.tensor([float(coin.getrandbits(1)) for _ in episodes])
        rewards = torch.where(rewards.isnan(), rewards, flips)
    for episode, reward in zip(episodes, rewards.tolist()):
        episode.reward = reward
