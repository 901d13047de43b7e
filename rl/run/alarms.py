"""Alarms: signs of reward hacking, of steps from which nothing can be learned, and of updates that go wrong.

They report, and stop nothing. `find_alarms` looks at the metrics of the steps so far, the evaluations and the last step's
episodes, and gives one line for each alarm, by subject. The subjects stand in metrics.jsonl (`alarms`) as long as they hold.
If one alarm explains others, only that one is given: a policy that has diverged also fails and is cut off.
"""

import math
from collections import Counter

from grading import Rewards, Score, outcome_of
from grading.base import SHAPING_SHARE, shorten
from rl.config import Config
from rl.evaluate import Z95, Evaluation
from rl.rollout import Episode
from rl.run.metrics import mean

WINDOW = 5  # steps over which a figure is averaged, and the first steps it is compared with
SMALL_GAIN = 0.05  # held-out accuracy that rose by less, and not beyond its interval, has not risen
LONGER = 1.5  # length has risen: by half or more
DIVERGED = 1.0  # KL, nats a token: at most 0.7 in forty runs of the tiny model, 1.4 to 15 in six that fell apart
MISMATCH, WORST_MISMATCH = 0.1, 5.0  # nats a token: fp32 has 1e-6, bf16 0.01 to 0.03; the worst token of a step
STILL, STILL_STEPS = 1e-7, 10  # a KL below, after this many steps with updates: the policy hardly moves

Alarms = dict[str, str]  # a line by subject


def find_alarms(
    history: list[dict],
    evaluations: dict[int, Evaluation],
    episodes: list[Episode],
    rewards: Rewards,
    config: Config,
) -> Alarms:
    """The alarms after the last step of `history`.

    Args:
        history: the metrics of each step.
        evaluations: by step, the first one (step 0) before training.
        episodes: those of the last step.
    """
    scores = [episode.score for episode in episodes]
    judges = {score.judge for score in scores if score.judge}
    alarms = find_hacking(history, evaluations, judges, rewards, config)
    alarms |= _dominating(history, scores, judges, rewards)
    alarms |= _left_out(history, scores) | _sampler(history) | _diverged(history, config)
    repeating = recent(history, "completions/repetitive")
    at_first = mean(values(history[:WINDOW], "completions/repetitive"))
    if repeating > at_first + 0.1:
        alarms["repetition"] = (
            f"{repeating:.0%} of the completions are long and mostly repeat themselves, {at_first:.0%} did in the first "
            "steps: look in rollouts/ for what pays for it"
        )
    if "kl" not in alarms:
        alarms |= _cut_off(history, config)
    if not alarms.keys() & {"kl", "all_cut"}:
        alarms |= _nothing_to_compare(history, episodes, config)
    return alarms | _nothing_moves(history, alarms, config)


def find_notes(history: list[dict], config: Config) -> Alarms:
    """What is worth knowing but no alarm, in the same form."""
    notes = {}
    easy = recent(history, "frac_groups_all_right")
    same = recent(history, "frac_reward_zero_std")
    if easy > 0.7:
        notes["easy"] = f"in {easy:.0%} of the groups everything is right: the questions have become easy"
    elif same > 0.9 and config.uses_group:
        notes["same"] = f"in {same:.0%} of the groups all rewards are the same, so there is little to learn"
    steps_with_updates = sum(1 for metrics in history if metrics.get("updates") and metrics.get("learning_rate"))
    hardly_moves = steps_with_updates > STILL_STEPS and recent(history, "kl") < STILL
    if hardly_moves and "unmoved" not in _nothing_moves(history, {}, config):
        notes["still"] = (
            f"after {len(history)} steps the policy still writes what it wrote at the start (KL below {STILL:g} nats a "
            f"token): raise learning_rate (now {config.learning_rate:g})"
        )
    return notes


def values(metrics: list[dict], name: str) -> list[float]:
    """The values of a metric without nan and null; steps of an older version may lack it."""
    return [m[name] for m in metrics if m.get(name) is not None and not math.isnan(m[name])]


