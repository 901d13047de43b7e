"""Loading a file of reward functions: which of its functions count, and with which weights."""

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

    The functions that count are those that are decorated and those in the file's own list `reward_funcs = [...]`, as
    in TRL.

    Args:
        reward_funcs: Names of the functions to use; all of them if empty.
        reward_weights: Weights by name, which replace the file's own.
        source: The content of the file, if it is not saved yet.

    Raises:
        RewardError: The file is missing, does not import or has no reward, or a name is unknown.
    """
    file = Path(path).resolve()
    if source is None and not file.is_file():
        raise RewardError(f"rewards_file: there is no file {path}")
    module = _import_file(file, source)
    found = _find_functions(module, file)
    plain = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    chosen = reward_funcs or list(found)
    for name in [*chosen, *(reward_weights or {})]:
        if name in chosen and name not in found and name in plain:  # a plain function that is named in the settings
            found[name] = RewardFunction(name, plain[name])
        if name not in found:
            setting = "reward_funcs" if name in chosen else "reward_weights"
            hint = did_you_mean(name, found) or f" It has {', '.join(found) or 'none'}."
            raise RewardError(f"{setting}: {file.name} has no reward function '{name}'.{hint}")
    weights = {name: found[name].weight for name in chosen} | (reward_weights or {})
    functions = [replace(found[name], weight=float(weights[name])) for name in chosen]
    examples = getattr(module, "examples", [])
    rewards = Rewards(file, functions, reward_errors, max_steps, examples if isinstance(examples, list) else [])
    if not rewards.names:
        raise RewardError(
            f"{file.name} has no reward with a weight: mark a function with @reward, or name it in reward_funcs = [...]"
        )
    if not reward_funcs:
        for name, function in plain.items():
            if name not in found and "completions" in inspect.signature(function).parameters:
                rewards.notes.append(
                    f"{name} in {file.name} has a parameter completions, but is neither decorated nor named in "
                    "reward_funcs: it does not count"
                )
    return rewards


def _find_functions(module, file: Path) -> dict[str, RewardFunction]:
    """The reward functions of a module by name."""
    decorated = [value for value in vars(module).values() if isinstance(getattr(value, "reward", None), RewardFunction)]
    functions = [value.reward for value in decorated if value.__module__ == module.__name__]
    listed = getattr(module, "reward_funcs", [])
    if not isinstance(listed, (list, tuple)):
        raise RewardError(f"{file.name}: reward_funcs is {short_repr(listed)}, expected a list of functions")
    for entry in listed:
        function = getattr(module, entry, None) if isinstance(entry, str) else entry
        name = getattr(function, "__name__", type(function).__name__)
        if not callable(function) or name == "<lambda>":
            hint = did_you_mean(entry, vars(module)) if isinstance(entry, str) else " Write it as a function with def."
            raise RewardError(f"{file.name}: reward_funcs names {short_repr(entry)}, which is no function.{hint}")
        f = getattr(function, "reward", None)
        functions.append(f if isinstance(f, RewardFunction) else RewardFunction(name, function))
    found = {}
    for f in functions:
        if f.name in found and found[f.name].function is not f.function:
            raise RewardError(
                f"{file.name}: two reward functions are called {f.name}: rename one (of a reward model: name=)"
            )
        found[f.name] = f
    return found


def _import_file(file: Path, source: str | None):
    name = f"rewards_of_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up by name
    try:
        # Not by the loader: its bytecode cache takes a file of the same second and size for the same file.
        exec(compile(file.read_bytes() if source is None else source, file, "exec"), vars(module))
    except Exception as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
            line = lines[-1] if lines else "?"
        raise RewardError(f"{file.name}:{line}: {type(error).__name__}: {error}") from error
    return module
