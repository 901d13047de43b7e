"""Teach a language model to think: GRPO or PPO on questions whose answers a program can check.

    python train.py                                       the bundled tiny model, configs/tiny.yaml
    python train.py --config FILE --learning-rate 2e-5    another recipe, with settings replaced
    python train.py --config auto                         the largest recipe that this machine has room for
    python train.py --dry-run --gpu-memory 12             does it fit? and what to change if not; loads nothing
    python train.py --probe                               two steps of it: seconds and memory, measured
    python train.py --resume runs/NAME                    go on with a run that was stopped
    python train.py --eval-only --adapter runs/NAME/checkpoints/step_000045
    python train.py --help                                every setting

Reads top to bottom: settings, rewards and questions are checked first (the policy is not loaded yet), then the policy is
loaded and evaluated, then the loop rolls out, scores, computes advantages, updates, logs, evaluates and saves, then the
policy is evaluated again and its saved LoRA is read back and compared. Everything lands in a run folder (rl/run/folder.py).
"""

import contextlib
import dataclasses
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from data import DataError, QuestionSampler, load_questions, local_prompts
from grading import RewardError, check_tests, load_rewards, preflight, sandbox
from rl.config import COMMANDS, ConfigError, RunError
from rl.fit.memory import dry_run
from rl.run.process import Stopping
from rl.run.read_config import read_config

PROBE_STEPS, PROBE_QUESTIONS = 2, 16  # of --probe, and how many held-out questions it answers


def main(arguments: list[str]) -> None:
    with Stopping() as stopping, contextlib.ExitStack() as at_end:
        train(arguments, stopping, at_end)


