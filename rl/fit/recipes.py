"""`--config auto`: the largest recipe that this machine has room for, by the prediction of rl/fit/memory.py. Imports no torch.

python train.py --config auto                                  for this machine
python train.py --config auto --dry-run --gpu-memory 12        for a card elsewhere
python train.py --config auto --dry-run --gpu-memory 15 --dtype float16         for one without bf16, such as a T4
"""

import dataclasses
import itertools
from collections.abc import Callable

from rl.config import Config
from rl.fit.cards import GB, Machine, find_machine
from rl.fit.memory import ASSUMED_PROMPT, predict
from rl.fit.shapes import find_shape

TINY = "configs/tiny.yaml"
LADDER = (  # from the largest to the smallest
    "configs/qwen3_8b_base_dapo.yaml",
    "configs/qwen3_4b_base_dapo.yaml",
    "configs/llama3.2_3b_gsm8k.yaml",
    "configs/qwen3_1.7b_gsm8k.yaml",
    "configs/qwen3_0.6b_gsm8k.yaml",
    "configs/qwen2.5_0.5b_gsm8k.yaml",
)
LADDER_FP16 = ("configs/t4.yaml", "configs/qwen2.5_0.5b_gsm8k.yaml")  # for cards without bf16


def choose_recipe(settings: Callable[[str], Config]) -> tuple[str, str]:
    """The file of the recipe, and why, in a few lines.

    settings: of a recipe's file, with what the command line replaces. Raises ConfigError for a machine that cannot be.
    """
    machine = find_machine(settings(TINY))
    if machine.device == "cpu":
        return TINY, f"No NVIDIA GPU here: taking {TINY}, the bundled model, which is made for a CPU."
    ladder = LADDER_FP16 if machine.dtype == "float16" else LADDER
    lines, beside = [f"This card: {machine.name}, in {machine.dtype}. All figures are predicted, not measured."], ""
    for file in ladder:
        config = settings(file)
        needed = memory_needed(config, machine)
        if needed is not None:
            lines += [f"{file} needs {in_gb(needed)}{beside}.", f"Taking {file}."]
            return file, "\n".join(lines)
        least = least_memory(config, machine)
        beside = f"; the next larger, {file}, would need {in_gb(least)}"
    lines += [
        f"The smallest recipe, {ladder[-1]}, would need {in_gb(least)}.",
        f"Taking {TINY}, the bundled model, which has room anywhere.",
    ]
    return TINY, "\n".join(lines)


def memory_needed(config: Config, machine: Machine) -> float | None:
    """Bytes, if a recipe fits on a card and rolls out as many rows at a time as it asks for; else None."""
    found = predict(config, find_shape(config.model), "cuda", machine.dtype, ASSUMED_PROMPT, machine.free())
    needed = machine.needed(found.peak)
    return needed if found.rows == found.rows_wanted and needed <= machine.memory else None


def least_memory(config: Config, machine: Machine) -> float:
    """Bytes of the smallest card, larger than this one, that has room for a recipe."""
    larger = (machine.memory + tenths * GB / 10 for tenths in itertools.count(1))
    return next(of for of in larger if memory_needed(config, dataclasses.replace(machine, memory=of)) is not None)


def in_gb(of: float) -> str:
    return f"{of / GB:.1f} GB"
