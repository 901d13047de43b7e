"""Alarms for reward hacking, for steps without a learning signal, and for updates that fail.

Alarms only report; they never stop a run. `find_alarms` inspects the metrics of all steps so far, the evaluations and
the episodes of the last step, and returns a text per alarm, keyed by subject. In metrics.jsonl, `alarms` lists the
subjects that are active in a step. If one alarm explains others, only that one is raised: a policy that has diverged
also produces wrong and truncated completions.
"""

import math
import shlex
from collections import Counter

from data.tasks import MAKERS
from grading import Rewards, Score, outcome_of
from grading.base import SHAPING_SHARE, shorten
from grading.rewards.verdicts import judge_range
from rl.config import Config
from rl.evaluate import Z95, Evaluation
from rl.rollout import Episode
from rl.run.metrics import mean

WINDOW = 5  # number of latest steps to average, and of first steps to compare them with
SMALL_GAIN = 0.05  # a smaller gain of held-out accuracy does not count, unless its confidence interval excludes 0
LENGTH_GROWTH = 1.5  # the mean completion length has grown if it is this many times the earlier one
DIVERGED_KL = 1.0  # nats per token: at most 0.7 in forty runs of the tiny model, 1.4 to 15 in six that degenerated
MEAN_MISMATCH = 0.1  # sampler vs. trainer, nats per token: 1e-6 in fp32, 0.01 to 0.03 in bf16
MAX_MISMATCH = 5.0  # the same for the worst token of a step
STILL_KL = 1e-7  # nats per token: with a smaller KL the policy has hardly moved
STILL_STEPS = 10  # the note on it appears only after more than this many steps with updates

Alarms = dict[str, str]  # text by subject: one line, in some cases with commands in further lines


def find_alarms(
    history: list[dict],
    evaluations: dict[int, Evaluation],
    episodes: list[Episode],
    rewards: Rewards,
    config: Config,
) -> Alarms:
    """Return the alarms that are active after the last step.

    Args:
        history: The metrics of each step.
        evaluations: The evaluations by step; step 0 is before training.
        episodes: The episodes of the last step.
    """
    scores = [episode.score for episode in episodes]
    judges = {score.judge for score in scores if score.judge}
    alarms = find_hacking(history, evaluations, judges, rewards, config)
    alarms |= _shaping_dominates(history, scores, judges, rewards)
    alarms |= _excluded(history, scores) | _sampler_mismatch(history) | _diverged(history, config)
    repetitive = recent(history, "completions/repetitive")
    initial = mean(values(history[:WINDOW], "completions/repetitive"))
    if repetitive > initial + 0.1:
        alarms["repetition"] = (
            f"{repetitive:.0%} of the completions are long and mostly repeat themselves ({initial:.0%} in the first "
            "steps): check in rollouts/ which reward pays for it"
        )
    if "kl" not in alarms:
        alarms |= _truncated(history, config)
    if not alarms.keys() & {"kl", "all_cut"}:
        alarms |= _no_signal(history, episodes, config)
    return alarms | _no_change(history, alarms, config)


def find_notes(history: list[dict], config: Config) -> Alarms:
    """Return observations that are no alarms, in the same form."""
    notes = {}
    easy = recent(history, "frac_groups_all_right")
    same = recent(history, "frac_reward_zero_std")
    if easy > 0.7:
        notes["easy"] = (
            f"in {easy:.0%} of the groups every completion is right: the questions have become easy. To select harder ones:"
            f"{calibrate_command(config)}"
        )
    elif same > 0.9 and config.uses_group:
        notes["same"] = f"in {same:.0%} of the groups all rewards are equal, so there is little to learn"
    steps_with_updates = sum(1 for metrics in history if metrics.get("updates") and metrics.get("learning_rate"))
    hardly_moves = steps_with_updates > STILL_STEPS and recent(history, "kl") < STILL_KL
    if hardly_moves and "unmoved" not in _no_change(history, {}, config):
        notes["still"] = (
            f"after {len(history)} steps the policy has hardly moved (KL below {STILL_KL:g} nats per token): raise "
            f"learning_rate (now {config.learning_rate:g})"
        )
    return notes


