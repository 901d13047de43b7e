"""Load questions from any source, in one schema.

A row is a dict with `id`, `prompt` (text, or a list of chat messages), `task`, and the columns that its grader needs:
`answer`, or `tests` (with `entry_point`, `setup`, `starter`), or the columns of the grader named in `grader`. `solution`
is a complete solution. All other columns of the source are kept. Rows without a gold answer suit rewards that need none.

    sums, words, functions, long_sums, ...      generated from a seed (data/tasks.py)
    environments.py:IceMaze, gym:NAME, ...      games of several turns, from a seed (data/environments.py)
    reasoning_gym:NAME                          generated from a seed by the package reasoning_gym (data/gym.py)
    questions.jsonl                             a .jsonl, .json, .csv, .tsv or .parquet file; well-known datasets are
                                                recognized by columns (data/formats.py)
    openai/gsm8k, OWNER/NAME:CONFIG[SPLIT]      a dataset on the Hugging Face Hub (data/hub.py)

    python -m data show sums                    # print a few rows of a source
    python -m data check openai/gsm8k           # check that graders accept each gold and reject wrong answers
"""

import math
import random
import re
from pathlib import Path

from data.environments import assign_environment, is_environment, read_environment
from data.formats import FORMATS
from data.gym import PREFIX, read_gym
from data.hub import held_out_split, is_hub_source, read_hub
from data.schema import DataError
from data.sources import FILE_TYPES, read_file
from data.tasks import MAKERS, questions

__all__ = ["DataError", "QuestionSampler", "load", "load_questions", "local_prompts", "parse_columns"]

EVAL_SEED = 0  # all runs have the same built-in held-out questions, so that they can be compared
MAX_HELD_OUT = 0.2  # share of the questions of a source that is used for both training and evaluation
EVALUATION_ONLY = {form.task for form in FORMATS if form.evaluation_only}


def load(source: str, n: int | None = None, split: str = "train", columns: dict | None = None, seed: int = 0):
    """Load the rows of one source. Raise DataError if it cannot be used.

    Args:
        source: A source as listed in the module's docstring.
        n: Number of questions to generate (default 100), or the maximum number to read (default all).
        split: "train" or "eval"; ignored for files.
        columns: Maps our column names to the names in the file or dataset, which may be nested (a.b, a.0.b).
    """
    return _read(source, n, split, columns or {}, seed)[0]


def _read(source: str, n: int | None, split: str, columns: dict, seed: int) -> tuple[list[dict], int]:
    """Return at most n rows, and the total number of rows in the source (for generated rows: their number)."""
    if is_generated(source):
        try:
            if is_environment(source):
                generate = read_environment
            else:
                generate = read_gym if source.startswith(PREFIX) else questions
            rows = generate(source, n=n or 100, split=split, seed=seed)
        except ValueError as error:
            raise DataError(str(error)) from None
        return rows, len(rows)
    if Path(source).suffix.lower() in FILE_TYPES:
        rows = read_file(source, columns)
        return rows[:n], len(rows)
    if is_hub_source(source) and not Path(source).exists():
        return read_hub(source, n, split, columns)
    raise DataError(
        f"{source}: unknown source: use {', '.join(MAKERS)}, {PREFIX}NAME, a file ending in {', '.join(FILE_TYPES)}, or "
        "a dataset on the Hub such as openai/gsm8k"
    )


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """Parse arguments such as "prompt=question" into a mapping of columns. Raise DataError if one has no "="."""
    for pair in pairs:
        if "=" not in pair:
            raise DataError(f"--columns expects pairs such as prompt=question, not {pair}")
    return dict(pair.split("=", 1) for pair in pairs)


def is_generated(source: str) -> bool:
    """Return True if the questions of a source are generated from a seed, in any number."""
    return source in MAKERS or source.startswith(PREFIX) or is_environment(source)


