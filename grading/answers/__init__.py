"""The math grader: answers in LaTeX are parsed strictly and compared by value, never evaluated as code.

Pipeline: extract_answer (extraction.py) finds the final answer, `tidy` and `tokenize` (tokens.py) normalize and split
it, `parse` (structures.py, formulas.py, units.py) builds values (exact.py), sets (regions.py) and other structures, and
`is_same` (equality.py) compares these with the gold answer.
"""

from grading.answers.extraction import extract_answer
from grading.answers.math_grader import grade_math

__all__ = ["extract_answer", "grade_math"]
