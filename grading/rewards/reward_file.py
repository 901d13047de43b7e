"""Reward files: import a file, and select its reward functions and their weights."""

import importlib.util
import inspect
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from grading.base import RewardError, RewardFunction, Rewards, did_you_mean, short_repr


def load_rewards(
    path: str,
    reward_funcs: list[str] | None = None,
    reward_weights: dict[str, float] | None = None,
    reward_errors: str = "stop",
    max_steps: int | None = None,
    source: str | None = None,
) -> Rewards:
    """Load the reward functions of a file, in the order of the file.

    Reward functions are the decorated functions, and those in the file's list `reward_funcs = [...]`, as in TRL.

    Args:
        path: Path of the reward file.
        reward_funcs: Names of the functions to use; all of them if empty.
        reward_weights: Weights by name, which override the weights in the file.
        reward_errors: "stop" or "skip": what to do if a function raises.
        max_steps: Number of steps of the run, passed to TRL functions.
        source: Content of the file, if it is not saved yet.

    Raises:
        RewardError: The file is missing, cannot be imported or has no reward, or a name is unknown.
    """
    file = Path(path).resolve()
    if source is None and not file.is_file():
        raise RewardError(f"rewards_file: there is no file {path}")
    module = _import_file(file, source)
    registered = _registered_functions(module, file)
    plain = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    chosen = reward_funcs or list(registered)
    for name in [*chosen, *(reward_weights or {})]:
        if name in chosen and name not in registered and name in plain:  # the settings may name an undecorated function
            registered[name] = RewardFunction(name, plain[name])
        if name not in registered:
            setting = "reward_funcs" if name in chosen else "reward_weights"
            hint = did_you_mean(name, registered) or f" It has {', '.join(registered) or 'none'}."
            raise RewardError(f"{setting}: {file.name} has no reward function '{name}'.{hint}")
    weights = {name: registered[name].weight for name in chosen} | (reward_weights or {})
    functions = [replace(registered[name], weight=float(weights[name])) for name in chosen]
    examples = getattr(module, "examples", [])
    rewards = Rewards(file, functions, reward_errors, max_steps, examples if isinstance(examples, list) else [])
    if not rewards.names:
        raise RewardError(
            f"{file.name} has no reward with a weight: mark a function with @reward, or name it in reward_funcs = [...]"
        )
    if not reward_funcs:
        for name, function in plain.items():
            if name not in registered and "completions" in inspect.signature(function).parameters:
                rewards.notes.append(
                    f"{name} in {file.name} is not used: it has a parameter completions, but is neither decorated with "
                    "@reward nor listed in reward_funcs"
                )
    return rewards


def _registered_functions(module, file: Path) -> dict[str, RewardFunction]:
    """Return the decorated and listed reward functions of a module by name. Raise RewardError for an invalid list."""
    decorated = [value for value in vars(module).values() if isinstance(getattr(value, "reward", None), RewardFunction)]
    functions = [value.reward for value in decorated if value.__module__ == module.__name__]
    listed = getattr(module, "reward_funcs", [])
    if not isinstance(listed, (list, tuple)):
        raise RewardError(f"{file.name}: reward_funcs is {short_repr(listed)}, expected a list of functions")
    for entry in listed:
        function = getattr(module, entry, None) if isinstance(entry, str) else entry
        name = getattr(function, "__name__", type(function).__name__)
        if not callable(function) or name == "<lambda>":
            hint = did_you_mean(entry, vars(module)) if isinstance(entry, str) else " Define it with def."
            raise RewardError(f"{file.name}: reward_funcs lists {short_repr(entry)}, which is not a function.{hint}")
        f = getattr(function, "reward", None)
        functions.append(f if isinstance(f, RewardFunction) else RewardFunction(name, function))
    by_name = {}
    for f in functions:
        if f.name in by_name and by_name[f.name].function is not f.function:
            raise RewardError(
                f"{file.name}: two reward functions are called {f.name}: rename one (for a reward model, set name=)"
            )
        by_name[f.name] = f
    return by_name


def _import_file(file: Path, source: str | None):
    """Execute a reward file as a module. Raise RewardError with file and line if it fails."""
    name = f"reward_file_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, among others, look up their module by name
    try:
        # The loader is not used: its bytecode cache misses a change that keeps the file's size within the same second.
        exec(compile(file.read_bytes() if source is None else source, file, "exec"), vars(module))
    except Exception as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
            line = lines[-1] if lines else "?"
        raise RewardError(f"{file.name}:{line}: {type(error).__name__}: {error}") from error
    return module
