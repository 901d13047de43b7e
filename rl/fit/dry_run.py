"""`--dry-run`: predicts memory and time, and reports whether the run fits and, if not, which settings to change."""

import dataclasses
from collections.abc import Iterable

import torch

from rl.config import Config
from rl.fit.cards import GB, MB, Machine, find_machine, run_seconds
from rl.fit.memory import ASSUMED_PROMPT, predict
from rl.fit.shapes import Shape, find_shape
from rl.model.backends import choose_dtype

CHARACTERS_PER_TOKEN = 3  # estimate for prompts
TEMPLATE_TOKENS = 32  # tokens that a chat template adds to a question
MIN_COMPLETION = 64  # lowest max_completion_length to suggest, in tokens
SMALLER_MODELS = ("Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")  # in the recipes


def dry_run(config: Config, prompt_length: int | None = None, prompts: Iterable[str] = ()) -> str:
    """Return the output of --dry-run. Raises ConfigError if the dimensions of the model are unknown.

    prompt_length: tokens of the longest prompt. If None, it is estimated from `prompts`, or assumed if there are none.
    """
    shape = find_shape(config.model)
    machine = find_machine(config)
    source = "the longest"
    characters = max(map(len, prompts), default=0)
    if prompt_length is None and characters:
        characters += len(config.system_prompt or "")
        prompt_length = -(-characters // CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS
        source = f"the longest, estimated from its {characters:,} characters"
    elif prompt_length is None:
        prompt_length = ASSUMED_PROMPT
        source = "assumed, because the questions are not available"

    if machine.device == "cpu":
        machine.dtype = str(choose_dtype(config, torch.device("cpu"))).removeprefix("torch.")
    prediction = predict(config, shape, machine.device, machine.dtype, prompt_length, machine.free())
    needed = machine.needed(prediction.peak)
    lora_parameters = shape.lora_parameters(config.lora_r)
    precision = machine.dtype + (" and 4-bit NF4" if config.load_in_4bit or shape.is_4bit else "")
    precision += ", with Unsloth" if prediction.uses_unsloth else ""
    limited = f" ({prediction.rows_requested} requested)" if prediction.rows < prediction.rows_requested else ""
    total = "roll-out and update add up, because small models keep freed memory"
    if not prediction.allocator_keeps:
        total = "only the larger of roll-out and update counts"
    overhead = "the CUDA context and 8 % for fragmentation" if machine.device == "cuda" else "the imported packages"
    lines = [
        "Dry run: computed from the model's dimensions, nothing was loaded.",
        f"  model      {config.model}, {shape.parameters:,} parameters and {lora_parameters:,} LoRA parameters",
        f"  prompts    {prompt_length} tokens ({source}), completions up to {config.max_completion_length} tokens",
        f"  device     {machine.name}, in {precision}",
        "",
        f"  weights    {human(prediction.weights)}",
        f"  LoRA       {human(prediction.lora)}   with its gradients",
        f"  optimizer  {human(prediction.optimizer)}   {config.optim}",
    ]
    if config.has_critic:
        lines.append(f"  critic     {human(prediction.critic)}   with its gradients and optimizer")
    lines += [
        f"  roll-out   {human(prediction.rollout)}   {prediction.rows} rows at a time{limited}",
        f"  update     {human(prediction.update)}   {prediction.tokens:,} tokens at a time",
        f"  fixed      {human(prediction.fixed)}",
    ]
    if prediction.load:
        lines.append(f"  loading    {human(prediction.load)}   instead of the parts above, while loading")
    lines.append(f"  peak       {human(prediction.peak)}   {total}")
    lines.append(f"  needed     {human(needed)}   including {overhead}")
    if needed <= machine.memory and machine.card:
        step, run = run_seconds(config, shape, machine.card, prompt_length, prediction)
        seconds = f"{step:.0f} s" if step >= 10 else f"{step:.1f} s"
        minutes = f"about {max(run / 60, 1):,.0f} minutes modelled for {machine.card.name} ({seconds} a step)"
        lines.append(f"  time       {minutes}; --probe measures it")
    lines.append("")
    if not shape.uses_decoder:
        lines.append("These figures are rough: this architecture is trained through its own forward pass.")
    if needed <= machine.memory:
        lines.append(f"It fits: {needed / GB:.1f} of {machine.memory / GB:.1f} GB.")
    else:
        lines.append(
            f"It does not fit: it needs {needed / GB:.1f} GB, but only {machine.memory / GB:.1f} GB are available."
        )
        lines.append(advice(config, shape, machine, prompt_length))
    if config.rollout == "vllm":
        from rl.model.vllm_server import launch_command

        lines += ["", "The server is started with", "", f"    {launch_command(config, prompt_length)}"]
    return "\n".join(lines)


def human(num_bytes: float) -> str:
    """Format bytes as MB or GB."""
    return f"{num_bytes / GB:6.2f} GB" if num_bytes >= GB else f"{num_bytes / MB:6.0f} MB"


# --- advice for a run that does not fit


def advice(config: Config, shape: Shape, machine: Machine, prompt: int) -> str:
    """Describe the settings to change, or else suggest a smaller model that fits."""
    changes = advise(config, shape, machine, prompt)
    if changes is not None:
        needed = memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt)
        flags = " ".join(flag(name, value) for name, value in changes.items())
        return f"It fits in {needed / GB:.1f} GB with these settings, least costly first:\n\n    {flags}"
    for model in SMALLER_MODELS:
        smaller = find_shape(model)
        if smaller.parameters < shape.parameters and advise(config, smaller, machine, prompt) is not None:
            return f"No change of settings makes it fit. Use a smaller model, such as --model {model}."
    return "No change of settings makes it fit, and the smaller models of the recipes do not fit either."


def advise(config: Config, shape: Shape, machine: Machine, prompt: int, names: list[str] | None = None) -> dict | None:
    """Return the settings that must change so that the run fits, least costly first, or None if it cannot fit.

    names: the settings that may change; None: all that save memory.
    """
    options = memory_savers(config, shape, machine, prompt)
    options = {name: values for name, values in options.items() if names is None or name in names}
    changes = {name: values[-1] for name, values in options.items()}
    if memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt) > machine.memory:
        return None
    for name in reversed(options):  # undo changes that are not needed, the most costly first
        for value in (getattr(config, name), *options[name]):
            changes[name] = value
            if memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt) <= machine.memory:
                break
    return {name: value for name, value in changes.items() if value != getattr(config, name)}


def memory_savers(config: Config, shape: Shape, machine: Machine, prompt: int) -> dict[str, list]:
    """Return values to try by setting, least costly first: they cost time, then precision, then length."""
    options = {"gradient_checkpointing": [True]}
    if not shape.is_4bit:
        options["load_in_4bit"] = [True]
    if machine.device == "cuda":
        options["optim"] = ["adamw_8bit"]
    shortest = max(MIN_COMPLETION, config.soft_punish_cache + 1)
    minima = {
        "max_tokens_per_micro_batch": prompt + shortest,
        "rollout_batch_size": config.num_generations,
        "max_completion_length": shortest,
    }
    for name, minimum in minima.items():
        value = getattr(config, name)
        options[name] = [value]
        while value // 2 >= minimum:
            value //= 2
            options[name].append(value)
    return options


def memory_needed(config: Config, shape: Shape, machine: Machine, prompt: int) -> float:
    """Return the bytes of memory that a run needs on a machine."""
    prediction = predict(config, shape, machine.device, machine.dtype, prompt, machine.free())
    return machine.needed(prediction.peak)


def flag(name: str, value) -> str:
    """Format a setting as a command-line flag."""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
