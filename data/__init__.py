"""What is asked: questions from every source, all in one schema.

A row is a dict with `id`, `prompt` (text, or a list of chat messages), `task`, and what its grader needs: `answer` or
`tests` (with `entry_point`, `setup`, `starter`), or what the grader named in `grader` takes. A `solution` is worked out in
full. Every other column of the source is there too. Rows without a gold are for reward functions that need none.

    sums, words, functions, long_sums, ...      made from a seed (data/tasks.py)
    reasoning_gym:NAME                          made from a seed by that package (data/gym.py)
    questions.jsonl, .json, .csv, .parquet      your own, or another set's, told by its columns (data/formats.py)
    openai/gsm8k, OWNER/NAME:CONFIG[SPLIT]      the Hugging Face Hub (data/hub.py)

    python -m data show sums                    # print a few rows of a source
    python -m data check openai/gsm8k           # is each gold full marks, and a wrong answer none?
"""

import math
import random
import re
from pathlib import Path

from data.formats import FORMATS
from data.gym import PREFIX, read_gym
from data.hub import held_out_split, is_hub_source, read_hub
from data.sources import FILE_TYPES, DataError, read_file
from data.tasks import MAKERS, questions

__all__ = ["DataError", "QuestionSampler", "load", "load_questions", "local_prompts", "parse_columns"]

EVAL_SEED = 0  # the built-in held-out questions are the same for every run, so that runs can be compared
MAX_HELD_OUT = 0.2  # of a source that serves for training and evaluation
EVALUATION_ONLY = {form.task for form in FORMATS if form.evaluation_only}


def load(source: str, n: int | None = None, split: str = "train", columns: dict | None = None, seed: int = 0):
    """Rows of one source, as named above.

    n: how many questions to make (default 100), or the most to take of a file or set (default all). split: train or
    eval; of a file both are all of it. columns: our column names to a file's or set's. Raises DataError.
    """
    return _read(source, n, split, columns or {}, seed)[0]


def _read(source: str, n: int | None, split: str, columns: dict, seed: int) -> tuple[list[dict], int]:
    """Rows, at most n, and how many there are in all (of what is made: as many)."""
    if is_generated(source):
        try:
            make = read_gym if source.startswith(PREFIX) else questions
            rows = make(source, n=n or 100, split=split, seed=seed)
        except ValueError as error:
            raise DataError(str(error)) from None
        return rows, len(rows)
    if Path(source).suffix.lower() in FILE_TYPES:
        rows = read_file(source, columns)
        return rows[:n], len(rows)
    if is_hub_source(source) and not Path(source).exists():
        return read_hub(source, n, split, columns)
    raise DataError(
        f"{source}: not a source: use {', '.join(MAKERS)}, {PREFIX}NAME, a file ending in {', '.join(FILE_TYPES)}, or a "
        "set of the Hub such as openai/gsm8k"
    )


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """The mapping that arguments such as "prompt=question" ask for. Raises DataError."""
    for pair in pairs:
        if "=" not in pair:
            raise DataError(f"--columns takes pairs such as prompt=question, not {pair}")
    return dict(pair.split("=", 1) for pair in pairs)


def is_generated(source: str) -> bool:
    """Whether a source makes its questions from a seed, as many as asked for."""
    return source in MAKERS or source.startswith(PREFIX)


