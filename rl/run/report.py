"""Texts for the user of a run: header, console line, completions, evaluation table, closing messages, model card, plot.

Imports no torch.
"""

import math
import shlex
import unicodedata
from pathlib import Path

from grading import Rewards, sandbox
from rl.config import Config


def console_line(metrics: dict, config: Config, seconds_left: float, warnings: list[str]) -> str:
    """Return the console line of a step. warnings: texts from `run_warnings`, repeated in every line."""
    held_out = f"  held-out accuracy {metrics['eval/accuracy']:4.0%}" if "eval/accuracy" in metrics else ""
    return (
        f"step {metrics['step']:>{len(str(config.max_steps))}}/{config.max_steps}  "
        f"accuracy {metrics['accuracy']:4.0%}  reward {metrics['reward']:5.2f}  "
        f"thinking {metrics['completions/thinking']:4.0%}  length {metrics['completions/mean_length']:3.0f} tokens  "
        f"time {metrics['step_time']:4.1f} s  "
        f"{clock(seconds_left)} left{held_out}{''.join('  ' + warning for warning in warnings)}"
    )


def highest_rewards(step: int, episodes: list) -> str:
    """Return the two different completions of a step with the highest rewards, with the reward of each function."""
    graded = [episode for episode in episodes if not math.isnan(episode.score.total)]
    best = {}  # by text; of equal texts, the first
    for episode in sorted(graded, key=lambda episode: -episode.score.total):
        best.setdefault(episode.completion.text, episode)
    lines = [f"  highest rewards of step {step}:"]
    for episode in list(best.values())[:2]:
        completion = episode.completion
        score = episode.score
        parts = ", ".join(f"{name} {value:g}" for name, value in score.parts.items() if value is not None)
        lines.append(f"    {score.total:.2f} ({parts}), {score.verdict}, {completion.tokens} tokens")
        turns = [{"text": turn.text, "reply": turn.reply} for turn in completion.turns]
        answer = transcript({"completion": completion.text, "turns": turns})
        for label, text in (("question", completion.prompt), ("answer", answer)):
            if len(text) > 500:
                text = f"{text[:250]} [...] {text[-250:]}"
            lines.append(f"      {label + ':':<10}" + printable(text).replace("\n", "\n" + 16 * " "))
    return "\n".join(lines)


def printable(text: str) -> str:
    """Remove control characters except line feeds, so that model output cannot control the terminal."""
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")


