"""`--dry-run`: the memory of a run by part, its time, whether it fits, and if not, which settings to change."""

import dataclasses
from collections.abc import Iterable

from rl.config import Config
from rl.fit.cards import GB, MB, Machine, find_machine, run_seconds
from rl.fit.memory import ASSUMED_PROMPT, predict
from rl.fit.shapes import Shape, find_shape

CHARACTERS_PER_TOKEN = 3
TEMPLATE_TOKENS = 32  # added to a question by a chat template
MIN_COMPLETION = 64  # tokens; nothing shorter is advised
SMALLER_MODELS = ("Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B-Instruct")  # of the recipes


def dry_run(config: Config, prompt_length: int | None = None, prompts: Iterable[str] = ()) -> str:
    """Return the text of --dry-run. Raises ConfigError if the dimensions of the model cannot be found.

    prompt_length: tokens of the longest prompt. None: estimated from the texts in `prompts`, or assumed if there are none.
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
        source = "assumed, since the questions are not known"

    prediction = predict(config, shape, machine.device, machine.dtype, prompt_length, machine.free())
    needed = machine.needed(prediction.peak)
    trained = shape.lora_parameters(config.lora_r)
    precision = machine.dtype + (" and 4-bit NF4" if config.load_in_4bit or shape.four_bit else "")
    precision += ", by Unsloth" if prediction.uses_unsloth else ""
    few = f" (wanted: {prediction.rows_requested})" if prediction.rows < prediction.rows_requested else ""
    total = "small models keep what they free: roll-out and update add"
    if not prediction.allocator_keeps:
        total = "roll-out and update do not add"
    overhead = "the CUDA context and 8 % for fragmentation" if machine.device == "cuda" else "the imports"
    lines = [
        "Dry run: arithmetic, nothing was loaded.",
        f"  model      {config.model}, {shape.parameters:,} parameters; {trained:,} more are trained (LoRA)",
        f"  prompts    {prompt_length} tokens ({source}); completions up to {config.max_completion_length}",
        f"  runs on    {machine.name}, in {precision}",
        "",
        f"  weights    {human(prediction.weights)}",
        f"  LoRA       {human(prediction.lora)}   with its gradients",
        f"  optimizer  {human(prediction.optimizer)}   {config.optim}",
    ]
    if config.has_critic:
        lines.append(f"  critic     {human(prediction.critic)}   with gradients and optimizer")
    lines += [
        f"  roll-out   {human(prediction.rollout)}   {prediction.rows}{few} rows at a time",
        f"  update     {human(prediction.update)}   {prediction.tokens:,} tokens at a time",
        f"  fixed      {human(prediction.fixed)}",
    ]
    if prediction.load:
        lines.append(f"  loading    {human(prediction.load)}   instead of all of these")
    lines.append(f"  peak       {human(prediction.peak)}   {total}")
    lines.append(f"  needed     {human(needed)}   with {overhead}")
    if needed <= machine.memory and machine.card:
        step, run = run_seconds(config, shape, machine.card, prompt_length, prediction)
        each = f"{step:.0f} s" if step >= 10 else f"{step:.1f} s"
        minutes = f"about {max(run / 60, 1):,.0f} minutes modelled for {machine.card.name} ({each} a step)"
        lines.append(f"  time       {minutes}; measure it with --probe")
    lines.append("")
    if not shape.uses_decoder:
        lines.append("This architecture runs through its own forward, for which these are rough figures.")
    if needed <= machine.memory:
        lines.append(f"It fits: {needed / GB:.1f} of {machine.memory / GB:.1f} GB.")
    else:
        lines.append(f"It does not fit: {needed / GB:.1f} GB are needed, and there are {machine.memory / GB:.1f}.")
        lines.append(advice(config, shape, machine, prompt_length))
    return "\n".join(lines)


def human(num_bytes: float) -> str:
    return f"{num_bytes / GB:6.2f} GB" if num_bytes >= GB else f"{num_bytes / MB:6.0f} MB"


# --- advice for a run that does not fit


def advice(config: Config, shape: Shape, machine: Machine, prompt: int) -> str:
    """The settings to change, else a smaller model of the recipes for which there are such settings."""
    changes = advise(config, shape, machine, prompt)
    if changes is not None:
        needed = memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt)
        flags = " ".join(flag(name, value) for name, value in changes.items())
        return f"With these settings, the mildest first, it does in {needed / GB:.1f} GB:\n\n    {flags}"
    for model in SMALLER_MODELS:
        smaller = find_shape(model)
        if smaller.parameters < shape.parameters and advise(config, smaller, machine, prompt) is not None:
            return f"No setting makes it fit: take a smaller model, such as --model {model}."
    return "No setting makes it fit, nor would a smaller model of the recipes."


def advise(config: Config, shape: Shape, machine: Machine, prompt: int) -> dict | None:
    """Settings to change so that the run fits, the mildest first and each of them needed. None if they do not suffice."""
    options = memory_savers(config, shape, machine, prompt)
    changes = {name: values[-1] for name, values in options.items()}
    if memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt) > machine.memory:
        return None
    for name in reversed(options):  # take back what is not needed, the costliest first
        for value in (getattr(config, name), *options[name]):
            changes[name] = value
            if memory_needed(dataclasses.replace(config, **changes), shape, machine, prompt) <= machine.memory:
                break
    return {name: value for name, value in changes.items() if value != getattr(config, name)}


def memory_savers(config: Config, shape: Shape, machine: Machine, prompt: int) -> dict[str, list]:
    """Values to try for settings that cost time, then precision, then the length of completions, the mildest first."""
    options = {"gradient_checkpointing": [True]}
    if not shape.four_bit:
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
    """Bytes of memory that a run needs on a machine."""
    prediction = predict(config, shape, machine.device, machine.dtype, prompt, machine.free())
    return machine.needed(prediction.peak)


def flag(name: str, value) -> str:
    """A setting as it is written on the command line."""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
