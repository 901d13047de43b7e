"""The math grader: answers in LaTeX are read exactly, never evaluated, and compared by value."""

from grading.answers.math_grader import extract_answer, grade_math

__all__ = ["extract_answer", "grade_math"]
