"""Checkpoints: all that a run needs to continue as if it had never been stopped.

checkpoints/
  last, best                      the names of the newest one and of the one with the highest held-out accuracy
  step_000050/
    adapter_model.safetensors ... the LoRA with its tokenizer and card, as peft and others load it
    trainer_state.json            the step, what the run was made with, its last evaluation
    trainer_state.pt              the training state: optimizers, critic, random states (torch.load with weights_only)
    SHA256SUMS                    of the files beside it, as `sha256sum -c SHA256SUMS` reads it

A checkpoint is written beside its place, synced, and renamed: it is whole or it is not there.
"""

import contextlib
import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError

from grading.base import shorten
from rl.config import Config, ConfigError, RunError
from rl.model.oom import AUTO_SHRUNK, retry_on_oom
from rl.model.policy import Policy, Question, reloaded_adapter, save_adapter
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout
from rl.run.files import describe_write_error, fsync_path, sha256, write_atomic, write_errors

FORMAT = 2  # of trainer_state.json and trainer_state.pt
# Settings that cannot change in the middle of a run.
FIXED = ("model adapter load_in_4bit lora_r lora_alpha algorithm critic optim seed runs_on held_out").split()
# Compared by effect (file hash, resolved dtype), not by value.
COMPARED_BY_HASH = ("rewards_file device dtype train_data eval_data train_questions eval_questions columns").split()


@dataclass
class Checkpoint:
    """A checkpoint that has been read."""

    folder: Path
    step: int
    meta: dict  # trainer_state.json
    state: dict  # trainer_state.pt


