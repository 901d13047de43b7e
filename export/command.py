"""The command `python export.py`: its settings, and the search for the checkpoint."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from data import load_questions
from export.gguf import CONVERTED_TYPES, QUANTIZED_TYPES, find_tools
from grading import load_rewards, sandbox
from grading.base import did_you_mean
from rl.config import ConfigError, RunError
from rl.run.read_config import read_yaml


@dataclass
class Settings:
    """Merge a trained LoRA into its 16-bit base model, for transformers, vLLM, llama.cpp and Ollama."""

    path: str  # run folder (its last checkpoint is exported), or the folder of a checkpoint
    gguf: Literal[CONVERTED_TYPES + QUANTIZED_TYPES] | None = None  # also write a GGUF file of this type
    llama_cpp: str | None = None  # llama.cpp folder; default: the PATH, ./llama.cpp, ~/llama.cpp, ~/.unsloth/llama.cpp
    eval_questions: int = 402  # maximum number of held-out questions to answer; 0: none
    base_model: str | None = None  # 16-bit base model, if it has moved since the run or the run used a quantized one
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPU if available
    push_to_hub: str | None = None  # USER/NAME: upload the merged model to the Hugging Face Hub
    public: bool = False  # make the uploaded repository public


def main(arguments: list[str]) -> None:
    """Run the command line. Raises ConfigError, DataError, RewardError or RunError with a one-line message."""
    settings = tyro.cli(tyro.conf.PositionalRequiredArgs[Settings], args=arguments, prog="export.py")
    checkpoint = find_checkpoint(Path(settings.path))
    run = checkpoint.parent.parent
    config = read_yaml(str(run / "config.yaml"))
    tools = find_tools(settings.gguf, settings.llama_cpp) if settings.gguf else None
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)  # forks, so it must precede the import of torch
    rows = []
    if settings.eval_questions > 0:
        file = str(run / "rewards.py")
        rewards = load_rewards(file, config.reward_funcs, config.reward_weights, config.reward_errors, config.max_steps)
        _, rows, _ = load_questions(config)
        rows = rows[:: -(-len(rows) // settings.eval_questions)]

    import torch  # not at the top of the file, so that --help and the checks above are fast

    from export.pipeline import Export

    export = Export(checkpoint, config, settings.base_model, settings.device)
    try:
        export.merge()
        if tools:
            export.convert(settings.gguf, tools)
        if rows:
            export.evaluate(rows, rewards)
        if settings.push_to_hub:
            export.upload(settings.push_to_hub, settings.public)
    except torch.OutOfMemoryError as error:
        raise RunError("the GPU is out of memory: use --device cpu to merge in main memory") from error
    finally:
        shutil.rmtree(export.unpacked, ignore_errors=True)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder for a path: a run folder (its last checkpoint), checkpoints/best, or a checkpoint.

    Raises ConfigError if there is no checkpoint or it does not belong to a run.
    """
    pointer = path if path.is_file() else path / "checkpoints/last"
    if pointer.is_file():
        path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if (path / "adapter_config.json").is_file() and (path.parent.parent / "config.yaml").is_file():
        return path
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{path} has no checkpoint: the run has not saved one yet")
    runs = [file.parent for folder in (Path("runs"), path.parent) for file in folder.glob("*/config.yaml")]
    raise ConfigError(
        f"{path} is neither a run folder (runs/NAME) nor a checkpoint of a run.{did_you_mean(path, runs)}"
    )
