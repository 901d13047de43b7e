"""A training run: its folder, state, logs and checkpoints, and how it stops and resumes."""

import contextlib
from pathlib import Path

import torch

from grading import RewardError, Rewards
from grading.rewards.verdicts import payments_to_lists
from rl.config import Config
from rl.critic import Critic
from rl.evaluate import Evaluation, best_step
from rl.model import distributed
from rl.model.backends import describe_precision
from rl.model.lora import restore_adapter
from rl.model.policy import Policy, Question
from rl.rollout import Episode
from rl.run import report
from rl.run.alarms import Alarms, find_alarms, find_hacking, find_notes
from rl.run.checkpoint import Checkpoint, RandomState, check_saved, fingerprint, run_provenance, shrunk_settings
from rl.run.checks import Agreement
from rl.run.files import to_json, write_errors
from rl.run.folder import RunFolder, choose_folder
from rl.run.metrics import describe_episodes, summarize
from rl.run.monitor import MemoryUse, Stopwatch, describe_machine, peak_memory_mb, versions
from rl.run.process import Stopped, StopSignals
from rl.run.token_log import describe_tokens
from rl.run.trackers import Trackers


class Run:
    """Context manager for one training run.

    `start` opens the folder and restores the state of a resumed run. During a step, the first Ctrl-C or SIGTERM, or a
    STOP file in the folder, stops the run after that step, which is saved. A second Ctrl-C raises KeyboardInterrupt at
    once, and --resume repeats the steps since the last checkpoint.

    Attributes:
        step: The current step, or the last one if none is in progress; 0 before the first.
        history: The metrics of each step, with its alarms.
        evaluations: The evaluations by step; step 0 is before the first step, after the cold start if there is one.
        base: The evaluation of the model before any training.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        settings: dict,
        rewards: Rewards,
        train_rows: list[dict],
        eval_rows: list[dict],
        notes: list[str],
        started: float,
        signals: StopSignals,
    ):
        self.config = config
        self.settings = settings
        self.rewards = rewards
        self.num_rows = len(train_rows), len(eval_rows)
        self.notes = notes
        self.step = 0
        self.history: list[dict] = []
        self.evaluations: dict[int, Evaluation] = {}
        self.base: Evaluation | None = None
        self.memory = MemoryUse()
        self.stopwatch = Stopwatch(started)
        self.signals = signals
        self.stop_agreed = False  # with torchrun: whether a process has seen a request to stop
        self.trackers = None
        self.folder = RunFolder(choose_folder(config, name), config)
        self.provenance = run_provenance(settings, rewards.path, train_rows, eval_rows, describe_precision(config))
        self.resumed_from: Checkpoint | None = None

    def __enter__(self) -> "Run":
        """Load and check the checkpoint to resume from before the model is loaded. Raises ConfigError or RunError."""
        if self.config.resume:
            try:
                self._open_to_resume()
            except BaseException:
                self._close()
                raise
        return self

    def _open_to_resume(self) -> None:
        accept = self.config.accept_changes
        self.folder.open()
        checkpoints = self.folder.checkpoints
        if path := checkpoints.choose(Path(self.config.resume), accept):
            self.resumed_from = checkpoints.read(path)
            self.notes += checkpoints.check_provenance(self.resumed_from, self.provenance, accept)
            self.step = self.resumed_from.step
        self.folder.check_resumable()
        if self.resumed_from:
            self.folder.check_complete(self.step, self.num_rows[1])

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error and self.trackers:  # the run had started
                last = self.folder.checkpoints.marked("last")
                last_step = self.history[-1]["step"] if self.history else 0
                print(report.stop_message(last_step, self.config.max_steps, last, self.folder.path), flush=True)
            if isinstance(error, RewardError) and error.completions and self.folder.is_open:
                raise self.folder.write_failed(error, self.rewards) from error
        finally:
            self._close()

    def _close(self) -> None:
        self.signals.deferred = False
        try:
            if self.trackers:
                self.trackers.close()
        finally:
            if self.folder.is_open:
                self.folder.close()

    def start(
        self,
        policy: Policy,
        critic: Critic | None,
        state: dict,
        generator: torch.Generator,
        questions: list[Question],
        held_out: list[Question],
        agreement: Agreement,
    ) -> None:
        """Open the folder, restore a resumed run, and print the run header.

        Args:
            state: The objects, by name, whose state_dict a checkpoint saves in addition to the LoRA.
            generator: The random generator of the roll-out; it is saved too.
            agreement: From `check_sampler`.
        """
        config = self.config
        self.policy = policy
        self.provenance["model"] = fingerprint(policy)
        if self.resumed_from:
            self.folder.checkpoints.check_provenance(self.resumed_from, self.provenance, config.accept_changes)
            restore_adapter(policy.model, self.resumed_from.folder)
        if config.resume:
            self.folder.rewind(self.step, restart=not self.resumed_from)
        else:
            self.folder.open()
        config.output_dir = str(self.folder.path)
        self.folder.write_settings(self.settings, self.rewards.path, self.step)
        self.stopwatch.end_setup()
        self.state = state | {"stopwatch": self.stopwatch, "random": RandomState(generator, config.seed)}
        self.trackers = Trackers(config.report_to, self.folder.path, self.settings, self.step + 1, print_note)
        machine = describe_machine(policy.device)
        resumed_step = self.step if self.resumed_from else None
        print(
            report.run_header(
                config, machine, self.folder.path, policy, critic, agreement, self.rewards, self.num_rows, resumed_step
            )
        )
        self.notes += report.model_notes(policy)
        for note in [*self.notes, *config.notes()]:
            print(f"  note     {note}")
        self.warnings = report.run_warnings(config)
        for warning in self.warnings:
            print(f"  WARNING  {warning}")
        if self.resumed_from:
            self._restore(self.resumed_from)
        self.memory.predict(config, policy, questions, held_out)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Load the training state, metrics and evaluations.

        Batch settings that were halved when memory ran out keep their halved values, unless the user has changed them.
        """
        by_process = checkpoint.state.pop("random")
        for name, part in checkpoint.state.items():
            self.state[name].load_state_dict(part)
        if len(by_process) == distributed.world_size():
            self.state["random"].load_state_dict(by_process[distributed.rank()])
        else:
            print_note(
                f"the checkpoint is of {len(by_process)} processes: new random states, so results differ slightly"
            )
            self.state["random"].generator.manual_seed(distributed.own_seed(self.config.seed) + self.step)
        checkpoint.state.clear()  # frees memory: the state has been copied
        saved = checkpoint.meta["made"]["config"]
        for name, value in checkpoint.meta["shrunk"].items():
            if getattr(self.config, name) == saved[name]:
                setattr(self.config, name, value)
        self.history = self.folder.history()
        evaluations = self.folder.evaluations()
        self.evaluations = {step: evaluation.without_texts() for step, evaluation in evaluations.items()}
        base = evaluations[0]
        self.base = self.evaluations[0]
        if self.config.sft_data:  # step 0 is after the cold start
            base = self.folder.base_evaluation()
            self.base = base.without_texts()
        with write_errors(self.folder.checkpoints.path):
            self.folder.checkpoints.mark(self.step, best_step(self.evaluations))
        self._print_example("Before training, one held-out question", base)
        self.write_summary()  # a finished run that is continued no longer counts as finished

    # --- during the steps

    @property
    def stop_requested(self) -> bool:
        return self.stop_agreed if distributed.world_size() > 1 else self._sees_request()

    def _sees_request(self) -> bool:
        return self.signals.requested or (self.folder.path / "STOP").exists()

    @property
    def stopped_early(self) -> bool:
        """True if none of the last `early_stopping` evaluations was a new best."""
        num_later = sum(step > best_step(self.evaluations) for step in self.evaluations)
        return 0 < self.config.early_stopping <= num_later

    @property
    def done(self) -> bool:
        """True at max_steps, after early stopping, or if a stop was requested."""
        return self.step >= self.config.max_steps or self.stopped_early or self.stop_requested

    @property
    def checkpoint_due(self) -> bool:
        """True every `save_steps`, at a new best evaluation, and at the end."""
        is_best = self.step in self.evaluations and best_step(self.evaluations) == self.step
        is_regular = self.config.save_steps > 0 and self.step % self.config.save_steps == 0
        return is_regular or is_best or self.done

    def begin_step(self) -> None:
        self.step += 1
        self.stopwatch.begin_step()
        self.signals.deferred = True

    def timer(self, part: str):
        """Return a context manager that adds its seconds to a part of the run: rollout, update or eval."""
        return self.stopwatch.measure(part)

    def log_step(self, episodes: list[Episode], tokens: dict, stats: dict[str, float]) -> None:
        """Write roll-outs, tokens and metrics of the step, check for alarms, and print the console line.

        Args:
            tokens: From `inspect_tokens`.
            stats: The metrics of the advantages and of the update.
        """
        config = self.config
        self.stop_agreed = any(distributed.all_ranks(self._sees_request()))
        previous = self.history[-1] if self.history else {}
        metrics = {"step": self.step} | describe_episodes(episodes, self.rewards, config)
        metrics |= describe_tokens(tokens) | stats | self.stopwatch.step_metrics()
        metrics["num_tokens"] = previous.get("num_tokens", 0) + sum(e.num_sampled for e in episodes)
        metrics["num_completions"] = previous.get("num_completions", 0) + len(episodes)
        metrics["peak_memory_mb"] = peak_memory_mb(self.policy.device)
        metrics["judges"] = sorted({e.score.judge for e in episodes if e.score.judge})
        if evaluation := self.evaluations.get(self.step):
            metrics["eval/accuracy"] = evaluation.accuracy
            metrics["eval/accuracy_sampled"] = evaluation.accuracy_sampled
        self.history.append(metrics)
        notes = find_notes(self.history, config)
        alarms = find_alarms(self.history, self.evaluations, episodes, self.rewards, config)
        metrics["notes"] = list(notes)
        metrics["alarms"] = list(alarms)
        self.folder.write_rollouts(self.step, episodes)
        self.folder.write_tokens(self.step, {"step": self.step} | tokens)
        self.folder.append_metrics(metrics)
        self.trackers.log(self.step, metrics)
        if self.step % config.logging_steps == 0 or self.done:
            seconds_left = report.seconds_left(self.step, config, self.stopwatch.seconds)
            print(report.console_line(metrics, config, seconds_left, self.warnings), flush=True)
        self._print_new("alarm", alarms)
        self._print_new("note", notes)
        if config.log_completions_steps and self.step % config.log_completions_steps == 0:
            print(report.highest_rewards(self.step, episodes), flush=True)

    def _print_new(self, kind: str, lines: Alarms) -> None:
        """Print the alarms or notes whose subjects no earlier step had."""
        printed = {subject for metrics in self.history[:-1] for subject in metrics[f"{kind}s"]}
        for subject, text in lines.items():
            if subject not in printed:
                print(f"  {kind}: {text}", flush=True)

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Write the answers of an evaluation, keep it without its texts, and update the summary."""
        self.evaluations[self.step] = evaluation.without_texts()
        name = self.folder.evaluation_file(self.step).stem
        self.folder.write_evaluation(name, evaluation)
        if self.step == 0:
            self.base = self.evaluations[0]
            self._print_example("Before training, one held-out question", evaluation)
        self.write_summary()

    def log_cold_start(self, evaluation: Evaluation) -> None:
        """Write the answers after the cold start, and save a checkpoint of step 0."""
        self.evaluations[0] = evaluation.without_texts()
        self.folder.write_evaluation("cold_start", evaluation)
        self._print_example("After the cold start, the same question", evaluation)
        low, high = evaluation.summary()["ci95"]
        print(
            f"Held-out accuracy after the cold start: {evaluation.accuracy:.1%} ({low:.0%} to {high:.0%})\n", flush=True
        )
        self.save()

    def _print_example(self, title: str, evaluation: Evaluation) -> None:
        """Print the answer to the first question that was not answered correctly before training."""
        before = self.base.greedy
        example = next((i for i, record in enumerate(before) if record["verdict"] != "right"), 0)
        print(f"\n{title}:\n{report.format_answer(evaluation.greedy[example])}\n")

    def write_summary(self, is_finished: bool = False) -> None:
        summary = summarize(self.config, self.history, self.evaluations, self.base, is_finished) | {
            "versions": versions(),
            "seconds": self.stopwatch.summary(),
            "peak_memory_mb": peak_memory_mb(self.policy.device),
            "memory": self.memory.figures(self.policy.device) | shrunk_settings(self.config),
            "reward_errors": self.rewards.errors,
            "payments": payments_to_lists(self.rewards),
        }
        self.folder.write("summary.json", to_json(summary, indent=2) + "\n")

    def save(self) -> Path:
        """Write a checkpoint of the current step and return its folder."""
        meta = {
            "seed": self.config.seed,
            "eval": self.evaluations[max(self.evaluations)].summary(),
            "made": self.provenance,
            "versions": versions(),
            "shrunk": shrunk_settings(self.config),
        }
        state = {name: part.state_dict() for name, part in self.state.items()}
        state["random"] = distributed.all_ranks(state["random"])
        distributed.check_equal(self.policy.trainable_parameters())
        card = report.model_card(self.config, self.step, self.base, self.evaluations)
        best = best_step(self.evaluations)
        path = self.folder.checkpoints.save(self.step, self.policy, card, meta, state, best)
        self.write_summary()
        return path

    # --- the end

    def end_steps(self) -> None:
        """Handle signals immediately again. If a stop was requested, save the last step and raise Stopped."""
        if self.stop_requested:
            checkpoints = self.folder.checkpoints
            if self.history and checkpoints.marked("last") != checkpoints.folder(self.step):
                self.save()  # the request came after the step was logged
            with contextlib.suppress(OSError):
                (self.folder.path / "STOP").unlink()
            raise Stopped(self.signals.exit_code)
        self.signals.deferred = False
        if self.step < self.config.max_steps:
            best = best_step(self.evaluations)
            print(f"Stopped early: no evaluation after step {best} was better ({len(self.evaluations)} evaluations).")

    def finish(self, evaluation: Evaluation, held_out: list[Question]) -> None:
        """Log the final evaluation, save, verify that the saved LoRA gives the same answers, and print the results."""
        self.evaluations[self.step] = evaluation.without_texts()
        self.folder.write_evaluation("after", evaluation)
        self._print_example("After training, the same question", evaluation)
        summary = summarize(self.config, self.history, self.evaluations, self.base, is_finished=True)
        print(report.evaluation_table(summary["eval"]))
        last = self.history[-1] if self.history else {"step": 0, "judges": [], "alarms": [], "notes": []}
        alarms = find_hacking(self.history, self.evaluations, set(last["judges"]), self.rewards, self.config)
        for subject, text in alarms.items():
            if not any(subject in metrics["alarms"] for metrics in self.history):
                print(f"  alarm: {text}", flush=True)
                last["alarms"] = [*last["alarms"], subject]
        self.signals.deferred = True
        checkpoint = self.save()  # replaces the last checkpoint, now with the final evaluation
        num_answers, num_changed = check_saved(self.policy, checkpoint, held_out, self.config)
        with write_errors(self.folder.path / "curve.png"):
            report.draw_curve(self.folder.path / "curve.png", self.evaluations, self.history)
        self.write_summary(is_finished=True)
        self._print_results(checkpoint, num_answers, num_changed)

    def _print_results(self, checkpoint: Path, num_answers: int, num_changed: int) -> None:
        count = f"{num_answers} of {num_answers}"
        print(f"\nSaved {checkpoint}. When read back, it gives the same greedy answers as in memory ({count}).")
        print(f"Training changed {num_changed} of these answers.")
        if not num_changed:
            print("  hint: training changed no greedy answer: raise learning_rate or max_steps")
        if (best := self.folder.checkpoints.marked("best")) and best != checkpoint:
            print(f"Best checkpoint by held-out accuracy: {best}")
        completions = self.history[-1]["num_completions"] if self.history else 0
        print(
            f"{completions:,} completions in {report.clock(self.stopwatch.total)}. Curve: {self.folder.path}/curve.png"
        )
        print(f"Peak memory: {report.describe_memory(self.memory.figures(self.policy.device))}.")
        for warning in self.warnings:
            print(f"  WARNING  {warning}")
        print(report.next_steps(self.folder.path, checkpoint))


def print_note(text: str) -> None:
    print(f"  note: {text}", flush=True)
