"""Demonstrations for the cold start (rl/run/cold_start.py): prompts with complete answers.

A demonstration is a row with `prompt` and `completion`, and with `turns` if it is an episode of several turns: pairs of the
model's text and the environment's reply. `read_demonstrations` reads them from a file,
`write_demonstrations` makes them for the built-in families that have steps.
"""

import itertools
import random

from data.environments import add_observation, find_class, play_moves
from data.schema import ASSISTANT_ROLES, DataError, is_prompt, parse_text, to_schema
from data.sources import read_raw
from data.tasks import MAKERS, Problem, problems
from grading.base import did_you_mean, prompt_text


def read_demonstrations(source: str | None, held_out: list[dict]) -> tuple[list[dict], list[str]]:
    """Read a file with the columns `prompt` and `completion`, or `messages` that end with an assistant turn.

    Args:
        source: The file; None: no demonstrations.
        held_out: The held-out rows. Demonstrations of their questions are left out.

    Returns:
        The demonstrations, and notes for the user.

    Raises:
        DataError: The file cannot be used, or no demonstration is left.
    """
    if source is None:
        return [], []
    raw_rows, places = read_raw(source)
    rows = to_schema([_split(raw, place) for raw, place in zip(raw_rows, places)], "demonstration", {}, places)
    questions = {prompt_text(row["prompt"]).strip() for row in held_out}
    remaining = [row for row in rows if prompt_text(row["prompt"]).strip() not in questions]
    if not remaining:
        raise DataError(f"sft_data: all questions of {source} are also held out: use other demonstrations")
    notes = [f"cold start: {len(remaining)} demonstrations from {source}"]
    if len(remaining) < len(rows):
        notes.append(f"{len(rows) - len(remaining)} demonstrations are left out: their questions are held out")
    return remaining, notes


def _split(raw: dict, place: str) -> dict:
    """Return the prompt and the completion of a row. Raise DataError if it has no complete answer."""
    messages = parse_text(raw["messages"]) if isinstance(raw.get("messages"), str) else raw.get("messages")
    prompt = raw.get("prompt")
    completion = raw.get("completion")
    if completion is None and messages is not None:
        is_chat = isinstance(messages, list) and is_prompt(messages)
        if not is_chat or messages[-1]["role"].lower() not in ASSISTANT_ROLES:
            raise DataError(f"{place}: messages must be a list of {{role, content}} that ends with an assistant turn")
        prompt = messages[:-1]
        completion = messages[-1]["content"]
    turns = []
    if isinstance(completion, list) and is_prompt(completion):  # TRL's conversational form, with replies in between
        texts = [message["content"] for message in completion]
        replies = [message for message in completion[1::2] if message["role"].lower() in ASSISTANT_ROLES]
        if replies or len(texts) % 2 == 0:
            raise DataError(f"{place}: completion must begin and end with an assistant turn, with one reply in between")
        turns = list(zip(texts[::2], [*texts[1::2], ""]))
        completion = texts[-1]
    if not prompt or not isinstance(completion, str) or not completion.strip():
        raise DataError(
            f"{place}: a demonstration needs the columns prompt and completion (text), or messages; this row has "
            f"{', '.join(raw)}"
        )
    return {"prompt": prompt, "completion": completion} | ({"turns": turns} if len(turns) > 1 else {})


def play_demonstrations(environment: str, rows: list[dict], n: int, seed: int, skill: float) -> list[dict]:
    """Return n episodes as demonstrations, whose completions are lists of messages.

    Args:
        rows: Questions to play, in turn.
        skill: Probability that a turn is the class's `_good_move()`; otherwise it is its `_random_move()`.

    Raises:
        DataError: The class lacks one of the two methods.
    """
    for method in ("_good_move", "_random_move"):
        if not hasattr(find_class(environment), method):
            raise DataError(f"{environment}: demonstrations need a method {method}(), which returns the text of a turn")
    random.seed(f"{environment} {seed}")
    demonstrations = []
    for row in itertools.islice(itertools.cycle(rows), n):
        row = dict(row)

        def choose_move(game) -> str:
            return game._good_move() if random.random() < skill else game._random_move()

        turns, _ = play_moves(environment, row, choose_move)
        messages = [
            {"role": role, "content": content} for turn in turns for role, content in zip(("assistant", "user"), turn)
        ]
        prompt = add_observation(row["prompt"], row["observation"])
        demonstrations.append({"prompt": prompt, "completion": messages[:-1]})  # without the last reply
    return demonstrations


def write_demonstrations(families: list[str], n: int, seed: int) -> list[dict]:
    """Return n demonstrations of built-in families in turn, with distinct questions of the split "pretrain".

    Raises DataError for other sources, and for families without steps or without enough questions.
    """
    for family in families:
        if family not in MAKERS:
            raise DataError(
                f"{family} is not a built-in family ({', '.join(MAKERS)}), whose demonstrations a program can write."
                f"{did_you_mean(family, MAKERS)} For other sources: python -m data distil {family} --model MODEL"
            )
    sources = [problems(family, "pretrain", random.Random(f"{family} {seed}")) for family in families]
    rows = {}
    for i in range(100 * n):
        problem = next(sources[i % len(sources)])
        if not problem.steps:
            raise DataError(f"{problem.family} has no demonstrations: its questions come without a way to the answer")
        rows.setdefault(problem.prompt, {"prompt": problem.prompt, "completion": demonstrate(problem)})
        if len(rows) == n:
            return list(rows.values())
    raise DataError(f"{', '.join(families)}: fewer than {n} different questions: lower -n")


def demonstrate(problem: Problem) -> str:
    """Return the steps of a problem in a <think> block, and its answer."""
    answer = f"\\boxed{{{problem.answer}}}"
    if problem.entry_point:
        answer = f"def {problem.entry_point}(x):\n    return {problem.answer}"
    return "<think>" + "\n".join(problem.steps) + f"</think>{answer}"
