"""Steps that cannot teach, and updates that go wrong or do nothing: what `rl/run/alarms.py` says beside cheating.

Each is a line in plain words with what to try, by subject. Where one explains others, only that one is said: a policy
that has run away also fails and is cut, answers that are all cut are all wrong.
"""

import math
from collections import Counter

from grading import Completion, Score, outcome_of
from grading.base import shorten
from rl.config import Config
from rl.run.report import mean

WINDOW = 5  # steps that a figure is averaged over, and what the first steps are
FAR = 1.0  # KL, nats a token: at most 0.7 in forty runs of the tiny model, 1.4 to 15 in six that fell apart
MISMATCH, WORST_MISMATCH = 0.1, 5.0  # nats a token: fp32 has 1e-6, bf16 0.01 to 0.03; the worst token of a step
STILL, STILL_STEPS = 1e-7, 10  # a KL below, after so many steps with updates: the policy hardly moves


def values(metrics: list[dict], name: str) -> list[float]:
    """What the steps have of a metric, without nan and null; steps of an older version may lack it."""
    return [m[name] for m in metrics if m.get(name) is not None and not math.isnan(m[name])]


def recent(history: list[dict], name: str) -> float:
    """The mean over the last WINDOW steps, nan where there is none: a comparison with nan is false."""
    return mean(values(history[-WINDOW:], name))


def find(history: list[dict], scores: list[Score], completions: list[Completion], config: Config) -> dict[str, str]:
    """What holds after the last step of `history`. scores, completions: of that step."""
    found = _left_out(history, scores) | _sampler(history) | _run_away(history, config)
    repeating = recent(history, "completions/repetitive")
    at_first = mean(values(history[:WINDOW], "completions/repetitive"))
    if repeating > at_first + 0.1:
        found["repetition"] = (
            f"{repeating:.0%} of the completions are long and mostly repeat themselves, {at_first:.0%} did in the first "
            "steps: look in rollouts.jsonl for what pays for it"
        )
    if "kl" not in found:
        found |= _cut(history, config)
    if not found.keys() & {"kl", "all_cut"}:
        found |= _nothing_to_compare(history, scores, completions, config)
    return found | nothing_moves(history, found, config)


def _left_out(history: list[dict], scores: list[Score]) -> dict[str, str]:
    """Completions and updates that took no part."""
    found, now = {}, history[-1]
    if (ungraded := recent(history, "ungraded")) > 0.05:
        found["ungraded"] = (
            f"{ungraded:.0%} of the completions could not be graded and take no part in learning, most often: "
            f"{_commonest_reason(scores, 'ungraded')}"
        )
    failed = [score for score in scores if score.error]
    if now.get("reward_errors") and failed:
        found["reward_errors"] = (
            f"{len(failed)} completions of this step were left out: {' '.join(failed[0].error.split())}"
        )
    if now.get("skipped_updates"):
        skipped, made = (sum(values(history, name)) for name in ("skipped_updates", "updates"))
        found["skipped"] = (
            f"{skipped:.0f} of {skipped + made:.0f} updates so far were skipped, their gradients were NaN or infinite: if it "
            "goes on, lower learning_rate or max_grad_norm, or set dtype to float32 (bfloat16 in place of float16)"
        )
    return found


def _sampler(history: list[dict]) -> dict[str, str]:
    """The sampler gives other probabilities than the trainer."""
    usual, worst = (recent(history, f"sampling/sampling_logp_difference/{kind}") for kind in ("mean", "max"))
    if not (usual > MISMATCH or worst > WORST_MISMATCH):
        return {}
    return {
        "sampler": f"what samples and what is trained differ by {usual:.2g} nats a token ({worst:.2g} at the worst; bf16 alone "
        "makes 0.01 to 0.03), so that another policy is trained than the one that writes: set dtype to float32, or keep "
        "importance_sampling_cap at 2, which bounds the harm"
    }


