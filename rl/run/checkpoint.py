"""Checkpoints: all that a run needs to go on as if it had never been stopped.

checkpoints/
  last, best                      the names of the newest one and of the one with the highest held-out accuracy
  step_000050/
    adapter_model.safetensors ... the LoRA with its tokenizer and card, as peft and others load it
    trainer_state.json            the step, what the run was made with, counters, the sizes of the logs
    trainer_state.pt              optimizers, critic, random states (torch.load with weights_only)
    SHA256SUMS                    of the files beside it, as `sha256sum -c SHA256SUMS` reads it

A checkpoint is written beside its place, brought to the disk, and renamed: it is whole or it is not there.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError

from rl.config import Config, ConfigError, RunError
from rl.model.oom import HALVED
from rl.model.policy import Policy, save_adapter

FORMAT = 1  # of trainer_state.json and trainer_state.pt
# Settings that the state of a run depends on.
FIXED = (
    "model", "adapter", "load_in_4bit", "lora_r", "lora_alpha", "algorithm", "critic", "optim", "seed", "runs_on", "held_out",
)  # fmt: skip
# Those of which not the setting counts but what it comes to.
TOLD_BY_DIGESTS = (
    "rewards_file", "device", "dtype", "train_data", "eval_data", "train_questions", "eval_questions", "columns",
)  # fmt: skip


class Checkpoints:
    """Those of one run folder. keep: so many newest ones stay, and the best; 0: all."""

    def __init__(self, run: Path, keep: int):
        self.run, self.path, self.keep = run, run / "checkpoints", keep

    def folder(self, step: int) -> Path:
        return self.path / f"step_{step:06d}"

    def save(self, step: int, policy: Policy, card: str, state: dict, tensors: dict, best: int) -> Path:
        """Write the checkpoint of a step, in place of one that is there. best: the step of the best evaluation so far.

        Raises RunError where it cannot be written.
        """
        folder = self.folder(step)
        unfinished, replaced = (folder.with_name(f"{folder.name}.{kind}") for kind in ("unfinished", "replaced"))
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            save_adapter(policy, unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
            state = {"format": FORMAT, "step": step} | state
            text = json.dumps(state, indent=2, default=str) + "\n"
            (unfinished / "trainer_state.json").write_text(text, encoding="utf-8")
            torch.save(tensors, unfinished / "trainer_state.pt")
            # A person may edit the card.
            files = [file for file in sorted(unfinished.iterdir()) if file.name != "README.md"]
            lines = [f"{digest(file)}  {file.name}\n" for file in files]
            (unfinished / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
            for file in (*unfinished.iterdir(), unfinished):
                bring_to_disk(file)
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            bring_to_disk(self.path)
            self.mark(step, best)
            shutil.rmtree(replaced, ignore_errors=True)
            self.prune()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunError(cannot_write(folder, error)) from error
        return folder

    def mark(self, last: int, best: int) -> None:
        """Let checkpoints/last and checkpoints/best name these steps', where there are such. Raises OSError."""
        for name, step in (("last", last), ("best", best)):
            if self.folder(step).is_dir():
                write_whole(self.path / name, self.folder(step).name + "\n")
            else:
                (self.path / name).unlink(missing_ok=True)

    def marked(self, name: str) -> Path | None:
        """The checkpoint that checkpoints/NAME names, if it is there."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            folder = self.path / (self.path / name).read_text(encoding="utf-8").strip()
            return folder if folder in self.all() else None

    def all(self) -> list[Path]:
        """Every checkpoint, the oldest first."""
        return sorted(folder for folder in self.path.glob("step_*") if folder.name[5:].isdigit())

    def prune(self) -> None:
        """Remove those that need not be kept."""
        best = self.marked("best")
        for folder in self.all()[: -self.keep] if self.keep else ():
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)

    def repair(self) -> None:
        """Finish or undo what a save had begun when it was killed."""
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

    def to_resume(self, named: Path, drop_later: bool) -> Path | None:
        """The newest checkpoint, or the one that is named; None where there is none yet.

        Raises ConfigError where later ones are whole and would be dropped, unless that is wanted.
        """
        self.repair()
        folders = self.all()
        if named.resolve() == self.run.resolve():
            return folders[-1] if folders else None
        chosen = next((folder for folder in folders if folder.resolve() == named.resolve()), None)
        if not chosen:
            raise ConfigError(f"resume: there is no checkpoint {named}; there are {', '.join(f.name for f in folders)}")
        later = [folder.name for folder in folders if folder > chosen and not damage(folder)]
        if later and not drop_later:
            raise ConfigError(
                f"resume: {', '.join(later)} came after {chosen.name} and would be lost, with the logs of these steps: add "
                "--accept-changes if that is wanted, or copy the run folder"
            )
        return chosen

    def read(self, folder: Path) -> "Saved":
        """What a checkpoint holds, once every file in it has proved whole. Raises ConfigError where one has not."""
        if problem := damage(folder):
            raise ConfigError(f"resume: {folder} cannot be used: {problem}; {self.older_than(folder)}")
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise ConfigError(
                f"resume: {folder} was written by another version of Ponder, in another format; to begin a new run with its "
                f"LoRA: --adapter {folder}"
            )
        tensors = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        return Saved(folder, state["step"], state, tensors)

    def older_than(self, folder: Path, model: str | None = None) -> str:
        """What to do where a checkpoint cannot be used: name the newest older one that can."""
        for other in reversed([other for other in self.all() if other < folder]):
            if not damage(other) and (model is None or self.read(other).state["made"]["model"] == model):
                return f"the one before it can: python train.py --resume {other}"
        return "there is no older one that can: start a new run"

    def check_same(self, saved: "Saved", made: dict, accept: bool) -> list[str]:
        """Notes on what the run is made with now and was not then. Raises ConfigError where it cannot or may not be so.

        made: as by `made_with`, and where it is known, the model's fingerprint.
        """
        then = saved.state["made"]
        changed = {
            name: f"{name} {short(old)} -> {short(made['config'][name])}"
            for name, old in then["config"].items()
            if name in made["config"] and name not in TOLD_BY_DIGESTS and made["config"][name] != old
        }
        if made["runs_on"] != then["runs_on"]:
            changed["runs_on"] = f"it ran on {then['runs_on']}, and would now on {made['runs_on']}"
        if made["held_out"] != then["held_out"]:
            changed["held_out"] = "the held-out questions are others"
        if fixed := [text for name, text in changed.items() if name in FIXED]:
            raise ConfigError(
                f"resume: {'; '.join(fixed)}: this cannot change in the middle of a run; to begin a new one with its LoRA: "
                f"--adapter {saved.folder}"
            )
        if made.get("model", then["model"]) != then["model"]:
            raise ConfigError(
                f"resume: {saved.folder} belongs to another base model, or reference adapter, than {made['config']['model']} is "
                f"now; {self.older_than(saved.folder, made['model'])}"
            )
        texts = list(changed.values())
        if made["rewards"] != then["rewards"]:
            copies = [str(copy) for copy in self.run.glob("rewards*.py") if digest(copy) == then["rewards"]]
            hint = f" (its copy: {copies[0]})" if copies else ""
            texts.append(f"{made['config']['rewards_file']} is not what the run was scored with{hint}")
        if made["questions"] != then["questions"]:
            texts.append("the training questions are others")
        if texts and not accept:
            raise ConfigError(
                f"resume: since {saved.folder.name}: {'; '.join(texts)}. To go on so, add --accept-changes; else put them back"
            )
        return [f"changed since {saved.folder.name}: {text}" for text in texts]


@dataclass
class Saved:
    """A checkpoint that has been read."""

    folder: Path
    step: int
    state: dict  # trainer_state.json
    tensors: dict  # trainer_state.pt


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all of them are as they were written."""
    try:
        return _damage(folder)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _damage(folder: Path) -> str | None:
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
        if digest(folder / name) != sums[name]:
            return f"{name} has changed since it was written, or is cut short"
    return None


