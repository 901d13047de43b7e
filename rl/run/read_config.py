"""Read the settings of a run from a YAML file and the command line.

A setting that is unknown, of the wrong type or out of range raises a ConfigError of one line, which names the setting and what
to write instead. Imports no torch.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Literal

import yaml

from grading.base import did_you_mean
from rl.config import COMMANDS, Config, ConfigError

RENAMED = Path(__file__).with_name("renamed_settings.yaml")  # settings of TRL and Unsloth, and what to use instead


def unknown_setting(name: str, where: str) -> ConfigError:
    """The error for a setting that does not exist, with TRL's equivalent or the nearest name."""
    renamed = yaml.safe_load(RENAMED.read_text(encoding="utf-8"))
    if name in renamed:
        return ConfigError(f"{where}: {name} is a setting of TRL or Unsloth that does not exist here: {renamed[name]}")
    if name in COMMANDS:
        return ConfigError(f"{where}: {name} is for the command line: --{name.replace('_', '-')}")
    hint = did_you_mean(name, vars(Config())) or " python train.py --help lists them all."
    return ConfigError(f"{where}: there is no setting {name}.{hint}")


def read_config(arguments: list[str], default_file: str) -> tuple[Config, str]:
    """Return the settings and a name for the run.

    They come from `--config FILE`, or with `--config auto` from the recipe that fits this machine, from the run that `--resume`
    names, from the run that saved `--adapter`, or from the default file; the command line overrides them.

    Raises:
        ConfigError: A setting is wrong.
        SystemExit: A value on the command line cannot be read; tyro prints a message.
    """
    import tyro

    file, arguments = take(split_pairs(arguments, "--columns"), "--config")
    adapter, _ = take(arguments, "--adapter")
    resume, _ = take(arguments, "--resume")
    if resume is not None:
        file = config_to_resume(resume, arguments, file)
    elif file is None and adapter and (Path(adapter).parent.parent / "config.yaml").is_file():
        file = str(Path(adapter).parent.parent / "config.yaml")
    file = file or default_file
    known = {*vars(Config()), "help"}
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise unknown_setting(name, "command line")

    def settings(file: str) -> Config:
        description = f"Settings come from {file} (choose another with --config FILE). Options replace them."
        return tyro.cli(Config, default=read_yaml(file), args=arguments, prog="train.py", description=description)

    if file == "auto":
        from rl.fit.recipes import choose_recipe

        file, reason = choose_recipe(settings)
        print(reason, end="\n\n", flush=True)
    config = settings(file)
    config.check()
    path = Path(file)
    if config.resume:
        config.output_dir = str(path.parent)
        if config.eval_only:
            raise ConfigError("resume: an evaluation cannot be resumed: use --eval-only alone, with --adapter")
    path = path.resolve()
    return config, path.parent.name if path.name == "config.yaml" else path.stem


def saved_settings(config: Config) -> dict:
    """The settings as they are saved with a run, before any is resolved or halved; they can be used as a recipe again."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in COMMANDS} | {"output_dir": None}


def config_to_resume(resume: str, arguments: list[str], file: str | None) -> str:
    """The config.yaml of a run that is given by its folder or by one of its checkpoints. Raises ConfigError."""
    others = ("--output-dir", "--output_dir", "--probe", "--dry-run", "--dry_run")
    if file or any(argument.partition("=")[0] in others for argument in arguments):
        raise ConfigError(
            "resume: the run keeps its settings and its folder: leave --config, --output-dir, --probe and --dry-run out"
        )
    for folder in (Path(resume), Path(resume).parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return str(folder / "config.yaml")
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    newest = f" There is {runs[-1]}." if runs else " There are none in runs/."
    hint = did_you_mean(resume, runs) or newest
    raise ConfigError(f"resume: {resume} is not the folder of a run, which has a config.yaml.{hint}")


def take(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, or None, and the other arguments."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == name and equals:
            return value, [*arguments[:i], *arguments[i + 1 :]]
        if option == name:
            if i + 1 == len(arguments):
                raise ConfigError(f"{name} needs a path behind it")
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
    return None, list(arguments)


def split_pairs(arguments: list[str], name: str) -> list[str]:
    """Rewrite `--columns answer=gold` to the form that tyro reads, `--columns answer gold`."""
    split = []
    inside = False
    for argument in arguments:
        inside = argument == name or (inside and not argument.startswith("--"))
        split += argument.split("=", 1) if inside else [argument]
    return split


def read_yaml(file: str) -> Config:
    """Read the settings in a YAML file, each converted to its field's type. Raises ConfigError with file and key."""
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
            raise ConfigError(f"{file}: {name} is {value!r}, but must be {error}") from None
    return Config(**values)


def coerce(value, kind):
    """Convert a YAML value to a field's type: YAML reads 1e-5 as text. Raises ValueError with what is expected."""
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
