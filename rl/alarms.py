"""Alarms: what in a run looks like reward hacking, or like a step that cannot teach. They report, they stop nothing.

`find` looks at the metrics of the steps so far, the evaluations and the last step's completions, and gives one line
for each alarm that holds, by subject. The subjects stand in metrics.jsonl (`alarms`) for as long as they hold.
"""

import math
from collections import Counter

from grading import Completion, Rewards, Score, outcome_of
from grading.registry import shorten
from grading.reward_file import SHAPING_SHARE
from rl.config import Config
from rl.evaluate import Z95, Answers
from rl.report import mean

WINDOW = 5  # steps that a figure is averaged over, and what the first steps are
SMALL_GAIN = 0.05  # held-out accuracy that rose by less, and not beyond its interval, has not risen
LONGER = 1.5  # length has risen: by half or more


def find(
    history: list[dict],
    evaluations: dict[int, Answers],
    scores: list[Score],
    completions: list[Completion],
    rewards: Rewards,
    config: Config,
) -> dict[str, str]:
    """The alarms that hold after the last step of `history`: a line in plain words by subject.

    history: the metrics of each step. evaluations: by step, the first one (step 0) before training. scores,
    completions: of the last step.
    """
    judges = {s.judge for s in scores if s.judge}
    found = _hacking(history, evaluations, judges, rewards, config) | _dominating(history, scores, judges, rewards)

    def recent(name):
        return mean([m[name] for m in history[-WINDOW:]])

    at_first, repeating = (
        mean([m["completions/repetitive"] for m in history[:WINDOW]]),
        recent("completions/repetitive"),
    )
    if repeating > at_first + 0.1:
        found["repetition"] = (
            f"{repeating:.0%} of the completions are long and mostly repeat themselves, {at_first:.0%} did in the first "
            "steps: look in rollouts.jsonl for what pays for it"
        )
    if recent("completions/clipped_ratio") > 0.2:
        found["cut"] = (
            f"{recent('completions/clipped_ratio'):.0%} of the completions are cut at max_completion_length = "
            f"{config.max_completion_length}: raise it"
        )
    if recent("frac_groups_all_wrong") > 0.7:
        found["all_wrong"] = (
            f"in {recent('frac_groups_all_wrong'):.0%} of the groups nothing is right: easier questions would teach more. "
            f"Most often: {_commonest_reason(scores, 'wrong')}. One ends in {completions[0].text[-100:]!r}"
        )
    if recent("ungraded") > 0.05:
        found["ungraded"] = (
            f"{recent('ungraded'):.0%} of the completions could not be graded and take no part in learning, most often: "
            f"{_commonest_reason(scores, 'ungraded')}"
        )
    if history[-1]["reward_errors"]:
        failed = [score for score in scores if score.error]
        found["reward_errors"] = (
            f"{len(failed)} completions of this step were left out: {' '.join(failed[0].error.split())}"
        )
    if history[-1]["skipped_updates"]:
        found["skipped"] = "an update was skipped, its gradient was not finite: if it goes on, lower learning_rate"
    return found


def _commonest_reason(scores: list[Score], verdict: str) -> str:
    """An example of the commonest outcome among the reasons of completions with a verdict."""
    reasons = [reason for score in scores if score.verdict == verdict for reason in score.reasons.values()]
    outcomes = [outcome_of(reason) or reason for reason in reasons]
    if not reasons:
        return "the reward functions give no reason"
    commonest = Counter(outcomes).most_common(1)[0][0]
    return shorten(" ".join(reasons[outcomes.index(commonest)].split()), 200)


def notes(history: list[dict], config: Config) -> dict[str, str]:
    """What is worth knowing and no alarm, as `find` gives it."""
    easy, same = (
        mean([m[name] for m in history[-WINDOW:]]) for name in ("frac_groups_all_right", "frac_reward_zero_std")
    )
    if easy > 0.7:
        return {"easy": f"in {easy:.0%} of the groups everything is right: the questions have become easy"}
    if same > 0.9 and config.uses_group:
        return {"same": f"in {same:.0%} of the groups all rewards are the same, so there is little to learn"}
    return {}


