"""The grader of reasoning_gym's puzzles: the package's own `score_answer`, in a worker process that can be killed.

Only full marks count. Many families give a part to an answer that is merely near, of the right form or long enough, and
a model learns to collect such parts; what an answer was given stands in the reason.
"""

import functools

from grading.answers.math_grader import extract_answer
from grading.base import Ungraded
from grading.sandbox.messages import decode, encode
from grading.sandbox.workers import WorkerError, run_in_worker

MAX_ANSWER_CHARS = 10_000
SECONDS = 3.0
_NEARLY = 1e-9  # some families add up tenths


def grade_gym(answer: str, row: dict) -> tuple[float, str]:
    """1.0 where `score_answer` gives the final answer full marks, else 0.0, with the reason in words.

    row: with `family` and `entry` as data/gym.py makes them. An exception in `score_answer` is a wrong answer: it expects
    a form that the answer does not have. Raises Ungraded where no worker can be had.
    """
    found = final_answer(answer)
    if found is None:
        return 0.0, "no_answer: no <answer>, no \\boxed{}, no text"
    if len(found) > MAX_ANSWER_CHARS:
        return 0.0, f"no_answer: the answer has {len(found)} characters, over {MAX_ANSWER_CHARS}"
    work = ("grading.gym:score_in_worker", row["family"], found, encode(row["entry"]))
    try:
        score, problem = run_in_worker(*work, timeout=SECONDS, preload=("reasoning_gym", "grading.gym"))
    except TimeoutError:
        return 0.0, f"gave_up: score_answer took over {SECONDS:g} s"
    except WorkerError as error:
        raise Ungraded(f"sandbox_error: {error}") from None
    if score >= 1 - _NEARLY:
        return 1.0, "right"
    return 0.0, "wrong: score_answer " + (f"raised {problem}" if problem else f"gives {score:.2g} of 1")


def final_answer(text: str) -> str | None:
    """What stands in the last <answer> ... </answer>, else all of the text; of that what stands in a box, if any.

    Answers here are whole boards and programs as often as numbers: no other marker is looked for. In tags or a box an
    answer may be empty (a word that is reduced to nothing), else None.
    """
    before, closed, _ = text.rpartition("</answer>")
    is_marked = closed and "<answer>" in before
    if is_marked:
        text = before.rpartition("<answer>")[2]
    boxed = extract_answer(text) if "\\boxed{" in text else None
    if boxed is not None:
        return boxed.strip()
    return text.strip() if is_marked or text.strip() else None


def score_in_worker(family: str, answer: str, entry) -> tuple[float, str]:
    """In the worker: the score, and the exception that `score_answer` raised, if any."""
    try:
        return float(_dataset(family).score_answer(answer, decode(entry))), ""
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"[:100]


@functools.lru_cache(maxsize=8)
def _dataset(family: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0)
