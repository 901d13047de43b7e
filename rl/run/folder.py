"""The run folder: all files that a run writes, in formats that other programs can read.

config.yaml  rewards.py  metrics.jsonl  rollouts/000012.jsonl  tokens/000012.json  eval/*.jsonl  checkpoints/
summary.json  curve.png  console.log  lock  failed.jsonl (if a reward function stopped the run)
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import time
from pathlib import Path

import filelock
import yaml

from grading import Completion, RewardError, Rewards
from grading.rewards.reward_file import modules_beside
from rl.config import Config, ConfigError, RunError
from rl.evaluate import Evaluation
from rl.rollout import Episode
from rl.run.checkpoint import Checkpoints
from rl.run.files import describe_write_error, read_jsonl, to_json, to_jsonl, write_atomic, write_errors
from rl.run.process import Console

# Files of a run that was killed before it wrote config.yaml. A folder with nothing else is free for a new run.
LEFTOVERS = set("eval rollouts tokens checkpoints lock console.log rewards.py rewards.py.unfinished".split())
LEFTOVERS.add("config.yaml.unfinished")


def choose_folder(config: Config, name: str) -> Path:
    """Return output_dir, or runs/NAME-TIME if it is not set. Raises ConfigError if output_dir is in use."""
    path = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume or not config.output_dir:
        return path
    if path.exists() and (not path.is_dir() or {file.name for file in path.iterdir()} - LEFTOVERS):
        hint = f", resume the run with --resume {path}" if (path / "config.yaml").exists() else ""
        raise ConfigError(f"output_dir: {path} exists already: choose another folder{hint}, or delete it")
    return path


class RunFolder:
    """Reads and writes the files of one run. All methods raise RunError if a file cannot be written.

    `open` locks the folder against other runs and starts copying the console to console.log; `close` ends both.
    """

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self.is_open = False

    def open(self) -> None:
        try:
            if not self.config.output_dir:
                self.path = make_new_folder(self.path)
            for name in ("eval", "rollouts", "tokens", "checkpoints"):
                if not (self.path / name).is_dir():
                    (self.path / name).mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"output_dir: {self.path} cannot be created: {error.strerror}") from None
        self.checkpoints = Checkpoints(self.path, self.config.save_total_limit)
        self.lock = filelock.FileLock(self.path / "lock", timeout=1.0)  # the page holds it briefly to check for a run
        self.console = Console(self.path / "console.log")
        with write_errors(self.path / "lock"):
            try:
                self.lock.acquire()
            except filelock.Timeout:
                raise RunError(
                    f"{self.path} is in use by a run that is still active; to stop that run: touch {self.path / 'STOP'}"
                ) from None
            (self.path / "STOP").unlink(missing_ok=True)  # left by an earlier run
            self.console.__enter__()
        self.is_open = True

    def close(self) -> None:
        self.console.__exit__()
        self.lock.release()
        self.is_open = False

    def write(self, name: str, content: str | bytes) -> None:
        with write_errors(self.path / name):
            write_atomic(self.path / name, content)

    def write_settings(self, settings: dict, rewards_file: Path, step: int) -> None:
        """Write the settings, and copy the reward file with the modules in its folder that it imports.

        Back up existing files that differ, as *_until_step_NNNNNN.
        """
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
        files = {"rewards.py": rewards_file.read_bytes(), "config.yaml": text}
        for module in modules_beside(rewards_file):
            name = str(module.relative_to(rewards_file.parent))
            if name in files and module != rewards_file:
                raise ConfigError(
                    f"rewards_file: {rewards_file.name} imports {module}, but in the run folder {name} is the copy of "
                    f"{rewards_file.name}: rename {module.name}"
                )
            files[name] = module.read_bytes()
        for name, content in files.items():
            path = self.path / name
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            backup = path.with_stem(f"{path.stem}_until_step_{step:06d}")
            if path.exists() and step and not backup.exists() and path.read_bytes() != content:
                self.write(backup.name, path.read_bytes())
            self.write(name, content)

    def append_metrics(self, metrics: dict) -> None:
        """Append a line to metrics.jsonl in one write, so that readers see whole lines, and sync it."""
        path = self.path / "metrics.jsonl"
        with write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_rollouts(self, step: int, episodes: list[Episode]) -> None:
        """Write every completion of a step with its rewards, verdict and mean advantage."""
        self.write(f"rollouts/{step:06d}.jsonl", to_jsonl([describe_episode(e, self.config) for e in episodes]))

    def write_tokens(self, step: int, tokens: dict) -> None:
        self.write(f"tokens/{step:06d}.json", to_json(tokens) + "\n")

    def write_evaluation(self, name: str, evaluation: Evaluation) -> None:
        self.write(f"eval/{name}.jsonl", to_jsonl(evaluation.lines()))

    def write_failed(self, error: RewardError, rewards: Rewards) -> RewardError:
        """Append the completions on which a reward function failed to failed.jsonl.

        Returns:
            The error, with a command that reproduces it.
        """
        path = self.path / "failed.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(to_jsonl([describe_completion(c) | {"row": dict(c.row)} for c in error.completions]))
        except OSError as problem:
            return RewardError(f"{error}. ({describe_write_error(path, problem)})")
        is_default = rewards.path == Path("rewards.py").resolve()
        script = "rewards.py" if is_default else f"-m grading self-test {shlex.quote(str(rewards.path))}"
        return RewardError(f"{error}. To reproduce it: python {script} --rescore {shlex.quote(str(path))}")

    # --- resuming

    def history(self) -> list[dict]:
        """Return the metrics of each step, with NaN in place of null."""
        lines = read_jsonl(self.path / "metrics.jsonl")
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def evaluations(self) -> dict[int, Evaluation]:
        """Return the evaluations by step, in order, without eval/after.jsonl. Step 0 is after the cold start, if any."""
        files = {evaluation_step(file): file for file in sorted(self.path.glob("eval/*.jsonl"))}
        return {step: Evaluation.from_lines(read_jsonl(files[step])) for step in sorted(files.keys() - {None})}

    def check_resumable(self) -> None:
        """Raise ConfigError if the run has finished or its checkpoints are missing, unless --accept-changes is set."""
        summary = {}
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        num_steps = len(self.metrics_lines())
        if summary.get("finished") and not self.config.accept_changes:
            option = "--max-steps N" if num_steps >= self.config.max_steps else "--early-stopping 0"
            raise ConfigError(
                f"resume: {self.path} has finished at step {num_steps}. To continue it, add {option} --accept-changes"
            )
        if not self.checkpoints.all() and not self.config.accept_changes and 0 < self.config.save_steps < num_steps:
            raise ConfigError(
                f"resume: {self.path} has logs of {num_steps} steps but no checkpoint. To restart it from step 1 and "
                "delete these logs, add --accept-changes"
            )

    def metrics_lines(self) -> list[bytes]:
        """Return the complete lines of metrics.jsonl; a crash can truncate the last line."""
        path = self.path / "metrics.jsonl"
        return (
            [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            if path.exists()
            else []
        )

    def base_evaluation(self) -> Evaluation:
        """Return the evaluation of the model before any training."""
        return Evaluation.from_lines(read_jsonl(self.evaluation_file(0)))

    def check_complete(self, step: int, num_questions: int) -> None:
        """Raise ConfigError if metrics of steps up to this one, or answers of their evaluations, are missing."""
        lines = self.metrics_lines()
        problem = ""
        if len(lines) < step:
            problem = f"{self.path / 'metrics.jsonl'} has {len(lines)} steps, but the checkpoint is of step {step}"
        steps = [json.loads(line)["step"] for line in lines[:step] if b'"eval/accuracy"' in line]
        files = [self.evaluation_file(0)] + [self.path / "eval/cold_start.jsonl"] * (self.config.sft_data is not None)
        for file in [*files, *map(self.evaluation_file, steps)]:
            num_lines = file.read_bytes().count(b"\n") if file.exists() else 0
            if num_lines != num_questions:
                problem = f"{file} has {num_lines} of {num_questions} questions"
        if problem:
            raise ConfigError(f"resume: {problem}: restore the file, or resume from an older checkpoint")

    def rewind(self, step: int, restart: bool) -> None:
        """Remove the files and log lines of later steps, or all of them to restart the run.

        If a finished run is continued, its final evaluation becomes the evaluation of its last step.
        """
        with write_errors(self.path):
            after = self.path / "eval/after.jsonl"
            is_last = self.checkpoints.all()[-1:] == [self.checkpoints.folder(step)]
            if after.exists() and is_last and step < self.config.max_steps:
                after.replace(self.evaluation_file(step))
            after.unlink(missing_ok=True)
            self.checkpoints.drop_after(step)  # first: the older checkpoint needs none of the files removed below
            if (self.path / "metrics.jsonl").exists():
                size = sum(map(len, self.metrics_lines()[:step]))
                os.truncate(self.path / "metrics.jsonl", size)
            for file in [*self.path.glob("rollouts/*.jsonl"), *self.path.glob("tokens/*.json")]:
                if file.stem.isdigit() and int(file.stem) > step:
                    file.unlink()
            for file in self.path.glob("eval/*.jsonl"):
                if (evaluation_step(file) or 0) > step or restart:
                    file.unlink()
            if restart:
                (self.path / "summary.json").unlink(missing_ok=True)

    def evaluation_file(self, step: int) -> Path:
        return self.path / (f"eval/step_{step:06d}.jsonl" if step else "eval/before.jsonl")


def make_new_folder(path: Path) -> Path:
    """Create a folder and return its path, with a number appended if it exists (of a run begun in the same second)."""
    for candidate in itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate


def evaluation_step(file: Path) -> int | None:
    """Return the step of eval/before.jsonl and eval/cold_start.jsonl (0) or eval/step_000050.jsonl; None for
    eval/after.jsonl (the last step).
    """
    if file.stem in ("before", "cold_start"):
        return 0
    return int(file.stem[5:]) if file.stem.startswith("step_") and file.stem[5:].isdigit() else None


def describe_completion(completion: Completion) -> dict:
    """Return the fields of a line in rollouts/ that are needed, with the data row, to score a completion again."""
    turns = [{"text": turn.text, "reply": turn.reply} for turn in completion.turns]
    return ({"turns": turns} if turns else {}) | {
        "step": completion.step,
        "prompt_id": completion.row["id"],
        "task": completion.row["task"],
        "prompt": completion.prompt,
        "completion": completion.text,
        "finish_reason": "length" if completion.truncated else "stop",
        "tokens": completion.tokens,
    }


def describe_episode(episode: Episode, config: Config) -> dict:
    """Return a line of rollouts/. `advantage` is None if dynamic_sampling left the episode out of training."""
    score = episode.score
    line = describe_completion(episode.completion) | {
        "reward": score.total,
        "rewards": score.parts,
        "metrics": score.metrics,
        "verdict": score.verdict,
        "reasons": score.reasons,
        "advantage": None if episode.advantages is None else episode.advantages.mean().item(),
    }
    if score.extra:
        line["extra"] = score.extra
    if config.control != "none" or config.missing_eos_penalty or config.soft_punish_cache:
        line["learned_reward"] = episode.reward
    return line
