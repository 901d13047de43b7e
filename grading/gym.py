"""The grader of reasoning_gym puzzles.

Most families are graded by the package's own `score_answer`, in a worker process that can be killed: inside bubblewrap,
where no file of the user can be read, or in a process without file writes and network if bubblewrap does not run. No
family evaluates model text: `score_answer` only gets text that is data, or a formula of numbers and known functions. The
families that would evaluate more, or that accept wrong answers, have verdicts of this project (grading/gym_verdicts.py).

Only a full score counts as right. Many families give partial credit to an answer that is merely close, well-formed or
long enough, and a model would learn to exploit it. The reason contains the partial score.
"""

import importlib.util
import sys
from pathlib import Path

from grading.answers.extraction import extract_answer
from grading.base import Ungraded
from grading.gym_verdicts import CHECKS, REFUSED, VERDICTS, Verdict
from grading.sandbox.bubblewrap import start_server
from grading.sandbox.messages import NotPlain
from grading.sandbox.tiers import bubblewrap
from grading.sandbox.workers import WorkerError, Zygote, run_in_worker

MAX_ANSWER_CHARS = 10_000
SECONDS = 3.0
_PRELOAD = ("reasoning_gym", "gym_scorer")


def grade_gym(answer: str, row: dict) -> tuple[float, str]:
    """Grade an answer to a reasoning_gym puzzle.

    An exception in `score_answer` counts as a wrong answer: the answer does not have the form that it expects.

    Args:
        answer: Text that contains the final answer, see `final_answer`.
        row: Data row with the columns `family` and `entry`, and `level` if it has one, as data/gym.py creates them.

    Returns:
        1.0 for a full score, else 0.0; and a reason that starts with an outcome.

    Raises:
        Ungraded: If no worker process is available, or if the family cannot be graded.
    """
    family = row["family"]
    entry = row["entry"]
    if family in REFUSED:
        raise Ungraded(f"unsupported: the family {family} cannot be graded: {REFUSED[family]}")
    final_text = final_answer(answer)
    if final_text is None:
        return 0.0, "no_answer: no <answer>, no \\boxed{}, no text"
    limit = max(MAX_ANSWER_CHARS, 2 * len(str(entry.get("answer"))))  # some right answers are boards of 100 x 100 cells
    if len(final_text) > limit:
        return 0.0, f"no_answer: the answer has {len(final_text)} characters, over {limit}"
    if family in VERDICTS or family in CHECKS:
        problem = _find_problem(VERDICTS.get(family) or CHECKS[family], final_text, entry)
        if problem:
            return 0.0, f"wrong: {problem}"
    if family in VERDICTS:
        return 1.0, "right"
    call = ("gym_scorer:score", family, row.get("level"), final_text, entry)
    try:
        score, exception = run_in_worker(*call, timeout=SECONDS, start=_start_server)
    except TimeoutError:
        return 0.0, f"gave_up: score_answer took over {SECONDS:g} s"
    except (WorkerError, NotPlain) as error:
        raise Ungraded(f"sandbox_error: {error}") from None
    if score == 1:
        return 1.0, "right"
    return 0.0, "wrong: score_answer " + (f"raised {exception}" if exception else f"gives {score:.2g}, not 1")


def _find_problem(verdict: Verdict, text: str, entry: dict) -> str:
    """Return why an answer is wrong, or "". A text that cannot be read as data is wrong."""
    try:
        return verdict(text, entry)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"it cannot be read: {str(error) or type(error).__name__}"[:200]


def _start_server() -> Zygote:
    """Start the server of the worker processes: in bubblewrap if it runs here, else with this user's rights to read files."""
    script = Path(__file__).with_name("sandbox") / "gym_scorer.py"
    if not bubblewrap()[0]:
        return Zygote(preload=_PRELOAD, path=[*sys.path, str(script.parent)])
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    if spec := importlib.util.find_spec("reasoning_gym"):
        packages.append(str(Path(spec.origin).parent.parent))
    return start_server(_PRELOAD, modules=[script], packages=list(dict.fromkeys(packages)))


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