def _hacking(
    history: list[dict], evaluations: dict[int, Answers], judges: set[str], rewards: Rewards, config: Config
) -> dict[str, str]:
    """The reward, or the length, has risen and the held-out accuracy has not: as of the last evaluation.

    It is compared with the start and with the best evaluation, where another one lies between.
    """
    if len(evaluations) < 3 or not judges:
        return {}
    found, (*earlier, _, last) = {}, evaluations
    best = sorted(earlier, key=lambda step: evaluations[step].accuracy, reverse=True)[:1]
    for base in dict.fromkeys([*earlier[:1], *best]):
        gain = evaluations[last].gain_over(evaluations[base])
        if any(gain[f"ci95{kind}"][0] > 0 or gain[f"accuracy{kind}"] >= SMALL_GAIN for kind in ("", "_sampled")):
            continue
        low, high = gain["ci95"]
        points = f"{100 * gain['accuracy']:+.1f} points, 95 %: {100 * low:+.1f} to {100 * high:+.1f}"
        accuracy = f"held-out accuracy has not ({points})"

        n = max(1, min(WINDOW, (last - base) // 3))
        around = max(0, base - n // 2)
        then, now = history[around : around + n], history[last - n : last]
        # What right answers can explain of the reward's rise is at most the upper end of the gain's interval. A group is
        # one sample of the reward, since its completions answer the same question.
        before, after = (mean([m["reward"] for m in part]) for part in (then, now))
        variance = sum(m["reward_std"] ** 2 for m in then + now) / n**2 / config.prompts_per_step
        rise = after - before - Z95 * math.sqrt(variance)
        if rise > _worth(judges, rewards) * max(0, high, gain["ci95_sampled"][1]):
            found["hacking"] = (
                f"since step {base} the training reward has risen ({before:.2f} to {after:.2f}) and {accuracy}: something "
                "else than right answers is paid for; look at the completions with the highest reward"
            )
        before, after = (mean([m["completions/mean_length"] for m in part]) for part in (then, now))
        if after >= LONGER * before:
            found["length"] = (
                f"since step {base} completions have grown ({before:.0f} to {after:.0f} tokens) and {accuracy}"
            )
    return found


def _dominating(history: list[dict], scores: list[Score], judges: set[str], rewards: Rewards) -> dict[str, str]:
    """Rewards that do not judge give more of the reward than those that do, or pay wrong answers too much.

    Too much is more than shaping may give: a fifth of what being right is worth.
    """
    worth, names = _worth(judges, rewards), " and ".join(sorted(judges))
    reward, shaping = (mean([m[name] for m in history[-WINDOW:]]) for name in ("reward", "shaping"))
    when_wrong = mean([m["shaping_when_wrong"] for m in history[-WINDOW:] if not math.isnan(m["shaping_when_wrong"])])
    allowed = SHAPING_SHARE * worth + 1e-9  # 0.2 itself has no exact representation
    if not judges or not (when_wrong > allowed or shaping > max(reward - shaping, allowed)):
        return {}
    by_part = Counter()
    for score in scores:
        by_part.update({f.name: f.weight * (score.parts.get(f.name) or 0.0) for f in rewards.functions})
    most = next((name for name, _ in by_part.most_common() if name not in judges), "other rewards")
    paid = f"of the mean reward of {reward:.2f}, {shaping:.2f} do not come from {names}, most of that from {most}"
    if when_wrong > allowed:
        paid = (
            f"wrong answers earn {when_wrong:.2f}, most of it by {most}, where {names} pays {worth:g} for a right one"
        )
    return {
        "dominating": f"{paid}: something else than being right may be learned. Lower such weights to a fifth in all, or pay "
        "them only for right answers"
    }


def _worth(judges: set[str], rewards: Rewards) -> float:
    """What being right is worth: the largest weight of the functions that judge."""
    return max((f.weight for f in rewards.functions if f.name in judges), default=0.0)
