"""Grading of completions: reward files, the math grader and the code sandbox. Does not import torch."""

from grading.answers.extraction import extract_answer
from grading.answers.math_grader import grade_math
from grading.base import (
    Completion,
    RewardError,
    Rewards,
    Score,
    Turn,
    Ungraded,
    metric,
    outcome_of,
    outcome_shares,
    prompt_text,
    reward,
    row_kind,
)
from grading.countdown import grade_countdown
from grading.environments import grade_environment
from grading.gym import grade_gym
from grading.rewards.models import reward_model
from grading.rewards.preflight import preflight
from grading.rewards.reward_file import load_rewards
from grading.rewards.scoring import Scoring, score_all
from grading.sandbox.code_grader import check_tests, extract_code, grade_code

__all__ = [
    "Completion", "RewardError", "Rewards", "Score", "Scoring", "Turn", "Ungraded", "check_tests", "extract_answer", "extract_code",
    "grade_code", "grade_countdown", "grade_environment", "grade_gym", "grade_math", "grade_row", "load_rewards", "metric", "outcome_of",
    "outcome_shares", "preflight", "prompt_text", "reward", "reward_model", "row_kind", "score_all",
]  # fmt: skip


def grade_row(answer: str, row: dict) -> tuple[float, str]:
    """Grade an answer with the grader for its row (see `row_kind`).

    Returns:
        The score (1.0 or 0.0) and a reason that starts with an outcome.

    Raises:
        ValueError: If there is no grader for the row.
    """
    kind = row_kind(row)
    if kind == "math":
        return grade_math(answer, row["answer"], prompt_text(row["prompt"]) if row.get("prompt") else None)
    if kind == "code":
        columns = (row.get(name) or "" for name in ("entry_point", "setup", "starter"))
        return grade_code(answer, row["tests"], *columns)
    if kind == "countdown":
        return grade_countdown(answer, row["target"], row["nums"])
    if kind == "reasoning_gym":
        return grade_gym(answer, row)
    raise ValueError(f"row {row.get('id', '?')} cannot be graded: it has no answer, no tests and no known grader")
