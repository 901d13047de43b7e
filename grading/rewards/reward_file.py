"""Reward files: import a file, and select its reward functions and their weights."""

import contextlib
import importlib.util
import inspect
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from grading.base import RewardError, RewardFunction, Rewards, did_you_mean, short_repr

ROOT = Path(__file__).resolve().parent.parent.parent
OWN_MODULES = (
    "bench",
    "data",
    "environments",
    "export",
    "grading",
    "rewards",
    "rl",
    "tests",
    "tools",
    "train",
    "ui",
)  # in ROOT


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
    if source is None:
        source = file.read_bytes()
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
    rewards = Rewards(file, functions, reward_errors, max_steps)
    rewards.source = source if isinstance(source, str) else source.decode(errors="replace")
    rewards.examples = examples if isinstance(examples, list) else []
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


def _import_file(file: Path, source: str | bytes):
    """Execute a reward file as a module. Raise RewardError with file and line if it fails."""
    name = f"reward_file_{abs(hash(str(file)))}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, among others, look up their module by name
    text = source if isinstance(source, str) else source.decode(errors="replace")
    if re.search(rf"^\s*(?:from|import)\s+{re.escape(file.stem)}\b", text, re.MULTILINE):
        # Not the file itself: in a run folder, a copy that imports from rewards means the project's rewards.py.
        with contextlib.suppress(Exception):
            importlib.import_module(file.stem)
    try:
        with _imports_from(file.parent):
            # The loader is not used: its bytecode cache misses a change that keeps the file's size within a second.
            exec(compile(source, file, "exec"), vars(module))
    except Exception as error:
        if isinstance(error, SyntaxError):
            place = f"{Path(error.filename or file).name}:{error.lineno}"
        else:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
            place = f"{file.name}:{lines[-1] if lines else '?'}"
        hint = _import_hint(file, error) if isinstance(error, ImportError) else ""
        raise RewardError(f"{place}: {type(error).__name__}: {error}{hint}") from error
    return module


_folders = []  # folders of the reward files that were loaded


@contextlib.contextmanager
def _imports_from(folder: Path):
    """Let a reward file import the modules in its folder.

    They are imported anew for each load, so that changes take effect. Their folder is first on sys.path while the file
    is executed, and last while its functions run, so that it does not hide modules that others import later.
    """
    for name in [name for earlier in _folders for name in _names_beside(earlier)]:
        del sys.modules[name]
    for earlier in _folders:
        if earlier != ROOT:
            with contextlib.suppress(ValueError):
                sys.path.remove(str(earlier))
    _folders[:] = [folder]
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(folder))
        if folder != ROOT:
            sys.path.append(str(folder))


def modules_beside(file: Path) -> list[Path]:
    """Return the files of the modules that a loaded reward file has imported from its folder."""
    names = _names_beside(file.parent) if file.parent in _folders else []
    return sorted(Path(sys.modules[name].__file__) for name in names)


def _names_beside(folder: Path) -> list[str]:
    """Return the names of the modules that have been imported from a folder, without those of the project."""
    return [
        name
        for name in sys.modules
        if _is_beside(name, folder) and not (folder == ROOT and name.partition(".")[0] in OWN_MODULES)
    ]


def _is_beside(name: str, folder: Path) -> bool:
    """Return whether a module has been imported from a folder."""
    file = getattr(sys.modules.get(name), "__file__", None)
    stem = name.replace(".", "/")
    return bool(file) and Path(file) in (folder / f"{stem}.py", folder / stem / "__init__.py")


def _import_hint(file: Path, error: ImportError) -> str:
    """Return advice if a module in the folder of the reward file is hidden by another one of the same name."""
    name = (error.name or "").partition(".")[0]
    own = next((path for path in (file.parent / f"{name}.py", file.parent / name) if name and path.exists()), None)
    other = getattr(sys.modules.get(name), "__file__", None) or ""
    if own and other and not _is_beside(name, file.parent):
        return f". The name {name} means {other} here: rename {own}"
    if isinstance(error, ModuleNotFoundError) and not own:
        return f". Put {name}.py into {file.parent}, or install the package"
    return ""
