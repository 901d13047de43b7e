"""Teach a language model to think: GRPO on questions whose answers a program can check.

    python train.py                                       the bundled tiny model, configs/tiny.yaml
    python train.py --config FILE --learning-rate 2e-5    another recipe, with settings replaced
    python train.py --eval-only --adapter runs/NAME/checkpoints/step_000040
    python train.py --help                                every setting

Reads top to bottom: settings, rewards and questions are checked first (nothing large is loaded yet), then the policy is
loaded and evaluated, then the loop rolls out, scores, computes advantages, updates, logs, evaluates and saves, then the
policy is evaluated again and its saved LoRA is read back and compared. Everything lands in a run folder (rl/run.py).
"""

import contextlib
import itertools
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

from data import DataError, load_questions
from grading import RewardError, load_rewards
from grading.sandbox import check_tests
from rl.config import ConfigError, read_config

DEFAULT_CONFIG = "configs/tiny.yaml"


def main(arguments: list[str]) -> None:
    # --- Settings, rewards, questions: all that can be wrong is found before a model is loaded.
    config = read_config(arguments, DEFAULT_CONFIG)
    rewards = load_rewards(config.rewards_file, config.reward_funcs, config.reward_weights)
    train_rows, eval_rows, notes = load_questions(
        config.train_data, config.eval_data, config.train_questions, config.eval_questions, config.columns, config.seed
    )
    check_tests(train_rows + eval_rows)
    rewards.check(train_rows + eval_rows)

    import torch
    from tqdm import tqdm

    from rl import algorithms
    from rl.evaluate import evaluate, paired_gain, to_completions
    from rl.policy import check_model, choose_device, load_policy, reloaded_adapter, save_adapter
    from rl.rollout import Sampling, rollout
    from rl.run import RunFolder, Stopwatch, peak_memory_mb, versions
    from rl.update import Updater

    watch = Stopwatch()
    choose_device(config)
    check_model(config)
    run = RunFolder(config, config_name(arguments), rewards.path)

    # --- The policy: a model with its LoRA.
    with watch.time("setup"):
        policy = load_policy(config)
        train_prompts = [policy.encode_prompt(row["prompt"]) for row in train_rows]
        check_lengths(policy, config, train_rows, train_prompts)
        check_lengths(policy, config, eval_rows, [policy.encode_prompt(row["prompt"]) for row in eval_rows])
    parameters = sum(p.numel() for p in policy.model.parameters())
    trainable = sum(p.numel() for p in policy.trainable_parameters())
    print(f"Ponder on {describe(policy.device)}; everything goes into {run.path}")
    print(f"  model    {config.model}: {parameters:,} parameters, {trainable:,} of them trained (LoRA r {config.lora_r})")
    print(f"  rewards  {', '.join(f'{f.name} {f.weight:g}' for f in rewards.functions if f.weight)}")
    print(f"  asks     {len(train_rows):,} training questions, {len(eval_rows):,} held out")
    for note in [*notes, *sampling_warnings(config)]:
        print(f"  note     {note}")
    if not config.eval_only:
        print(
            f"  plan     {config.max_steps} steps of {config.prompts_per_step} questions x {config.num_generations} "
            f"completions; an evaluation every {config.eval_steps or config.max_steps} steps"
        )

    def progress(total, what):
        return tqdm(total=total, desc=what, unit="completions", leave=False, disable=not sys.stderr.isatty())

    def measure(step, name):
        """Evaluate, write the answers, and return them."""
        with watch.time("eval"), progress(2 * len(eval_rows), "evaluation") as bar:
            answers = evaluate(policy, eval_rows, rewards, config, step, bar.update)
        run.write_evaluation(name, answers.lines())
        return answers

    summary = {
        "algorithm": config.algorithm, "loss_type": config.loss_type, "model": config.model, "steps": 0,
        "seed": config.seed, "eval": {}, "completions": 0, "tokens": 0, "versions": versions(),
    }  # fmt: skip

    def write_summary():
        run.write_summary(summary | {"seconds": watch.summary(), "peak_memory_mb": peak_memory_mb()})

    # --- Before: the same held-out questions that are asked at the end.
    with policy.model.disable_adapter() if config.eval_only else contextlib.nullcontext():
        before = measure(0, "before")
    evaluations = {0: before.summary()}
    summary["eval"]["before"] = evaluations[0]
    write_summary()
    sample = next((r for r in before.greedy if r["verdict"] != "right"), before.greedy[0])
    print(f"\nBefore training, one held-out question:\n{dialogue(sample)}\n")
    if config.eval_only:
        after = measure(0, "after") if config.adapter else None
        finish_evaluation(summary, before, after, paired_gain)
        write_summary()
        return

    updater = Updater(policy, config)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    questions = endless_order(len(train_rows), config.seed)
    rewards_by_step, lengths_by_step, hints_given = [], [], set()

    def save(step):
        """Save the LoRA as a folder that peft, vLLM and others load."""
        state = {"step": step, "seed": config.seed, "eval": evaluations[max(evaluations)]}
        checkpoint = run.checkpoint_path(step)
        save_adapter(policy, checkpoint, model_card(config, step, evaluations), state)
        run.mark_last(checkpoint)
        return checkpoint

    step = 0
    try:
        for step in range(1, config.max_steps + 1):
            # --- Roll out: each question is answered num_generations times.
            asked = list(itertools.islice(questions, config.prompts_per_step))
            rows, prompts = [train_rows[i] for i in asked], [train_prompts[i] for i in asked]
            total = len(asked) * config.num_generations
            with watch.time("rollout"), progress(total, f"step {step}") as bar:
                episodes = rollout(
                    policy, prompts, config.num_generations, config.max_completion_length, sampling, generator,
                    config.rollout_batch_size, bar.update,
                )  # fmt: skip

            # --- Score: a program says how good each completion is.
            with watch.time("score"):
                completions = to_completions(policy, episodes, rows, step)
                scores = [rewards.score(completion) for completion in completions]

            # --- Advantages: better or worse than the group's mean.
            totals = torch.tensor([score.total for score in scores])  # (N,), nan where ungraded
            advantages = algorithms.group_advantages(totals, config.num_generations, config.scale_rewards)
            for episode, advantage in zip(episodes, advantages.tolist()):
                episode.advantages = torch.full((len(episode.completion_ids),), advantage)
                episode.in_loss = not (episode.truncated and config.mask_truncated_completions)

            # --- Update: make the better completions likelier.
            with watch.time("update"):
                group = max(range(len(asked)), key=lambda g: advantages[g * config.num_generations :][: config.num_generations].abs().sum())  # noqa: E501
                inspected = updater.inspect(episodes[group * config.num_generations :][: config.num_generations])
                updated = updater.update(episodes)

            # --- Log.
            summary["steps"] = step
            summary["completions"] += len(episodes)
            summary["tokens"] += sum(completion.tokens for completion in completions)
            metrics = {
                "step": step,
                **describe_step(completions, scores, rewards),
                "frac_reward_zero_std": algorithms.groups_without_variance(totals, config.num_generations),
                "kl": mean([value for row in inspected for value in row["kl"]]),
                **updated,
                "num_tokens": summary["tokens"],
            }
            rewards_by_step.append(metrics["reward"])
            lengths_by_step.append(metrics["completions/mean_length"])
            run.log_rollouts(step, episodes, completions, scores)
            run.append("tokens.jsonl", [{"step": step, "prompt_id": rows[group]["id"], "completions": inspected}])
            lap = watch.lap()
            metrics |= lap | {"step_time": sum(lap.values()), "peak_memory_mb": peak_memory_mb()}

            # --- Evaluate and save.
            if config.eval_steps and step % config.eval_steps == 0 and step < config.max_steps:
                evaluations[step] = measure(step, f"step_{step:06d}").summary()
                metrics |= {f"eval/{name}": evaluations[step][name] for name in ("accuracy", "accuracy_sampled")}
                write_summary()
            run.append("metrics.jsonl", [metrics])
            if step % config.logging_steps == 0 or step == config.max_steps:
                print(console_line(metrics, config, watch), flush=True)
            for hint in hints(metrics, scores, completions, config):
                if hint.partition(":")[0] not in hints_given:
                    hints_given.add(hint.partition(":")[0])
                    print(f"  hint: {hint}", flush=True)
            if config.save_steps and step % config.save_steps == 0 and step < config.max_steps:
                save(step)
    except KeyboardInterrupt:
        if summary["steps"]:
            print(f"\nStopped after step {summary['steps']}. Saved {save(summary['steps'])}")
        sys.exit(130)

    # --- After: the same questions again, and the saved LoRA read back from the disk.
    after = measure(config.max_steps, "after")
    evaluations[config.max_steps] = after.summary()
    checkpoint = save(config.max_steps)
    probes = [policy.encode_prompt(row["prompt"]) for row in eval_rows[:: max(1, len(eval_rows) // 16)]]

    def greedy():
        episodes = rollout(
            policy, probes, 1, config.max_completion_length, Sampling(0.0), generator, config.rollout_batch_size
        )
        return [episode.completion_ids for episode in episodes]

    in_memory = greedy()
    with reloaded_adapter(policy, checkpoint):
        if greedy() != in_memory:
            sys.exit(f"error: {checkpoint}, read back, answers differently from the policy in memory: do not use it")
    with policy.reference():
        unchanged = sum(a == b for a, b in zip(in_memory, greedy()))
    run.draw_curve(evaluations, rewards_by_step, lengths_by_step)
    same = next(r for r in after.greedy if r["id"] == sample["id"])
    print(f"\nAfter training, the same question:\n{dialogue(same)}\n")
    finish_evaluation(summary, before, after, paired_gain)
    summary["adapter"] = str(checkpoint)
    write_summary()
    print(f"\nSaved {checkpoint}; read back, it answers {len(probes)} of {len(probes)} questions as in memory, ", end="")
    print(f"{len(probes) - unchanged} of them otherwise than before training.")
    if unchanged == len(probes):
        print("  hint: the LoRA changes nothing: raise learning_rate or max_steps.")
    print(f"Curve: {run.path / 'curve.png'}. {summary['completions']:,} completions in {clock(watch.summary()['total'])}.")
    print(f"Evaluate it again:  python train.py --eval-only --adapter {checkpoint}")


def check_lengths(policy, config, rows, prompts) -> None:
    """Every prompt with a full completion must fit the model's context."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    needed = len(prompts[longest]) + config.max_completion_length
    if policy.context_length and needed > policy.context_length:
        raise ConfigError(
            f"max_completion_length: row {rows[longest]['id']} has {len(prompts[longest])} prompt tokens; with "
            f"{config.max_completion_length} more that is {needed}, but the model's context is {policy.context_length}"
        )


def sampling_warnings(config) -> list[str]:
    """Settings that make the sampling policy another than the trained one."""
    usual = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    changed = [f"{name} {getattr(config, name)}" for name, value in usual.items() if getattr(config, name) != value]
    return [f"{', '.join(changed)}: the policy that samples is not the one that is trained"] if changed else []


def endless_order(n: int, seed: int):
    """Indices of questions: every epoch in a new order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(n), n)


def describe_step(completions, scores, rewards) -> dict[str, float]:
    """Metrics of a step's completions, by TRL's names; accuracy and reward first."""
    totals = [s.total for s in scores if not math.isnan(s.total)]
    metrics = {
        "accuracy": mean([s.is_right for s in scores]),
        "reward": mean(totals),
        "reward_std": std(totals),
        "ungraded": mean([s.verdict == "ungraded" for s in scores]),
    }
    for function in rewards.functions:
        values = [(s.parts if function.weight else s.metrics).get(function.name) for s in scores]
        values = [value for value in values if value is not None]
        name = f"{'rewards' if function.weight else 'metrics'}/{function.name}"
        metrics |= {f"{name}/mean": mean(values), f"{name}/std": std(values)}
    lengths = [c.tokens for c in completions]
    return metrics | {
        "completions/mean_length": mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": mean([c.truncated for c in completions]),
        "completions/thinking": mean([bool(c.thinking) for c in completions]),
    }


def hints(metrics, scores, completions, config):
    """Plain lines about a step that cannot teach: what is wrong and what to try."""
    if metrics["completions/clipped_ratio"] > 0.5:
        yield (
            f"cut short: {metrics['completions/clipped_ratio']:.0%} of the completions reach max_completion_length = "
            f"{config.max_completion_length}: raise it"
        )
    if metrics["accuracy"] == 0:
        reasons = Counter(reason for score in scores for reason in score.reasons.values())
        why = reasons.most_common(1)[0][0] if reasons else "the reward functions give no reason"
        yield f"nothing right: no completion of this step is right; most often: {why}. One of them: {completions[0].text[-120:]!r}"  # noqa: E501
    if metrics["frac_reward_zero_std"] > 0.9:
        kind = "easy" if metrics["accuracy"] > 0.5 else "hard"
        yield f"groups agree: in {metrics['frac_reward_zero_std']:.0%} of the groups all rewards are the same, so there is little to learn: the questions are too {kind}"  # noqa: E501
    if metrics["ungraded"] > 0.05:
        yield f"ungraded: {metrics['ungraded']:.0%} of the completions could not be graded and take no part in learning"
    if metrics["skipped_updates"]:
        yield "skipped update: a gradient was not finite; if it happens again, lower learning_rate"


def console_line(metrics, config, watch) -> str:
    step, remaining = metrics["step"], config.max_steps - metrics["step"]
    seconds = watch.summary()
    per_step = (seconds["total"] - seconds["setup"] - seconds["eval"]) / step
    evals = remaining // config.eval_steps + 1 if config.eval_steps else 1
    done = 1 + (step // config.eval_steps if config.eval_steps else 0)
    held_out = f"  held-out {metrics['eval/accuracy']:4.0%}" if "eval/accuracy" in metrics else ""
    return (
        f"step {step:>{len(str(config.max_steps))}}/{config.max_steps}  accuracy {metrics['accuracy']:4.0%}  "
        f"reward {metrics['reward']:5.2f}  thinks {metrics['completions/thinking']:4.0%}  "
        f"length {metrics['completions/mean_length']:3.0f}  {metrics['step_time']:.1f} s  "
        f"{clock(remaining * per_step + evals * seconds['eval'] / done)} left{held_out}"
    )


def finish_evaluation(summary, before, after, paired_gain) -> None:
    """Put the evaluations into the summary and print them as a table with 95 % intervals."""
    first, last = before.summary(), after.summary() if after else None
    if after:
        gain, sampled = paired_gain(before.greedy, after.greedy), paired_gain(before.sampled, after.sampled)
        summary["eval"] |= {"after": last, "gain": gain | {"accuracy_sampled": sampled["accuracy"], "ci95_sampled": sampled["ci95"]}}  # noqa: E501
    columns = [("before", first)] + ([("after", last)] if last else [])
    print(f"{'held-out questions':<22}{'':>5}" + "".join(f"{name:>33}" for name, _ in columns))
    print(f"{'':<22}{'n':>5}" + f"{'greedy (95 %)':>20}{'sampled':>9}{'':>4}" * len(columns))
    for task in [None, *first["tasks"]]:
        cells = ""
        for _, rates in columns:
            rates = rates["tasks"][task] if task else rates
            low, high = rates["ci95"]
            cells += f"{rates['accuracy']:>8.1%} ({low:.0%} to {high:.0%})".rjust(20) + f"{rates['accuracy_sampled']:>9.1%}    "
        print(f"{task or 'all':<22}{(first['tasks'][task] if task else first)['n']:>5}{cells}")
    for label, name in (("thinks", "thinking"), ("right when it thinks", "accuracy_when_thinking")):
        values = ["-" if rates[name + "_sampled"] is None else f"{rates[name + '_sampled']:.1%}" for _, rates in columns]
        print(f"{label:<27}" + "".join(f"{value:>29}    " for value in values))
    if after:
        low, high = gain["ci95"]
        print(f"gain, greedy: {100 * gain['accuracy']:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f}), ", end="")
        print(f"{gain['fixed']} questions fixed, {gain['broke']} broke")


def dialogue(record) -> str:
    expected = record["expected"]
    expected = "; ".join(expected) if isinstance(expected, list) else expected
    lines = [f"question: {record['question']}", f"answer:   {record['completion']}", f"verdict:  {record['verdict']}"]
    if expected is not None:
        lines[-1] += f" (expected: {expected})"
    return "\n".join("  " + line.replace("\n", "\n            ") for line in lines)


def model_card(config, step, evaluations) -> str:
    first, last = evaluations[0], evaluations[max(evaluations)]
    return (
        f"---\nbase_model: {config.model}\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora, grpo, ponder]\n"
        f"---\n\n# A LoRA for {config.model}, trained by Ponder\n\n"
        f"{config.algorithm.upper()} ({config.loss_type}), step {step}, seed {config.seed}, on "
        f"{', '.join(config.train_data)}.\n\n"
        f"Held-out accuracy, greedy, {first['n']} questions: {first['accuracy']:.1%} before training, "
        f"{last['accuracy']:.1%} at step {max(evaluations)}.\n"
    )


def config_name(arguments) -> str:
    """The name of the config file, for the run folder."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--config"):
            return Path(argument.partition("=")[2] or arguments[i + 1]).stem
    return Path(DEFAULT_CONFIG).stem


def describe(device) -> str:
    import torch

    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GB)"
    return f"{os.cpu_count()} CPU cores"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


def mean(values) -> float:
    return sum(values) / len(values) if values else math.nan


def std(values) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, RewardError) as error:
        sys.exit(f"error: {error}")