# --- what the state is made of


class Position:
    """Where a run stands: everything that its steps change, apart from the LoRA and what is in the logs.

    order: of the questions. generator: of the sampling. teacher, updater, rewards, config: those of the run.
    """

    def __init__(self, order, generator: torch.Generator, rewards, teacher, updater, config: Config):
        self.order, self.generator, self.rewards = order, generator, rewards
        self.teacher, self.updater, self.config = teacher, updater, config

    def before_rollout(self) -> tuple[dict, dict]:
        """What a roll-out changes: counts and states, with which a step can be repeated as if it had not been begun."""
        counts = {"drawn": self.order.drawn, "scored": self.rewards.scored, "reward_errors": self.rewards.errors}
        return counts, {"random": random_states(), "generator": self.generator.get_state()}

    def after_update(self) -> tuple[dict, dict]:
        """What an update changes; and the settings that were halved where memory ran out."""
        halved = {name: getattr(self.config, name) for name in HALVED}
        return halved, {"updater": self.updater.state_dict(), "teacher": self.teacher.state_dict()}

    def restore(self, saved: Saved) -> None:
        """Go on from there. What was halved for want of memory stays so, unless it has been set anew."""
        state, tensors = saved.state, saved.tensors
        self.updater.load_state_dict(tensors["updater"])
        self.teacher.load_state_dict(tensors["teacher"])
        self.order.load_state_dict({"drawn": state["drawn"]})
        self.rewards.load_state_dict({"scored": state["scored"], "errors": state["reward_errors"]})
        for name in HALVED:
            if getattr(self.config, name) == state["made"]["config"][name]:
                setattr(self.config, name, state[name])
        self.generator.set_state(tensors["generator"])
        restore_random_states(tensors["random"])
        tensors.clear()  # they are large, and have been copied to where they belong


