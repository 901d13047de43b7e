"""How completions are judged: the reward registry, the math grader and the code sandbox. Imports no torch."""

from grading.answers import extract_answer, grade_math
from grading.registry import (
    Completion,
    RewardError,
    Rewards,
    Score,
    Ungraded,
    load_rewards,
    metric,
    prompt_text,
    reward,
)
from grading.sandbox import check_tests, extract_code, grade_code

__all__ = [
    "Completion", "RewardError", "Rewards", "Score", "Ungraded", "check_tests", "extract_answer", "extract_code", "grade_code",
    "grade_math", "load_rewards", "metric", "prompt_text", "reward",
]  # fmt: skip
