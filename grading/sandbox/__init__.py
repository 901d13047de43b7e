"""The code grader: runs model-written programs in a sandbox, and compares outside of it what they return."""

from grading.sandbox.code_grader import (
    available,
    check_tests,
    decided,
    describe,
    extract_code,
    grade_code,
    only,
    start,
)

__all__ = ["available", "check_tests", "decided", "describe", "extract_code", "grade_code", "only", "start"]
