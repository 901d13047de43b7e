"""Metrics of the completions of a step, under TRL's names, and the summary of a run. Imports no torch."""

import math

from grading import Rewards, Score, outcome_of, outcome_shares
from rl.config import Config

LONG_TOKENS = 64  # completions with at least this many tokens are checked for repetition
N_GRAM = 8  # number of tokens in the n-grams that are compared


def describe_episodes(episodes: list, rewards: Rewards, config: Config) -> dict[str, float]:
    """Return the metrics of the episodes of a step. Rates are fractions from 0 to 1.

    `shaping` is the mean part of the reward that comes from functions without a verdict, `shaping_when_wrong` the same
    over wrong completions. `time/score` is the seconds spent in reward functions, mostly during the roll-out.
    """
    scores = [episode.score for episode in episodes]
    completions = [episode.completion for episode in episodes]
    graded = [score for score in scores if not math.isnan(score.total)]
    totals = [score.total for score in graded]
    metrics = {
        "accuracy": mean([score.is_right for score in scores]),
        "reward": mean(totals),
        "reward_std": standard_deviation(totals),
        "shaping": mean([score.total - judged_part(score, rewards) for score in graded]),
        "shaping_when_wrong": mean([s.total - judged_part(s, rewards) for s in graded if s.verdict == "wrong"]),
        "ungraded": mean([score.verdict == "ungraded" for score in scores]),
        "reward_errors": sum("reward_error" in map(outcome_of, score.reasons.values()) for score in scores),
    }
    for kind in ("rewards", "metrics"):
        values = [score.parts if kind == "rewards" else score.metrics for score in scores]
        for name in dict.fromkeys(name for by_name in values for name in by_name):
            numbers = [by_name[name] for by_name in values if by_name.get(name) is not None]
            metrics[f"{kind}/{name}/mean"] = mean(numbers)
            metrics[f"{kind}/{name}/std"] = standard_deviation(numbers)
    lengths = [completion.tokens for completion in completions]
    return (
        metrics
        | describe_groups(episodes, config)
        | {
            "completions/mean_length": mean(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": mean([completion.truncated for completion in completions]),
            "completions/thinking": mean([bool(completion.thinking) for completion in completions]),
            "completions/repetitive": mean([is_repetitive(completion.token_ids) for completion in completions]),
            **(
                {"episodes/mean_turns": mean([len(c.turns) for c in completions])}
                if any(c.turns for c in completions)
                else {}
            ),
            "time/score": round(sum(score.seconds for score in scores), 4),
        }
        | outcome_shares(scores)
    )


def describe_groups(episodes: list, config: Config) -> dict[str, float]:
    """Return the fractions of groups without a learning signal; NaN if the group size is 1."""
    size = config.num_generations
    groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
    if size == 1:
        return dict.fromkeys(("frac_groups_all_wrong", "frac_groups_all_right", "frac_reward_zero_std"), math.nan)
    verdicts = [{episode.score.verdict for episode in group} - {"ungraded"} for group in groups]
    rewards = [{episode.reward for episode in group if not math.isnan(episode.reward)} for group in groups]
    metrics = {
        "frac_groups_all_wrong": mean([group == {"wrong"} for group in verdicts]),
        "frac_groups_all_right": mean([group == {"right"} for group in verdicts]),
        "frac_reward_zero_std": mean([len(group) < 2 for group in rewards]),
    }
    if config.dynamic_sampling:
        metrics["dynamic_sampling/refills"] = max(episode.refill for episode in episodes)
        metrics["dynamic_sampling/groups_left_out"] = sum(not group[0].has_signal for group in groups)
    return metrics


def judged_part(score: Score, rewards: Rewards) -> float:
    """Return the part of a completion's reward that comes from graders, including the one that gave the verdict."""
    return sum(
        f.weight * (score.parts.get(f.name) or 0.0)
        for f in rewards.functions
        if f.name == score.judge or outcome_of(score.reasons.get(f.name, ""))
    )


def is_repetitive(token_ids: list[int]) -> bool:
    """Return True if a completion is long and more than half of its n-grams repeat earlier ones."""
    if len(token_ids) < LONG_TOKENS:
        return False
    n_grams = list(zip(*(token_ids[i:] for i in range(N_GRAM))))
    return len(set(n_grams)) < len(n_grams) / 2


def summarize(config: Config, history: list[dict], evaluations: dict, base, is_finished: bool) -> dict:
    """Return the part of summary.json that is derived from settings, metrics and evaluations.

    Args:
        history: The metrics of each step, with its `alarms` and `judges`.
        evaluations: The evaluations (rl.evaluate.Evaluation) by step; step 0 is after the cold start, if there is one.
        base: The evaluation before any training.
        is_finished: Whether the last evaluation is the final one.
    """
    last = history[-1] if history else {}
    alarms = {}
    for metrics in history:
        for subject in metrics["alarms"]:
            alarms.setdefault(subject, metrics["step"])
    summary = {
        "algorithm": config.algorithm,
        "model": config.model,
        "seed": config.seed,
        "control": config.control,
        "steps": last.get("step", 0),
        "completions": last.get("num_completions", 0),
        "tokens": last.get("num_tokens", 0),
        "judges": last.get("judges", []),
        "alarms": alarms,
        "eval": {"before": base.summary()} if base else {},
    }
    has_cold_start = bool(evaluations) and evaluations[0] is not base
    if has_cold_start:
        summary["eval"]["cold_start"] = evaluations[0].summary()
    if is_finished:
        after = evaluations[max(evaluations)]
        summary["eval"] |= {"after": after.summary(), "gain": after.gain_over(base)}
        if has_cold_start:
            summary["eval"]["gain_over_cold_start"] = after.gain_over(evaluations[0])
        summary["finished"] = True
    return summary


def mean(values) -> float:
    """Return the mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan


def standard_deviation(values) -> float:
    """Return the sample standard deviation (divisor n - 1); 0 for fewer than two values."""
    average = mean(values)
    return math.sqrt(sum((v - average) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
