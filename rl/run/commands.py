"""What train.py does instead of training: --dry-run, --probe and --eval-only."""

import time

from data import load_questions, local_prompts
from grading import check_tests, load_rewards, sandbox
from rl.config import Config
from rl.fit.memory import dry_run
from rl.run.read_config import saved_settings

PROBE_STEPS = 2
PROBE_QUESTIONS = 16  # held-out questions that a probe answers


def run_command(config: Config, name: str) -> None:
    """Do what the settings ask for, and return."""
    if config.dry_run:
        print(dry_run(config, prompts=local_prompts(config.train_data, config.eval_data, config.columns)))
    elif config.probe:
        probe(config)
    else:
        eval_only(config, name)


def load_task(config: Config):
    """Rewards, training rows, held-out rows, and notes; what is wrong with them is an error before a model is loaded."""
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    train_rows, eval_rows, notes = load_questions(config)
    notes += check_tests(train_rows + eval_rows) + rewards.check(train_rows + eval_rows)
    return rewards, train_rows, eval_rows, notes


def eval_only(config: Config, name: str) -> None:
    """Answer the held-out questions: the model without its LoRA, and if there is an adapter, with it."""
    started = time.perf_counter()
    settings = saved_settings(config)
    rewards, _, eval_rows, notes = load_task(config)

    from rl.model.backends import import_backend

    notes += import_backend(config)
    from rl.evaluate import evaluate
    from rl.model.policy import load_policy
    from rl.run import report
    from rl.run.files import to_json
    from rl.run.folder import RunFolder, choose_folder
    from rl.run.metrics import summarize
    from rl.run.monitor import MemoryUse, describe_machine, versions

    folder = RunFolder(choose_folder(config, name), config)
    memory = MemoryUse()
    policy = load_policy(config)
    questions = policy.encode(eval_rows)
    folder.open()
    try:
        folder.write_settings(settings, rewards.path, step=0)
        lines = [f"Ponder on {describe_machine(policy.device)}; everything goes into {folder.path}"]
        lines += report.describe_model(config, policy, critic=None)
        lines.append(f"data     {len(eval_rows):,} eval questions")
        print("\n  ".join(lines))
        for note in notes:
            print(f"  note     {note}")
        with policy.model.disable_adapter():
            before = evaluate(policy, questions, rewards, config, step=0)
        folder.write_evaluation("before", before)
        evaluations = {0: before}
        if config.adapter:
            evaluations[1] = evaluate(policy, questions, rewards, config, step=0)
            folder.write_evaluation("after", evaluations[1])
        summary = summarize(config, [], evaluations, is_finished=bool(config.adapter)) | {
            "versions": versions(),
            "seconds": {"total": round(time.perf_counter() - started, 2)},
            "memory": memory.figures(policy.device),
        }
        folder.write("summary.json", to_json(summary, indent=2) + "\n")
        print("\n" + report.evaluation_table(**({"after": None, "gain": None} | summary["eval"])))
    finally:
        folder.close()


def probe(config: Config) -> None:
    """Load everything, run the largest batches and two steps, and print seconds and memory. Nothing is written."""
    started = time.perf_counter()
    rewards, train_rows, eval_rows, _ = load_task(config)
    questions_in_all = config.eval_questions
    eval_rows = eval_rows[:PROBE_QUESTIONS]

    from rl.model.backends import import_backend

    import_backend(config)
    import torch

    from data import QuestionSampler
    from rl.advantages import Advantages
    from rl.checks import check_memory, check_sampler
    from rl.critic import Critic
    from rl.evaluate import evaluate
    from rl.model.policy import load_policy
    from rl.rollout import collect
    from rl.run import report
    from rl.run.metrics import mean
    from rl.run.monitor import MemoryUse, Stopwatch, describe_machine
    from rl.update import Updater

    memory = MemoryUse()
    stopwatch = Stopwatch(started)
    policy = load_policy(config)
    critic = Critic(policy, config) if config.has_critic else None
    train_questions = policy.encode(train_rows)
    held_out = policy.encode(eval_rows)
    questions = QuestionSampler(train_questions, config.curriculum_steps, config.seed)
    advantages = Advantages(policy, rewards, config)
    updater = Updater(policy, critic, config)
    generator = torch.Generator(policy.device).manual_seed(config.seed)
    print(f"Ponder on {describe_machine(policy.device)}: {PROBE_STEPS} steps of {config.model}, nothing is kept")
    check_sampler(policy, train_questions)
    memory.predict(config, policy, train_questions, held_out)
    check_memory(updater, train_questions, held_out)
    stopwatch.end_setup()
    with stopwatch.measure("eval"):
        evaluate(policy, held_out, rewards, config, step=0)
    for step in range(1, PROBE_STEPS + 1):
        stopwatch.begin_step()
        with stopwatch.measure("rollout"):
            episodes = collect(policy, questions, rewards, generator, config, step)
        batch = [episode for episode in episodes if episode.has_signal]
        with stopwatch.measure("update"):
            updater.fill_values(batch)
            advantages.compute(batch)
            updater.update(batch)

    last = stopwatch.step_metrics()
    length = mean([len(episode.completion_ids) for episode in episodes])
    evaluations = 2 + ((config.max_steps - 1) // config.eval_steps if config.eval_steps else 0)
    evaluation = stopwatch.seconds["eval"] / len(held_out) * questions_in_all
    whole = stopwatch.seconds["setup"] + last["step_time"] * config.max_steps + evaluation * evaluations
    print(f"""
Probed: {PROBE_STEPS} steps, nothing is kept.
  a step   {last["step_time"]:.1f} s (rollout {last["time/rollout"]:.1f}, update {last["time/update"]:.1f}), completions of \
{length:.0f} tokens; longer ones take longer
  a run    about {report.clock(whole)}: {config.max_steps} steps and {evaluations} evaluations of about \
{report.clock(evaluation)}
  memory   {report.memory(memory.figures(policy.device))}
  fits     rollout_batch_size {config.rollout_batch_size}, max_tokens_per_micro_batch {config.max_tokens_per_micro_batch}""")
