"""What the person sees: the console line of a step, its best completions, an evaluation's table, and the model card.

Also the metrics of a step's completions, by TRL's names. No torch in here.
"""

import math
import shlex
import unicodedata
from pathlib import Path

from grading import Completion, Rewards, Score, outcome_of, outcome_shares
from rl.config import Config

LONG_TOKENS, N_GRAM = 64, 8  # repetition is looked for in completions this long, by runs of so many tokens


def describe_step(
    completions: list[Completion], scores: list[Score], rewards: Rewards, group_size: int
) -> dict[str, float]:
    """Metrics of a step's completions, by TRL's names; accuracy and reward first. Rates are shares from 0 to 1.

    shaping: what of the reward comes from functions other than those that say right or wrong; shaping_when_wrong: the
    same of wrong completions alone.
    """
    totals = [s.total for s in scores if not math.isnan(s.total)]
    metrics = {
        "accuracy": mean([s.is_right for s in scores]),
        "reward": mean(totals),
        "reward_std": standard_deviation(totals),
        "shaping": mean([s.total - judged_part(s, rewards) for s in scores if not math.isnan(s.total)]),
        "shaping_when_wrong": mean([s.total - judged_part(s, rewards) for s in scores if s.verdict == "wrong"]),
        "ungraded": mean([s.verdict == "ungraded" for s in scores]),
        "reward_errors": sum("reward_error" in map(outcome_of, s.reasons.values()) for s in scores),
    }
    for kind, of in (("rewards", lambda score: score.parts), ("metrics", lambda score: score.metrics)):
        for name in dict.fromkeys(name for score in scores for name in of(score)):
            values = [of(score)[name] for score in scores if of(score).get(name) is not None]
            metrics[f"{kind}/{name}/mean"], metrics[f"{kind}/{name}/std"] = mean(values), standard_deviation(values)
    groups = [{s.verdict for s in scores[i : i + group_size]} - {"ungraded"} for i in range(0, len(scores), group_size)]
    lengths = [c.tokens for c in completions]
    return metrics | {
        "frac_groups_all_wrong": mean([verdicts == {"wrong"} for verdicts in groups]) if group_size > 1 else math.nan,
        "frac_groups_all_right": mean([verdicts == {"right"} for verdicts in groups]) if group_size > 1 else math.nan,
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": mean([c.truncated for c in completions]),
        "completions/thinking": mean([bool(c.thinking) for c in completions]),
        "completions/repetitive": mean([is_repetitive(c.token_ids) for c in completions]),
        **outcome_shares(scores),
    }


def judged_part(score: Score, rewards: Rewards) -> float:
    """What of a completion's reward comes from the function that gave the verdict, and from other graders."""
    return sum(
        f.weight * (score.parts.get(f.name) or 0.0)
        for f in rewards.functions
        if f.name == score.judge or outcome_of(score.reasons.get(f.name, ""))
    )


def is_repetitive(token_ids: list[int]) -> bool:
    """Whether a completion is long and more than half of its runs of N_GRAM tokens stood in it before."""
    if len(token_ids) < LONG_TOKENS:
        return False
    runs = list(zip(*(token_ids[i:] for i in range(N_GRAM))))
    return len(set(runs)) < len(runs) / 2


def describe_tokens(inspected: list[dict]) -> dict[str, float]:
    """Metrics from the one group that was looked at token by token, before its update.

    kl: the mean of k3 against the reference. sampling_logp_difference: between the sampler's log-probabilities and the
    trainer's, which should agree. The update replaces them by those of all completions that it trains on: kl where beta is
    set, the difference in bf16 and fp16.
    """
    differences = [abs(a - b) for t in inspected for a, b in zip(t["logprobs"], t["sampler_logprobs"])]
    return {
        "kl": mean([kl for t in inspected for kl in t["kl"]]),
        "sampling/sampling_logp_difference/mean": mean(differences),
        "sampling/sampling_logp_difference/max": max(differences),
    }


def console_line(metrics: dict, config: Config, seconds_left: float, warnings: list[str]) -> str:
    """One readable line a step, accuracy and reward first. warnings: what nobody may forget about the run."""
    held_out = f"  held-out {metrics['eval/accuracy']:4.0%}" if "eval/accuracy" in metrics else ""
    return (
        f"step {metrics['step']:>{len(str(config.max_steps))}}/{config.max_steps}  accuracy {metrics['accuracy']:4.0%}  "
        f"reward {metrics['reward']:5.2f}  thinks {metrics['completions/thinking']:4.0%}  "
        f"length {metrics['completions/mean_length']:3.0f}  {metrics['step_time']:4.1f} s  "
        f"{clock(seconds_left)} left{held_out}{''.join('  ' + warning for warning in warnings)}"
    )


def highest_rewards(step: int, completions: list[Completion], scores: list[Score]) -> str:
    """The two completions of a step with the highest reward, of different texts, and what each reward made of them."""
    ranked = [i for i, score in enumerate(scores) if not math.isnan(score.total)]
    best = {}  # by text, the first of equals
    for i in sorted(ranked, key=lambda i: -scores[i].total):
        best.setdefault(completions[i].text, i)
    lines = [f"  highest rewards of step {step}:"]
    for i in list(best.values())[:2]:
        completion, score = completions[i], scores[i]
        parts = ", ".join(f"{name} {value:g}" for name, value in score.parts.items() if value is not None)
        lines.append(f"    {score.total:.2f} ({parts}), {score.verdict}, {completion.tokens} tokens")
        for label, text in (("question", completion.prompt), ("answer", completion.text)):
            if len(text) > 500:
                text = f"{text[:250]} [...] {text[-250:]}"
            lines.append(f"      {label + ':':<10}" + printable(text).replace("\n", "\n" + 16 * " "))
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text for a terminal: what a model writes may hold control characters, which are left out, lines excepted."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")


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
    return "\n".join("  " + printable(line).replace("\n", "\n            ") for line in lines)


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

