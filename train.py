"""Teach a language model to reason: GRPO or PPO on questions whose answers a program can check.

    python train.py                                       the bundled tiny model, configs/tiny.yaml
    python train.py --config FILE --learning-rate 2e-5    another recipe, with one setting changed
    python train.py --config auto                         the largest recipe that fits this machine
    python train.py --dry-run --gpu-memory 12             predict the memory without loading a model
    python train.py --probe                               run two steps and measure time and memory
    python train.py --resume runs/NAME                    resume a run
    python train.py --eval-only --adapter runs/NAME/checkpoints/step_000045
    python train.py --help                                list all settings

A run writes all of its files into its run folder (rl/run/folder.py).
"""

import sys
import time

from data import DataError, QuestionSampler, load_questions
from data.demonstrations import read_demonstrations
from grading import RewardError, check_tests, load_rewards, preflight, sandbox
from rl.config import Config, ConfigError, RunError
from rl.run import commands
from rl.run.process import StopSignals, command_output
from rl.run.read_config import read_config, saved_settings


def main(arguments: list[str]) -> None:
    config, name = read_config(arguments, default_file="configs/tiny.yaml")
    with StopSignals() as signals:
        if config.dry_run:
            commands.dry_run(config)
        elif config.eval_only:
            commands.eval_only(config, name)
        elif config.probe:
            commands.probe(config, train, signals)
        else:
            train(config, name, signals)


def train(config: Config, name: str, signals: StopSignals) -> None:
    """Train, evaluate and save. The run folder is named after `name`, the name of the recipe."""
    started = time.perf_counter()

    # Rewards and questions come first: errors in them are reported before a model is loaded.
    settings = saved_settings(config)
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)  # forks while this process is small
    rewards = load_rewards(
        config.rewards_file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps
    )
    train_rows, eval_rows, notes = load_questions(config)
    demonstrations, cold_start_notes = read_demonstrations(config.sft_data, eval_rows)
    notes += check_tests(train_rows + eval_rows) + preflight(rewards, train_rows + eval_rows) + cold_start_notes

    # Unsloth patches transformers, so it must be imported first. The imports below take a few seconds.
    from rl.model.backends import import_backend

    notes += import_backend(config)
    import torch

    from rl.advantages import Advantages
    from rl.critic import Critic
    from rl.evaluate import evaluate
    from rl.model import distributed
    from rl.model.policy import load_policy
    from rl.rollout import collect
    from rl.run.checks import check_memory, check_sampler
    from rl.run.cold_start import ColdStart
    from rl.run.session import Run
    from rl.run.token_log import inspect_tokens
    from rl.update import Updater

    distributed.join(config)  # with torchrun, the processes share roll-outs and gradients
    with Run(config, name, settings, rewards, train_rows, eval_rows, notes, started, signals) as run:
        # One frozen base model, a LoRA for the policy, and with PPO a LoRA or a value head for the critic.
        policy = load_policy(config)
        critic = Critic(policy, config) if config.has_critic else None
        train_questions = policy.encode(train_rows)
        held_out = policy.encode(eval_rows)
        questions = QuestionSampler(train_questions, config.curriculum_steps, config.seed)
        advantages = Advantages(policy, rewards, config)
        updater = Updater(policy, critic, config)
        cold_start = ColdStart(updater, demonstrations, config) if demonstrations else None
        generator = torch.Generator(policy.device).manual_seed(distributed.own_seed(config.seed))

        agreement = check_sampler(policy, train_questions)  # the sampler and the trainer must agree
        state = {"questions": questions, "rewards": rewards, "advantages": advantages, "updater": updater}
        state |= {"cold_start": cold_start} if cold_start else {}
        run.start(policy, critic, state, generator, train_questions, held_out, agreement)  # restores a resumed run
        check_memory(updater, train_questions, held_out)  # runs the largest batches; halves them on OOM

        if not run.evaluations:  # neither training nor the cold start has begun
            with run.timer("eval"):
                evaluation = evaluate(policy, held_out, rewards, config, run.step)
            run.log_evaluation(evaluation)
            if cold_start:
                with run.timer("cold_start"):
                    cold_start.train()  # supervised steps on the same LoRA
                with run.timer("eval"):
                    evaluation = evaluate(policy, held_out, rewards, config, run.step)
                run.log_cold_start(evaluation)

        while not run.done:
            run.begin_step()
            with run.timer("rollout"):
                episodes = collect(policy, questions, rewards, generator, config, run.step)
            batch = [episode for episode in episodes if episode.has_signal]

            with run.timer("update"):
                if critic:
                    updater.fill_values(batch)  # V(s), and log-probabilities for the KL in the reward
                stats = advantages.compute(batch)  # the advantage of each token
                tokens = inspect_tokens(updater, episodes)  # token details for the page
                stats |= updater.update(batch)  # policy gradient steps

            if config.evaluates_at(run.step):
                with run.timer("eval"):
                    evaluation = evaluate(policy, held_out, rewards, config, run.step)
                run.log_evaluation(evaluation)
            run.log_step(episodes, tokens, stats)  # metrics, roll-outs, console line, alarms, trackers
            if run.checkpoint_due:
                run.save()

        run.end_steps()  # raises Stopped if a stop was requested
        with run.timer("eval"):
            evaluation = evaluate(policy, held_out, rewards, config, run.step)
        run.finish(evaluation, held_out)


if __name__ == "__main__":
    try:
        with command_output():
            main(sys.argv[1:])
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