def seconds_left(step: int, config: Config, seconds: dict[str, float]) -> float:
    """Estimate the remaining time of the run. seconds: the time spent so far in `rollout`, `update` and `eval`."""
    steps_left = config.max_steps - step
    per_step = (seconds["rollout"] + seconds["update"]) / step
    evaluations = 1 + (step // config.eval_steps if config.eval_steps else 0)
    evaluations_left = max(1, math.ceil(steps_left / config.eval_steps)) if config.eval_steps else 1
    return steps_left * per_step + evaluations_left * seconds["eval"] / evaluations


def evaluation_table(evaluations: dict) -> str:
    """Return a table of the accuracies with 95% confidence intervals, overall and by task, and the gains.

    evaluations: `eval` of summary.json: `before`, and if they exist, `cold_start`, `after` and the gains.
    """
    columns = {name: evaluations[name] for name in ("before", "cold_start", "after") if name in evaluations}
    before = columns["before"]
    lines = [
        f"{'held-out questions':<22}{'':>5}" + "".join(f"{name.replace('_', ' '):>33}" for name in columns),
        f"{'':<22}{'n':>5}" + f"{'greedy (95% CI)':>23}{'sampled':>10}" * len(columns),
    ]
    for task in ["all", *before["tasks"]]:
        cells = ""
        for summary in columns.values():
            rates = summary if task == "all" else summary["tasks"][task]
            low, high = rates["ci95"]
            greedy = f"{rates['accuracy']:.1%} ({low:.0%} to {high:.0%})"
            cells += f"{greedy:>23}{rates['accuracy_sampled']:>10.1%}"
        lines.append(f"{task:<22}{(before if task == 'all' else before['tasks'][task])['n']:>5}{cells}")
    for label, name in (("thinking", "thinking_sampled"), ("accuracy when thinking", "accuracy_when_thinking_sampled")):
        values = ["-" if rates[name] is None else f"{rates[name]:.1%}" for rates in columns.values()]
        lines.append(f"{label:<27}" + "".join(f"{value:>33}" for value in values))
    for name, label in (("gain", "gain"), ("gain_over_cold_start", "over the cold start")):
        if gain := evaluations.get(name):
            lines.append(f"{label}, greedy: {describe_gain(gain)}")
    return "\n".join(lines)


def describe_gain(gain: dict) -> str:
    """Describe a paired gain (rl.evaluate.paired_gain) with its 95% confidence interval."""
    low, high = gain["ci95"]
    return (
        f"{100 * gain['accuracy']:+.1f} points (95% CI {100 * low:+.1f} to {100 * high:+.1f}), "
        f"{gain['fixed']} questions fixed, {gain['broke']} broken"
    )


def format_answer(record: dict) -> str:
    """Return one question with its answer and verdict as indented lines."""
    expected = record["expected"]
    verdict = record["verdict"]
    if expected is not None:
        verdict += f" (expected: {'; '.join(map(str, expected)) if isinstance(expected, list) else expected})"
    lines = [f"question: {record['question']}", f"answer:   {transcript(record)}", f"verdict:  {verdict}"]
    return "\n".join("  " + printable(line).replace("\n", "\n            ") for line in lines)


def transcript(record: dict) -> str:
    """Return the text of a completion, of an episode all turns, with the environment's replies in lines after "> "."""
    lines = []
    for turn in record.get("turns") or [{"text": record["completion"], "reply": ""}]:
        lines.append(turn["text"])
        lines += [f"> {line}" for line in turn["reply"].splitlines()]
    return "\n".join(lines)


def model_card(config: Config, step: int, base, evaluations: dict) -> str:
    """Return the README.md of a saved adapter. base: the evaluation before any training. evaluations: the others by step."""
    last = max(evaluations)
    cold_start = f", after a cold start on {config.sft_data}" if config.sft_data else ""
    loss = "" if config.algorithm == "dpo" else f" (loss_type {config.loss_type})"
    return f"""\
---
base_model: {config.model}
library_name: peft
pipeline_tag: text-generation
tags: [lora, {config.algorithm}, ponder]
---

# LoRA for {config.model}, trained with Ponder

Training: {config.algorithm.upper()}{loss}, step {step}, seed {config.seed}, on {", ".join(config.train_data)}{cold_start}.

Held-out accuracy (greedy, {len(base.greedy)} questions): {base.accuracy:.1%} before training,
{evaluations[last].accuracy:.1%} at step {last}.
"""


def describe_model(config: Config, policy, critic) -> list[str]:
    """Return the lines of the run header that describe the policy and the critic."""
    trainable, parameters = policy.model.get_nb_trainable_parameters()
    backend = " (Unsloth)" if policy.uses_unsloth else ""
    lines = [
        f"model    {config.model}{backend}, {parameters:,} parameters, of which {trainable:,} are trainable (LoRA)"
    ]
    if critic:
        kind = "separate LoRA with a value head" if config.critic == "adapter" else "value head on the policy"
        size = sum(p.numel() for p in critic.parameters)
        lines.append(f"critic   {kind}, {size:,} parameters, on the same base model")
    return lines


def model_notes(policy) -> list[str]:
    """Return notes about the model: a slow forward pass, experts that are not trained, an incomplete chat template."""
    notes = []
    if policy.fallback_reason:
        notes.append(f"falling back to the model's own forward pass, which is slower: {policy.fallback_reason}")
    experts = sum(p.numel() for p in untrained_experts(policy.model))
    if experts:
        share = experts / policy.model.get_nb_trainable_parameters()[1]
        dtype = str(policy.dtype).removeprefix("torch.")
        notes.append(
            f"the experts ({share:.0%} of the weights) get no LoRA and stay in {dtype}, with load_in_4bit too; "
            "the other linear layers are trained"
        )
    tokenizer = policy.tokenizer
    if tokenizer.chat_template and not has_generation_prompt(tokenizer):
        notes.append(
            "the chat template adds no generation prompt, so each completion begins with the marks of an answer"
        )
    return notes


def untrained_experts(model) -> list:
    """Return the weights of experts that have no LoRA: those of some families are not in linear layers."""
    return [
        p
        for name, p in model.named_parameters()
        if not ("lora_" in name or "base_layer" in name or "conv" in name)
        and (p.dim() == 3 or ("experts" in name and not name.endswith(("weight", "bias"))))
    ]


def has_generation_prompt(tokenizer) -> bool:
    """Return whether the chat template ends a prompt with the beginning of an answer, or cannot render a question."""
    messages = [{"role": "user", "content": "?"}]
    try:
        texts = {
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=flag)
            for flag in (True, False)
        }
    except Exception:  # a template may raise anything; encoding the prompts reports it
        return True
    return len(texts) == 2


