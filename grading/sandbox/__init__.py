"""The code grader: runs model-written programs in a sandbox and compares their results outside of it."""

from grading.sandbox.code_grader import (
    available,
    check_tests,
    describe,
    extract_code,
    grade_code,
    graded_by_tier,
    start,
    use_only_tier,
)

__all__ = [
    "available", "check_tests", "describe", "extract_code", "grade_code", "graded_by_tier", "start", "use_only_tier",
]  # fmt: skip
