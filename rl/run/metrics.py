"""Metrics of a step's completions, by TRL's names, and the summary of a run derived from them. Imports no torch."""

import math

from grading import Rewards, Score, outcome_of, outcome_shares
from rl.config import Config

LONG_TOKENS, N_GRAM = 64, 8  # completions this long are checked for repeated runs of this many tokens


def describe_episodes(episodes: list, rewards: Rewards, config: Config) -> dict[str, float]:
    """Metrics of the episodes of a step. Rates are shares from 0 to 1.

    shaping: the part of the reward that comes from functions other than those that say right or wrong;
    shaping_when_wrong: the same for wrong completions alone. time/score: seconds spent in reward functions, most of them
    while the roll-out went on.
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
            present = [by_name[name] for by_name in values if by_name.get(name) is not None]
            metrics[f"{kind}/{name}/mean"] = mean(present)
            metrics[f"{kind}/{name}/std"] = standard_deviation(present)
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
            "time/score": round(sum(score.seconds for score in scores), 4),
        }
        | outcome_shares(scores)
    )


def describe_groups(episodes: list, config: Config) -> dict[str, float]:
    """Shares of groups from which nothing can be learned; nan without groups."""
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
    """The part of a completion's reward that comes from the function that gave the verdict, and from other graders."""
    return sum(
        f.weight * (score.parts.get(f.name) or 0.0)
        for f in rewards.functions
        if f.name == score.judge or outcome_of(score.reasons.get(f.name, ""))
    )


def is_repetitive(token_ids: list[int]) -> bool:
    """Whether a completion is long and more than half of its runs of N_GRAM tokens occurred in it before."""
    if len(token_ids) < LONG_TOKENS:
        return False
    runs = list(zip(*(token_ids[i:] for i in range(N_GRAM))))
    return len(set(runs)) < len(runs) / 2


def summarize(config: Config, history: list[dict], evaluations: dict, is_finished: bool) -> dict:
    """The part of summary.json that follows from settings, metrics and evaluations.

    Args:
        history: the metrics of each step, with its `alarms` and `judges`.
        evaluations: rl.evaluate.Evaluation by step; 0 is before training.
        is_finished: the last evaluation is the final one.
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
        "eval": {"before": evaluations[0].summary()} if evaluations else {},
    }
    if is_finished:
        after = evaluations[max(evaluations)]
        summary["eval"] |= {"after": after.summary(), "gain": after.gain_over(evaluations[0])}
        summary["finished"] = True
    return summary


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


def standard_deviation(values) -> float:
    """With n - 1; 0 for fewer than two values."""
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
