"""Alarms: what in a run looks like reward hacking, or (rl/run/health.py) like a step that cannot teach. They report, they
stop nothing.

`find` looks at the metrics of the steps so far, the evaluations and the last step's completions, and gives one line
for each alarm that holds, by subject. The subjects stand in metrics.jsonl (`alarms`) for as long as they hold.
"""

import math
from collections import Counter

from grading import Completion, Rewards, Score
from grading.base import SHAPING_SHARE
from rl.config import Config
from rl.evaluate import Z95, Answers
from rl.run import health
from rl.run.health import WINDOW, recent, values
from rl.run.report import mean

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
    cheating = hacking(history, evaluations, judges, rewards, config) | _dominating(history, scores, judges, rewards)
    return cheating | health.find(history, scores, completions, config)


def notes(history: list[dict], config: Config) -> dict[str, str]:
    """What is worth knowing and no alarm, as `find` gives it."""
    found = {}
    easy, same = (recent(history, name) for name in ("frac_groups_all_right", "frac_reward_zero_std"))
    if easy > 0.7:
        found["easy"] = f"in {easy:.0%} of the groups everything is right: the questions have become easy"
    elif same > 0.9 and config.uses_group:
        found["same"] = f"in {same:.0%} of the groups all rewards are the same, so there is little to learn"
    if health.hardly_moves(history) and "unmoved" not in health.nothing_moves(history, {}, config):
        found["still"] = (
            f"after {len(history)} steps the policy still writes what it wrote at the start (KL below {health.STILL:g} nats a "
            f"token): raise learning_rate (now {config.learning_rate:g})"
        )
    return found


def hacking(
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
        before, after = (mean(values(part, "reward")) for part in (then, now))
        variance = sum(std**2 for std in values(then + now, "reward_std")) / n**2 / config.prompts_per_step
        rise = after - before - Z95 * math.sqrt(variance)
        if rise > _worth(judges, rewards) * max(0, high, gain["ci95_sampled"][1]):
            found["hacking"] = (
                f"since step {base} the training reward has risen ({before:.2f} to {after:.2f}) and {accuracy}: something "
                "else than right answers is paid for; look at the completions with the highest reward"
            )
        before, after = (mean(values(part, "completions/mean_length")) for part in (then, now))
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
    reward, shaping, when_wrong = (recent(history, name) for name in ("reward", "shaping", "shaping_when_wrong"))
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
