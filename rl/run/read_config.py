"""Reads the settings of a run from a YAML file and the command line.

What is unknown, of the wrong type or out of range becomes a one-line ConfigError that names the setting and what to write
instead. Imports no torch.
"""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Literal

import yaml

from rl.config import COMMANDS, Config, ConfigError
from rl.fit.recipes import choose_recipe

# Settings of TRL and Unsloth that do not exist here, each with what to use instead.
ELSEWHERE = {
    "per_device_train_batch_size": "use prompts_per_step and num_generations (their product is the completions of a step); "
    "memory is bounded by max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "micro-batches are made from max_tokens_per_micro_batch and give the same gradient; "
    "use prompts_per_step for more questions in a step",
    "generation_batch_size": "use prompts_per_step x num_generations; rollout_batch_size bounds the rows at a time",
    "steps_per_generation": "use num_mini_batches",
    "per_device_eval_batch_size": "use rollout_batch_size",
    "max_prompt_length": "prompts are never cut; leave it out",
    "max_seq_length": "use max_completion_length; prompts are never cut",
    "max_length": "use max_completion_length; prompts are never cut",
    "max_new_tokens": "use max_completion_length",
    "warmup_steps": "use warmup_ratio, a share of the steps",
    "save_strategy": "use save_steps",
    "eval_strategy": "use eval_steps",
    "eval_on_start": "the evaluation before training is always made; leave it out",
    "disable_dropout": "dropout is always off; leave it out",
    "num_completions_to_print": "two are printed, use log_completions_steps; rollouts.jsonl holds every completion",
    "log_completions": "use log_completions_steps; rollouts.jsonl holds every completion",
    "vllm_importance_sampling_correction": "use importance_sampling_cap, 0 is off",
    "vllm_importance_sampling_cap": "use importance_sampling_cap",
    "early_stopping_patience": "use early_stopping",
    "load_best_model_at_end": "checkpoints/best names the best one; leave it out",
    "vllm_mode": "the roll-out has its own engine; leave it out",
    "data_seed": "use seed",
    "vf_coef": "the critic has weights and an optimizer of its own: use critic_learning_rate",
    "model_name": "use model",
    "model_name_or_path": "use model",
    "dataset_name": "use train_data and eval_data",
    "num_train_epochs": "use max_steps",
    "r": "use lora_r",
    "target_modules": "the LoRA is on every linear layer; leave it out",
    "lora_target_modules": "the LoRA is on every linear layer; leave it out",
    "lora_dropout": "it is always 0, or the probability ratio would not start at 1; leave it out",
    "cliprange": "use epsilon",
    "kl_coef": "use beta",
    "num_ppo_epochs": "use num_iterations",
    "bf16": "use dtype: bfloat16",
    "fp16": "use dtype: float16",
    "torch_dtype": "use dtype",
    "reward_func": "use reward_funcs",
    "use_vllm": "the roll-out has its own engine; leave it out",
    "fast_inference": "the roll-out has its own engine; leave it out",
    "gpu_memory_utilization": "lower rollout_batch_size and max_tokens_per_micro_batch where memory is short",
    "resume_from_checkpoint": "python train.py --resume runs/NAME goes on with a run; adapter begins a new one with a saved LoRA",
    "run_name": "use output_dir",
    "bnb_4bit_quant_type": "load_in_4bit is NF4; leave it out",
    "use_gradient_checkpointing": "use gradient_checkpointing",
    "random_state": "use seed",
}  # fmt: skip