def made_with(config: dict, rewards_file: Path, train_rows: list[dict], eval_rows: list[dict], runs_on: str) -> dict:
    """What a run is made with: its settings, digests of its reward file and its questions, device and dtype. As JSON has it."""
    return {
        "config": json.loads(json.dumps(config, default=str)), "rewards": digest(rewards_file),
        "questions": digest_rows(train_rows), "held_out": digest_rows(eval_rows), "runs_on": runs_on,
    }  # fmt: skip


def digest_rows(rows: list[dict]) -> str:
    found = hashlib.sha256()
    for row in rows:  # of what JSON does not know the kind alone: its text may hold an address
        found.update(json.dumps(row, default=lambda value: type(value).__name__, sort_keys=True).encode())
    return found.hexdigest()


def seed_all(seed: int) -> None:
    """The generators that reward functions may use; everything else here has generators of its own."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict:
    """Those of python, numpy and torch, the GPU's included."""
    kind, keys, *rest = numpy.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def fingerprint(policy: Policy) -> str:
    """Of the base model, and the frozen LoRA that is the reference: dimensions, and the weights that are numbers, of large
    ones samples (NF4's bytes are left out)."""
    found = hashlib.sha256()
    for name, p in policy.model.named_parameters():
        if ".default." in name or ".critic." in name:  # what is trained
            continue
        found.update(f"{name.replace('.base_layer', '')} {p.dtype.is_floating_point}".encode())
        if p.dtype.is_floating_point:
            sample = p.detach().flatten()[:: 1 + p.numel() // 2**16]
            found.update(f"{tuple(p.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return found.hexdigest()


def short(value) -> str:
    """A setting's value for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- files


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it into it, so that no reader and no crash meets half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def bring_to_disk(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows syncs what it may write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def cannot_write(path: Path, error: Exception) -> str:
    """One line for a file that could not be written."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    problem = error.strerror if isinstance(error, OSError) and error.strerror else first_line
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path.parent).free < 2**20:
            problem = "the disk is full: make room"
    return f"{path} cannot be written: {problem}"
