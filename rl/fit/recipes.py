"""`--config auto`: the largest recipe that fits this machine, as predicted by rl/fit/memory.py.

Torch is imported only if this machine has an NVIDIA GPU or `gpu_memory` is set.
"""

import dataclasses
from collections.abc import Callable

from rl.config import Config
from rl.fit.cards import GB, Machine, find_machine
from rl.fit.shapes import Shape, find_shape

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


def choose_recipe(read_settings: Callable[[str], Config]) -> tuple[str, str]:
    """Return the file of the recipe and a few lines that explain the choice. Raises ConfigError.

    read_settings: function that reads a recipe file and applies the command line.
    """
    config = read_settings(TINY)
    machine = find_machine(config)
    if machine.device == "cpu":
        return TINY, f"This machine has no NVIDIA GPU. Using {TINY}, whose bundled model trains on a CPU."
    if not config.dry_run:
        from rl.model.backends import import_backend

        import_backend(config)  # first: the prediction imports transformers, which must come after Unsloth
    ladder = LADDER_FP16 if machine.dtype == "float16" else LADDER
    lines = [f"Device: {machine.name}, in {machine.dtype}. All figures are predicted, not measured."]
    larger = ""
    for file in ladder:
        config = read_settings(file)
        shape = find_shape(config.model)
        needed = memory_needed(config, shape, machine)
        if needed is not None:
            lines += [f"{file} needs {needed / GB:.1f} GB{larger}.", f"Using {file}."]
            return file, "\n".join(lines)
        minimum = min_memory(config, shape, machine)
        larger = f"; the next larger recipe, {file}, needs {minimum / GB:.1f} GB"
    lines.append(f"The smallest recipe, {ladder[-1]}, needs {minimum / GB:.1f} GB.")
    lines.append(f"Using {TINY}, whose bundled model fits on any machine.")
    return TINY, "\n".join(lines)


def memory_needed(config: Config, shape: Shape, machine: Machine) -> float | None:
    """Return the bytes that a recipe needs, or None if it does not fit with the rows at a time that it requests."""
    from rl.fit.memory import ASSUMED_PROMPT, predict

    prediction = predict(config, shape, "cuda", machine.dtype, ASSUMED_PROMPT, machine.free())
    needed = machine.needed(prediction.peak)
    return needed if prediction.rows == prediction.rows_requested and needed <= machine.memory else None


def min_memory(config: Config, shape: Shape, machine: Machine) -> float:
    """Return the memory in bytes of the smallest card that fits a recipe, in steps of 0.1 GB from this machine up."""
    larger = machine
    while memory_needed(config, shape, larger) is None:
        larger = dataclasses.replace(larger, memory=larger.memory + GB / 10)
    return larger.memory
