"""The grader of reasoning_gym puzzles: the package's own `score_answer`, run in a worker process that can be killed.

Only a full score counts as right. Many families give partial credit to an answer that is merely close, well-formed or
long enough, and a model would learn to exploit it. The reason contains the partial score.
"""

import functools

from grading.answers.math_grader import extract_answer
from grading.base import Ungraded
from grading.sandbox.messages import decode, encode
from grading.sandbox.workers import WorkerError, run_in_worker

MAX_ANSWER_CHARS = 10_000
SECONDS = 3.0
_TOLERANCE = 1e-9  # for rounding: some families sum up tenths


def grade_gym(answer: str, row: dict) -> tuple[float, str]:
    """Grade an answer to a reasoning_gym puzzle with `score_answer`.

    An exception in `score_answer` counts as a wrong answer: the answer does not have the form that it expects.

    Args:
        answer: Text that contains the final answer, see `final_answer`.
        row: Data row with the columns `family` and `entry`, as data/gym.py creates them.

    Returns:
        1.0 for a full score, else 0.0; and a reason that starts with an outcome.

    Raises:
        Ungraded: If no worker process is available.
    """
    final_text = final_answer(answer)
    if final_text is None:
        return 0.0, "no_answer: no <answer>, no \\boxed{}, no text"
    if len(final_text) > MAX_ANSWER_CHARS:
        return 0.0, f"no_answer: the answer has {len(final_text)} characters, over {MAX_ANSWER_CHARS}"
    call = ("grading.gym:score_in_worker", row["family"], final_text, encode(row["entry"]))
    try:
        score, exception = run_in_worker(*call, timeout=SECONDS, preload=("reasoning_gym", "grading.gym"))
    except TimeoutError:
        return 0.0, f"gave_up: score_answer took over {SECONDS:g} s"
    except WorkerError as error:
        raise Ungraded(f"sandbox_error: {error}") from None
    if score >= 1 - _TOLERANCE:
        return 1.0, "right"
    return 0.0, "wrong: score_answer " + (f"raised {exception}" if exception else f"gives {score:.2g} of 1")


def final_answer(text: str) -> str | None:
    r"""Return the content of the last <answer> ... </answer>, else the whole text; of a \boxed{} in it, its content.

    Other markers are ignored, since answers are often whole boards or programs. An answer in tags or in a box may be
    empty (a word reduced to nothing). Returns None if the text is empty and has neither tags nor a box.
    """
    before, end_tag, _ = text.rpartition("</answer>")
    is_tagged = end_tag and "<answer>" in before
    if is_tagged:
        text = before.rpartition("<answer>")[2]
    boxed = extract_answer(text) if "\\boxed{" in text else None
    if boxed is not None:
        return boxed.strip()
    return text.strip() if is_tagged or text.strip() else None


def score_in_worker(family: str, answer: str, entry) -> tuple[float, str]:
    """Return the score, and the exception that `score_answer` raised, if any. Called in the worker process."""
    try:
        return float(_dataset(family).score_answer(answer, decode(entry))), ""
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"[:100]


@functools.lru_cache(maxsize=8)
def _dataset(family: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=0)
