"""Read the settings of a run from a YAML file and the command line.

An unknown setting, a wrong type or a value out of range raises ConfigError with a one-line message that names the
setting and what to write instead. Imports no torch.
"""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Literal

import yaml

from data.schema import DAMAGED_COMMAND
from grading.base import did_you_mean, first_line
from rl.config import COMMANDS, Config, ConfigError

# Settings that are chosen for the model and this machine (rl/fit/recipes.py), unless all but the last are set.
FITTED = ("learning_rate", "max_tokens_per_micro_batch", "rollout_batch_size", "gradient_checkpointing")
RENAMED_SETTINGS = Path(__file__).with_name("renamed_settings.yaml")  # of TRL and Unsloth, with what to use instead
# Control characters except line breaks and tabs, and these two if a LaTeX command such as "\text{" was read as one.
CONTROL_CHARACTER = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]|{DAMAGED_COMMAND.pattern}")


def unknown_setting(name: str, source: str) -> ConfigError:
    """Return the error for an unknown setting in `source` (a file or the command line), with the setting to use."""
    renamed = yaml.safe_load(RENAMED_SETTINGS.read_text(encoding="utf-8"))
    if name in renamed:
        return ConfigError(
            f"{source}: {name} is a setting of TRL or Unsloth that Ponder does not have: {renamed[name]}"
        )
    if name in COMMANDS:
        return ConfigError(f"{source}: {name} can only be set on the command line: --{name.replace('_', '-')}")
    hint = did_you_mean(name, vars(Config())) or " For a list of all settings: python train.py --help"
    return ConfigError(f"{source}: there is no setting {name}.{hint}")


def read_config(arguments: list[str], default_file: str) -> tuple[Config, str]:
    """Return the settings and a name for the run.

    Settings are read from `--config FILE`, the largest recipe that fits this machine (`--config auto`), the run to
    `--resume`, the run that saved the `--adapter`, or the default file, which is the recipe of one model: with another
    `--model`, it is not used. Options on the command line override them. Of the settings of FITTED, those that neither
    sets are chosen for the model and this machine.

    Raises:
        ConfigError: If a setting is invalid.
        SystemExit: If a value on the command line cannot be parsed; tyro prints a message.
    """
    import tyro

    file, arguments = pop_option(split_pairs(arguments, "--columns"), "--config")
    adapter, _ = pop_option(arguments, "--adapter")
    model, _ = pop_option(arguments, "--model")
    resume, _ = pop_option(arguments, "--resume")
    if resume is not None:
        file = config_to_resume(resume, arguments, file)
    elif file is None and adapter and (Path(adapter).parent.parent / "config.yaml").is_file():
        file = str(Path(adapter).parent.parent / "config.yaml")
    elif file is None and model and model != read_yaml(default_file).model:
        file = model
    file = file or default_file
    known = {*vars(Config()), "help"}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise unknown_setting(name, "command line")

    def parse(file: str) -> Config:
        description = f"Settings are read from {file} (--config FILE chooses another file). Options override them."
        default = Config() if file == model else read_yaml(file)
        return tyro.cli(Config, default=default, args=arguments, prog="train.py", description=description)

    if file == "auto":
        from rl.fit.recipes import choose_recipe

        file, reason = choose_recipe(parse)
        print(reason, end="\n\n", flush=True)
    config = parse(file)
    for name, value in vars(config).items():
        refuse_control_characters(value, f"command line: {name}", "remove it")
    config.check()
    in_file = {} if file == model else read_settings(file)
    options = {argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in arguments}
    missing = [name for name in FITTED if name not in in_file and not options & {name, f"no_{name}"}]
    if missing and missing != ["gradient_checkpointing"]:
        from rl.fit.recipes import fit_settings

        if chosen := fit_settings(config, missing):
            config = dataclasses.replace(config, **chosen)
            values = ", ".join(f"{name} {value}" for name, value in chosen.items())
            print(f"Chosen for {config.model} on this machine: {values}", end="\n\n", flush=True)
    path = Path(file)
    if config.resume:
        config.output_dir = str(path.parent)
        if config.eval_only:
            raise ConfigError("resume: an evaluation cannot be resumed: use --eval-only with --adapter instead")
    path = path.resolve()
    return config, path.parent.name if path.name == "config.yaml" else path.stem


