"""Environments: classes whose methods a model calls in episodes of several turns. environments.py has examples.

A class needs what TRL's `environment_factory` needs: `reset(**row)`, whose text is added to the question, and public
methods as tools, with type hints and a docstring with an `Args:` section. Optional: `get_reward()`, which is called at
the end; `prompt`, the question of a class that makes its own rows; a parameter `seed` of `reset`; `done`, which ends the
episode if it is true; `score()`, whose change is the reward of a turn.

A class is named by its file, environments.py:IceMaze, or as gym:NAME or textarena:NAME (data/games.py). Functions can take
the place of a class, as in TRL's `tools`: my_tools.py:multiply,divide. Such a name is a source of questions, a value of the
setting `environment`, or of the column `environment`.
"""

import copy
import functools
import hashlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from data.commands import find_commands
from data.games import GAMES, find_game
from data.schema import DataError
from data.tasks import assign_split
from grading.base import did_you_mean, first_line

NOT_TOOLS = ("reset", "get_reward")
INTERNAL_COLUMNS = ("observation",)  # columns that `reset` does not get
MAX_REPEATS = 1000  # seeds with a known first observation that are left out before observations are repeated


def is_environment(source: str) -> bool:
    """Return whether a source or a setting names an environment: FILE.py:CLASS, gym:NAME or textarena:NAME."""
    return ".py:" in source or source.startswith(GAMES)


class Functions:
    """Plain functions as the tools of an episode."""

    def __init__(self, tools: dict[str, Callable]):
        self.tools = tools

    def reset(self) -> None:
        pass


@functools.cache
def find_class(name: str) -> Callable[[], object]:
    """Return the class with this name, or a function that makes the game. Raises DataError if there is none."""
    if name.startswith(GAMES):
        return find_game(name)
    if not is_environment(name):
        raise DataError(
            f"environment: {name} is not a name such as environments.py:IceMaze, gym:NAME or textarena:NAME"
        )
    path, _, class_name = name.rpartition(":")
    module = _import(Path(path).resolve(), path)
    functions = {key: getattr(module, key, None) for key in class_name.split(",")}
    if all(map(inspect.isfunction, functions.values())):
        return functools.partial(Functions, functions)
    classes = {key: value for key, value in vars(module).items() if inspect.isclass(value) and hasattr(value, "reset")}
    if class_name not in classes:
        hint = did_you_mean(class_name, classes) or f" It has {', '.join(classes) or 'none'}."
        raise DataError(f"environment: {path} has no class {class_name} with a method reset.{hint}")
    return classes[class_name]


@functools.cache
def _import(file: Path, path: str):
    if not file.is_file():
        raise DataError(f"environment: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"environment_file_{abs(hash(str(file)))}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        place = f"{path}:{lines[-1] if lines else '?'}"
        raise DataError(f"environment: {place}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def make_environment(name: str) -> object:
    """Return a new object of a class. Raises DataError if its `__init__` needs arguments or fails."""
    try:
        return find_class(name)()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"environment: {name}() fails: {type(error).__name__}: {first_line(error)}") from error


def tools_of(environment: object) -> dict[str, Callable]:
    """Return the commands of an environment by name: its public methods, or plain functions."""
    if isinstance(environment, Functions):
        return environment.tools
    names = [name for name in dir(type(environment)) if not name.startswith("_") and name not in NOT_TOOLS]
    members = {name: getattr(environment, name) for name in names}
    tools = {name: member for name, member in members.items() if inspect.ismethod(member)}
    if has_score(environment):
        del tools["score"]
    return tools


def has_score(environment: object) -> bool:
    """Return whether an environment has a score: a method without arguments. With arguments, it is a tool."""
    score = getattr(environment, "score", None)
    return inspect.ismethod(score) and not inspect.signature(score).parameters


def environment_of(row: dict) -> str | None:
    """Return the name of a row's environment. A column `environment` with other values is some data of the user."""
    name = row.get("environment")
    return name if isinstance(name, str) and is_environment(name) else None


def first_observation(environment: object, row: dict) -> str:
    """Call `reset` with the columns of a row that it accepts, and return its text, "" for None.

    Without a parameter `seed`, a row's seed is that of Python's `random`.
    """
    parameters = inspect.signature(environment.reset).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    columns = {name: value for name, value in row.items() if name not in INTERNAL_COLUMNS}
    if "seed" not in parameters:
        random.seed(columns.pop("seed", None))
    arguments = {name: value for name, value in columns.items() if takes_all or name in parameters}
    observation = environment.reset(**copy.deepcopy(arguments))
    if observation is not None and not isinstance(observation, str):
        raise TypeError(f"reset() returned {type(observation).__name__}, expected text or None")
    return observation or ""


def add_observation(prompt: str | list[dict], observation: str) -> str | list[dict]:
    """Return a prompt with the first observation at the end of its last user message, as TRL adds it."""
    if isinstance(prompt, str):
        return prompt + observation
    messages = [dict(message) for message in prompt]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last]["content"] += observation
    return messages


