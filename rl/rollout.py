"""The roll-out: sample completions from the policy, and score finished ones while others are still being generated.

Sampling ignores the model's generation_config (temperature, top_k, ...), so that completions come from the policy that
is trained. Llama and its close relatives use our engine (rl/model/engine.py); other architectures use their own
forward pass with our loop and sampling (rl/model/hf_generate.py).
"""

import contextlib
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import QuestionSampler
from data.environments import environment_of
from grading import Completion, RewardError, Rewards, Score, Scoring, prompt_text
from rl import algorithms
from rl.config import Config
from rl.model import distributed
from rl.model.backends import set_mode
from rl.model.engine import Engine
from rl.model.hf_generate import HFGenerate, ServerGenerate
from rl.model.oom import retry_on_oom, return_freed_memory
from rl.model.play import Play
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling


@dataclass
class Episode:
    """One completion with its score and training data. C is the number of its tokens."""

    prompt_ids: list[int]
    completion_ids: list[int]  # including the end-of-sequence token; of an episode, all turns and replies
    sampler_logprobs: list[float]  # (C,), at the sampling temperature, before top-k, top-p and penalties
    truncated: bool  # reached max_completion_length without an end-of-sequence token
    is_sampled: list[bool] | None = None  # (C,), False for tokens of an environment; None: all are sampled
    group: int = 0  # index shared by the completions of one question
    refill: int = 0  # dynamic_sampling: number of the refill that added the group, 0 for the first batch
    completion: Completion | None = None  # input of the reward functions
    score: Score | None = None
    reward: float = math.nan  # training reward, after length penalties; nan if ungraded
    has_signal: bool = True  # False if dynamic_sampling drops its group, see groups_with_signal
    in_loss: bool = True  # False if masked out of the loss
    advantages: torch.Tensor | None = None  # (C,)
    old_logprobs: torch.Tensor | None = None  # (C,), under the policy before the first update
    reference_logprobs: torch.Tensor | None = None  # (C,)
    values: torch.Tensor | None = None  # (C + 1,), the critic's values before each token and after the last one
    returns: torch.Tensor | None = None  # (C,), targets of the critic

    @property
    def finish_reason(self) -> str:
        return "length" if self.truncated else "stop"

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy sampled."""
        return sum(self.sampled_flags)

    @property
    def sampled_flags(self) -> list[bool]:
        """`is_sampled`, with all True if it is None."""
        return self.is_sampled or [True] * len(self.completion_ids)

    def turn_ends(self) -> list[int]:
        """Return the index of the last token of each turn."""
        flags = [*self.sampled_flags, False]
        return [i for i in range(len(flags) - 1) if flags[i] and not flags[i + 1]]


def sampled_mask(episodes: list[Episode]) -> torch.Tensor:
    """Return the mask of the completion tokens that the policy sampled, (N, C) bool on the CPU."""
    flags = [torch.tensor(episode.sampled_flags, dtype=torch.bool) for episode in episodes]
    return torch.nn.utils.rnn.pad_sequence(flags, batch_first=True)


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
    play: Play | None = None,
) -> list[Episode]:
    """Sample `num_generations` completions of each prompt.

    Args:
        prompts: Token ids of each prompt.
        rollout_batch_size: Number of completions generated at a time.
        on_finished: Called with the episodes that have just finished, by their index in the result.
        play: The environments of the episodes, by the same index.

    Returns:
        The episodes in the order of the prompts, with the completions of one prompt next to each other.
    """
    set_mode(policy.model, False, policy.uses_unsloth)  # enables the KV cache, which gradient checkpointing disables
    engine = ServerGenerate if policy.server else Engine if policy.decoder else HFGenerate
    sampler = engine(
        policy, prompts, num_generations, max_completion_length, sampling, generator, rollout_batch_size, play
    )
    episodes = {}
    with contextlib.closing(play) if play else contextlib.nullcontext():
        for outputs in sampler.run():
            finished = {}
            for index, (ids, logprobs, truncated) in outputs.items():
                group = index // num_generations
                finished[index] = episode = Episode(prompts[group], ids, logprobs, truncated, group=group)
                if None in logprobs:
                    episode.is_sampled = [logprob is not None for logprob in logprobs]
                    episode.sampler_logprobs = [logprob or 0.0 for logprob in logprobs]
            episodes |= finished
            on_finished(finished)
    del sampler
    return_freed_memory(policy)
    return [episodes[index] for index in range(len(episodes))]


class StreamingScorer:
    """Scores completions as they finish, while the roll-out continues with the others."""

    def __init__(
        self,
        policy: Policy,
        questions: list[Question],
        rewards: Rewards,
        step: int,
        progress: tqdm,
        play: Play | None = None,
    ):
        self.policy = policy
        self.questions = questions
        self.play = play
        self.step = step
        self.progress = progress
        self.scoring = Scoring(rewards)

    def add(self, finished: dict[int, Episode]) -> None:
        """Start scoring finished episodes, by their index in the roll-out."""
        for index, episode in finished.items():
            if self.play:
                sampled = [token for token, flag in zip(episode.completion_ids, episode.sampled_flags) if flag]
                episode.completion = self.play.completion(index, sampled, episode.truncated, self.step)
                self.scoring.add(episode.completion, index)
                continue
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
        """Wait for all scores and return them in roll-out order. Raise RewardError if a reward function fails."""
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
    """Sample completions and score them. With torchrun, each process does so for its share of the questions.

    On OOM, the whole roll-out restarts with a smaller batch: keeping the finished completions would favour short ones.

    Args:
        label: Text before the progress bar, which is shown on a terminal only.

    Raises:
        RewardError: A reward function fails.
        ConfigError: Not even one group fits into memory.
    """
    num_questions = len(questions)
    questions = distributed.share(questions)
    total = len(questions) * num_generations
    state = generator.get_state()
    scorer = None

    def attempt() -> list[Episode]:
        nonlocal scorer
        generator.set_state(state)
        progress.reset()
        prompts = [question.prompt_ids for question in questions]
        size = num_generations
        play = None
        if any(environment_of(question.row) for question in questions):
            play = Play(policy, questions, num_generations, config, step)
            prompts = play.prompts
            size = play.num_generations
        scorer = StreamingScorer(policy, questions, rewards, step, progress, play)
        return rollout(
            policy,
            prompts,
            size,
            config.max_completion_length,
            sampling,
            generator,
            config.rollout_batch_size,
            scorer.add,
            play,
        )

    is_terminal = sys.stderr.isatty()
    counts = rewards.state_dict()
    episodes = []
    failure = None
    if questions:
        with tqdm(total=total, desc=label, unit=" completions", leave=False, disable=not is_terminal) as progress:
            try:
                episodes = retry_on_oom(attempt, config, "rollout_batch_size", requested=total, minimum=num_generations)
                for episode, score in zip(episodes, scorer.results()):
                    episode.score = score
                    episode.reward = score.total
            except RewardError as error:
                failure = error
    distributed.raise_first(failure)
    if distributed.world_size() > 1:
        episodes = share_episodes(episodes, num_questions, num_generations, rewards, counts)
    for i, episode in enumerate(episodes):
        episode.group = i // num_generations
    return episodes


def share_episodes(
    episodes: list[Episode], num_questions: int, num_generations: int, rewards: Rewards, before: dict
) -> list[Episode]:
    """Return the episodes of all processes, without their environments, and add the others' counts to `rewards`.

    before: the counts of `rewards` before these episodes were scored.
    """
    for episode in episodes:
        episode.completion.environment = None  # cannot be sent
    groups = [episodes[i : i + num_generations] for i in range(0, len(episodes), num_generations)]
    added = distributed.sum_counts(Counter(rewards.state_dict()) - Counter(before))
    rewards.load_state_dict({name: count + added[name] for name, count in before.items()})
    return [episode for group in distributed.gather_shares(groups, num_questions) for episode in group]


def collect(
    policy: Policy, questions: QuestionSampler, rewards: Rewards, generator: torch.Generator, config: Config, step: int
) -> list[Episode]:
    """Return the episodes of one training step, with scores and training rewards.

    With `dynamic_sampling` (DAPO, arXiv 2503.14476), groups without a learning signal are replaced by groups of new
    questions, up to `dynamic_sampling` times per step. Replaced groups stay in the result with `has_signal` False.
    """
    sampling = Sampling.from_config(config)
    episodes = []
    missing = config.prompts_per_step
    for refill in range(1 + config.dynamic_sampling):
        batch = questions.take(missing, step)
        first_group = len(episodes) // config.num_generations
        new_episodes = rollout_and_score(
            policy, batch, config.num_generations, sampling, generator, rewards, config, step, f"step {step}"
        )
        for episode in new_episodes:
            episode.group += first_group
            episode.refill = refill
        episodes += new_episodes
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
    """Return for each group whether it has both right and wrong completions, with different rewards.

    Without a reward function that judges correctness, different rewards suffice. Ungraded completions are ignored.
    """
    totals = torch.tensor([score.total for score in scores])
    has_signal = algorithms.has_varied_rewards(totals, num_generations)
    if any(score.judge for score in scores):
        right = torch.tensor([float(score.is_right) for score in scores])
        has_signal &= algorithms.has_varied_rewards(torch.where(totals.isnan(), torch.nan, right), num_generations)
    return has_signal.tolist()


def set_rewards(episodes: list[Episode], config: Config, step: int) -> None:
    """Set each episode's training reward: its score minus length penalties, or a coin flip in the control run.

    Any gain from training on coin flips is an artefact of the model or the algorithm (arXiv 2506.10947).
    """
    rewards = torch.tensor([episode.score.total for episode in episodes])  # (N,)
    if config.missing_eos_penalty:
        rewards = rewards - config.missing_eos_penalty * torch.tensor([float(e.truncated) for e in episodes])
    if config.soft_punish_cache:
        lengths = torch.tensor([episode.num_sampled for episode in episodes])
        rewards = rewards + algorithms.overlong_penalty(lengths, config.max_completion_length, config.soft_punish_cache)
    if config.control == "random-reward":
        coin = random.Random(f"{config.seed} {step}")
        flips = torch.tensor([float(coin.getrandbits(1)) for _ in episodes])
        rewards = torch.where(rewards.isnan(), rewards, flips)
    for episode, reward in zip(episodes, rewards.tolist()):
        episode.reward = reward
