"""What is asked: questions from the built-in families and from files, all in one schema.

A row is a dict with `id`, `prompt` (text, or a list of chat messages), `task`, and either `answer` or `tests` (assert
statements), plus every other column of its source. Rows with neither are for reward functions that need no gold.

    python -m data show sums                    # print a few rows of a source
"""

import random

from data.sources import DataError, read_file
from data.tasks import FAMILIES, questions

__all__ = ["DataError", "load", "load_questions"]

EVAL_SEED = 0  # the built-in held-out questions are the same for every run, so that runs can be compared
MAX_HELD_OUT = 0.2  # of a file that serves for training and evaluation


def load(source: str, n: int | None = None, split: str = "train", columns: dict | None = None, seed: int = 0):
    """Rows of one source: a built-in family (sums, words, functions) or a .jsonl, .json, .csv or .parquet file.

    n: how many built-in questions to make (default 100), or the most to take from a file (default all). split: train,
    eval or pretrain, for the built-in families. columns: our column names to the file's. Raises DataError.
    """
    if source in FAMILIES:
        try:
            return questions(source, split, n or 100, seed)
        except ValueError as error:
            raise DataError(str(error)) from None
    return read_file(source, columns or {})[:n]


def load_questions(
    train_data: list[str], eval_data: list[str], train_n: int, eval_n: int, columns: dict, seed: int
) -> tuple[list[dict], list[dict], list[str]]:
    """The training rows, the held-out rows (no prompt in both), and notes for the person on what was set aside.

    train_n: for each source. eval_n: in all. Without eval_data each training source gives its own held-out part: a
    built-in family its evaluation split, a file at most a fifth of its questions.
    """
    train_rows, eval_rows, notes = [], [], []

    def load_at_most(source, n, split, seed, use):
        rows = load(source, n if source in FAMILIES else None, split, columns, seed)
        if len(rows) > n:
            notes.append(f"{source}: the first {n} of {len(rows)} questions are {use}")
        return rows[:n]

    share = -(-eval_n // len(eval_data or train_data))  # rounded up
    for source in train_data:
        rows = load_at_most(source, train_n, "train", seed, "used (train_questions)")
        if not eval_data and source in FAMILIES:
            eval_rows += load(source, share, "eval", seed=EVAL_SEED)
        elif not eval_data:
            rows, held_out = hold_out(source, rows, share)
            eval_rows += held_out
            notes.append(f"{source}: {len(rows)} questions to train on, {len(held_out)} held out")
        train_rows += rows
    for source in eval_data:
        eval_rows += load_at_most(source, share, "eval", EVAL_SEED, "held out (eval_questions)")
    held_out_prompts = {str(row["prompt"]) for row in eval_rows}
    kept = [row for row in train_rows if str(row["prompt"]) not in held_out_prompts]
    if len(kept) < len(train_rows):
        notes.append(f"{len(train_rows) - len(kept)} training questions are also held out: left out of training")
    if not kept:
        raise DataError("train_data: no question is left to train on: all of them are in eval_data too")
    return kept, eval_rows, notes


def hold_out(source: str, rows: list[dict], n: int) -> tuple[list[dict], list[dict]]:
    """Split a file's rows by prompt: the same for every seed, at most n and at most a fifth of them held out."""
    prompts = sorted({str(row["prompt"]) for row in rows})
    if len(prompts) < 2:
        raise DataError(f"{source}: one question is too few to train on and to hold out: add more, or name eval_data")
    random.Random(EVAL_SEED).shuffle(prompts)
    chosen = set(prompts[: min(n, max(1, int(len(prompts) * MAX_HELD_OUT)))])
    held_out = {str(row["prompt"]): row for row in rows if str(row["prompt"]) in chosen}
    return [row for row in rows if str(row["prompt"]) not in chosen], list(held_out.values())
