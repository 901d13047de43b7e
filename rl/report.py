"""What the person sees: the console line of a step, hints, the table of an evaluation, and the model card.

Also the metrics of a step's completions, by TRL's names. No torch in here.
"""

import math
from collections import Counter

from rl.config import Config


def describe_step(completions, scores, rewards) -> dict[str, float]:
    """Metrics of a step's completions, by TRL's names; accuracy and reward first. Rates are shares from 0 to 1."""
    totals = [s.total for s in scores if not math.isnan(s.total)]
    metrics = {
        "accuracy": mean([s.is_right for s in scores]),
        "reward": mean(totals),
        "reward_std": standard_deviation(totals),
        "ungraded": mean([s.verdict == "ungraded" for s in scores]),
    }
    for function in rewards.functions:
        values = [(s.parts if function.weight else s.metrics).get(function.name) for s in scores]
        values = [value for value in values if value is not None]
        name = f"{'rewards' if function.weight else 'metrics'}/{function.name}"
        metrics |= {f"{name}/mean": mean(values), f"{name}/std": standard_deviation(values)}
    lengths = [c.tokens for c in completions]
    return metrics | {
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": mean([c.truncated for c in completions]),
        "completions/thinking": mean([bool(c.thinking) for c in completions]),
    }


def describe_tokens(inspected: list[dict]) -> dict[str, float]:
    """Metrics from the one group that was looked at token by token, before its update.

    kl: the mean of k3 against the reference (the update replaces it by that of all completions where beta is set).
    sampling_logp_difference: between the sampler's log-probabilities and the trainer's, which should agree.
    """
    differences = [abs(a - b) for t in inspected for a, b in zip(t["logprobs"], t["sampler_logprobs"])]
    return {
        "kl": mean([kl for t in inspected for kl in t["kl"]]),
        "sampling/sampling_logp_difference/mean": mean(differences),
        "sampling/sampling_logp_difference/max": max(differences),
    }


def hints(metrics: dict, scores, completions, config: Config) -> dict[str, str]:
    """Plain lines about a step that cannot teach, by subject: what is wrong and what to try."""
    found = {}
    cut, same = metrics["completions/clipped_ratio"], metrics["frac_reward_zero_std"]
    if cut > 0.5:
        found["cut"] = (
            f"{cut:.0%} of the completions are cut at max_completion_length = {config.max_completion_length}: raise it"
        )
    if metrics["accuracy"] == 0:
        reasons = Counter(reason for score in scores for reason in score.reasons.values())
        why = reasons.most_common(1)[0][0] if reasons else "the reward functions give no reason"
        found["wrong"] = f"nothing is right in this step; most often: {why}. One ends in {completions[0].text[-100:]!r}"
    if same > 0.9:
        kind = "easy" if metrics["accuracy"] > 0.5 else "hard"
        found["same"] = (
            f"in {same:.0%} of the groups all rewards are the same, so there is little to learn: the questions are too {kind}"
        )
    if metrics["ungraded"] > 0.05:
        found["ungraded"] = (
            f"{metrics['ungraded']:.0%} of the completions could not be graded and take no part in learning"
        )
    if metrics["skipped_updates"]:
        found["skipped"] = "an update was skipped, its gradient was not finite: if it goes on, lower learning_rate"
    return found


def console_line(metrics: dict, config: Config, seconds_left: float) -> str:
    """One readable line a step, accuracy and reward first."""
    held_out = f"  held-out {metrics['eval/accuracy']:4.0%}" if "eval/accuracy" in metrics else ""
    return (
        f"step {metrics['step']:>{len(str(config.max_steps))}}/{config.max_steps}  accuracy {metrics['accuracy']:4.0%}  "
        f"reward {metrics['reward']:5.2f}  thinks {metrics['completions/thinking']:4.0%}  "
        f"length {metrics['completions/mean_length']:3.0f}  {metrics['step_time']:4.1f} s  "
        f"{clock(seconds_left)} left{held_out}"
    )


def seconds_left(step: int, config: Config, seconds: dict[str, float]) -> float:
    """An estimate from what the steps and evaluations so far have taken. seconds: by part of the run."""
    steps_left = config.max_steps - step
    per_step = (seconds["rollout"] + seconds["score"] + seconds["update"]) / step
    evaluations = 1 + (step // config.eval_steps if config.eval_steps else 0)
    evaluations_left = max(1, math.ceil(steps_left / config.eval_steps)) if config.eval_steps else 1
    return steps_left * per_step + evaluations_left * seconds["eval"] / evaluations


def evaluation_table(before: dict, after: dict | None, gain: dict | None) -> str:
    """The table of accuracies with 95 % intervals, before and after, over all questions and by task."""
    columns = [("before", before)] + ([("after", after)] if after else [])
    lines = [
        f"{'held-out questions':<22}{'':>5}" + "".join(f"{name:>33}" for name, _ in columns),
        f"{'':<22}{'n':>5}" + f"{'greedy (95 %)':>23}{'sampled':>10}" * len(columns),
    ]
    for task in ["all", *before["tasks"]]:
        cells = ""
        for _, summary in columns:
            rates = summary if task == "all" else summary["tasks"][task]
            low, high = rates["ci95"]
            greedy = f"{rates['accuracy']:.1%} ({low:.0%} to {high:.0%})"
            cells += f"{greedy:>23}{rates['accuracy_sampled']:>10.1%}"
        lines.append(f"{task:<22}{(before if task == 'all' else before['tasks'][task])['n']:>5}{cells}")
    for label, name in (("thinks", "thinking_sampled"), ("right when it thinks", "accuracy_when_thinking_sampled")):
        values = ["-" if rates[name] is None else f"{rates[name]:.1%}" for _, rates in columns]
        lines.append(f"{label:<27}" + "".join(f"{value:>33}" for value in values))
    if gain:
        low, high = gain["ci95"]
        lines.append(
            f"gain, greedy: {100 * gain['accuracy']:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f}), "
            f"{gain['fixed']} questions fixed, {gain['broke']} broke"
        )
    return "\n".join(lines)


def dialogue(record: dict) -> str:
    """One answered question, indented."""
    expected = record["expected"]
    verdict = record["verdict"]
    if expected is not None:
        verdict += f" (expected: {'; '.join(map(str, expected)) if isinstance(expected, list) else expected})"
    lines = [f"question: {record['question']}", f"answer:   {record['completion']}", f"verdict:  {verdict}"]
    return "\n".join("  " + line.replace("\n", "\n            ") for line in lines)


def model_card(config: Config, step: int, evaluations: dict[int, dict]) -> str:
    """README.md of a saved adapter. evaluations: summaries by step."""
    first, last = evaluations[0], evaluations[max(evaluations)]
    return f"""\
---
base_model: {config.model}
library_name: peft
pipeline_tag: text-generation
tags: [lora, {config.algorithm}, ponder]
---

# A LoRA for {config.model}, trained by Ponder

{config.algorithm.upper()} ({config.loss_type}), step {step}, seed {config.seed}, on {", ".join(config.train_data)}.

Held-out accuracy, greedy, {first["n"]} questions: {first["accuracy"]:.1%} before training, {last["accuracy"]:.1%} at step
{max(evaluations)}.
"""


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


def standard_deviation(values) -> float:
    """With n - 1; 0 for fewer than two values."""
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