def cold_start_commands(config: Config) -> str:
    """Return the commands that write demonstrations and start the run again with them, each in a line of its own."""
    settings = settings_path(config)
    sources = shlex.join(config.train_data)
    command = f"distil {sources} --config {settings} --keep-right --out demos.jsonl"
    if all(source in MAKERS and source != "countdown" for source in config.train_data):
        command = f"demos {sources} > demos.jsonl"
    return f"\n    python -m data {command}\n    python train.py --config {settings} --sft-data demos.jsonl"


def calibrate_command(config: Config) -> str:
    """Return the command that selects questions by the base model's pass rate, in a line of its own."""
    sources = shlex.join(config.train_data)
    return f"\n    python -m data calibrate {sources} --config {settings_path(config)} --out calibrated.jsonl"


def settings_path(config: Config) -> str:
    """Return the path of the run's settings, quoted for a shell."""
    return shlex.quote(f"{config.output_dir}/config.yaml")


def values(metrics: list[dict], name: str) -> list[float]:
    """Return the values of a metric without NaN and null. Steps logged by an older version may lack the metric."""
    return [m[name] for m in metrics if m.get(name) is not None and not math.isnan(m[name])]


def recent(history: list[dict], name: str) -> float:
    """Return the mean of a metric over the last WINDOW steps; NaN if there are none, so that comparisons are false."""
    return mean(values(history[-WINDOW:], name))


# --- reward hacking


