"""Checkpoints: the full state of a run, so that a resumed run gives the same result as an uninterrupted one.

checkpoints/
  last, best                      the names of the newest checkpoint and of the one with the highest held-out accuracy
  step_000050/
    adapter_model.safetensors ... the LoRA with its tokenizer and model card, in PEFT's format
    trainer_state.json            the step, the provenance of the run (settings and hashes), the last evaluation
    trainer_state.pt              the training state: optimizers, critic, random states (torch.load with weights_only)
    SHA256SUMS                    checksums of these files; to verify them: sha256sum -c SHA256SUMS

A checkpoint is written to a temporary folder, synced to disk and renamed, so it is either complete or absent.
"""

import contextlib
import hashlib
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError

from grading.base import shorten
from grading.rewards.reward_file import modules_beside
from rl.config import Config, ConfigError, RunError
from rl.model.lora import reloaded_adapter, save_adapter
from rl.model.oom import AUTO_SHRUNK, retry_on_oom
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout
from rl.run.files import describe_write_error, fsync_path, sha256, write_atomic, write_errors

FORMAT = 3  # version of the format of trainer_state.json and trainer_state.pt
# Settings and other provenance that cannot change during a run.
FIXED = (
    "model adapter load_in_4bit lora_r lora_alpha algorithm critic optim seed runs_on held_out sft_data sft_epochs "
    "sft_learning_rate"
).split()
# Compared by effect (file hash, resolved dtype), not by value.
COMPARED_BY_HASH = ("rewards_file device dtype train_data eval_data train_questions eval_questions columns").split()


@dataclass
class Checkpoint:
    """The contents of a checkpoint in memory."""

    folder: Path
    step: int
    meta: dict  # the contents of trainer_state.json
    state: dict  # the contents of trainer_state.pt


