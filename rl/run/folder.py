"""The run folder: everything that a run leaves behind, in files that other programs read.

config.yaml  rewards.py  metrics.jsonl  rollouts/000012.jsonl  tokens/000012.json  eval/*.jsonl  checkpoints/
summary.json  curve.png  console.log  lock  and failed.jsonl, if a reward function has stopped the run
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
from rl.config import Config, ConfigError, RunError
from rl.evaluate import Evaluation
from rl.rollout import Episode
from rl.run.checkpoint import Checkpoints
from rl.run.files import describe_write_error, read_jsonl, to_json, to_jsonl, write_atomic, write_errors
from rl.run.process import Console

# What a run that was killed at its very start leaves; config.yaml makes it a run.
LEFTOVERS = set("eval rollouts tokens checkpoints lock console.log rewards.py rewards.py.unfinished".split())
LEFTOVERS.add("config.yaml.unfinished")


def choose_folder(config: Config, name: str) -> Path:
    """output_dir, or runs/NAME-TIME. Raises ConfigError if there is a run already: none is overwritten."""
    path = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume or not config.output_dir:
        return path
    if path.exists() and (not path.is_dir() or {file.name for file in path.iterdir()} - LEFTOVERS):
        hint = f", resume it with --resume {path}" if (path / "config.yaml").exists() else ""
        raise ConfigError(f"output_dir: {path} exists already: choose another{hint}, or remove it")
    return path


class RunFolder:
    """Writes and reads the files of one run. Every method raises RunError if a file cannot be written.

    `open` keeps other runs out of the folder, and copies the console into console.log; `close` ends both.
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
            raise ConfigError(f"output_dir: {self.path} cannot be made: {error.strerror}") from None
        self.checkpoints = Checkpoints(self.path, self.config.save_total_limit)
        self.lock = filelock.FileLock(self.path / "lock", timeout=1.0)  # the page holds it for a moment to look
        self.console = Console(self.path / "console.log")
        with write_errors(self.path / "lock"):
            try:
                self.lock.acquire()
            except filelock.Timeout:
                raise RunError(
                    f"{self.path} is in use by a run that is still running; to end it: touch {self.path / 'STOP'}"
                ) from None
            (self.path / "STOP").unlink(missing_ok=True)  # left from before
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
        """Copy what the run is made with; what it was made with up to this step stays beside it if it was different."""
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
        for name, content in {"rewards.py": rewards_file.read_bytes(), "config.yaml": text}.items():
            path = self.path / name
            before = path.with_stem(f"{path.stem}_until_step_{step:06d}")
            if path.exists() and step and not before.exists() and path.read_bytes() != content:
                self.write(before.name, path.read_bytes())
            self.write(name, content)

    def append_metrics(self, metrics: dict) -> None:
        """Add a line in one write, so that no reader meets half of it, and sync it."""
        path = self.path / "metrics.jsonl"
        with write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_rollouts(self, step: int, episodes: list[Episode]) -> None:
        """Every completion of a step, with its rewards, verdict and mean advantage."""
        self.write(f"rollouts/{step:06d}.jsonl", to_jsonl([describe_episode(e, self.config) for e in episodes]))

    def write_tokens(self, step: int, tokens: dict) -> None:
        self.write(f"tokens/{step:06d}.json", to_json(tokens) + "\n")

    def write_evaluation(self, name: str, evaluation: Evaluation) -> None:
        self.write(f"eval/{name}.jsonl", to_jsonl(evaluation.lines()))

    def write_failed(self, error: RewardError, rewards: Rewards) -> RewardError:
        """Add the completions on which a reward function failed to failed.jsonl. Returns the error, with a command to repeat it."""
        path = self.path / "failed.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(to_jsonl([describe_completion(c) | {"row": dict(c.row)} for c in error.completions]))
        except OSError as problem:
            return RewardError(f"{error}. ({describe_write_error(path, problem)})")
        is_default = rewards.path == Path("rewards.py").resolve()
        script = "rewards.py" if is_default else f"-m grading self-test {shlex.quote(str(rewards.path))}"
        return RewardError(f"{error}. To see it again: python {script} --rescore {shlex.quote(str(path))}")

    # --- resuming

    def history(self) -> list[dict]:
        """The metrics of each step so far, with nan in place of null."""
        lines = read_jsonl(self.path / "metrics.jsonl")
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def evaluations(self) -> dict[int, Evaluation]:
        """The evaluations in the folder by their steps, in order; without eval/after.jsonl."""
        files = {evaluated_at(file): file for file in self.path.glob("eval/*.jsonl")}
        return {step: Evaluation.from_lines(read_jsonl(files[step])) for step in sorted(files.keys() - {None})}

    def check_resumable(self) -> None:
        """Raise ConfigError if the run has finished, or its checkpoints are gone, unless changes are accepted."""
        summary = {}
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        logged = len(self.metrics_lines())
        if summary.get("finished") and not self.config.accept_changes:
            more = "--max-steps N" if logged >= self.config.max_steps else "--early-stopping 0"
            raise ConfigError(
                f"resume: {self.path} has finished, with step {logged}; to train on: {more} --accept-changes"
            )
        if not self.checkpoints.all() and not self.config.accept_changes and 0 < self.config.save_steps < logged:
            raise ConfigError(
                f"resume: {self.path} has {logged} steps in its logs, but no checkpoint; to begin from its first step, and "
                "lose these: --accept-changes"
            )

    def metrics_lines(self) -> list[bytes]:
        """The complete lines of metrics.jsonl; the last one may be cut short."""
        path = self.path / "metrics.jsonl"
        return (
            [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            if path.exists()
            else []
        )

    def check_complete(self, step: int, num_questions: int) -> None:
        """Raise ConfigError unless metrics and evaluations up to this step are as they were written."""
        lines = self.metrics_lines()
        problem = ""
        if len(lines) < step:
            problem = f"{self.path / 'metrics.jsonl'} has {len(lines)} steps, but had {step}"
        evaluated = [0] + [json.loads(line)["step"] for line in lines[:step] if b'"eval/accuracy"' in line]
        for number in evaluated if step else ():
            file = self.evaluation_file(number)
            found = file.read_bytes().count(b"\n") if file.exists() else 0
            if found != num_questions:
                problem = f"{file} has {found} of {num_questions} questions"
        if problem:
            raise ConfigError(f"resume: {problem}: put back what it was, or resume from an older checkpoint")

    def cut_back(self, step: int) -> None:
        """Remove what belongs to later steps. If more steps follow a finished run, its final evaluation becomes one among others."""
        with write_errors(self.path):
            after = self.path / "eval/after.jsonl"
            is_last = self.checkpoints.all()[-1:] == [self.checkpoints.folder(step)]
            if after.exists() and is_last and step < self.config.max_steps:
                after.replace(self.evaluation_file(step))
            after.unlink(missing_ok=True)
            self.checkpoints.drop_after(step)  # first: an older checkpoint does not miss what is removed below
            if (self.path / "metrics.jsonl").exists():
                size = sum(map(len, self.metrics_lines()[:step]))
                os.truncate(self.path / "metrics.jsonl", size)
            for file in [*self.path.glob("rollouts/*.jsonl"), *self.path.glob("tokens/*.json")]:
                if file.stem.isdigit() and int(file.stem) > step:
                    file.unlink()
            for file in self.path.glob("eval/*.jsonl"):
                if (evaluated_at(file) or 0) > step or step == 0:
                    file.unlink()
            if step == 0:
                (self.path / "summary.json").unlink(missing_ok=True)

    def evaluation_file(self, step: int) -> Path:
        return self.path / (f"eval/step_{step:06d}.jsonl" if step else "eval/before.jsonl")


def make_new_folder(path: Path) -> Path:
    """Make it, with a number behind it if another run has begun in the same second, or the clock was set back."""
    for other in itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            other.mkdir(parents=True)
            return other


def evaluated_at(file: Path) -> int | None:
    """The step of eval/before.jsonl or eval/step_000050.jsonl; None for eval/after.jsonl, whose step is the last."""
    if file.stem == "before":
        return 0
    return int(file.stem[5:]) if file.stem.startswith("step_") and file.stem[5:].isdigit() else None


def describe_completion(completion: Completion) -> dict:
    """The fields of a line in rollouts/ from which, with its data row, a completion can be scored again."""
    return {
        "step": completion.step,
        "prompt_id": completion.row["id"],
        "task": completion.row["task"],
        "prompt": completion.prompt,
        "completion": completion.text,
        "finish_reason": "length" if completion.truncated else "stop",
        "tokens": completion.tokens,
    }


def describe_episode(episode: Episode, config: Config) -> dict:
    """A line in rollouts/. advantage is null if dynamic_sampling left the episode out of learning."""
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