def saved_settings(config: Config) -> dict:
    """Return the settings to save with a run, before any is resolved or halved. They can be used as a recipe."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in COMMANDS} | {"output_dir": None}


def config_to_resume(resume: str, arguments: list[str], file: str | None) -> str:
    """Return the config.yaml of the run to resume; `resume` is the folder of the run or of one of its checkpoints.

    Raises ConfigError if it is neither, or if --config (`file`) or other options conflict with --resume.
    """
    conflicts = ("--output-dir", "--output_dir", "--probe", "--dry-run", "--dry_run")
    if file or any(argument.partition("=")[0] in conflicts for argument in arguments):
        raise ConfigError(
            "resume: a run keeps its settings and its folder: remove --config, --output-dir, --probe and --dry-run"
        )
    for folder in (Path(resume), Path(resume).parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return str(folder / "config.yaml")
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    example = f" Example: --resume {runs[-1]}." if runs else " There are no runs in runs/."
    hint = did_you_mean(resume, runs) or example
    raise ConfigError(f"resume: {resume} is not the folder of a run: config.yaml or checkpoints/ is missing.{hint}")


def pop_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of `name VALUE` or `name=VALUE` (None if absent), and the remaining arguments."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == name and equals:
            return value, [*arguments[:i], *arguments[i + 1 :]]
        if option == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name} requires a path")
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
    return None, list(arguments)


def split_pairs(arguments: list[str], name: str) -> list[str]:
    """Rewrite `--columns answer=gold` to `--columns answer gold`, the form that tyro expects."""
    split = []
    is_value = False
    for argument in arguments:
        is_value = argument == name or (is_value and not argument.startswith("--"))
        split += argument.split("=", 1) if is_value else [argument]
    return split


def read_yaml(file: str) -> Config:
    """Return the settings in a YAML file, and the defaults of all others. Raises ConfigError with file and setting."""
    return Config(**read_settings(file))


def read_settings(file: str) -> dict:
    """Return the settings in a YAML file, converted to their types. Raises ConfigError with file and setting."""
    path = Path(file)
    if not path.is_file():
        recipes = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ConfigError(f"--config: there is no file {file}; available recipes: {', '.join(recipes) or 'none'}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        fixes = {"escape": ": put text with backslashes in single quotes", "'\\t'": ": use spaces instead of the tab"}
        fix = next((fix for part, fix in fixes.items() if part in problem), "")
        raise ConfigError(f"{file}{line}: not valid YAML: {problem}{fix}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: expected lines of the form 'setting: value'")
    hints = typing.get_type_hints(Config)
    values = {}
    for name, value in settings.items():
        if name not in hints or name in COMMANDS:
            raise unknown_setting(str(name), file)
        fix = "put the text in single quotes, or write two backslashes, because YAML reads one as a control character"
        refuse_control_characters(value, f"{file}: {name}", fix)
        try:
            values[name] = coerce(value, hints[name])
        except ValueError as error:
            raise ConfigError(f"{file}: {name} is {value!r}, but must be {error}") from None
    return values


def refuse_control_characters(value, label: str, fix: str) -> None:
    """Raise ConfigError if a setting has text with a control character. Line breaks and tabs are allowed.

    YAML reads "\\boxed" in double quotes as a backspace and "oxed".

    Args:
        label: Source and name of the setting, for the message.
        fix: What to change.
    """
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, (dict, list)):
            refuse_control_characters(text, label, fix)
        elif isinstance(text, str) and (match := CONTROL_CHARACTER.search(text)):
            raise ConfigError(
                f"{label} has the control character {match[0]!r} before {text[match.end() :][:8]!r}: {fix}"
            )


def coerce(value, kind):
    """Convert a YAML value to a field's type (YAML reads 1e-5 as text). Raises ValueError with the valid values."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if kind is typing.Any:
        return value
    if origin in (types.UnionType, typing.Union):  # X | None
        inner = next(a for a in args if a is not type(None))
        return None if value is None else coerce(value, inner)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise ValueError(f"one of {', '.join(args)}.{did_you_mean(value, args)}")
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
    raise ValueError({int: "a whole number", float: "a number", str: "text (in quotes)"}[kind])