class Checkpoints:
    """The checkpoints of a run folder. keep: the number of newest ones to keep in addition to the best; 0: all."""

    def __init__(self, run: Path, keep: int):
        self.run = run
        self.path = run / "checkpoints"
        self.keep = keep

    def folder(self, step: int) -> Path:
        return self.path / f"step_{step:06d}"

    def save(self, step: int, policy: Policy, card: str, meta: dict, state: dict, best: int) -> Path:
        """Write the checkpoint of a step, and replace an existing one. best: the step of the best evaluation so far.

        Raises RunError if the checkpoint cannot be written.
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
            # Users may edit the model card, so it has no checksum.
            files = [file for file in sorted(unfinished.iterdir()) if file.name != "README.md"]
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
        # torch and safetensors raise their own errors if the disk is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunError(describe_write_error(folder, error)) from error
        return folder

    def mark(self, last: int, best: int) -> None:
        """Write the names of the checkpoints of these steps to checkpoints/last and checkpoints/best, if they exist."""
        for name, step in (("last", last), ("best", best)):
            if self.folder(step).is_dir():
                write_atomic(self.path / name, self.folder(step).name + "\n")
            else:
                (self.path / name).unlink(missing_ok=True)

    def marked(self, name: str) -> Path | None:
        """Return the checkpoint named in the file checkpoints/NAME (last or best), or None if it does not exist."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            folder = self.path / (self.path / name).read_text(encoding="utf-8").strip()
            return folder if folder in self.all() else None

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        return sorted(folder for folder in self.path.glob("step_*") if folder.name[5:].isdigit())

    def prune(self) -> None:
        """Remove all checkpoints but the newest `keep` and the best."""
        best = self.marked("best")
        for folder in self.all()[: -self.keep] if self.keep else ():
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)

    def repair(self) -> None:
        """Complete or undo a save that was interrupted."""
        for replaced in self.path.glob("step_*.replaced"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))
        for leftover in [*self.path.glob("*.replaced"), *self.path.glob("*.unfinished")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which the resumed run repeats."""
        for folder in reversed(self.all()):
            if folder > self.folder(step):
                shutil.rmtree(folder)

    def choose(self, path: Path, accept_changes: bool) -> Path | None:
        """Return the checkpoint to resume from: the newest if `path` is the run folder, else the one at `path`.

        Returns None if the run has no checkpoint yet. Raises ConfigError if there is no checkpoint at `path`, or if
        newer intact checkpoints would be lost and `accept_changes` is False.
        """
        with write_errors(self.path):
            self.repair()
        folders = self.all()
        if path.resolve() == self.run.resolve():
            return folders[-1] if folders else None
        chosen = next((folder for folder in folders if folder.resolve() == path.resolve()), None)
        if not chosen:
            names = ", ".join(f.name for f in folders) or "none"
            raise ConfigError(f"resume: there is no checkpoint {path}; available checkpoints: {names}")
        newer = [folder.name for folder in folders if folder > chosen and not damage(folder)]
        if newer and not accept_changes:
            raise ConfigError(
                f"resume: checkpoints newer than {chosen.name} would be deleted, with the logs of their steps: "
                f"{', '.join(newer)}. To delete them, add --accept-changes; to keep them, copy the run folder first"
            )
        return chosen

    def read(self, folder: Path) -> Checkpoint:
        """Verify the files of a checkpoint and load them. Raises ConfigError if a file is damaged."""
        if problem := damage(folder):
            raise ConfigError(f"resume: {folder} cannot be used: {problem}. {self.suggest_older(folder)}")
        meta = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT:
            raise ConfigError(
                f"resume: {folder} was written in the format of another version of Ponder. To start a new run from its "
                f"LoRA: --adapter {folder}"
            )
        state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(folder, meta["step"], meta, state)

    def suggest_older(self, folder: Path) -> str:
        """Return advice for a damaged checkpoint: resume from the newest intact checkpoint before it."""
        for other in reversed([other for other in self.all() if other < folder]):
            if not damage(other):
                return f"To resume from the last intact checkpoint before it: python train.py --resume {other}"
        return "No older checkpoint is intact: start a new run"

    def check_provenance(self, checkpoint: Checkpoint, provenance: dict, accept_changes: bool) -> list[str]:
        """Compare the current settings, rewards, questions and model with those of the checkpoint.

        Args:
            provenance: From `run_provenance`, with the model's fingerprint once the model is loaded.

        Returns:
            Notes on accepted changes.

        Raises:
            ConfigError: If a fixed setting has changed, or a change was not accepted with --accept-changes.
        """
        saved = checkpoint.meta["made"]
        folder = checkpoint.folder
        changes = {
            name: f"{name} {shorten(str(old), 40)} -> {shorten(str(provenance['config'][name]), 40)}"
            for name, old in saved["config"].items()
            if name in provenance["config"] and name not in COMPARED_BY_HASH and provenance["config"][name] != old
        }
        if provenance["runs_on"] != saved["runs_on"]:
            changes["runs_on"] = f"device and dtype {saved['runs_on']} -> {provenance['runs_on']}"
        if provenance["held_out"] != saved["held_out"]:
            changes["held_out"] = "the held-out questions have changed"
        if fixed := [text for name, text in changes.items() if name in FIXED]:
            raise ConfigError(
                f"resume: {'; '.join(fixed)}: this cannot change during a run. To start a new run from the saved LoRA: "
                f"--adapter {folder}"
            )
        if provenance.get("model", saved["model"]) != saved["model"]:
            raise ConfigError(
                f"resume: the weights of {provenance['config']['model']} or of the reference adapter have changed "
                f"since {folder} was saved: restore the original weights, or start a new run"
            )
        texts = list(changes.values())
        if provenance["rewards"] != saved["rewards"]:
            copies = [str(copy) for copy in self.run.glob("rewards*.py") if sha256(copy) == saved["rewards"]]
            hint = f" (original: {copies[0]})" if copies else ""
            texts.append(f"{provenance['config']['rewards_file']} differs from the reward file of the run{hint}")
        for name, sha in saved.get("reward_modules", {}).items():
            if provenance["reward_modules"].get(name) != sha:
                texts.append(f"{name}, which the reward file imports, differs from {self.run / name}")
        if provenance["questions"] != saved["questions"]:
            texts.append("the training questions have changed")
        if texts and not accept_changes:
            raise ConfigError(
                f"resume: changed since {folder.name}: {'; '.join(texts)}. To resume with these changes, add "
                "--accept-changes; otherwise undo them"
            )
        return [f"changed since {folder.name}: {text}" for text in texts]


def damage(folder: Path) -> str | None:
    """Return a description of the first damaged file of a checkpoint; None if all files are intact."""
    try:
        return find_damage(folder)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def find_damage(folder: Path) -> str | None:
    """Check the files of a checkpoint for `damage`. Raises OSError if a file cannot be read."""
    if not (folder / "SHA256SUMS").is_file():
        if not (folder / "trainer_state.pt").exists() and (folder / "adapter_model.safetensors").exists():
            return f"it has only the LoRA, without the optimizer state (to start a new run from it: --adapter {folder})"
        return "SHA256SUMS is missing"
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
            return f"{name} is truncated, or has changed since it was written"
    return None


def check_saved(policy: Policy, folder: Path, questions: list[Question], config: Config) -> tuple[int, int]:
    """Compare greedy answers of the policy in memory and of its LoRA reloaded from `folder` on some questions.

    Returns:
        The number of questions compared, and the number of answers that differ from those of the reference.

    Raises:
        RunError: If the reloaded LoRA gives different answers.
    """
    prompts = [question.prompt_ids for question in questions[:: max(1, len(questions) // 16)]]
    policy = replace(policy, server=None)  # a server gives a request another answer in another batch

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
            raise RunError(
                f"{folder}: the saved LoRA, read back, gives different answers than the policy in memory: do not use it"
            )
    with policy.reference():
        return len(prompts), sum(a != b for a, b in zip(in_memory, greedy_answers(), strict=True))


# --- provenance, and random states


def run_provenance(
    settings: dict, rewards_file: Path, train_rows: list[dict], eval_rows: list[dict], runs_on: str
) -> dict:
    """Return settings, hashes of the reward files and the questions, device and dtype of a run, as JSON values."""
    return {
        "config": json.loads(json.dumps(settings, default=str)),
        "rewards": sha256(rewards_file),
        "reward_modules": {
            m.relative_to(rewards_file.parent).as_posix(): sha256(m) for m in modules_beside(rewards_file)
        },
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
    """Return a hash of the base model and the frozen reference LoRA.

    It covers names, shapes and weights. Large tensors are sampled, and the packed bytes of NF4 weights are left out.
    """
    sha = hashlib.sha256()
    for name, p in policy.model.named_parameters():
        if ".default." in name or ".critic." in name:  # trainable
            continue
        sha.update(f"{name.replace('.base_layer', '')} {p.dtype.is_floating_point}".encode())
        if p.dtype.is_floating_point:
            sample = p.detach().flatten()[:: 1 + p.numel() // 2**16]
            sha.update(f"{tuple(p.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return sha.hexdigest()


def shrunk_settings(config: Config) -> dict[str, int]:
    """Return the current values of the settings that are halved when memory runs out."""
    return {name: getattr(config, name) for name in AUTO_SHRUNK}


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch, whose generators reward functions may use."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomState:
    """The random states of python, numpy and torch, which reward functions may use, and of the roll-out's generator."""

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