def unknown_setting(name: str, where: str) -> ConfigError:
    """The error for a setting that does not exist, with TRL's equivalent or the nearest name."""
    if name in ELSEWHERE:
        return ConfigError(
            f"{where}: {name} is a setting of TRL or Unsloth that does not exist here: {ELSEWHERE[name]}"
        )
    if name in COMMANDS:
        return ConfigError(f"{where}: {name} is for the command line: --{name.replace('_', '-')}")
    names = [f.name for f in dataclasses.fields(Config)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "python train.py --help lists them all"
    return ConfigError(f"{where}: there is no setting {name}; {hint}")


def read_config(arguments: list[str], default_file: str) -> tuple[Config, str]:
    """The settings with command-line overrides, and a name for the run.

    They come from `--config FILE`, with `--config auto` from the recipe that fits this machine (which is printed), from the
    run that `--resume` names, from the one that `--adapter` was saved by, or else from the default file.
    Raises ConfigError; leaves with tyro's own message for a value on the command line that cannot be read.
    """
    import tyro

    file, arguments = take(split_pairs(arguments, "--columns"), "--config")
    adapter, _ = take(arguments, "--adapter")
    resume, _ = take(arguments, "--resume")
    if resume is not None:
        file = config_to_resume(resume, arguments, file)
    elif file is None and adapter and (Path(adapter).parent.parent / "config.yaml").is_file():
        file = str(Path(adapter).parent.parent / "config.yaml")  # an adapter of one of our runs: with its settings
    file = file or default_file
    known = {f.name for f in dataclasses.fields(Config)} | {"help"}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise unknown_setting(name, "command line")

    def settings(file: str) -> Config:
        return tyro.cli(Config, default=read_yaml(file), args=arguments, prog="train.py", description=description)

    description = "Settings come from the recipe that fits (--config auto); what is given here replaces them."
    if file == "auto":
        file, why = choose_recipe(settings)
        print(why, end="\n\n", flush=True)
    description = f"Settings come from {file} (choose another with --config FILE); what is given here replaces them."
    config = settings(file)
    config.check()
    if config.resume:
        config.output_dir = str(Path(file).parent)
        if config.eval_only:
            raise ConfigError(
                "resume: there is nothing to go on with in an evaluation: use --eval-only alone, with --adapter"
            )
    path = Path(file).resolve()
    return config, path.parent.name if path.name == "config.yaml" else path.stem


def saved_settings(config: Config) -> dict:
    """The settings as they are saved with a run, before any is resolved or halved; they can be used as a recipe again."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in COMMANDS} | {"output_dir": None}


def config_to_resume(resume: str, arguments: list[str], file: str | None) -> str:
    """config.yaml of the run that is named by its folder, or by that of one of its checkpoints. Raises ConfigError."""
    others = ("--output-dir", "--output_dir", "--probe", "--dry-run", "--dry_run")
    if file or any(argument.partition("=")[0] in others for argument in arguments):
        raise ConfigError(
            "resume: it goes on with the settings and the folder of the run: leave --config, --output-dir, --probe and --dry-run out"
        )
    for folder in (Path(resume), Path(resume).parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return str(folder / "config.yaml")
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    near = difflib.get_close_matches(resume, runs, n=1, cutoff=0.5) or runs[-1:]
    hint = f"did you mean {near[0]}?" if near else "there are none in runs/"
    raise ConfigError(f"resume: {resume} is not the folder of a run, which has a config.yaml; {hint}")


def take(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, None where it is not given, and the other arguments."""
    for i, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given == name and equals:
            return value, [*arguments[:i], *arguments[i + 1 :]]
        if given == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name} needs a path behind it")
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
    return None, list(arguments)


def read_yaml(file: str) -> Config:
    """The settings in a YAML file, each brought to its field's type. Raises ConfigError naming file and key."""
    path = Path(file)
    if not path.is_file():
        others = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ConfigError(f"--config: there is no file {file}; there are {', '.join(others) or 'none in configs/'}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: expected lines of the form 'setting: value'")
    hints = typing.get_type_hints(Config)
    values = {}
    for name, value in settings.items():
        if name not in hints or name in COMMANDS:
            raise unknown_setting(str(name), file)
        try:
            values[name] = coerce(value, hints[name])
        except ValueError as error:
            raise ConfigError(f"{file}: {name} must be {error}, but is {value!r}") from None
    return Config(**values)


def split_pairs(arguments: list[str], name: str) -> list[str]:
    """`--columns answer=gold` in the form that tyro reads, `--columns answer gold`."""
    split, inside = [], False
    for argument in arguments:
        inside = argument == name or (inside and not argument.startswith("--"))
        split += argument.split("=", 1) if inside else [argument]
    return split


def coerce(value, kind):
    """Bring a YAML value to a field's type: YAML reads 1e-5 as text. Raises ValueError saying what is expected."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return value
    if origin in (types.UnionType, typing.Union):  # X | None
        inner = next(a for a in args if a is not type(None))
        return None if value is None else coerce(value, inner)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), args, n=1)
        raise ValueError(f"one of {', '.join(args)}" + (f" (did you mean {near[0]}?)" if near else ""))
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [coerce(item, args[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError("a mapping such as {name: value}")
        return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number) and (kind is float or number == int(number)):
            return kind(number)
    if kind is str and isinstance(value, str):
        return value
    raise ValueError({int: "a whole number", float: "a number", str: "text (in quotes)"}.get(kind, "a number"))