def load_questions(config) -> tuple[list[dict], list[dict], list[str]]:
    """Load the training rows and the held-out rows. No prompt is in both.

    Without eval_data, held-out questions come from the training sources: the evaluation split of a generated source or
    of a Hub dataset that has one, and at most a fifth of the questions of any other source.

    Args:
        config: Any object with the settings train_data, eval_data, train_questions (per source), eval_questions (in
            total), columns, seed and, if set, system_prompt (for a note) and curriculum_steps (to check the levels).

    Returns:
        The training rows, the held-out rows, and notes for the user.

    Raises:
        DataError: A source cannot be used, or curriculum_steps is set and a training row has no level.
    """
    train_rows = []
    eval_rows = []
    notes = []

    def load_at_most(source, n, split, seed, use):
        rows, total = _read(source, n, split, config.columns, seed)
        if total > n:
            notes.append(f"{source}: the first {n} of {total} questions are {use}")
        return rows

    num_eval = -(-config.eval_questions // len(config.eval_data or config.train_data))  # per source, rounded up
    for source in config.train_data:
        rows = load_at_most(source, config.train_questions, "train", config.seed, "used (train_questions)")
        if tasks := {row["task"] for row in rows} & EVALUATION_ONLY:
            notes.append(f"{source}: {', '.join(tasks)} is made for evaluation: training on it invalidates its scores")
        held_out_source = None if config.eval_data else _held_out_source(source)
        if held_out_source:
            eval_rows += load_at_most(held_out_source, num_eval, "eval", EVAL_SEED, "held out (eval_questions)")
        elif not config.eval_data:
            rows, held_out = hold_out(source, rows, num_eval)
            eval_rows += held_out
            notes.append(f"{source}: {len(rows)} training questions, {len(held_out)} held out")
        train_rows += rows
    for source in config.eval_data:
        eval_rows += load_at_most(source, num_eval, "eval", EVAL_SEED, "held out (eval_questions)")
    held_out_prompts = {str(row["prompt"]) for row in eval_rows if row.get("grader") != "environment"}
    remaining = [row for row in train_rows if str(row["prompt"]) not in held_out_prompts]
    if len(remaining) < len(train_rows):
        notes.append(f"{len(train_rows) - len(remaining)} training questions are also held out: removed from training")
    if not remaining:
        raise DataError("train_data: no training questions are left: all of them are also in eval_data")
    assign_environment(remaining + eval_rows, getattr(config, "environment", None))
    if getattr(config, "curriculum_steps", 0):
        for row in remaining:
            level_of(row)
    notes += _decimal_comma_notes(remaining + eval_rows)
    notes += _system_prompt_notes(remaining + eval_rows, getattr(config, "system_prompt", None))
    return remaining, eval_rows, notes


def _system_prompt_notes(rows: list[dict], system_prompt: str | None) -> list[str]:
    """Return a note if the setting system_prompt replaces other system messages in the prompts of rows."""

    def is_replaced(message: dict) -> bool:
        return message["role"] == "system" and message["content"] != system_prompt

    replaced = [row for row in rows if isinstance(row["prompt"], list) and any(map(is_replaced, row["prompt"]))]
    if not system_prompt or not replaced:
        return []
    return [
        f"system_prompt replaces the system message of {len(replaced)} of {len(rows)} questions (such as row "
        f"{replaced[0]['id']}): leave the setting empty to use theirs"
    ]


def _decimal_comma_notes(rows: list[dict]) -> list[str]:
    """Return a note if answers look like decimals with a comma, which the math grader reads as two numbers."""
    commas = [row for row in rows if re.fullmatch(r"-?(0,\d+|\d+,(\d{1,2}|\d{4,}))", str(row.get("answer")).strip())]
    if not commas:
        return []
    return [
        f"{len(commas)} answers are two numbers, such as {commas[0]['answer']} in row {commas[0]['id']}: if the comma is "
        "a decimal comma, write a point"
    ]


def level_of(row: dict) -> float:
    """Return the number in a row's column `level`, which may be text ("Level 3"). Raise DataError if there is none."""
    number = re.search(r"-?\d+(\.\d+)?", str(row.get("level", "")))
    if not number:
        raise DataError(
            f"curriculum_steps: row {row['id']} has no number in the column level, which orders the questions: map yours "
            "with columns: {level: YOUR_COLUMN}, or set curriculum_steps to 0"
        )
    return float(number[0])


def local_prompts(train_data: list[str], eval_data: list[str], columns: dict) -> list[str]:
    """Return the prompts of generated questions and local files; an empty list if any source is on the Hub."""
    sources = [*train_data, *eval_data]
    if any(map(is_hub_source, sources)):
        return []
    rows = [row for source in sources for row in load(source, columns=columns)]
    return [str(row["prompt"]) + str(row.get("observation") or "") for row in rows]


class QuestionSampler:
    """Draws each training question once per epoch, in an order that depends only on the seed.

    Args:
        questions: Objects with a `row`.
        curriculum_steps: Number of steps over which the levels of the rows are added one by one, the easiest first. 0
            uses all levels from the start.
    """

    def __init__(self, questions: list, curriculum_steps: int, seed: int):
        self.questions = questions
        self.curriculum_steps = curriculum_steps
        self.seed = seed
        self.levels = [level_of(question.row) if curriculum_steps else 0.0 for question in questions]
        self._restart()

    def take(self, n: int, step: int) -> list:
        """Return the next n questions for a step. Questions above its level are skipped for the epoch."""
        max_level = highest_level(self.levels, step, self.curriculum_steps)
        batch = []
        while len(batch) < n:
            i = self._next()
            if self.levels[i] <= max_level:
                batch.append(self.questions[i])
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position of a sampler of the same questions and seed."""
        self._restart()
        while self.drawn < state["drawn"]:
            self._next()

    def _restart(self) -> None:
        self.drawn = 0
        self._rng = random.Random(self.seed)
        self._epoch = []

    def _next(self) -> int:
        position = self.drawn % len(self.questions)
        if position == 0:
            self._epoch = self._rng.sample(range(len(self.questions)), len(self.questions))
        self.drawn += 1
        return self._epoch[position]


def highest_level(levels: list[float], step: int, curriculum_steps: int) -> float:
    """Return the highest level of a step. Levels are added one by one over `curriculum_steps`; all at once if it is 0."""
    distinct = sorted(set(levels))
    num_levels = math.ceil(len(distinct) * min(step / curriculum_steps, 1)) if curriculum_steps else len(distinct)
    return distinct[num_levels - 1]


def _held_out_source(source: str) -> str | None:
    """Return the source of the evaluation split of a training source; None if it has no evaluation split."""
    if is_generated(source):
        return source
    return None if Path(source).suffix.lower() in FILE_TYPES else held_out_split(source)


def hold_out(source: str, rows: list[dict], n: int) -> tuple[list[dict], list[dict]]:
    """Split rows by prompt into training and held-out rows.

    At most n and at most a fifth of the prompts are held out, the same ones for every seed.
    """
    prompts = sorted({str(row["prompt"]) for row in rows})
    if len(prompts) < 2:
        raise DataError(f"{source}: one question cannot be both trained on and held out: add more, or set eval_data")
    random.Random(EVAL_SEED).shuffle(prompts)
    held_out_prompts = set(prompts[: min(n, max(1, int(len(prompts) * MAX_HELD_OUT)))])
    held_out = {str(row["prompt"]): row for row in rows if str(row["prompt"]) in held_out_prompts}
    return [row for row in rows if str(row["prompt"]) not in held_out_prompts], list(held_out.values())
