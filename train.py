"""Teach a language model to think: GRPO or PPO on questions whose answers a program can check.

    python train.py                                       the bundled tiny model, configs/tiny.yaml
    python train.py --config FILE --learning-rate 2e-5    another recipe, with settings replaced
    python train.py --eval-only --adapter runs/NAME/checkpoints/step_000045
    python train.py --help                                every setting

Reads top to bottom: settings, rewards and questions are checked first (the policy is not loaded yet), then the policy is
loaded and evaluated, then the loop rolls out, scores, computes advantages, updates, logs, evaluates and saves, then the
policy is evaluated again and its saved LoRA is read back and compared. Everything lands in a run folder (rl/run.py).
"""

import contextlib
import itertools
import math
import random
import sys
import time

from data import DataError, levels, load_questions
from grading import RewardError, check_tests, load_rewards, sandbox
from rl.config import ConfigError
from rl.read_config import read_config


def main(arguments: list[str]) -> None:
    started = time.perf_counter()

    # --- Settings, rewards, questions: what can be wrong with them is found before a model is loaded.
    config, config_name = read_config(arguments, default_file="configs/tiny.yaml")
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)  # its processes are forked while this one is small
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    train_rows, eval_rows, notes = load_questions(
        config.train_data, config.eval_data, config.train_questions, config.eval_questions, config.columns, config.seed
    )
    level_of = levels(train_rows) if config.curriculum_steps else [0] * len(train_rows)
    notes += check_tests(train_rows + eval_rows) + rewards.check(train_rows + eval_rows)
    warnings = []  # in every line of the console
    if "unprotected" in sandbox.available():
        warnings.append("UNSAFE: model-written code runs unprotected")
    if config.control == "random-reward":
        warnings.append("CONTROL: learning from random rewards")

    import torch  # late: --help and the checks above answer at once
    from tqdm import tqdm

    from rl import alarms, report
    from rl.advantages import Advantages, learned_rewards, teaching_groups
    from rl.algorithms import varied_groups
    from rl.critic import Critic
    from rl.evaluate import Marking, evaluate
    from rl.policy import check_model, describe_adapter, load_policy, reloaded_adapter, save_adapter
    from rl.rollout import rollout
    from rl.run import RunFolder, Stopwatch, choose_folder, describe_machine, peak_memory_mb, versions
    from rl.sampler_check import check_sampler
    from rl.sampling import Sampling
    from rl.update import Updater

    check_model(config)
    folder = choose_folder(config, config_name)

    # --- The policy: a model with its LoRA. Its prompts, as token ids.
    policy = load_policy(config)
    trainable, parameters = policy.model.get_nb_trainable_parameters()
    critic = Critic(policy, config) if config.has_critic and not config.eval_only else None
    train_prompts = policy.encode_prompts(train_rows, config.max_completion_length)
    eval_prompts = policy.encode_prompts(eval_rows, config.max_completion_length)
    agreement = check_sampler(policy, train_prompts, config.max_completion_length)
    if policy.own_forward_because:
        notes.append(f"the model's own forward is used, which is slower: {policy.own_forward_because}")
    run = RunFolder(folder, config, rewards.path)
    watch = Stopwatch(started)
    print(f"Ponder on {describe_machine(policy.device)}; everything goes into {run.path}")
    print(f"  model    {config.model}, {parameters:,} parameters, of which {trainable:,} are trained (LoRA)")
    if critic:
        kind = "a LoRA of its own and a value head" if config.critic == "adapter" else "a value head on the policy"
        print(f"  critic   {kind}, {sum(p.numel() for p in critic.parameters):,} parameters, on the same base model")
    print(
        f"  sampler  differs from the trainer by {agreement.sampler:.1g} nats a token (where a LoRA of noise moves "
        f"{agreement.shift:.1f})"
    )
    print(f"  rewards  {', '.join(f'{f.name} {f.weight:g}' for f in rewards.functions if f.weight)}")
    print(f"  asks     {len(train_rows):,} training questions, {len(eval_rows):,} held out")
    if not config.eval_only:
        print(
            f"  plan     {config.max_steps} steps of {config.prompts_per_step} x {config.num_generations} completions"
        )
    for note in [*notes, *config.notes()]:
        print(f"  note     {note}")
    for warning in warnings:
        print(f"  WARNING  {warning}")

    def progress(total, what):
        return tqdm(total=total, desc=what, unit=" completions", leave=False, disable=not sys.stderr.isatty())

    def measure(step, name):
        """Evaluate, write the answers into the run folder, and return them."""
        with watch.time("eval"), run.keeping_failed(rewards), progress(2 * len(eval_rows), "evaluation") as bar:
            answers = evaluate(policy, eval_rows, eval_prompts, rewards, config, step, bar.update)
        run.write_evaluation(name, answers.lines())
        return answers

    summary = {
        "algorithm": config.algorithm, "model": config.model, "steps": 0, "seed": config.seed, "eval": {},
        "control": config.control, "completions": 0, "tokens": 0, "alarms": {}, "versions": versions(),
    }  # fmt: skip

    def write_summary():
        measured = {"seconds": watch.summary(), "peak_memory_mb": peak_memory_mb(policy.device)}
        run.write_summary(summary | measured | {"reward_errors": rewards.errors})

    # --- Before: the same held-out questions that are asked at the end.
    with policy.model.disable_adapter() if config.eval_only else contextlib.nullcontext():
        before = measure(0, "before")
    evaluations, verdicts = {0: before.summary()}, {0: before.verdicts()}  # by step
    summary["eval"]["before"] = evaluations[0]
    write_summary()
    sample = next((i for i, r in enumerate(before.greedy) if r["verdict"] != "right"), 0)
    print(f"\nBefore training, one held-out question:\n{report.dialogue(before.greedy[sample])}\n")

    def finish(after, step):
        """Print the table before and after, with the paired gain, and complete the summary."""
        evaluations[step], verdicts[step] = after.summary(), after.verdicts()
        summary["eval"] |= {"after": evaluations[step], "gain": after.gain_over(before)}
        print(f"\nAfter training, the same question:\n{report.dialogue(after.greedy[sample])}\n")
        print(report.evaluation_table(**summary["eval"]))

    if config.eval_only:
        if config.adapter:
            finish(measure(0, "after"), step=0)
        else:
            print(report.evaluation_table(evaluations[0], None, None))
        return write_summary()

    teacher, updater = Advantages(policy, config, rewards), Updater(policy, config, critic)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    order = endless_order(len(train_rows), config.seed)
    group_size = config.num_generations
    history, trained_steps = [], 0  # metrics of each step

    def ask(n, step):
        """Answer n questions num_generations times each, scoring while the roll-out goes on: episodes, completions, scores."""
        hardest = highest_level(level_of, step, config.curriculum_steps)
        asked = list(itertools.islice((i for i in order if level_of[i] <= hardest), n))
        with watch.time("rollout"), progress(n * group_size, f"step {step}") as bar:
            marking = Marking(policy, [train_rows[i] for i in asked], rewards, step, bar.update)
            episodes = rollout(
                policy, [train_prompts[i] for i in asked], group_size, config.max_completion_length, sampling, generator,
                config.rollout_batch_size, marking.add,
            )  # fmt: skip
        with watch.time("score"), run.keeping_failed(rewards):
            return episodes, *marking.results()

    told = set()

    def tell(kind, found):
        """Print each alarm or note when it first turns up."""
        for subject, text in found.items():
            if subject not in told:
                print(f"  {kind}: {text}", flush=True)
                told.add(subject)

    def find_alarms(completions, scores, step):
        """The alarms that hold, also kept in the summary by the step in which they first did."""
        found = alarms.find(history, verdicts, scores, completions, rewards, config)
        summary["alarms"] = {subject: step for subject in found} | summary["alarms"]
        return found

    def save(step):
        """Save the LoRA as a folder that peft and others load."""
        checkpoint = run.checkpoint_folder(step)
        if not checkpoint.exists():
            save_adapter(policy, checkpoint, *describe(step))
            run.mark_last(checkpoint)
        return checkpoint

    def describe(step):
        """The card and the state of a checkpoint, from what has been evaluated so far."""
        state = {"step": step, "seed": config.seed, "eval": evaluations[max(evaluations)]}
        return report.model_card(config, step, evaluations), state

    try:
        for step in range(1, config.max_steps + 1):
            watch.lap()  # an evaluation is not part of the step after it

            # --- Roll out and score. With dynamic_sampling, new questions make up for groups that cannot teach.
            episodes, completions, scores = ask(config.prompts_per_step, step)
            refills = 0
            while refills < config.dynamic_sampling:
                missing = config.prompts_per_step - sum(teaching_groups(scores, group_size))
                if not missing:
                    break
                more = ask(missing, step)
                episodes, completions, scores = (a + b for a, b in zip((episodes, completions, scores), more))
                refills += 1
            totals = torch.tensor([score.total for score in scores])  # (N,), nan where ungraded
            learned = learned_rewards(totals, episodes, config)  # (N,) less what is taken off for length
            if config.control == "random-reward":  # and nothing else
                learned = torch.where(totals.isnan(), totals, torch.tensor(coin_flips(len(totals), config.seed, step)))

            # --- Advantages: how much better than expected each token is. A critic is asked first what it expects.
            taking_part = range(len(episodes))
            if config.dynamic_sampling:
                teaches = teaching_groups(scores, group_size)
                taking_part = [i for i in taking_part if teaches[i // group_size]]
            learning = [episodes[i] for i in taking_part]
            with watch.time("update"):
                updater.look(learning)
                expected = teacher.fill(
                    learning,
                    learned[list(taking_part)],
                    [completions[i] for i in taking_part],
                    [scores[i] for i in taking_part],
                )

            # --- Update: make the better tokens likelier.
            with watch.time("update"):
                group, inspected = updater.inspect(episodes)  # the one where most is learned, token by token
                updated = updater.update(learning)
            trained_steps = step

            # --- Log.
            summary["steps"] = step
            summary["completions"] += len(episodes)
            summary["tokens"] += sum(len(episode.completion_ids) for episode in episodes)
            metrics = {"step": step, **report.describe_step(completions, scores, rewards, group_size)}
            same = 1 - varied_groups(learned, group_size).float().mean().item() if group_size > 1 else math.nan
            metrics["frac_reward_zero_std"] = same
            if config.dynamic_sampling:
                left_out = (len(episodes) - len(learning)) // group_size
                metrics |= {"dynamic_sampling/refills": refills, "dynamic_sampling/groups_left_out": left_out}
            metrics |= report.describe_tokens(inspected) | expected | updated | watch.lap()
            metrics |= {"num_tokens": summary["tokens"], "peak_memory_mb": peak_memory_mb(policy.device)}
            run.log_rollouts(episodes, completions, scores, None if learned is totals else learned.tolist())
            run.append(
                "tokens.jsonl",
                [{"step": step, "prompt_id": completions[group * group_size].row["id"], "completions": inspected}],
            )

            # --- Evaluate, look for alarms, and save.
            if config.eval_steps and step % config.eval_steps == 0 and step < config.max_steps:
                answers = measure(step, f"step_{step:06d}")
                evaluations[step], verdicts[step] = answers.summary(), answers.verdicts()
                metrics |= {f"eval/{name}": evaluations[step][name] for name in ("accuracy", "accuracy_sampled")}
                write_summary()
            history.append(metrics)
            found = find_alarms(completions, scores, step)
            run.append("metrics.jsonl", [metrics | {"alarms": list(found)}])
            if config.save_steps and step % config.save_steps == 0 and step < config.max_steps:
                save(step)
            if step % config.logging_steps == 0 or step == config.max_steps:
                left = report.seconds_left(step, config, watch.seconds)
                print(report.console_line(metrics, config, left, warnings), flush=True)
            tell("alarm", found)
            tell("note", alarms.notes(history, config))
            if config.log_completions_steps and step % config.log_completions_steps == 0:
                print(report.highest_rewards(step, completions, scores), flush=True)
    except (KeyboardInterrupt, RewardError):
        if trained_steps:
            write_summary()
            print(f"\nStopped. The LoRA as it stands, after {trained_steps} steps: {save(trained_steps)}")
        raise

    # --- After: the LoRA is saved, answers the same questions again, and is read back and compared.
    checkpoint = save(config.max_steps)
    finish(measure(config.max_steps, "after"), config.max_steps)
    tell("alarm", find_alarms(completions, scores, config.max_steps))  # now with the final evaluation
    describe_adapter(checkpoint, *describe(config.max_steps))  # now with the final evaluation
    probes = eval_prompts[:: max(1, len(eval_prompts) // 16)]

    def greedy_answers():
        answers = rollout(
            policy, probes, 1, config.max_completion_length, Sampling(0), generator, config.rollout_batch_size
        )
        return [episode.completion_ids for episode in answers]

    in_memory = greedy_answers()
    with reloaded_adapter(policy, checkpoint):
        if greedy_answers() != in_memory:
            sys.exit(f"error: {checkpoint}, read back, answers otherwise than the policy in memory: do not use it")
    with policy.reference():
        changed = sum(a != b for a, b in zip(in_memory, greedy_answers(), strict=True))
    run.draw_curve(evaluations, history)
    write_summary()
    print(
        f"\nSaved {checkpoint}; read back, it gives the same {len(probes)} of {len(probes)} greedy answers as in memory"
    )
    print(f"and another answer than before training to {changed} of them.")
    if not changed:
        print("  hint: training changed no greedy answer: raise learning_rate or max_steps")
    print(
        f"{summary['completions']:,} completions in {report.clock(watch.summary()['total'])}. Curve: {run.path}/curve.png"
    )
    for warning in warnings:
        print(f"  WARNING  {warning}")
    print(f"Next: python train.py --eval-only --adapter {checkpoint}")


def endless_order(n: int, seed: int):
    """Indices of questions, every epoch in a new order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(n), n)


def highest_level(levels: list[float], step: int, curriculum_steps: int) -> float:
    """The hardest level that is asked in a step: they join one by one over the first `curriculum_steps`, all at 0."""
    known = sorted(set(levels))
    joined = math.ceil(len(known) * min(step / curriculum_steps, 1)) if curriculum_steps else len(known)
    return known[joined - 1]


def coin_flips(n: int, seed: int, step: int) -> list[float]:
    """The rewards of --control random-reward: 0 or 1 with even chances, of no connection with what was written.

    What training on them gains is no skill but an artefact of the model or the algorithm (arXiv 2506.10947).
    """
    rng = random.Random(f"{seed} {step}")
    return [float(rng.getrandbits(1)) for _ in range(n)]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a model may write what a Windows console cannot show
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, RewardError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
