"""The commands of train.py other than training: --dry-run, --probe and --eval-only."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data import load_questions, local_prompts
from data.demonstrations import read_demonstrations
from grading import RewardError, check_tests, load_rewards, preflight, sandbox
from grading.rewards.trials import try_to_learn_payments
from grading.rewards.verdicts import payments_to_lists
from rl.config import Config
from rl.run import report
from rl.run.files import read_jsonl, to_json
from rl.run.process import StopSignals
from rl.run.read_config import saved_settings

PROBE_STEPS = 2
PROBE_QUESTIONS = 16  # number of held-out questions that a probe evaluates


def dry_run(config: Config) -> None:
    """Print the predicted memory and time of a run."""
    from rl.fit.dry_run import dry_run

    _, notes = read_demonstrations(config.sft_data, held_out=[])
    print(dry_run(config, prompts=local_prompts(config.train_data, config.eval_data, config.columns)))
    for note in notes:
        print(f"  note     {note}, {config.sft_epochs} epochs before the first step")


def eval_only(config: Config, name: str) -> None:
    """Evaluate the base model on the held-out questions, then the model with its adapter if there is one.

    name: the name of the recipe, for the run folder.
    """
    started = time.perf_counter()
    settings = saved_settings(config)
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    train_rows, eval_rows, notes = load_questions(config)
    notes += check_tests(eval_rows) + preflight(rewards, eval_rows)
    try_to_learn_payments(rewards, train_rows + eval_rows)  # from all rows, as in training

    from rl.model.backends import import_backend

    notes += import_backend(config)
    from rl.evaluate import evaluate
    from rl.model import distributed
    from rl.model.policy import load_policy
    from rl.run.checkpoint import seed_all, shrunk_settings
    from rl.run.checks import check_sampler
    from rl.run.folder import RunFolder, choose_folder
    from rl.run.metrics import summarize
    from rl.run.monitor import MemoryUse, describe_machine, peak_memory_mb, versions

    distributed.join(config)
    folder = RunFolder(choose_folder(config, name), config)
    memory = MemoryUse()
    policy = load_policy(config)
    questions = policy.encode(eval_rows)
    check_sampler(policy, questions)
    folder.open()
    try:
        folder.write_settings(settings, rewards.path, step=0)
        lines = [f"Ponder on {describe_machine(policy.device)}, run folder {folder.path}"]
        lines += report.describe_model(config, policy, critic=None)
        lines.append(f"data     {len(eval_rows):,} eval questions")
        print("\n  ".join(lines))
        for note in [*notes, *report.model_notes(policy), *config.notes()]:
            print(f"  note     {note}")
        for warning in report.run_warnings(config):
            print(f"  WARNING  {warning}")
        seed_all(config.seed)
        with policy.model.disable_adapter():
            before = evaluate(policy, questions, rewards, config, step=0)
        folder.write_evaluation("before", before)
        evaluations = {0: before}
        if config.adapter:
            evaluations[1] = evaluate(policy, questions, rewards, config, step=0)
            folder.write_evaluation("after", evaluations[1])
        summary = summarize(config, [], evaluations, before, is_finished=bool(config.adapter)) | {
            "versions": versions(),
            "seconds": {"total": round(time.perf_counter() - started, 2)},
            "peak_memory_mb": peak_memory_mb(policy.device),
            "memory": memory.figures(policy.device) | shrunk_settings(config),
            "reward_errors": rewards.errors,
            "payments": payments_to_lists(rewards),
        }
        folder.write("summary.json", to_json(summary, indent=2) + "\n")
        print("\n" + report.evaluation_table(summary["eval"]))
    except RewardError as error:
        if error.completions:
            raise folder.write_failed(error, rewards) from error
        raise
    finally:
        folder.close()


def probe(config: Config, train: Callable[[Config, str, StopSignals], None], signals: StopSignals) -> None:
    """Run two steps and print the time, the memory and the batch settings that fit. Nothing is saved.

    train: the training function. A whole run is measured, because it does more than its steps.
    """
    with tempfile.TemporaryDirectory(prefix="ponder-probe-") as folder:
        changes = {"max_steps": PROBE_STEPS, "eval_questions": PROBE_QUESTIONS, "critic_warmup_steps": 0}
        changes |= {"eval_steps": 0, "save_steps": 0, "report_to": [], "output_dir": f"{folder}/run", "sft_data": None}
        probed = dataclasses.replace(config, **changes)
        train(probed, "probe", signals)
        run = Path(probed.output_dir)  # under torchrun, each process has its own
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        last = read_jsonl(run / "metrics.jsonl")[-1]
    evaluations = 2 + ((config.max_steps - 1) // config.eval_steps if config.eval_steps else 0)
    questions = summary["eval"]["before"]["n"] + summary["eval"]["after"]["n"]
    evaluation = summary["seconds"]["eval"] / questions * config.eval_questions
    total = summary["seconds"]["setup"] + last["step_time"] * config.max_steps + evaluation * evaluations
    memory = summary["memory"]
    sizes = memory["rollout_batch_size"], memory["max_tokens_per_micro_batch"]
    print(f"""
Probe of {PROBE_STEPS} steps (nothing was saved):
  step     {last["step_time"]:.1f} s (roll-out {last["time/rollout"]:.1f} s, update {last["time/update"]:.1f} s) with \
{last["completions/mean_length"]:.0f} tokens per completion; longer completions take longer
  run      about {report.clock(total)}: {config.max_steps} steps, and {evaluations} evaluations of about \
{report.clock(evaluation)} each{", without the cold start" if config.sft_data else ""}
  memory   {report.describe_memory(memory)}
  batch    rollout_batch_size {sizes[0]} and max_tokens_per_micro_batch {sizes[1]} fit in memory""")
