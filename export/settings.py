"""The settings of `python export.py`, and what it exports: a checkpoint with its run, found without loading a model."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import load_questions
from export.gguf import CONVERTED_TYPES, QUANTIZED_TYPES
from grading import Rewards, load_rewards
from rl.config import Config, ConfigError
from rl.run.read_config import read_yaml


@dataclass
class Settings:
    path: str  # a run folder (its last checkpoint), one of its checkpoints, or any folder with a LoRA saved by peft
    gguf: Literal[CONVERTED_TYPES + QUANTIZED_TYPES] | None = None  # also write a GGUF file of this type
    llama_cpp: str | None = None  # its folder; default: the PATH, ./llama.cpp, ~/llama.cpp, ~/.unsloth/llama.cpp
    eval_questions: int = 402  # number of held-out questions to answer at most; 0: none
    base_model: str | None = None  # the 16-bit base model, if it has moved since the run or the run's was quantized
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    output_dir: str | None = None  # default: export/ in the run folder, or in the folder of the LoRA
    push_to_hub: str | None = None  # USER/NAME: upload the merged model to the Hugging Face Hub
    public: bool = False  # make the uploaded repository public


@dataclass
class Source:
    """What is exported."""

    checkpoint: Path  # folder of the saved LoRA
    run: Path | None  # the run folder that it is in, if any
    config: Config  # settings of the run; without a run only `model` is meaningful

    @property
    def state(self) -> dict:
        """trainer_state.json of the checkpoint; only a run's checkpoint has one."""
        return json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def find_source(path: Path) -> Source:
    """The checkpoint that a path names, with its run and settings. Raises ConfigError if there is none."""
    checkpoint = find_checkpoint(path)
    run = checkpoint.parent.parent if len(checkpoint.parts) > 1 else checkpoint.absolute().parent.parent
    if (run / "config.yaml").is_file():
        return Source(checkpoint, run, read_yaml(str(run / "config.yaml")))
    try:
        saved = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}/adapter_config.json cannot be read: {error}") from None
    return Source(checkpoint, None, Config(model=saved.get("base_model_name_or_path") or "(not named)"))


def find_checkpoint(path: Path) -> Path:
    """The folder of the LoRA that a run folder, checkpoints/best or the folder itself names."""
    pointer = path if path.name in ("last", "best") else path / "checkpoints/last"
    if pointer.is_file():
        path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{path} has no checkpoint: this run has saved nothing")
    runs = [str(file.parent) for folder in (Path("runs"), path.parent) for file in folder.glob("*/config.yaml")]
    near = difflib.get_close_matches(str(path), runs, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "give runs/NAME, or a folder like runs/NAME/checkpoints/step_000045"
    raise ConfigError(f"{path} is neither the folder of a run nor that of a saved LoRA; {hint}")


def load_held_out(source: Source, count: int) -> tuple[list[dict], Rewards | None]:
    """At most `count` of the run's held-out questions, and its rewards; nothing without a run."""
    if count <= 0 or not source.run:
        return [], None
    config, file = source.config, str(source.run / "rewards.py")
    rewards = load_rewards(file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps)
    _, rows, _ = load_questions(config)
    return rows[:: -(-len(rows) // count)], rewards