def _run_away(history: list[dict], config: Config) -> dict[str, str]:
    """The KL from the reference, 0 in the first step, has become too large."""
    if not (far := recent(history, "kl")) > FAR:
        return {}
    stay = f"raise beta (now {config.beta:g})" if config.beta else "set beta (0.01 to 0.04)"
    return {
        "kl": f"the policy has run away from the model it began as: KL {far:.1f} nats a token, and above {FAR:g} most of "
        f"what is written falls apart. Lower learning_rate (now {config.learning_rate:g}), or {stay}, and go back to a checkpoint "
        "from before"
    }


def _cut(history: list[dict], config: Config) -> dict[str, str]:
    """Completions that end at the limit."""
    cut, limit = recent(history, "completions/clipped_ratio"), f"max_completion_length = {config.max_completion_length}"
    if cut == 1 and recent(history, "accuracy") == 0:
        return {
            "all_cut": f"every completion is cut at {limit} and none is right, since no answer is finished: raise it, or "
            "choose a model or questions with shorter answers"
        }
    return {"cut": f"{cut:.0%} of the completions are cut at {limit}: raise it"} if cut > 0.2 else {}


def _nothing_to_compare(
    history: list[dict], scores: list[Score], completions: list[Completion], config: Config
) -> dict[str, str]:
    """Rewards that are all 0; else groups without a difference, and groups with nothing right."""
    last = history[-WINDOW:]
    enough = len(last) == min(WINDOW, config.max_steps)
    example = f"Most often: {_commonest_reason(scores, 'wrong')}. One ends in {completions[0].text[-100:]!r}"

    def always(name, value):
        return values(last, name) == [value] * len(last)

    if always("reward", 0) and always("reward_std", 0) and config.control == "none":
        nothing = (
            f"every reward of the last {len(last)} steps is 0, so there is nothing to learn from: ask easier questions, or "
            f"pay for a part of the way. {example}"
        )
        return {"no_reward": nothing} if enough else {}
    wrong, found = recent(history, "frac_groups_all_wrong"), {}
    if enough and always("frac_reward_zero_std", 1) and config.uses_group and recent(history, "ungraded") != 1:
        right = recent(history, "frac_groups_all_right")
        other = "harder" if right > 0.5 else "easier" if wrong > 0.5 else "other"
        found["dead_groups"] = (
            f"in every group of the last {len(last)} steps all rewards are the same, so all advantages are 0 and nothing is "
            f"learned: try {other} questions, more num_generations, a higher temperature, or dynamic_sampling"
        )
    if wrong > 0.7:
        found["all_wrong"] = (
            f"in {wrong:.0%} of the groups nothing is right: easier questions would teach more. {example}"
        )
    return found


def nothing_moves(history: list[dict], found: dict[str, str], config: Config) -> dict[str, str]:
    """No updates, or updates that leave the LoRA exactly as it was. Where the schedule's learning rate is 0 that is right."""
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
    explained = found.keys() & {"kl", "all_cut", "no_reward", "dead_groups", "reward_errors", "skipped"}
    if any(updates) or warm_up or explained or recent(history, "ungraded") == 1:
        return {}
    settings = {"target_kl": config.target_kl, "mask_truncated_completions": config.mask_truncated_completions}
    suspects = [f"{name} = {value}" for name, value in settings.items() if value]
    return {
        "no_updates": f"no update was made in the last {WINDOW} steps, all advantages are 0 or no completion takes part: look "
        f"at `advantage` in rollouts.jsonl{', and at ' if suspects else ''}{' and '.join(suspects)}"
    }


def hardly_moves(history: list[dict]) -> bool:
    """The policy still writes as it did at the start, after STILL_STEPS steps with updates."""
    steps = sum(1 for m in history if m.get("updates") and m.get("learning_rate"))
    return steps > STILL_STEPS and recent(history, "kl") < STILL


def _commonest_reason(scores: list[Score], verdict: str) -> str:
    """An example of the commonest outcome among the reasons of completions with a verdict."""
    reasons = [reason for score in scores if score.verdict == verdict for reason in score.reasons.values()]
    outcomes = [outcome_of(reason) or reason for reason in reasons]
    if not reasons:
        return "the reward functions give no reason"
    commonest = Counter(outcomes).most_common(1)[0][0]
    return shorten(" ".join(reasons[outcomes.index(commonest)].split()), 200)
