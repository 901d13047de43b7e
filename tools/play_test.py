"""Self-test of environments: play each class well and at random. Needs no model.

    python environments.py                       every class of the file
    python environments.py --episodes 500
    python -m tools.play_test my_games.py        another file

The docstrings of all tools are checked. If it has `_good_move()` and `_random_move()`, good play must earn
more than random play, and a game must not depend on anything but its seed.
"""

import argparse
import ast
import inspect
import random
import sys
from pathlib import Path

from transformers.utils import get_json_schema

from data import DataError, load
from data.environments import make_environment, play_moves, tools_of
from grading import grade_row
from grading.base import first_line
from rl.run.process import command_output

QUESTIONS = "long_sums"  # for classes that make none
ROWS = 50


@command_output()
def play_test(file: str, arguments: list[str] | None = None) -> None:
    """Run the command line of the self-test. Exits with status 1 if a class fails."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(file).name}", description="Play the environments of a file well and at random."
    )
    parser.add_argument("--episodes", type=int, default=200, help="episodes of each kind of play (default 200)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        classes = [f"{file}:{name}" for name in class_names(file)]
        failures = [failure for name in classes for failure in check_class(name, options.episodes)]
    except DataError as error:
        sys.exit(f"error: {error}")
    for failure in failures:
        print(f"FAILED: {failure}")
    if failures or not classes:
        sys.exit(1 if failures else f"error: {file} has no class with a method reset")
    print(f"All {len(classes)} classes passed.")


def class_names(file: str) -> list[str]:
    """Return the names of the classes of a file that have a method `reset`, in its order."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [
        node.name for node in classes if node.bases or any(getattr(item, "name", "") == "reset" for item in node.body)
    ]


def check_class(name: str, episodes: int) -> list[str]:
    """Print what good and random play earn in a class, and return what is wrong with it."""
    failures = []
    environment = make_environment(name)
    for tool in tools_of(environment).values():
        try:
            get_json_schema(tool)
        except Exception as error:
            failures.append(f"{name}.{tool.__name__}: {first_line(error)}")
    label = name.rpartition(":")[2]
    if not (hasattr(environment, "_good_move") and hasattr(environment, "_random_move")):
        print(f"{label:<18} has no _good_move() and _random_move(), so it was not played")
        return failures
    source = name if getattr(environment, "prompt", None) else QUESTIONS
    rows = load(source, ROWS)
    good = play(name, rows, "_good_move", episodes)
    again = play(name, rows, "_good_move", episodes)
    at_random = play(name, rows, "_random_move", episodes)
    print(f"{label:<18} good play {good:6.1%}   random play {at_random:6.1%}   {episodes} episodes each")
    if good <= at_random:
        failures.append(f"{label}: random play earns as much as good play")
    if "seed" in inspect.signature(environment.reset).parameters and good != again:
        failures.append(f"{label}: the same seeds give different rewards")
    return failures


def play(name: str, rows: list[dict], method: str, episodes: int) -> float:
    """Return the mean reward of episodes whose turns are written by a method of the class."""
    random.seed(0)
    total = 0.0
    for i in range(episodes):
        row = dict(rows[i % len(rows)])
        turns, environment = play_moves(name, row, lambda game: getattr(game, method)())
        total += environment.get_reward() if hasattr(environment, "get_reward") else is_right(turns, row)
    return total / episodes


def is_right(turns: list[tuple[str, str]], row: dict) -> float:
    """Grade the last turn as an answer to the row, for classes without a reward."""
    return grade_row(turns[-1][0], row)[0]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tools.play_test FILE [--episodes N]")
    play_test(sys.argv[1], sys.argv[2:])