{config.algorithm.upper()}{"" if config.algorithm == "dpo" else f" (loss_type {config.loss_type})"}, step {step}, seed {config.seed}, on {", ".join(config.train_data)}.

Held-out accuracy, greedy, {first["n"]} questions: {first["accuracy"]:.1%} before training, {last["accuracy"]:.1%} at step
{max(evaluations)}.
"""


def opening(config, machine: str, run: Path, policy, critic, agreement, rewards: Rewards, asked, resumed: int) -> str:
    """What is said before a run. asked: how many questions to train on, and held out. resumed: the step that it goes on after."""
    trainable, parameters = policy.model.get_nb_trainable_parameters()
    lines = [f"Ponder on {machine}; everything goes into {run}"]
    through = " through Unsloth" if policy.by_unsloth else ""
    lines.append(
        f"model    {config.model}{through}, {parameters:,} parameters, of which {trainable:,} are trained (LoRA)"
    )
    if critic:
        kind = "a LoRA of its own and a value head" if config.critic == "adapter" else "a value head on the policy"
        size = sum(p.numel() for p in critic.parameters)
        lines.append(f"critic   {kind}, {size:,} parameters, on the same base model")
    lines.append(
        f"sampler  differs from the trainer by {agreement.sampler:.1g} nats a token (where a LoRA of noise moves "
        f"{agreement.shift:.1f})"
    )
    lines.append(f"rewards  {', '.join(f'{f.name} {f.weight:g}' for f in rewards.functions if f.weight)}")
    lines.append(f"asks     {asked[0]:,} training questions, {asked[1]:,} held out")
    if not config.eval_only:
        lines.append(
            f"plan     {config.max_steps} steps of {config.prompts_per_step} x {config.num_generations} completions"
        )
    if config.resume:
        lines.append(f"resumed  after step {resumed}" if resumed else "resumed  from the beginning: no step was saved")
    return "\n  ".join(lines)


def next_steps(run: Path, checkpoint: Path) -> str:
    """What can be done with a run that has ended."""
    folder = "" if run.parent == Path("runs") else f" --runs {shlex.quote(str(run.parent))}"
    commands = {
        f"python ui/app.py{folder}": "a page in the browser: chat with the model before and after",
        f"python train.py --eval-only --adapter {shlex.quote(str(checkpoint))}": "ask it the held-out questions again",
        f"python export.py {shlex.quote(str(run))}": "take the model away: for transformers, vLLM, llama.cpp, Ollama",
        "python train.py --config auto": "the largest recipe that this machine has room for",
    }
    width = max(map(len, commands))
    return "Next:\n" + "\n".join(f"  {command:{width}}   {what}" for command, what in commands.items())


def stopped(step: int, max_steps: int, last: Path | None, run: Path) -> str:
    """What is said where a run ends before its time. last: its newest checkpoint."""
    saved = f"{last} is saved" if last else "no step was saved"
    return f"\nStopped after step {step} of {max_steps}; {saved}. To go on: python train.py --resume {shlex.quote(str(run))}"


def memory(figures: dict[str, float | None]) -> str:
    """Peak measured and predicted, MB, as they stand in the summary."""
    measured, predicted = figures["measured_mb"], figures["predicted_mb"]
    text = "not measured on this system" if measured is None else f"{measured:,.0f} MB at the most"
    if predicted is None:
        return f"{text}; not predicted for this architecture"
    return f"{text}, {predicted:,.0f} MB predicted" + (f" ({predicted / measured - 1:+.0%})" if measured else "")


def probed(config: Config, history: list[dict], seconds: dict[str, float], questions: int, figures: dict) -> str:
    """What --probe has found. history: metrics of its steps. seconds: by part of the run. questions: evaluated each time.
    figures: of the memory."""
    last = history[-1]
    parts = ", ".join(f"{part} {last[f'time/{part}']:.1f}" for part in ("rollout", "score", "update"))
    evaluations = 2 + ((config.max_steps - 1) // config.eval_steps if config.eval_steps else 0)
    evaluation = seconds["eval"] / questions * config.eval_questions
    whole = seconds["setup"] + last["step_time"] * config.max_steps + evaluation * evaluations
    halved = f"rollout_batch_size {config.rollout_batch_size}, max_tokens_per_micro_batch {config.max_tokens_per_micro_batch}"
    return f"""
Probed: {len(history)} steps, nothing is kept.
  a step   {last["step_time"]:.1f} s ({parts}), completions of {last["completions/mean_length"]:.0f} tokens; longer ones take longer
  a run    about {clock(whole)}: {config.max_steps} steps and {evaluations} evaluations of about {clock(evaluation)}
  memory   {memory(figures)}
  fits     {halved}"""


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


def standard_deviation(values) -> float:
    """With n - 1; 0 for fewer than two values."""
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