def read_environment(source: str, n: int, split: str, seed: int) -> list[dict]:
    """Return n rows of an environment that makes its own questions, each with a seed and its first observation.

    The first observation, or else the seed, determines the split, so that no game of another split is played. If there
    are fewer different observations, they are repeated.
    """
    prompt = getattr(find_class(source), "prompt", None) or getattr(make_environment(source), "prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(
            f"{source}: the class has no text `prompt`, which is the question of its rows: add it, or name the class in the "
            "setting environment and a file of questions in train_data"
        )
    state = random.getstate()
    try:
        observations = {_observe(source, {"seed": i}) for i in range(8)}
        rows = []
        seen = set()
        repeats = 0
        numbers = random.Random(f"{source}/{split}/{seed}")
        while len(rows) < n:
            row = {"seed": numbers.getrandbits(31)}
            row["observation"] = _observe(source, row)
            key = row["observation"] if len(observations) > 1 else str(row["seed"])
            if (assign_split(source, key) == "eval") != (split == "eval"):
                continue
            if key in seen and repeats < MAX_REPEATS:
                repeats += 1
                continue
            seen.add(key)
            name = f"{source}-{split}-{seed}-{len(rows)}"
            rows.append({"id": name, "prompt": prompt, "task": task_name(source), "environment": source} | row)
            rows[-1]["grader"] = "environment"
        return rows
    finally:
        random.setstate(state)


def task_name(name: str) -> str:
    return name if name.startswith(GAMES) else name.rpartition(":")[2]


def _observe(source: str, row: dict) -> str:
    try:
        return first_observation(make_environment(source), row)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{source}: reset() fails: {type(error).__name__}: {first_line(error)}") from error


def assign_environment(rows: list[dict], name: str | None) -> None:
    """Set the environment of rows that have none, and the first observation of all that have one, in place.

    Raises DataError.
    """
    state = random.getstate()
    try:
        for row in rows:
            if name and not row.get("environment"):
                row["environment"] = name
            if environment_of(row) and "observation" not in row:
                row["observation"] = _observe(row["environment"], row | {"seed": row_seed(row, 0)})
    finally:
        random.setstate(state)


def row_seed(row: dict, step: int) -> int:
    """Return the seed of a row's episodes in a step: its column `seed`, or a number from its id and the step."""
    if isinstance(row.get("seed"), int):
        return row["seed"]
    return int.from_bytes(hashlib.sha256(f"{row['id']} {step}".encode()).digest()[:4], "big") // 2


def play_moves(
    name: str, row: dict, choose_move: Callable, max_turns: int = 12
) -> tuple[list[tuple[str, str]], object]:
    """Play an episode with texts in place of a model.

    Args:
        choose_move: Called with the environment before each turn; returns the text of the turn.

    Returns:
        The turns, each a text and the reply, and the environment.
    """
    environment = make_environment(name)
    tools = tools_of(environment)
    row["observation"] = first_observation(environment, row)
    turns = []
    while len(turns) < max_turns:
        text = choose_move(environment)
        replies = []
        for command, arguments in find_commands(text, tools, takes_bare=hasattr(environment, "done")):
            try:
                replies.append(str(tools[command](**arguments)))
            except ValueError as error:
                replies.append(str(error))
        turns.append((text, "\n".join(replies)))
        if not replies or getattr(environment, "done", False):
            break
    return turns, environment