def train(arguments: list[str], stopping: Stopping, at_end: contextlib.ExitStack) -> None:
    started = time.perf_counter()

    # --- Settings, rewards, questions: what can be wrong with them is found before a model is loaded.
    config, config_name = read_config(arguments, default_file="configs/tiny.yaml")
    if config.dry_run:
        return print(dry_run(config, prompts=local_prompts(config.train_data, config.eval_data, config.columns)))
    asked_for = {name: value for name, value in dataclasses.asdict(config).items() if name not in COMMANDS}
    asked_for |= {"output_dir": None}  # so that it can be used as a config again
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)  # its processes are forked while this one is small
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    train_rows, eval_rows, notes = load_questions(config)
    places = [SimpleNamespace(row=row, place=place) for place, row in enumerate(train_rows)]
    order = QuestionSampler(places, config.curriculum_steps, config.seed)
    notes += check_tests(train_rows + eval_rows) + preflight(rewards, train_rows + eval_rows)
    warnings = []  # in every line of the console
    if "unprotected" in sandbox.available():
        warnings.append("UNSAFE: model-written code runs unprotected")
    if config.control == "random-reward":
        warnings.append("CONTROL: learning from random rewards")

    from rl.model.backends import describe_precision, import_backend  # late: --help and the checks above answer at once

    notes += import_backend(config)  # Unsloth has to come before transformers
    import torch
    from tqdm import tqdm

    from rl.advantages import Advantages, learned_rewards, teaching_groups
    from rl.algorithms import varied_groups
    from rl.checks import check_sampler, rehearse
    from rl.critic import Critic
    from rl.evaluate import best_of, check_saved, evaluate, marked_rollout
    from rl.model.oom import HALVED
    from rl.model.policy import check_model, load_policy, restore_adapter
    from rl.model.sampling import Sampling
    from rl.run import alarms, report
    from rl.run.checkpoint import Position, fingerprint, made_with, seed_all
    from rl.run.folder import (
        MemoryUse,
        RunFolder,
        Stopwatch,
        choose_folder,
        describe_machine,
        peak_memory_mb,
        versions,
    )
    from rl.run.trackers import Trackers
    from rl.update import Updater

    check_model(config)
    if config.probe:
        config.output_dir = at_end.enter_context(tempfile.TemporaryDirectory(prefix="ponder-probe-"))
        eval_rows = eval_rows[:PROBE_QUESTIONS]
    run = RunFolder(choose_folder(config, config_name), config)
    made = made_with(asked_for, rewards.path, train_rows, eval_rows, describe_precision(config))
    saved = None
    if config.resume:  # is there a checkpoint, is it whole, and is all as it was?
        at_end.enter_context(run)
        if checkpoint := run.checkpoints.to_resume(Path(config.resume), config.accept_changes):
            saved = run.checkpoints.read(checkpoint)
            notes += run.checkpoints.check_same(saved, made, config.accept_changes)
        run.check_unfinished(config)
    steps_before = saved.step if saved else 0

    # --- The policy: a model with its LoRA. Its prompts, as token ids.
    memory = MemoryUse()
    policy = load_policy(config)
    made["model"] = fingerprint(policy)
    if saved:
        run.checkpoints.check_same(saved, made, config.accept_changes)
        restore_adapter(policy, saved.folder)
    critic = Critic(policy, config) if config.has_critic and not config.eval_only else None
    train_prompts = policy.encode_prompts(train_rows, config.max_completion_length)
    eval_prompts = policy.encode_prompts(eval_rows, config.max_completion_length)
    agreement = check_sampler(policy, train_prompts, config.max_completion_length)
    if policy.own_forward_because:
        notes.append(f"the model's own forward is used, which is slower: {policy.own_forward_because}")
    if config.resume:
        run.cut_back(steps_before, saved.state["logs"] if saved else {}, config.max_steps)
    else:
        at_end.enter_context(run)
    run.begin(asked_for, rewards.path, steps_before)
    stopping.file = run.path / "STOP"
    watch = Stopwatch(started)
    step = trained = saved_step = steps_before  # the last step that was learned from, and the last one that was saved
    at_start = None  # of the step: where the run stood

    def on_leaving(kind, error, trace):
        """Where the run ends before its time: save what was learned, and say how to go on."""
        if error and not config.probe and not config.eval_only:
            if not stopping.held and trained > saved_step and not isinstance(error, RunError):
                stopping.hold()  # a step that was only rolled out is as if it had not been begun
                with contextlib.suppress(RunError):  # the first error is the one to be told
                    write_summary()
                    save(trained, at_start)
            print(report.stopped(trained, config.max_steps, run.checkpoints.marked("last"), run.path), flush=True)

    names = [] if config.probe else config.report_to
    trackers = Trackers(names, run.path, asked_for, steps_before + 1, lambda text: print(f"  note: {text}"))
    at_end.callback(trackers.close)
    at_end.push(on_leaving)
    machine, asked = describe_machine(policy.device), (len(train_rows), len(eval_rows))
    print(report.opening(config, machine, run.path, policy, critic, agreement, rewards, asked, steps_before))
    for note in [*notes, *config.notes()]:
        print(f"  note     {note}")
    for warning in warnings:
        print(f"  WARNING  {warning}")

    def progress(total, what):
        return tqdm(total=total, desc=what, unit=" completions", leave=False, disable=not sys.stderr.isatty())

    def measure(step, name=None):
        """Evaluate, write the answers into the run folder, and return them."""
        with watch.time("eval"), run.keeping_failed(rewards), progress(2 * len(eval_rows), "evaluation") as bar:
            answers = evaluate(policy, eval_rows, eval_prompts, rewards, config, step, bar.update)
        run.write_evaluation(name or (f"step_{step:06d}" if step else "before"), answers.lines())
        return answers

    def write_summary():
        measured = {"seconds": watch.summary(), "peak_memory_mb": peak_memory_mb(policy.device)}
        summary["memory"] = memory.figures(policy.device) | {name: getattr(config, name) for name in HALVED}
        run.write_summary(summary | measured | {"reward_errors": rewards.errors})

    # --- What a run changes, as it is at its beginning, or as it was where it stopped.
    seed_all(config.seed)
    teacher, updater = Advantages(policy, config, rewards), Updater(policy, config, critic)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    position = Position(order, generator, rewards, teacher, updater, config)
    history, told = [], set()  # metrics of each step; alarms and notes that have been printed
    summary = {
        "algorithm": config.algorithm, "model": config.model, "steps": 0, "seed": config.seed, "eval": {},
        "control": config.control, "completions": 0, "tokens": 0, "judges": [], "alarms": {}, "versions": versions(),
    }  # fmt: skip
    if saved:
        position.restore(saved)
        history, told = run.history(), set(saved.state["told"])
        summary |= saved.state["summary"]
        watch.go_on(saved.state["seconds"])

    # --- Can it be done at all? The longest batches are tried now, and what is too much for the memory is halved.
    memory.predict(config, policy, train_prompts, eval_prompts)
    if not config.eval_only:
        rehearse(updater, train_prompts, eval_prompts, config)

    # --- Before: the same held-out questions that are asked at the end.
    answers = run.evaluations() if saved else {}
    if steps_before not in answers and config.evaluates_at(steps_before):
        with policy.model.disable_adapter() if config.eval_only else contextlib.nullcontext():
            answers[steps_before] = measure(steps_before)
    before = answers[0]
    evaluations = {step: of_step.summary() for step, of_step in answers.items()}
    verdicts = {step: of_step.verdicts() for step, of_step in answers.items()}
    summary["eval"]["before"] = evaluations[0]
    run.checkpoints.mark(last=steps_before, best=best_of(evaluations))
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

    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    group_size = config.num_generations

    def ask(n, step):
        """Answer n questions num_generations times each, scoring while the roll-out goes on: episodes, completions, scores."""
        asked = [question.place for question in order.take(n, step)]
        rows, prompts = [train_rows[i] for i in asked], [train_prompts[i] for i in asked]
        with watch.time("rollout"), progress(n * group_size, f"step {step}") as bar:
            episodes, marking = marked_rollout(
                policy, rows, prompts, group_size, sampling, generator, rewards, config, step, bar.update
            )
        with watch.time("score"), run.keeping_failed(rewards):
            return episodes, *marking.results()

    def tell(kind, found, step):
        """Print each alarm or note when it first turns up; the summary keeps the alarms by that step."""
        for subject, text in found.items():
            if subject not in told:
                print(f"  {kind}: {text}", flush=True)
                told.add(subject)
            if kind == "alarm":
                summary["alarms"].setdefault(subject, step)

    def stops_early():
        """Whether the last evaluations, as many as early_stopping says, brought no new best."""
        return 0 < config.early_stopping <= sum(step > best_of(evaluations) for step in evaluations)

    def save(step, before_rollout):
        """A checkpoint of the run as it stands after a step."""
        (counts, states), (halved, learned) = before_rollout, position.after_update()
        state = counts | halved | {
            "seed": config.seed, "eval": evaluations[max(evaluations)], "made": made, "versions": versions(),
            "summary": {name: summary[name] for name in ("steps", "completions", "tokens", "judges", "alarms")},
            "told": sorted(told), "seconds": watch.summary(), "logs": run.log_sizes(),
        }  # fmt: skip
        card = report.model_card(config, step, evaluations)
        return run.checkpoints.save(step, policy, card, state, states | learned, best_of(evaluations))

    last_step = PROBE_STEPS if config.probe else config.max_steps
    while step < last_step and not stops_early():
        at_start = position.before_rollout()
        stopping.release()  # here, and while it rolls out, a run can be stopped at once
        step += 1
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
        stopping.hold()  # from here on a step is finished: half of one cannot be repeated
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
        trained = step

        # --- Log.
        summary["steps"] = step
        summary["completions"] += len(episodes)
        summary["judges"] = sorted({score.judge for score in scores if score.judge})  # what said right or wrong
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
        broken_off = None
        if config.evaluates_at(step) and step < last_step:
            try:
                answers = measure(step)
                evaluations[step], verdicts[step] = answers.summary(), answers.verdicts()
                metrics |= {f"eval/{name}": evaluations[step][name] for name in ("accuracy", "accuracy_sampled")}
                write_summary()
            except (KeyboardInterrupt, RewardError, ConfigError, RunError) as error:  # the step is done all the same
                broken_off = error
        history.append(metrics)
        found = alarms.find(history, verdicts, scores, completions, rewards, config)
        run.append("metrics.jsonl", [metrics | {"alarms": list(found)}])
        trackers.log(step, metrics)
        ends, is_best = step == last_step or stops_early(), step in evaluations and best_of(evaluations) == step
        if step % config.logging_steps == 0 or ends:
            left = report.seconds_left(step, config, watch.seconds)
            print(report.console_line(metrics, config, left, warnings), flush=True)
        tell("alarm", found, step)
        tell("note", alarms.notes(history, config), step)
        if config.log_completions_steps and step % config.log_completions_steps == 0:
            print(report.highest_rewards(step, completions, scores), flush=True)
        if broken_off or ends or is_best or (config.save_steps and step % config.save_steps == 0):
            save(step, position.before_rollout())
            saved_step = step
        if broken_off:
            raise broken_off

    at_start = position.before_rollout()
    stopping.release()
    if config.probe:
        write_summary()
        return print(report.probed(config, history, watch.seconds, len(eval_rows), summary["memory"]))

    # --- After: the LoRA is saved, answers the same questions again, and is read back and compared.
    if step < config.max_steps:
        print(f"Stopped early: no evaluation after step {best_of(evaluations)} was better, of {len(evaluations)}.")
    finish(measure(step, "after"), step)
    tell("alarm", alarms.hacking(history, verdicts, set(summary["judges"]), rewards, config), step)
    stopping.hold()
    checkpoint = save(step, at_start)  # now with the final evaluation
    asked, changed = check_saved(policy, checkpoint, eval_prompts, config)
    run.draw_curve(evaluations, history)
    summary["finished"] = True
    write_summary()

    print(f"\nSaved {checkpoint}; read back, it gives the same {asked} of {asked} greedy answers as in memory")
    print(f"and another answer than before training to {changed} of them.")
    if not changed:
        print("  hint: training changed no greedy answer: raise learning_rate or max_steps")
    if (best := run.checkpoints.marked("best")) and best != checkpoint:
        print(f"The best on the held-out questions was {best}.")
    took = report.clock(watch.summary()["total"])
    print(f"{summary['completions']:,} completions in {took}. Curve: {run.path}/curve.png")
    print(f"Memory: {report.memory(summary['memory'])}.")
    for warning in warnings:
        print(f"  WARNING  {warning}")
    print(report.next_steps(run.path, checkpoint))


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
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