def recent(history: list[dict], name: str) -> float:
    """The mean over the last WINDOW steps; nan if there is none, and comparisons with nan are false."""
    return mean(values(history[-WINDOW:], name))


# --- reward hacking


def find_hacking(
    history: list[dict], evaluations: dict[int, Evaluation], judges: set[str], rewards: Rewards, config: Config
) -> Alarms:
    """The reward, or the length, has risen and the held-out accuracy has not, as of the last evaluation.

    It is compared with the start and with the best evaluation, if another one lies between.
    """
    if len(evaluations) < 3 or not judges:
        return {}
    alarms = {}
    *earlier, _, last = evaluations
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
            alarms["hacking"] = (
                f"since step {base} the training reward has risen ({before:.2f} to {after:.2f}) and {accuracy}: something "
                "else than right answers is paid for; look at the completions with the highest reward"
            )
        before, after = (mean(values(part, "completions/mean_length")) for part in (then, now))
        if after >= LONGER * before:
            alarms["length"] = (
                f"since step {base} completions have grown ({before:.0f} to {after:.0f} tokens) and {accuracy}"
            )
    return alarms


def _dominating(history: list[dict], scores: list[Score], judges: set[str], rewards: Rewards) -> Alarms:
    """Rewards that do not judge give more of the reward than those that do, or pay wrong answers too much.

    Too much is more than shaping may give: a fifth of what being right is worth.
    """
    worth = _worth(judges, rewards)
    names = " and ".join(sorted(judges))
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


# --- steps that teach nothing, and updates that go wrong


def _left_out(history: list[dict], scores: list[Score]) -> Alarms:
    """Completions and updates that took no part."""
    alarms = {}
    now = history[-1]
    if (ungraded := recent(history, "ungraded")) > 0.05:
        alarms["ungraded"] = (
            f"{ungraded:.0%} of the completions could not be graded and take no part in learning, most often: "
            f"{_commonest_reason(scores, 'ungraded')}"
        )
    failed = [score for score in scores if score.error]
    if now.get("reward_errors") and failed:
        alarms["reward_errors"] = (
            f"{len(failed)} completions of this step were left out: {' '.join(failed[0].error.split())}"
        )
    if now.get("skipped_updates"):
        skipped, made = (sum(values(history, name)) for name in ("skipped_updates", "updates"))
        alarms["skipped"] = (
            f"{skipped:.0f} of {skipped + made:.0f} updates so far were skipped, their gradients were NaN or infinite: if it "
            "goes on, lower learning_rate or max_grad_norm, or set dtype to float32 (bfloat16 in place of float16)"
        )
    return alarms


def _sampler(history: list[dict]) -> Alarms:
    """The sampler gives other probabilities than the trainer."""
    usual, worst = (recent(history, f"sampling/sampling_logp_difference/{kind}") for kind in ("mean", "max"))
    if not (usual > MISMATCH or worst > WORST_MISMATCH):
        return {}
    return {
        "sampler": f"what samples and what is trained differ by {usual:.2g} nats a token ({worst:.2g} at the worst; bf16 alone "
        "makes 0.01 to 0.03), so that another policy is trained than the one that writes: set dtype to float32, or keep "
        "importance_sampling_cap at 2, which bounds the harm"
    }


def _diverged(history: list[dict], config: Config) -> Alarms:
    """The KL from the reference, 0 in the first step, has become too large."""
    if not (far := recent(history, "kl")) > DIVERGED:
        return {}
    stay = f"raise beta (now {config.beta:g})" if config.beta else "set beta (0.01 to 0.04)"
    return {
        "kl": f"the policy has run away from the model it began as: KL {far:.1f} nats a token, and above {DIVERGED:g} most of "
        f"what is written falls apart. Lower learning_rate (now {config.learning_rate:g}), or {stay}, and go back to a checkpoint "
        "from before"
    }