def find_hacking(
    history: list[dict], evaluations: dict[int, Evaluation], judges: set[str], rewards: Rewards, config: Config
) -> Alarms:
    """Return an alarm if the reward or the length has risen without the held-out accuracy, as of the last evaluation.

    The last evaluation is compared with the first one and with the best one, if at least one other lies between them.
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
        points = f"{100 * gain['accuracy']:+.1f} points, 95% CI {100 * low:+.1f} to {100 * high:+.1f}"
        accuracy = f"held-out accuracy has not ({points})"

        n = max(1, min(WINDOW, (last - base) // 3))
        start = max(0, base - n // 2)
        base_steps = history[start : start + n]
        last_steps = history[last - n : last]
        # More right answers explain a rise of the reward by at most the upper end of the gain's interval. Each group is
        # one sample of the reward, since its completions answer the same question.
        before, after = (mean(values(steps, "reward")) for steps in (base_steps, last_steps))
        variance = sum(std**2 for std in values(base_steps + last_steps, "reward_std")) / n**2 / config.prompts_per_step
        rise = after - before - Z95 * math.sqrt(variance)
        wrong, right = judge_range(rewards, judges)
        if rise > (right - wrong) * max(0, high, gain["ci95_sampled"][1]):
            alarms["hacking"] = (
                f"since step {base} the training reward has risen ({before:.2f} to {after:.2f}) but {accuracy}: the "
                "reward pays for something other than right answers; look at the completions with the highest reward"
            )
        before, after = (mean(values(steps, "completions/mean_length")) for steps in (base_steps, last_steps))
        if after >= LENGTH_GROWTH * before:
            alarms["length"] = (
                f"since step {base} completions have grown ({before:.0f} to {after:.0f} tokens) but {accuracy}: look "
                "at the longest completions in rollouts/"
            )
    return alarms


def _shaping_dominates(history: list[dict], scores: list[Score], judges: set[str], rewards: Rewards) -> Alarms:
    """Return an alarm if shaping rewards outweigh the judging rewards, or pay wrong answers too much.

    Shaping rewards come from functions that give no verdict. Wrong answers may earn at most SHAPING_SHARE (a fifth) of
    what a right answer adds.
    """
    wrong, right = judge_range(rewards, judges)
    added = right - wrong
    names = " and ".join(sorted(judges))
    reward, shaping, when_wrong = (recent(history, name) for name in ("reward", "shaping", "shaping_when_wrong"))
    allowed = SHAPING_SHARE * added + 1e-9  # 0.2 has no exact floating-point representation
    if not judges or not (when_wrong > allowed or shaping > max(reward - shaping - wrong, allowed)):
        return {}
    reward_sums = Counter()
    for score in scores:
        reward_sums.update({f.name: f.weight * (score.parts.get(f.name) or 0.0) for f in rewards.functions})
    largest = next((name for name, _ in reward_sums.most_common() if name not in judges), "other rewards")
    problem = (
        f"{shaping:.2f} of the mean reward of {reward:.2f} comes from rewards other than {names}, mostly from {largest}"
    )
    if when_wrong > allowed:
        problem = f"wrong answers earn {when_wrong:.2f}, mostly from {largest}; {names} pays {added:g} for being right"
    return {
        "dominating": f"{problem}: the policy may learn something other than right answers. Lower the weights of these "
        "rewards to at most a fifth of the weight for right answers in total, or pay them only for right answers"
    }


# --- steps without a learning signal, and updates that fail


def _excluded(history: list[dict], scores: list[Score]) -> Alarms:
    """Return alarms for completions and updates that were left out of training."""
    alarms = {}
    last = history[-1]
    if (ungraded := recent(history, "ungraded")) > 0.05:
        alarms["ungraded"] = (
            f"{ungraded:.0%} of the completions could not be graded and are left out of training; most common reason: "
            f"{_most_common_reason(scores, 'ungraded')}"
        )
    failed = [score for score in scores if score.error]
    if last.get("reward_errors") and failed:
        alarms["reward_errors"] = (
            f"{len(failed)} completions of this step were left out: {' '.join(failed[0].error.split())}"
        )
    if last.get("skipped_updates"):
        skipped, done = (sum(values(history, name)) for name in ("skipped_updates", "updates"))
        alarms["skipped"] = (
            f"{skipped:.0f} of {skipped + done:.0f} updates so far were skipped because their gradients were NaN or "
            "infinite: if this continues, lower learning_rate or max_grad_norm, or set dtype to float32 (or bfloat16 "
            "instead of float16)"
        )
    return alarms


def _sampler_mismatch(history: list[dict]) -> Alarms:
    """Return an alarm if the sampler's log-probabilities differ from the trainer's."""
    average, largest = (recent(history, f"sampling/sampling_logp_difference/{kind}") for kind in ("mean", "max"))
    if not (average > MEAN_MISMATCH or largest > MAX_MISMATCH):
        return {}
    return {
        "sampler": f"the log-probabilities of sampler and trainer differ by {average:.2g} nats per token (at most "
        f"{largest:.2g}; bf16 alone causes 0.01 to 0.03), so the policy that is trained is not the one that samples: "
        "set dtype to float32, or keep importance_sampling_cap at 2, which bounds the error"
    }


def _diverged(history: list[dict], config: Config) -> Alarms:
    """Return an alarm if the KL from the reference, which is 0 in the first step, has become too large."""
    if not (kl := recent(history, "kl")) > DIVERGED_KL:
        return {}
    remedy = f"raise beta (now {config.beta:g})" if config.beta else "set beta (0.01 to 0.04)"
    return {
        "kl": f"the policy has diverged from the reference model: the KL is {kl:.1f} nats per token, and above "
        f"{DIVERGED_KL:g} most completions degenerate. Lower learning_rate (now {config.learning_rate:g}) or {remedy}, "
        "and resume from an earlier checkpoint"
    }


def _truncated(history: list[dict], config: Config) -> Alarms:
    """Return an alarm if many completions are truncated at the length limit."""
    truncated = recent(history, "completions/clipped_ratio")
    limit = f"max_completion_length = {config.max_completion_length}"
    if truncated == 1 and recent(history, "accuracy") == 0:
        return {
            "all_cut": f"every completion is truncated at {limit} and none is right, because no answer is finished: "
            "raise it, or choose a model or questions with shorter answers"
        }
    return {"cut": f"{truncated:.0%} of the completions are truncated at {limit}: raise it"} if truncated > 0.2 else {}


def _no_signal(history: list[dict], episodes: list[Episode], config: Config) -> Alarms:
    """Return an alarm if all rewards are 0; otherwise, alarms for groups of equal rewards or without right answers."""
    scores = [episode.score for episode in episodes]
    last_steps = history[-WINDOW:]
    has_window = len(last_steps) == min(WINDOW, config.max_steps)
    reason = _most_common_reason(scores, "wrong")
    example = f"Most common reason: {reason}. One completion ends with {episodes[0].completion.text[-100:]!r}"

    def is_always(name, value):
        return values(last_steps, name) == [value] * len(last_steps)

    if (no_answer := recent(history, "outcomes/no_answer")) > 0.5 and not config.sft_data:
        return {
            "no_answer": f"{no_answer:.0%} of the completions have no final answer that a grader can read, so there is "
            "nothing to reward. If the model does not know the form of the answer, teach it with a cold start:"
            f"{cold_start_commands(config)}\n  {example}"
        }
    if is_always("reward", 0) and is_always("reward_std", 0) and config.control == "none":
        no_reward = (
            f"every reward of the last {len(last_steps)} steps is 0, so there is nothing to learn from: use easier "
            f"questions, or give partial credit. {example}"
        )
        return {"no_reward": no_reward} if has_window else {}
    alarms = {}
    wrong = recent(history, "frac_groups_all_wrong")
    if has_window and is_always("frac_reward_zero_std", 1) and config.uses_group and recent(history, "ungraded") != 1:
        right = recent(history, "frac_groups_all_right")
        kind = "harder" if right > 0.5 else "easier" if wrong > 0.5 else "different"
        alarms["dead_groups"] = (
            f"in every group of the last {len(last_steps)} steps all rewards are equal, so all advantages are 0 and "
            f"nothing is learned: try {kind} questions, more num_generations, a higher temperature, or dynamic_sampling"
        )
    if wrong > 0.7:
        alarms["all_wrong"] = (
            f"in {wrong:.0%} of the groups no completion is right: use easier questions, or select those that the model "
            f"solves at times:{calibrate_command(config)}\n  {example}"
        )
    return alarms


def _no_change(history: list[dict], alarms: Alarms, config: Config) -> Alarms:
    """Return an alarm for missing updates or an unchanged LoRA, unless the schedule sets the learning rate to 0."""
    last_steps = history[-WINDOW:]
    rates, updates, norms = (values(last_steps, name) for name in ("learning_rate", "updates", "lora_norm"))
    if len(last_steps) < WINDOW or len(rates) < WINDOW or not all(rates) or len(updates) < WINDOW:
        return {}
    if all(updates) and len(norms) == WINDOW and len(set(norms)) == 1:
        return {
            "unmoved": f"the LoRA has not changed in {WINDOW - 1} steps although it was updated: learning_rate = "
            f"{rates[-1]:g} has no effect, raise it (1e-5 to 5e-5 is usual for a LoRA)"
        }
    is_warmup = config.has_critic and last_steps[0].get("step", 1) <= config.critic_warmup_steps
    explained = alarms.keys() & {"kl", "all_cut", "no_reward", "dead_groups", "reward_errors", "skipped"}
    if any(updates) or is_warmup or explained or recent(history, "ungraded") == 1:
        return {}
    settings = {"target_kl": config.target_kl, "mask_truncated_completions": config.mask_truncated_completions}
    suspects = [f"{name} = {value}" for name, value in settings.items() if value]
    return {
        "no_updates": f"no update was made in the last {WINDOW} steps: all advantages are 0, or all completions are "
        f"left out. Check `advantage` in rollouts/{', and the settings ' if suspects else ''}{' and '.join(suspects)}"
    }


def _most_common_reason(scores: list[Score], verdict: str) -> str:
    """Return one reason of the most common outcome among the completions with this verdict."""
    reasons = [reason for score in scores if score.verdict == verdict for reason in score.reasons.values()]
    outcomes = [outcome_of(reason) or reason for reason in reasons]
    if not reasons:
        return "the reward functions give no reason"
    most_common = Counter(outcomes).most_common(1)[0][0]
    return shorten(" ".join(reasons[outcomes.index(most_common)].split()), 200)