class Checkpoints:
    """The checkpoints of one run folder. keep: the number of newest ones that stay, beside the best; 0 keeps all."""

    def __init__(self, run: Path, keep: int):
        self.run = run
        self.path = run / "checkpoints"
        self.keep = keep

    def folder(self, step: int) -> Path:
        return self.path / f"step_{step:06d}"

    def save(self, step: int, policy: Policy, card: str, meta: dict, state: dict, best: int) -> Path:
        """Write the checkpoint of a step, replacing an existing one. best: the step of the best evaluation so far.

        Raises RunError if it cannot be written.
        """
        folder = self.folder(step)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        replaced = folder.with_name(f"{folder.name}.replaced")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            save_adapter(policy, unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
            meta = {"format": FORMAT, "step": step} | meta
            text = json.dumps(meta, indent=2, default=str) + "\n"
            (unfinished / "trainer_state.json").write_text(text, encoding="utf-8")
            torch.save(state, unfinished / "trainer_state.pt")
            files = [
                file for file in sorted(unfinished.iterdir()) if file.name != "README.md"
            ]  # a person may edit the card
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
            (unfinished / "SHA256SUMS").write_text(sums, encoding="utf-8")
            for file in (*unfinished.iterdir(), unfinished):
                fsync_path(file)
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            fsync_path(self.path)
            self.mark(step, best)
            shutil.rmtree(replaced, ignore_errors=True)
            self.prune()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunError(describe_write_error(folder, error)) from error
        return folder

    def mark(self, last: int, best: int) -> None:
        """Write the names of these steps' checkpoints, if they exist, into checkpoints/last and checkpoints/best."""
        for name, step in (("last", last), ("best", best)):
            if self.folder(step).is_dir():
                write_atomic(self.path / name, self.folder(step).name + "\n")
            else:
                (self.path / name).unlink(missing_ok=True)

    def marked(self, name: str) -> Path | None:
        """The checkpoint that checkpoints/NAME names, if it exists."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            folder = self.path / (self.path / name).read_text(encoding="utf-8").strip()
            return folder if folder in self.all() else None

    def all(self) -> list[Path]:
        """Every checkpoint, the oldest first."""
        return sorted(folder for folder in self.path.glob("step_*") if folder.name[5:].isdigit())

    def prune(self) -> None:
        """Remove old checkpoints, beyond the newest `keep` and the best."""
        best = self.marked("best")
        for folder in self.all()[: -self.keep] if self.keep else ():
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)

    def repair(self) -> None:
        """Finish or undo a save that was killed."""
        for replaced in self.path.glob("step_*.replaced"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))
        for left in [*self.path.glob("*.replaced"), *self.path.glob("*.unfinished")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: these steps will be made again."""
        for folder in reversed(self.all()):
            if folder > self.folder(step):
                shutil.rmtree(folder)

    def to_resume(self, named: Path, accept_changes: bool) -> Path | None:
        """The newest checkpoint if `named` is the run folder, else the one named; None if there is none yet.

        Raises ConfigError if there is no such checkpoint, or if intact later ones would be lost.
        """
        with write_errors(self.path):
            self.repair()
        folders = self.all()
        if named.resolve() == self.run.resolve():
            return folders[-1] if folders else None
        chosen = next((folder for folder in folders if folder.resolve() == named.resolve()), None)
        if not chosen:
            names = ", ".join(f.name for f in folders) or "none yet"
            raise ConfigError(f"resume: there is no checkpoint {named}; there are {names}")
        later = [folder.name for folder in folders if folder > chosen and not damage(folder)]
        if later and not accept_changes:
            raise ConfigError(
                f"resume: {', '.join(later)} came after {chosen.name} and would be lost, with the logs of these steps: add "
                "--accept-changes if that is wanted, or copy the run folder"
            )
        return chosen

    def read(self, folder: Path) -> Checkpoint:
        """Read a checkpoint, once every file in it has proved whole. Raises ConfigError if one has not."""
        if problem := damage(folder):
            raise ConfigError(f"resume: {folder} cannot be used: {problem}; {self.older_than(folder)}")
        meta = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT:
            raise ConfigError(
                f"resume: {folder} was written by another version of Ponder, in another format; to begin a new run with its "
                f"LoRA: --adapter {folder}"
            )
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(folder, meta["step"], meta, state)

    def older_than(self, folder: Path) -> str:
        """Advice if a checkpoint is damaged: the newest older one that is intact."""
        for other in reversed([other for other in self.all() if other < folder]):
            if not damage(other):
                return f"the one before it can: python train.py --resume {other}"
        return "there is no older one that can: start a new run"

    def check_same(self, checkpoint: Checkpoint, made: dict, accept_changes: bool) -> list[str]:
        """Compare what the run is made with now and was made with then.

        Args:
            made: from `made_with`, and once it is known, the model's fingerprint.

        Returns:
            Notes on accepted changes.

        Raises:
            ConfigError: something changed that must not, or without --accept-changes.
        """
        then = checkpoint.meta["made"]
        folder = checkpoint.folder
        changed = {
            name: f"{name} {shorten(str(old), 40)} -> {shorten(str(made['config'][name]), 40)}"
            for name, old in then["config"].items()
            if name in made["config"] and name not in COMPARED_BY_HASH and made["config"][name] != old
        }
        if made["runs_on"] != then["runs_on"]:
            changed["runs_on"] = f"it ran on {then['runs_on']}, and would now on {made['runs_on']}"
        if made["held_out"] != then["held_out"]:
            changed["held_out"] = "the held-out questions are others"
        if fixed := [text for name, text in changed.items() if name in FIXED]:
            raise ConfigError(
                f"resume: {'; '.join(fixed)}: this cannot change in the middle of a run; to begin a new one with its LoRA: "
                f"--adapter {folder}"
            )
        if made.get("model", then["model"]) != then["model"]:
            raise ConfigError(
                f"resume: {folder} belongs to another base model, or reference adapter, than {made['config']['model']} is "
                "now: put that one back, or start a new run"
            )
        texts = list(changed.values())
        if made["rewards"] != then["rewards"]:
            copies = [str(copy) for copy in self.run.glob("rewards*.py") if sha256(copy) == then["rewards"]]
            hint = f" (its copy: {copies[0]})" if copies else ""
            texts.append(f"{made['config']['rewards_file']} is not what the run was scored with{hint}")
        if made["questions"] != then["questions"]:
            texts.append("the training questions are others")
        if texts and not accept_changes:
            raise ConfigError(
                f"resume: since {folder.name}: {'; '.join(texts)}. To continue with the changes, add --accept-changes; "
                "otherwise undo them"
            )
        return [f"changed since {folder.name}: {text}" for text in texts]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if all of them are as they were written."""
    try:
        return find_damage(folder)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def find_damage(folder: Path) -> str | None:
    """As `damage`; raises OSError if a file cannot be read."""
    if not (folder / "SHA256SUMS").is_file():
        if not (folder / "trainer_state.pt").exists() and (folder / "adapter_model.safetensors").exists():
            return f"it holds the LoRA alone, without the optimizer (to begin a new run with it: --adapter {folder})"
        return "it has no SHA256SUMS"
    sums = {}
    for line in (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        sums[name] = expected
    present = {file.name for file in folder.iterdir()} - {"SHA256SUMS"}
    for name in sorted({"trainer_state.json", "trainer_state.pt", "adapter_model.safetensors"} | set(sums)):
        if name not in present:
            return f"{name} is missing"
        if name not in sums:
            return f"SHA256SUMS does not list {name}"
        if sha256(folder / name) != sums[name]:
            return f"{name} has changed since it was written, or is cut short"
    return None


def check_saved(policy: Policy, folder: Path, questions: list[Question], config: Config) -> tuple[int, int]:
    """Compare greedy answers of the policy in memory with those of its LoRA read back from `folder`.

    Returns:
        The number of questions, and how many of them the reference answers differently.

    Raises:
        RunError: the saved LoRA answers differently.
    """
    prompts = [question.prompt_ids for question in questions[:: max(1, len(questions) // 16)]]

    def attempt() -> list[Episode]:
        generator = torch.Generator(policy.device)
        limit = config.max_completion_length
        return rollout(policy, prompts, 1, limit, Sampling(0), generator, config.rollout_batch_size)

    def greedy_answers() -> list[list[int]]:
        episodes = retry_on_oom(attempt, config, "rollout_batch_size", requested=len(prompts), minimum=1)
        return [episode.completion_ids for episode in episodes]

    in_memory = greedy_answers()
    with reloaded_adapter(policy, folder):
        if greedy_answers() != in_memory:
            raise RunError(f"{folder}, read back, answers otherwise than the policy in memory: do not use it")
    with policy.reference():
        return len(prompts), sum(a != b for a, b in zip(in_memory, greedy_answers(), strict=True))


# --- what a checkpoint is compared by, and the parts of the state that have no owner


def made_with(settings: dict, rewards_file: Path, train_rows: list[dict], eval_rows: list[dict], runs_on: str) -> dict:
    """What a run is made with: settings, hashes of its reward file and questions, device and dtype, as JSON values."""
    return {
        "config": json.loads(json.dumps(settings, default=str)),
        "rewards": sha256(rewards_file),
        "questions": hash_rows(train_rows),
        "held_out": hash_rows(eval_rows),
        "runs_on": runs_on,
    }


def hash_rows(rows: list[dict]) -> str:
    sha = hashlib.sha256()
    for row in rows:  # non-JSON values: hash the type only, repr() may contain an address
        sha.update(json.dumps(row, default=lambda value: type(value).__name__, sort_keys=True).encode())
    return sha.hexdigest()


def fingerprint(policy: Policy) -> str:
    """A hash of the base model and the frozen reference LoRA: shapes and weights; samples of large ones, without NF4's bytes."""
    sha = hashlib.sha256()
    for name, p in policy.model.named_parameters():
        if ".default." in name or ".critic." in name:  # trained
            continue
        sha.update(f"{name.replace('.base_layer', '')} {p.dtype.is_floating_point}".encode())
        if p.dtype.is_floating_point:
            sample = p.detach().flatten()[:: 1 + p.numel() // 2**16]
            sha.update(f"{tuple(p.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return sha.hexdigest()


def shrunk_settings(config: Config) -> dict[str, int]:
    """The settings that are halved when memory runs out, as they are now."""
    return {name: getattr(config, name) for name in AUTO_SHRUNK}


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch: reward functions may use them."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomState:
    """The random states of python, numpy and torch, which reward functions may use, and the generator of the roll-out."""

    def __init__(self, generator: torch.Generator, seed: int):
        self.generator = generator
        seed_all(seed)

    def state_dict(self) -> dict:
        kind, keys, *rest = numpy.random.get_state()
        state = {
            "generator": self.generator.get_state(),
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        version, keys, gauss = state["python"]
        random.setstate((version, tuple(keys), gauss))
        numpy.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(state["torch"])
        self.generator.set_state(state["generator"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