def load_questions(config) -> tuple[list[dict], list[dict], list[str]]:
    """Load the training rows and the held-out rows; no prompt is in both.

    Without eval_data each training source gives its own held-out part: a source that is made from a seed, or a set of
    the Hub that has one, its evaluation split; any other at most a fifth of its questions.

    Args:
        config: Any object with the settings train_data, eval_data, train_questions (for each source), eval_questions (in
            all), columns, seed and, if levels are to be checked, curriculum_steps.

    Returns:
        The training rows, the held-out rows, and notes for the user on what was set aside.

    Raises:
        DataError: A source cannot be used, or curriculum_steps is set and a training row has no level.
    """
    train_rows, eval_rows, notes = [], [], []

    def load_at_most(source, n, split, seed, use):
        rows, total = _read(source, n, split, config.columns, seed)
        if total > n:
            notes.append(f"{source}: the first {n} of {total} questions are {use}")
        return rows

    share = -(-config.eval_questions // len(config.eval_data or config.train_data))  # rounded up
    for source in config.train_data:
        rows = load_at_most(source, config.train_questions, "train", config.seed, "used (train_questions)")
        if tasks := {row["task"] for row in rows} & EVALUATION_ONLY:
            notes.append(
                f"{source}: {', '.join(tasks)} is made for evaluation, not to be trained on and then measured by"
            )
        held_out_source = None if config.eval_data else _held_out_source(source)
        if held_out_source:
            eval_rows += load_at_most(held_out_source, share, "eval", EVAL_SEED, "held out (eval_questions)")
        elif not config.eval_data:
            rows, held_out = hold_out(source, rows, share)
            eval_rows += held_out
            notes.append(f"{source}: {len(rows)} questions to train on, {len(held_out)} held out")
        train_rows += rows
    for source in config.eval_data:
        eval_rows += load_at_most(source, share, "eval", EVAL_SEED, "held out (eval_questions)")
    held_out_prompts = {str(row["prompt"]) for row in eval_rows}
    kept = [row for row in train_rows if str(row["prompt"]) not in held_out_prompts]
    if len(kept) < len(train_rows):
        notes.append(f"{len(train_rows) - len(kept)} training questions are also held out: left out of training")
    if not kept:
        raise DataError("train_data: no question is left to train on: all of them are in eval_data too")
    if getattr(config, "curriculum_steps", 0):
        for row in kept:
            level_of(row)
    return kept, eval_rows, notes


def level_of(row: dict) -> float:
    """The difficulty of a row: the number in its column `level`, or in a text there ("Level 3"). Raises DataError."""
    number = re.search(r"-?\d+(\.\d+)?", str(row.get("level", "")))
    if not number:
        raise DataError(
            f"curriculum_steps: row {row['id']} has no number in a column level, by which questions are put in order "
            "(columns: {level: YOUR_COLUMN} maps yours), or set curriculum_steps to 0"
        )
    return float(number[0])


def local_prompts(train_data: list[str], eval_data: list[str], columns: dict) -> list[str]:
    """The prompts of sources that are on this machine or made here; none if any source is on the Hub."""
    sources = [*train_data, *eval_data]
    if any(map(is_hub_source, sources)):
        return []
    return [str(row["prompt"]) for source in sources for row in load(source, columns=columns)]


class QuestionSampler:
    """Draws training questions: all of them once in each epoch, in an order that depends on the seed alone.

    Args:
        questions: Objects with a `row`.
        curriculum_steps: The levels of the rows join one by one over this many first steps; 0 for all at once.
    """

    def __init__(self, questions: list, curriculum_steps: int, seed: int):
        self.questions = questions
        self.curriculum_steps = curriculum_steps
        self.seed = seed
        self.levels = [level_of(question.row) if curriculum_steps else 0.0 for question in questions]
        self._restart()

    def take(self, n: int, step: int) -> list:
        """The next n questions for a step. Those that are too hard yet are left out of their epoch."""
        hardest = highest_level(self.levels, step, self.curriculum_steps)
        taken = []
        while len(taken) < n:
            i = self._next()
            if self.levels[i] <= hardest:
                taken.append(self.questions[i])
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a sampler of the same questions and seed was."""
        self._restart()
        while self.drawn < state["drawn"]:
            self._next()

    def _restart(self) -> None:
        self.drawn = 0
        self._rng = random.Random(self.seed)
        self._epoch = []

    def _next(self) -> int:
        place = self.drawn % len(self.questions)
        if place == 0:
            self._epoch = self._rng.sample(range(len(self.questions)), len(self.questions))
        self.drawn += 1
        return self._epoch[place]


def highest_level(levels: list[float], step: int, curriculum_steps: int) -> float:
    """The hardest level of a step: levels join one by one over the first `curriculum_steps`; all of them if it is 0."""
    known = sorted(set(levels))
    joined = math.ceil(len(known) * min(step / curriculum_steps, 1)) if curriculum_steps else len(known)
    return known[joined - 1]


def _held_out_source(source: str) -> str | None:
    """The source of the evaluation questions that belong to a training source, if it has any of its own."""
    if is_generated(source):
        return source
    return None if Path(source).suffix.lower() in FILE_TYPES else held_out_split(source)


def hold_out(source: str, rows: list[dict], n: int) -> tuple[list[dict], list[dict]]:
    """Split a source's rows by prompt: the same for every seed, at most n and at most a fifth of them held out."""
    prompts = sorted({str(row["prompt"]) for row in rows})
    if len(prompts) < 2:
        raise DataError(f"{source}: one question is too few to train on and to hold out: add more, or name eval_data")
    random.Random(EVAL_SEED).shuffle(prompts)
    chosen = set(prompts[: min(n, max(1, int(len(prompts) * MAX_HELD_OUT)))])
    held_out = {str(row["prompt"]): row for row in rows if str(row["prompt"]) in chosen}
    return [row for row in rows if str(row["prompt"]) not in chosen], list(held_out.values())
