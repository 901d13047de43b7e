"""`--config auto`: the largest recipe that fits this machine, and settings that fit a model, as predicted by rl/fit/memory.py.

Torch is imported only if this machine has an NVIDIA GPU or `gpu_memory` is set.
"""

import dataclasses
from collections.abc import Callable

from rl.config import Config, ConfigError
from rl.fit.cards import GB, Machine, find_machine
from rl.fit.shapes import Shape, find_shape

TINY = "configs/tiny.yaml"
LAPTOP = "configs/smollm2_135m.yaml"  # without a GPU
LADDER = (  # from the largest to the smallest
    "configs/qwen3_8b_base_dapo.yaml",
    "configs/qwen3_4b_base_dapo.yaml",
    "configs/llama3.2_3b_gsm8k.yaml",
    "configs/qwen3_1.7b_gsm8k.yaml",
    "configs/qwen3_0.6b_gsm8k.yaml",
    "configs/qwen2.5_0.5b_gsm8k.yaml",
)
LAPTOP_MEMORY = 4 * GB
LADDER_FP16 = ("configs/t4.yaml", "configs/qwen2.5_0.5b_gsm8k.yaml")  # for cards without bf16


def choose_recipe(read_settings: Callable[[str], Config]) -> tuple[str, str]:
    """Return the file of the recipe and a few lines that explain the choice. Raises ConfigError.

    read_settings: function that reads a recipe file and applies the command line.
    """
    config = read_settings(TINY)
    machine = find_machine(config)
    if machine.device == "cpu":
        file = LAPTOP if machine.memory >= LAPTOP_MEMORY else TINY
        return file, f"This machine has no NVIDIA GPU and {machine.memory / GB:.1f} GB of free memory. Using {file}."
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


# --- settings that fit a model

# Hidden size and peak learning rate of a LoRA for models up to this size: the tiny model and SmolLM2-135M as measured
# (docs/log.md), larger ones as in the recipes.
LEARNING_RATES = ((511, 2e-3), (767, 1e-4), (10**9, 2e-5))
LARGE_HIDDEN = 512  # from this hidden size on, larger micro-batches are not faster on a CPU


def fit_settings(config: Config, names: list[str]) -> dict:
    """Return values of these settings that suit the model and fit into the free memory.

    Returns nothing if the dimensions of the model are unknown; loading it reports what is wrong.
    """
    machine = find_machine(config)
    if machine.device == "cuda" and not config.dry_run:
        from rl.model.backends import import_backend

        import_backend(dataclasses.replace(config))  # first: the prediction imports transformers
    try:
        shape = find_shape(config.model)
    except ConfigError:
        return {}
    small_batches = machine.device == "cpu" and shape.hidden >= LARGE_HIDDEN
    values = {
        "learning_rate": next(rate for hidden, rate in LEARNING_RATES if shape.hidden <= hidden),
        "max_tokens_per_micro_batch": 1024 if small_batches else 8192,
        "rollout_batch_size": 512,
        "gradient_checkpointing": False,
    }
    values = {name: values[name] for name in names}
    from rl.fit.dry_run import advise
    from rl.fit.memory import ASSUMED_PROMPT

    fitted = dataclasses.replace(config, **values)
    return values | (advise(fitted, shape, machine, ASSUMED_PROMPT, names) or {})