def run_header(
    config: Config,
    machine: str,
    folder: Path,
    policy,
    critic,
    agreement,
    rewards: Rewards,
    num_questions: tuple[int, int],
    resumed_step: int | None,
) -> str:
    """Return the text to print before training.

    num_questions: of the training and of the held-out questions. resumed_step: of the checkpoint to resume from, if any.
    """
    weights = ", ".join(f"{f.name} (weight {f.weight:g})" for f in rewards.functions if f.weight)
    lines = [
        f"Ponder on {machine}, run folder {folder}",
        *describe_model(config, policy, critic),
        f"sampler  differs from the trainer by {agreement.sampler:.1g} nats per token "
        f"(a random LoRA shifts log-probs by {agreement.shift:.1f})",
        f"rewards  {weights}",
        f"data     {num_questions[0]:,} train / {num_questions[1]:,} eval questions",
    ]
    if not config.eval_only:
        size = f"{config.prompts_per_step} questions x {config.num_generations}"
        lines.append(f"plan     {config.max_steps} steps of {size} completions")
    if config.resume:
        start = "the start, because no checkpoint was saved" if resumed_step is None else f"step {resumed_step}"
        lines.append(f"resumed  from {start}")
    return "\n  ".join(lines)


def next_steps(run: Path, checkpoint: Path) -> str:
    """Return the commands to run after training."""
    folder = "" if run.parent == Path("runs") else f" --runs {shlex.quote(str(run.parent))}"
    adapter = shlex.quote(str(checkpoint))
    commands = {
        f"python ui/app.py{folder}": "open the web page: chat with the model before and after training",
        f"python train.py --eval-only --adapter {adapter}": "evaluate it again on the held-out questions",
        f"python export.py {shlex.quote(str(run))}": "export the model for transformers, vLLM, llama.cpp or Ollama",
        "python train.py --config auto": "train with the largest recipe that fits this machine",
    }
    width = max(map(len, commands))
    return "Next:\n" + "\n".join(f"  {command:{width}}   {purpose}" for command, purpose in commands.items())


def stop_message(step: int, max_steps: int, last: Path | None, run: Path) -> str:
    """Return the message for a run that stops early. step: the last completed step. last: the newest checkpoint."""
    saved = f"Checkpoint: {last}" if last else "No checkpoint was saved"
    command = f"python train.py --resume {shlex.quote(str(run))}"
    return f"\nStopped after step {step} of {max_steps}. {saved}. To resume: {command}"


def describe_memory(figures: dict[str, float | None]) -> str:
    """Return the measured and the predicted peak memory in MB. figures: from `MemoryUse.figures`."""
    measured = figures["measured_mb"]
    predicted = figures["predicted_mb"]
    text = "not measured on this system" if measured is None else f"{measured:,.0f} MB measured"
    if predicted is None:
        return f"{text}; not predicted for this architecture"
    return f"{text}, {predicted:,.0f} MB predicted" + (f" ({predicted / measured - 1:+.0%})" if measured else "")


def clock(seconds: float) -> str:
    """Return a duration as minutes:seconds, or as hours and minutes from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


def draw_curve(path: Path, evaluations: dict, history: list[dict]) -> None:
    """Plot held-out accuracy with its confidence intervals, thinking, reward and completion length, each by step.

    evaluations: the evaluations (rl.evaluate.Evaluation) by step. history: the metrics of each step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    steps = list(evaluations)
    summaries = [evaluation.summary() for evaluation in evaluations.values()]
    for name, label in (("accuracy", "accuracy (greedy)"), ("accuracy_sampled", "accuracy (sampled)")):
        interval = name.replace("accuracy", "ci95")
        left.plot(steps, [100 * summary[name] for summary in summaries], "o-", label=label)
        low = [100 * summary[interval][0] for summary in summaries]
        high = [100 * summary[interval][1] for summary in summaries]
        left.fill_between(steps, low, high, alpha=0.15)
    left.plot(steps, [100 * summary["thinking_sampled"] for summary in summaries], "--", c="grey", label="thinking")
    left.set(title="held-out questions", ylabel="%", ylim=(-2, 102))
    left.legend(loc="lower right")
    steps = [metrics["step"] for metrics in history]
    middle.plot(steps, [metrics["reward"] for metrics in history])
    middle.set(title="reward (training completions)")
    right.plot(steps, [metrics["completions/mean_length"] for metrics in history])
    right.set(title="length (training completions)", ylabel="tokens")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=110)
    unfinished.replace(path)
    pyplot.close(figure)


def run_warnings(config: Config) -> list[str]:
    """Return the warnings about a run, which are printed at its start and end and in every console line."""
    warnings = []
    if "unprotected" in sandbox.available():
        warnings.append("UNSAFE: model-written code runs without a sandbox")
    if config.control == "random-reward":
        warnings.append("CONTROL: learning from random rewards")
    return warnings
