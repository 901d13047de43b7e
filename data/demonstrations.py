"""Demonstrations for the cold start (rl/run/cold_start.py): prompts with complete answers.

A demonstration is a row with `prompt` and `completion`. `read_demonstrations` reads them from a file,
`write_demonstrations` makes them for the built-in families that have steps.
"""

import random

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
    if isinstance(completion, list) and is_prompt(completion) and len(completion) == 1:  # TRL's conversational form
        completion = completion[0]["content"]
    if not prompt or not isinstance(completion, str) or not completion.strip():
        raise DataError(
            f"{place}: a demonstration needs the columns prompt and completion (text), or messages; this row has "
            f"{', '.join(raw)}"
        )
    return {"prompt": prompt, "completion": completion}


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