def _cut_off(history: list[dict], config: Config) -> Alarms:
    """Completions that end at the limit."""
    cut = recent(history, "completions/clipped_ratio")
    limit = f"max_completion_length = {config.max_completion_length}"
    if cut == 1 and recent(history, "accuracy") == 0:
        return {
            "all_cut": f"every completion is cut at {limit} and none is right, since no answer is finished: raise it, or "
            "choose a model or questions with shorter answers"
        }
    return {"cut": f"{cut:.0%} of the completions are cut at {limit}: raise it"} if cut > 0.2 else {}


def _nothing_to_compare(history: list[dict], episodes: list[Episode], config: Config) -> Alarms:
    """Rewards that are all 0; else groups without a difference, and groups with nothing right."""
    scores = [episode.score for episode in episodes]
    last = history[-WINDOW:]
    enough = len(last) == min(WINDOW, config.max_steps)
    example = f"Most often: {_commonest_reason(scores, 'wrong')}. One ends in {episodes[0].completion.text[-100:]!r}"

    def always(name, value):
        return values(last, name) == [value] * len(last)

    if always("reward", 0) and always("reward_std", 0) and config.control == "none":
        nothing = (
            f"every reward of the last {len(last)} steps is 0, so there is nothing to learn from: ask easier questions, or "
            f"pay for a part of the way. {example}"
        )
        return {"no_reward": nothing} if enough else {}
    alarms = {}
    wrong = recent(history, "frac_groups_all_wrong")
    if enough and always("frac_reward_zero_std", 1) and config.uses_group and recent(history, "ungraded") != 1:
        right = recent(history, "frac_groups_all_right")
        other = "harder" if right > 0.5 else "easier" if wrong > 0.5 else "other"
        alarms["dead_groups"] = (
            f"in every group of the last {len(last)} steps all rewards are the same, so all advantages are 0 and nothing is "
            f"learned: try {other} questions, more num_generations, a higher temperature, or dynamic_sampling"
        )
    if wrong > 0.7:
        alarms["all_wrong"] = (
            f"in {wrong:.0%} of the groups nothing is right: easier questions would teach more. {example}"
        )
    return alarms


def _nothing_moves(history: list[dict], alarms: Alarms, config: Config) -> Alarms:
    """No updates, or updates that leave the LoRA exactly as it was. A learning rate of 0 by the schedule is meant."""
    last = history[-WINDOW:]
    rates, updates, norms = (values(last, name) for name in ("learning_rate", "updates", "lora_norm"))
    if len(last) < WINDOW or len(rates) < WINDOW or not all(rates) or len(updates) < WINDOW:
        return {}
    if all(updates) and len(norms) == WINDOW and len(set(norms)) == 1:
        return {
            "unmoved": f"the LoRA is exactly what it was {WINDOW - 1} steps ago although it was updated: learning_rate = "
            f"{rates[-1]:g} does nothing, raise it (1e-5 to 5e-5 is usual for a LoRA)"
        }
    warm_up = config.has_critic and last[0].get("step", 1) <= config.critic_warmup_steps
    explained = alarms.keys() & {"kl", "all_cut", "no_reward", "dead_groups", "reward_errors", "skipped"}
    if any(updates) or warm_up or explained or recent(history, "ungraded") == 1:
        return {}
    settings = {"target_kl": config.target_kl, "mask_truncated_completions": config.mask_truncated_completions}
    suspects = [f"{name} = {value}" for name, value in settings.items() if value]
    return {
        "no_updates": f"no update was made in the last {WINDOW} steps, all advantages are 0 or no completion takes part: look "
        f"at `advantage` in rollouts/{', and at ' if suspects else ''}{' and '.join(suspects)}"
    }


def _commonest_reason(scores: list[Score], verdict: str) -> str:
    """An example of the commonest outcome among the reasons of completions with a verdict."""
    reasons = [reason for score in scores if score.verdict == verdict for reason in score.reasons.values()]
    outcomes = [outcome_of(reason) or reason for reason in reasons]
    if not reasons:
        return "the reward functions give no reason"
    commonest = Counter(outcomes).most_common(1)[0][0]
    return shorten(" ".join(reasons[outcomes.index(commonest)].split()), 200)
